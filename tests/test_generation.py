"""Generation: order, batches, where a completion ends, the fast attention, and a model's own settings."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from utils import generation
from utils.generation import RoomyLayer, completion_length, generate, pad_left
from utils.kernels import FAST_ATTENTION
from utils.models import choose_dtype, load_model
from utils.prompts import encode

PROMPTS = ["the cat sat on the mat", "a dog ran", "person1 asks person2 to ran to the red house and the river", "big"]
KINDS = ["llama", "gpt2", "t5"]


@pytest.fixture
def lively(tiny):
    """The tiny model with larger weights: different prompts get different completions, by a clear margin."""
    model, tokenizer = tiny
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model, tokenizer


def write(model, tokenizer, prompts=PROMPTS, **settings):
    return generate(model, tokenizer, prompts, show_progress=False, **{"max_new_tokens": 8} | settings)


def watch(module):
    """The shapes of the token ids that reach `module` from here on."""
    seen = []

    def look(_, positional, given):
        ids = positional[0] if positional else given.get("input_ids")
        if ids is not None:
            seen.append(tuple(ids.shape))

    module.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def reference(model, tokenizer, prompt, tokens=8):
    """Greedy decoding by hand: no cache, no batch, no padding."""
    inputs, written = encode(tokenizer, prompt), []
    while len(written) < tokens and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = model.config.decoder_start_token_id
                logits = model(input_ids=torch.tensor([inputs]), decoder_input_ids=torch.tensor([[start, *written]]))
            else:
                logits = model(torch.tensor([inputs + written]), use_cache=False)
        written.append(int(logits.logits[0, -1].argmax()))
    return written


# --- order and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_completions_are_those_of_each_prompt_alone_and_in_order(lively, batch_size):
    expected = [reference(*lively, prompt) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    assert [completion.token_ids for completion in write(*lively, batch_size=batch_size)] == expected


def test_text_is_that_of_the_tokens(lively):
    _, tokenizer = lively
    for completion in write(*lively):
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()


def test_a_batch_holds_prompts_of_like_length(tiny, monkeypatch):
    model, tokenizer = tiny
    shapes, original = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: shapes.append(tuple(inputs["input_ids"].shape)) or original(**inputs)
    )
    write(model, tokenizer, ["the", "the cat " * 10, "a", "the dog " * 10], batch_size=2, do_sample=True, top_k=1)
    assert shapes == [(2, 20), (2, 1)]


SHARED = (
    "the cat sat on the mat and the dog ran to the big red house . the river "  # over the 16 tokens from which it pays
)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(lively, batch_size, each):
    model, tokenizer = lively
    prompts = [SHARED + prompt for prompt in PROMPTS]
    expected = [reference(model, tokenizer, prompt) for prompt in prompts for _ in range(each)]
    seen = watch(model.base_model)
    done = write(
        model, tokenizer, prompts, batch_size=batch_size, completions_per_prompt=each, do_sample=each > 1, top_k=1
    )
    assert [completion.token_ids for completion in done] == expected
    if not model.config.is_encoder_decoder:
        assert sum(length >= 16 for _, length in seen) == 1


def test_a_prompt_that_another_begins_with_keeps_a_token_of_its_own(lively):
    prompts = [SHARED, SHARED + "and"]
    assert [c.token_ids for c in write(*lively, prompts)] == [reference(*lively, prompt) for prompt in prompts]


def test_beam_search_over_prompts_that_begin_alike_is_that_of_each_alone(lively):
    prompts = [SHARED + prompt for prompt in PROMPTS]
    alone = [write(*lively, [prompt], num_beams=3)[0].token_ids for prompt in prompts]
    assert [c.token_ids for c in write(*lively, prompts, num_beams=3)] == alone


def test_no_prompts_give_no_completions(tiny):
    assert write(*tiny, []) == []


def test_chat_messages_are_read_through_the_chat_template_and_strings_as_they_are(tiny_folders):
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    messages = [{"role": "user", "content": "the cat sat"}]
    chat, same, plain = write(model, tokenizer, [messages, "<s> the cat sat </s> <s> summary : ", "the cat sat"])
    assert chat == same
    assert chat.token_ids == reference(model, tokenizer, messages)
    assert plain.token_ids == reference(model, tokenizer, "the cat sat")


def test_chat_messages_without_a_chat_template_are_their_text(tiny_folders):
    model, tokenizer = load_model(tiny_folders["gpt2"], dtype=torch.float32, device="cpu")
    chat, plain = write(model, tokenizer, [[{"role": "user", "content": "the cat sat"}], "the cat sat"])
    assert chat == plain


def test_pad_left_puts_padding_before_the_tokens():
    input_ids, attention_mask = pad_left([[5], [6, 7, 8]], 9, torch.device("cpu"))
    assert input_ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


# --- where a completion ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "eos_ids", "length"),
    [
        ([5, 6, 2, 2, 2], [2], 3),  # EOS is padding, too
        ([5, 6, 7, 2, 0], [2, 7], 3),
        ([5, 0, 2, 0], [2], 3),  # padding inside is a token like any other
        ([5, 6], [2], 2),
        ([2], [2], 1),
        ([], [2], 0),
    ],
)
def test_a_completion_ends_with_its_first_eos(token_ids, eos_ids, length):
    assert completion_length(token_ids, eos_ids) == length


@pytest.mark.parametrize("as_list", [True, False])
def test_completions_end_at_an_eos_of_the_models_own_configuration_although_padding_is_eos(lively, as_list):
    """A token that only one completion writes becomes EOS: that one ends with it, the rest are as before."""
    model, tokenizer = lively
    before = [completion.token_ids for completion in write(model, tokenizer)]
    row, eos = next(
        (row, token)
        for row, ids in enumerate(before)
        for token in ids[1:-1]
        if token > 3 and not any(token in other for i, other in enumerate(before) if i != row)
    )
    tokenizer.pad_token_id = eos
    model.generation_config.eos_token_id = [2, eos] if as_list else eos
    completions = write(model, tokenizer)
    wanted = before[row][: before[row].index(eos) + 1]
    assert completions[row].token_ids == wanted
    assert len(wanted) < 8
    assert not completions[row].truncated
    for i, completion in enumerate(completions):
        if i != row:
            assert completion.token_ids == before[i]
            assert completion.truncated == (before[i][-1] != 2)


def test_truncated_says_whether_the_limit_of_tokens_ended_it(lively):
    model, tokenizer = lively
    whole = write(model, tokenizer, ["the cat"], max_new_tokens=3)[0]
    assert (len(whole.token_ids), whole.truncated) == (3, True)
    ended = write(model, tokenizer, ["the cat"], max_new_tokens=3, eos_token_id=whole.token_ids[2])[0]
    assert ended.token_ids[-1] == whole.token_ids[2]
    assert not ended.truncated


# --- fast attention over our caches ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fast_attention_gives_the_logits_of_sdpa_over_a_cache_with_left_padding(tiny_folders, family):
    logits = []
    for attention in ("sdpa", FAST_ATTENTION):
        model, tokenizer = load_model(
            tiny_folders[family], dtype=torch.float32, device="cpu", attn_implementation=attention
        )
        assert model.config._attn_implementation == attention
        encoded = [encode(tokenizer, prompt) for prompt in PROMPTS]
        ids, mask = pad_left(encoded, tokenizer.pad_token_id, model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        for token in (5, 9):
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
            step = model(
                torch.full((4, 1), token),
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            logits.append(step.logits)
        # the shortest prompt, without padding or cache
        alone = model(torch.tensor([[*encoded[3], 5, 9]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(step.logits[3, -1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:2], logits[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", KINDS)
def test_fast_attention_writes_what_sdpa_writes(tiny_folders, family, monkeypatch):
    options = dict(dtype=torch.float32, device="cpu")
    sdpa, tokenizer = load_model(tiny_folders[family], **options, attn_implementation="sdpa")
    fast, _ = load_model(tiny_folders[family], **options, attn_implementation=FAST_ATTENTION)
    assert write(fast, tokenizer, max_new_tokens=16) == write(sdpa, tokenizer, max_new_tokens=16)


# --- the cache with room --------------------------------------------------------------------------------------------


def states(length, batch=2):
    return torch.randn(2, batch, 3, length, 4).unbind()


def cache_pair(lengths):
    """One layer of transformers' and one of ours after the same updates."""
    theirs, ours = DynamicCache(), DynamicCache()
    ours.layers, ours.layer_class_to_replicate = [RoomyLayer()], None
    for length in lengths:
        same(theirs, ours, *states(length))
    return theirs, ours


def same(theirs, ours, key, value):
    """Update both: what they return and hold is equal."""
    for mine, wanted in zip(ours.update(key, value, 0), theirs.update(key, value, 0), strict=True):
        assert torch.equal(mine, wanted)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


@torch.no_grad()
@pytest.mark.parametrize(
    "lengths",
    [[5, 1, 1, 3], [63, 1, 1], [64, 1], [1] * 70, [10, 200, 1]],
    ids=["within", "full", "edge", "steps", "beyond"],
)
def test_a_cache_with_room_holds_what_transformers_cache_holds(lengths):
    cache_pair(lengths)


@torch.no_grad()
def test_a_token_is_written_into_the_room_without_a_copy():
    layer = RoomyLayer()
    layer.update(*states(5))
    buffers = layer.keys.buffer, layer.values.buffer
    for _ in range(50):
        layer.update(*states(1))
    assert layer.keys.buffer is buffers[0]
    assert layer.values.buffer is buffers[1]
    assert layer.keys.data_ptr() == buffers[0].data_ptr()


CHANGES = {
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "chosen": lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "cut": lambda cache: cache.crop(-3),
    "emptied": lambda cache: cache.reset(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cache_with_room_goes_on_as_transformers_does(change):
    theirs, ours = cache_pair([6, 1])
    CHANGES[change](theirs)
    CHANGES[change](ours)
    batch = {"repeated": 4, "chosen": 3}.get(change, 2)
    for length in (1, 2, 70):
        same(theirs, ours, *states(length, batch))
    room = ours.layers[0].keys.buffer[:, :, ours.get_seq_length() :]  # of what was longer before nothing is left
    assert room.shape[2] > 0
    assert not room.any()


@torch.no_grad()
def test_a_deep_copy_of_a_cache_with_room_shares_nothing():
    theirs, ours = cache_pair([6])
    theirs_before, ours_before = copy.deepcopy(theirs), copy.deepcopy(ours)
    same(theirs, ours, *states(2))
    same(theirs_before, ours_before, *states(1))
    same(theirs, ours, *states(1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_over_a_cache_with_room_are_those_over_transformers_cache(tiny_folders, family):
    model, _ = load_model(tiny_folders[family], dtype=torch.float32, device="cpu", attn_implementation=FAST_ATTENTION)
    torch.manual_seed(0)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ours.layers = [RoomyLayer() for _ in ours.layers]
    for length in (20, 1, 1, 45, 1):
        ids = torch.randint(4, 40, (3, length))
        wanted, got = (model(ids, past_key_values=cache).logits for cache in (theirs, ours))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_layers_that_look_back_over_a_window_are_not_joined(tiny_folders):
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    model.config.sliding_window = 8
    assert not generation.can_join(DynamicCache(config=model.config))
    encoded = [encode(tokenizer, prompt) for prompt in PROMPTS]
    reads = [generation.read_prompts(model, [ids], tokenizer.pad_token_id) for ids in encoded]
    assert {type(layer) for layer in generation.join(reads[:1], 4).cache.layers} == {DynamicSlidingWindowLayer}
    with pytest.raises(ValueError, match="too many values"):
        generation.join(reads, 4)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_reads_that_are_joined_go_on_as_each_alone(tiny_folders, family):
    """Prompts of several lengths, one of them twice, read in two parts."""
    model, tokenizer = load_model(tiny_folders[family], dtype=torch.float32, device="cpu")
    encoded = [encode(tokenizer, prompt) for prompt in (*PROMPTS, PROMPTS[3])]
    reads = [generation.read_prompts(model, part, tokenizer.pad_token_id) for part in (encoded[:2], encoded[2:])]
    assert [read.index.tolist() for read in reads] == [[0, 1], [0, 1, 1]]
    read = generation.join(reads, room=5)
    assert read.index.tolist() == [0, 1, 2, 3, 4]
    if read.cache is not None:
        assert read.cache.layers[0].keys.buffer.shape[2] == max(map(len, encoded)) + 5
    written = generation.decode(model, read, [2], 5)
    for ids, prompt in zip(written, (*PROMPTS, PROMPTS[3]), strict=True):
        wanted = reference(model, tokenizer, prompt, 5)
        assert ids[: len(wanted)] == wanted


def test_rows_that_have_ended_are_left_out_once_they_are_half(lively):
    model, tokenizer = lively
    before = [completion.token_ids for completion in write(model, tokenizer)]
    if model.config.is_encoder_decoder:
        return  # transformers' loop
    own = {
        row: next((t for t in ids[:-1] if t > 3 and not any(t in before[i] for i in range(4) if i != row)), None)
        for row, ids in enumerate(before)
    }
    ending = {row: token for row, token in own.items() if token is not None}
    ending = dict([*ending.items()][:2])
    assert len(ending) == 2
    seen = watch(model)
    after = [completion.token_ids for completion in write(model, tokenizer, eos_token_id=[2, *ending.values()])]
    for row, ids in enumerate(after):
        assert ids == (before[row][: before[row].index(ending[row]) + 1] if row in ending else before[row])
    assert seen[-1] == (2, 1)


def test_a_draw_gives_each_token_as_often_as_its_probability():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = (torch.arange(1000) + 0.5) / 1000
    tokens = generation._draw(probabilities.log().expand(1000, 4), draws)
    assert tokens.bincount(minlength=4).tolist() == [500, 0, 300, 200]
    assert generation._draw(torch.zeros(1, 4), torch.tensor([1 - 2**-24])).tolist() == [3]


def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(lively):
    model, tokenizer = lively
    encoded = [encode(tokenizer, prompt) for prompt in PROMPTS]
    draws = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))

    def sample(rows):
        read = generation.join([generation.read_prompts(model, [encoded[i]], tokenizer.pad_token_id) for i in rows], 8)
        done = generation.decode(model, read, [2], 8, temperature=2.0, draws=draws[rows])
        return [ids[: completion_length(ids, [2])] for ids in done]

    together = sample([0, 1, 2, 3])
    assert [sample([i])[0] for i in range(4)] == together
    assert len(set(map(tuple, together))) > 1


def test_prompts_of_like_length_are_read_together_and_no_others(lively, monkeypatch):
    model, tokenizer = lively
    if model.config.is_encoder_decoder:
        return
    prompts = ["the cat " * words for words in (60, 58, 30)] + ["the"]
    expected = [reference(model, tokenizer, prompt) for prompt in prompts]
    seen = watch(model)
    assert [c.token_ids for c in write(model, tokenizer, prompts)] == expected
    assert seen[:3] == [(2, 120), (1, 60), (1, 1)]
    assert set(seen[3:]) == {(4, 1)}


@pytest.mark.parametrize("family", KINDS)
def test_greedy_completions_are_those_of_transformers(tiny_folders, family):
    options = dict(dtype=torch.float32, device="cpu")
    model, tokenizer = load_model(tiny_folders[family], **options, attn_implementation=FAST_ATTENTION)
    plain, _ = load_model(tiny_folders[family], **options)
    for prompt, completion in zip(PROMPTS, write(model, tokenizer, max_new_tokens=80), strict=True):
        ids = torch.tensor([encode(tokenizer, prompt)])
        config = generation.generation_config(plain, tokenizer, max_new_tokens=80)
        output = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert completion.token_ids == output[0, 1 if plain.config.is_encoder_decoder else ids.shape[1] :].tolist()


@pytest.mark.filterwarnings(
    "ignore:Position ids are not supported"
)  # PEFT drops them for prompt tuning, which is right here
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
@pytest.mark.parametrize("each", [1, 2])
def test_a_learned_prompt_is_in_front_of_what_is_read(tiny_folders, method, each):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    kind = {"prompt tuning": PromptTuningConfig, "prefix tuning": PrefixTuningConfig}[method]
    torch.manual_seed(0)
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    prompts = [SHARED + prompt for prompt in PROMPTS]
    settings = dict(do_sample=each > 1, top_k=1) if each > 1 else {}
    alone = [write(adapted, tokenizer, [prompt])[0].token_ids for prompt in prompts]
    done = write(adapted, tokenizer, prompts, completions_per_prompt=each, **settings)
    assert [c.token_ids for c in done] == [ids for ids in alone for _ in range(each)]


# --- packed weights -------------------------------------------------------------------------------------------------

needs_bfloat16 = pytest.mark.skipif(
    choose_dtype(torch.device("cpu")) != torch.bfloat16, reason="only where the processor multiplies bfloat16"
)


@needs_bfloat16
@torch.no_grad()
def test_packed_weights_give_the_same_logits_to_the_bit_also_after_training():
    torch.manual_seed(0)
    size = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, num_hidden_layers=2, attention_bias=True, **size))
    model = model.bfloat16().eval()
    ids = torch.randint(0, 500, (5, 40))
    for _ in range(2):
        plain = model(ids).logits
        with generation.packed_weights(model):
            assert "forward" in vars(model.lm_head)
            assert torch.equal(model(ids).logits, plain)
        for parameter in model.parameters():
            parameter.normal_(std=0.1)


@needs_bfloat16
def test_packed_weights_are_gone_after_an_error(tiny_folders, monkeypatch):
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.bfloat16, device="cpu")
    during = []

    def fails(**_):
        during.append("forward" in vars(model.lm_head))
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        write(model, tokenizer, do_sample=True)
    assert during == [True]
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_in_float32_are_not_packed(tiny):
    model, _ = tiny
    with generation.packed_weights(model):
        assert not any("forward" in vars(module) for module in model.modules())


# --- the model's own settings ------------------------------------------------------------------------------------


def test_settings_saved_with_the_model_do_not_apply_and_are_there_afterwards(lively):
    model, tokenizer = lively
    greedy = write(model, tokenizer)
    own = model.generation_config
    own.repetition_penalty, own.top_k, own.do_sample, own.no_repeat_ngram_size = 50.0, 1, True, 1
    own.max_new_tokens = 2
    saved = own.to_dict()
    assert write(model, tokenizer) == greedy
    assert len(write(model, tokenizer, ["the cat"], max_new_tokens=None, max_length=12)[0].token_ids) > 2
    assert model.generation_config is own
    assert own.to_dict() == saved


def test_top_k_saved_with_the_model_does_not_make_samples_greedy(tiny):
    model, tokenizer = tiny
    model.generation_config.top_k = 1
    torch.manual_seed(0)
    samples = write(model, tokenizer, ["the"] * 16, do_sample=True)
    assert len({tuple(completion.token_ids) for completion in samples}) > 8


def test_samples_come_from_the_whole_vocabulary(tiny_folders):
    """transformers' own default leaves the 50 likeliest tokens; here the model finds all alike."""
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    samples = write(model, tokenizer, ["the"] * 2000, do_sample=True, max_new_tokens=1, batch_size=2000)
    assert len({completion.token_ids[0] for completion in samples}) > 50
    few = write(model, tokenizer, ["the"] * 500, do_sample=True, max_new_tokens=1, batch_size=500, top_k=3)
    assert len({completion.token_ids[0] for completion in few}) <= 3


def test_settings_given_apply(lively):
    model, tokenizer = lively
    (completion,) = write(model, tokenizer, ["the cat"], repetition_penalty=1e6, max_new_tokens=6)
    assert len(set(completion.token_ids)) == len(completion.token_ids)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_settings_and_training_mode_are_as_before_even_after_an_error(tiny, training, fails):
    model, tokenizer = tiny
    own, during = model.generation_config, []

    def spy(*_):
        during.append((model.training, model.generation_config is own))
        if fails:
            raise RuntimeError("no memory")

    model.register_forward_pre_hook(spy)
    model.train(training)
    if fails:
        with pytest.raises(RuntimeError, match="no memory"):
            write(model, tokenizer)
    else:
        write(model, tokenizer)
    assert during[0] == (False, False)
    assert model.generation_config is own
    assert {module.training for module in model.modules()} == {training}


def test_generation_leaves_no_gradient(tiny):
    model, tokenizer = tiny
    write(model, tokenizer)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_an_adapter_generates_with_it(lively):
    from peft import get_peft_model

    from utils.training import lora_config

    model, tokenizer = lively
    before = [completion.token_ids for completion in write(model, tokenizer)]
    own = model.generation_config
    adapted = get_peft_model(model, lora_config(model, r=4))
    assert [completion.token_ids for completion in write(adapted, tokenizer)] == before
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert [completion.token_ids for completion in write(adapted, tokenizer)] != before
    with adapted.disable_adapter():
        assert [completion.token_ids for completion in write(adapted, tokenizer)] == before
    assert model.generation_config is own


def test_parts_of_like_lengths_are_cut_where_padding_costs_more_and_where_they_are_full():
    lengths = [100, 85, 80, 79, 63, 30, 20, 14, 13]

    def parts(*most):
        return [lengths[part] for part in generation.like_lengths(lengths, *most)]

    # Cut below four fifths of the longest, and only where 16 or more are saved.
    assert parts() == [[100, 85, 80], [79, 63], [30, 20, 14], [13]]
    assert parts(2) == [[100, 85], [80, 79], [63], [30, 20], [14, 13]]
    assert generation.like_lengths([], 2) == []
