"""Fast attention and fused LoRA give what torch and PEFT give, forward and backward, and leave alone what they cannot do."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import broken_copy
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import utils.kernels as kernels
from utils.generation import RoomyLayer
from utils.kernels import FAST_ATTENTION, fast_attention, fused_lora
from utils.models import load_model


@pytest.fixture(autouse=True)
def registered():
    """A broken copy registers its own attention under the same name."""
    yield
    AttentionInterface.register(FAST_ATTENTION, fast_attention)


def attention_inputs(queries, heads=4, kv_heads=2, length=7):
    torch.manual_seed(0)
    query = torch.randn(2, queries, heads, 8).transpose(1, 2)
    key, value = torch.randn(2, 2, kv_heads, length, 8)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
    mask = torch.ones(2, 1, queries, length, dtype=torch.bool)
    mask[0, :, :, :3] = False  # left padding
    return module, query, key, value, mask


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_kind", ["bool", "float", "none"])
def test_one_query_over_a_cache_gives_what_sdpa_gives(monkeypatch, kv_heads, mask_kind):
    module, query, key, value, mask = attention_inputs(1, kv_heads=kv_heads)
    mask = {"bool": mask, "float": torch.zeros(mask.shape).masked_fill(~mask, -1e9), "none": None}[mask_kind]
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(kernels, "sdpa_attention_forward", None)  # must not be needed
    got, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_in_the_cache_has_no_weight():
    module, query, key, value, mask = attention_inputs(1)
    before, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    key[0, :, :3], value[0, :, :3] = 7.0, 1e6
    after, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    assert torch.equal(before, after)


@torch.no_grad()
def test_free_places_of_the_cache_have_no_weight_and_change_nothing():
    module, query, key, value, mask = attention_inputs(1)
    wanted, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    key, value = RoomyLayer().update(key, value)
    assert key.buffer.shape[2] > key.shape[2]
    key.buffer[:, :, 7:] = 50.0
    got, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def check_many_queries(module, queries=150, past=0, padded=True, kv_heads=2, room=False):
    """Output and gradients of `module.fast_attention` in bfloat16 beside those of `sdpa` in float32."""
    layer, query, key, value, _ = attention_inputs(queries, kv_heads=kv_heads, length=past + queries)
    mask = torch.ones(queries, past + queries, dtype=torch.bool).tril(past).repeat(2, 1, 1, 1)
    mask[0, ..., 0] = not padded
    sees = mask.any(-1)[:, 0]  # not so the first query, where it is padding and has no past
    wanted_inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    wanted, _ = sdpa_attention_forward(layer, *wanted_inputs, mask, scaling=0.3)
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (query, key, value)]
    if room:
        with torch.no_grad():
            inputs[1:] = RoomyLayer().update(*inputs[1:])
    got, _ = module.fast_attention(layer, *inputs, mask if padded else None, scaling=0.3)
    assert got.isfinite().all()
    torch.testing.assert_close(got.float()[sees], wanted[sees], atol=0.03, rtol=0.03)
    if not room:
        grad = torch.randn_like(wanted) * sees[..., None, None]
        wanted.backward(grad)
        got.backward(grad.bfloat16())
        for ours, theirs in zip(inputs, wanted_inputs, strict=True):
            error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
            assert error < 0.02


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [2, 127, 128, 129, 300])
@pytest.mark.parametrize(("past", "padded"), [(0, True), (70, True), (0, False)])
@pytest.mark.parametrize("room", [False, True])
def test_many_queries_give_what_sdpa_gives(monkeypatch, kv_heads, queries, past, padded, room):
    monkeypatch.setattr(kernels, "sdpa_attention_forward", None)  # must not be needed
    check_many_queries(kernels, queries, past, padded, kv_heads, room)


def test_scoring_gives_the_bits_of_training():
    layer, query, key, value, mask = attention_inputs(7)
    inputs = [tensor.bfloat16() for tensor in (query, key, value)]
    with torch.no_grad():
        scored, _ = fast_attention(layer, *inputs, mask, scaling=0.3)
    trained, _ = fast_attention(layer, *(tensor.requires_grad_() for tensor in inputs), mask, scaling=0.3)
    assert torch.equal(scored, trained)


@pytest.mark.parametrize("why", ["float32", "float mask", "not causal", "position bias", "dropout"])
def test_other_passes_over_several_queries_are_left_to_sdpa(monkeypatch, why):
    module, query, key, value, mask = attention_inputs(3, length=3)
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if why == "float mask":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    module.is_causal = why != "not causal"
    more = {"position bias": {"position_bias": torch.zeros(1, 4, 3, 3)}, "dropout": {"dropout": 0.1}}.get(why, {})
    monkeypatch.setattr(kernels, "sdpa_attention_forward", lambda *_, **__: "sdpa")
    assert fast_attention(module, query, key, value, mask, scaling=0.3, **more) == "sdpa"


def test_one_query_with_gradients_is_left_to_sdpa():
    module, query, key, value, mask = attention_inputs(1)
    got, _ = fast_attention(module, query, key, value, mask, scaling=0.3)
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert torch.equal(got, wanted)


def test_decoders_are_loaded_with_it_and_others_without(tiny_folders):
    for family in ("llama", "gpt2"):
        assert load_model(tiny_folders[family])[0].config._attn_implementation == FAST_ATTENTION
    assert load_model(tiny_folders["t5"])[0].config._attn_implementation != FAST_ATTENTION
    chosen, _ = load_model(tiny_folders["llama"], attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_folders):
    """A function: a tiny decoder in bfloat16 with LoRA whose B is not zero."""

    def make(family="llama", **settings):
        torch.manual_seed(0)
        model, _ = load_model(tiny_folders[family], dtype=torch.bfloat16, device="cpu")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


def logits_and_gradients(model):
    ids = torch.arange(4, 24).view(2, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits.float()
    model.zero_grad()
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_lora(module, model):
    wanted, wanted_gradients = logits_and_gradients(model)
    with module.fused_lora(model):
        got, gradients = logits_and_gradients(model)
    torch.testing.assert_close(got, wanted, atol=0.03, rtol=0.03)
    assert gradients.keys() == wanted_gradients.keys()
    for name, ours in gradients.items():
        theirs = wanted_gradients[name]
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.08 * theirs.norm() + 1e-4, name
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), module.fused_lora(model):
        measured = model(input_ids=torch.arange(4, 24).view(2, 10)).logits.float()
    assert torch.equal(measured, got), "measured and trained on are not the same"
    again, _ = logits_and_gradients(model)
    assert torch.equal(again, wanted), "the layers were not put back"


def test_fused_lora_gives_what_peft_gives(adapted):
    model = adapted()
    with fused_lora(model):
        fused = [m for m in model.modules() if "forward" in vars(m)]
    assert len(fused) == 7 * model.config.num_hidden_layers
    check_lora(kernels, model)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"bias": "all"}, {"lora_bias": True}])
def test_other_adapters_stay_pefts(adapted, settings):
    if "lora_bias" in settings or "bias" in settings:  # llama's linear layers have none; GPT-2's are Conv1D
        model = adapted()
        layer = next(m for m in model.modules() if isinstance(m, kernels.LoraLinear))
        if "bias" in settings:
            layer.base_layer.weight.requires_grad_()
        else:
            layer.lora_bias["default"] = True
        with fused_lora(model):
            assert "forward" not in vars(layer)
        return
    model = adapted(**settings)
    with fused_lora(model):
        assert not any("forward" in vars(m) for m in model.modules())


def test_a_step_of_a_fused_optimizer_is_seen_at_once(adapted):
    """Such a step changes a tensor without changing its version; what is kept of the factors must not outlive it."""
    model = adapted()
    ids = torch.tensor([[4, 5, 6, 7]])
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.5, fused=True)
    logits = []
    with fused_lora(model):
        for _ in range(2):
            with torch.no_grad():
                logits.append(model(ids).logits)
            model(ids).logits.float().square().sum().backward()
            optimizer.step()
    assert not torch.equal(*logits)


def test_what_is_fused_stays_so_after_a_part_that_fuses_too(adapted):
    model = adapted()
    fused = lambda: {name for name, m in model.named_modules() if "forward" in vars(m)}  # noqa: E731
    with fused_lora(model):
        outer = fused()
        with fused_lora(model):
            assert fused() == outer
        assert fused() == outer
    assert outer
    assert not fused()


def test_every_measurement_goes_through_the_fused_step(tiny_folders, monkeypatch):
    from utils.benchmarks import evaluate
    from utils.generation import generate
    from utils.instruction import Item, option_scores
    from utils.models import load_model
    from utils.training import lora_config, mean_loss

    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.bfloat16, device="cpu")
    model = get_peft_model(model, lora_config(model, r=2))
    calls, plain = [], kernels._lora_forward
    monkeypatch.setattr(kernels, "_lora_forward", lambda *arguments: calls.append(arguments) or plain(*arguments))
    monkeypatch.setattr(kernels.LoraLinear, "forward", None)  # PEFT's own would be an error
    item = Item("x", "x_0", [{"role": "user", "content": "the cat sat"}], "a dog", ("a dog", "the cat"))
    for measure in (
        lambda: generate(model, tokenizer, ["the cat sat"], max_new_tokens=2),
        lambda: mean_loss(model, tokenizer, [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}]),
        lambda: option_scores(model, tokenizer, [item]),
        lambda: evaluate(model, tokenizer, {"GLUE": ["lab_sentiment"]}, limit=2),
    ):
        calls.clear()
        measure()
        assert calls


def frozen_linear(weight, bias=None):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def test_a_bias_of_the_base_is_added():
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(3, 5, 6), torch.randn(4, 6), torch.randn(4)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    got = kernels.LoraProduct.apply(inputs, frozen_linear(weight, bias), a, b, 0.5)
    torch.testing.assert_close(got, inputs @ weight.T + bias + 0.5 * inputs @ a.T @ b.T)


def test_gradients_of_the_product_by_differences():
    torch.manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (2, 5), (4, 2))
    inputs, weight, a, b = (torch.randn(*shape, dtype=torch.double) for shape in shapes)
    wanted = [tensor.requires_grad_() for tensor in (inputs, a, b)]
    base = frozen_linear(weight)
    assert torch.autograd.gradcheck(lambda x, a, b: kernels.LoraProduct.apply(x, base, a, b, 0.7), wanted)


@pytest.mark.parametrize(
    ("search", "replacement"),
    [
        (".tril(length - queries)", ".tril(length - queries - 1)"),
        ("query = (query * scaling).view(", "query = query.view("),
        ("seen = length - queries + end", "seen = length - queries + start"),
        ("lowest)\n            part", "0.0)\n            part"),
        ("return grad_query.mul_(ctx.scaling), ", "return grad_query, "),
        ("grad_value[:, :, :seen] += part", "grad_value[:, :, :seen] = part"),
        ("grad_key[:, :, :seen] += grad_scores", "grad_key[:, :, :seen] = grad_scores"),
        ("torch._softmax_backward_data(grad_weights, part, -1, part.dtype)", "grad_weights * part"),
        ("start, end, seen = end, end + part", "start, end, seen = 0, end + part"),
    ],
)
def test_broken_attention_is_noticed(search, replacement):
    module = broken_copy(kernels, search, replacement)

    def checks():
        check_many_queries(module, past=70)
        check_many_queries(module, padded=False)

    with pytest.raises((AssertionError, RuntimeError)):
        checks()


@pytest.mark.parametrize(
    ("search", "replacement"),
    [
        ("(b * scaling).to(dtype)", "b.to(dtype)"),
        ("(narrow.t() @ grad).t() * ctx.scaling", "(narrow.t() @ grad).t()"),
        ("base(rows).addmm_", "F.linear(rows, base.weight * 2, base.bias).addmm_"),
        (".addmm_(grad_narrow, narrow_a).view(", ".view("),
        ("grad_narrow = grad @ scaled_b", "grad_narrow = grad @ (scaled_b / ctx.scaling)"),
        (".addmm_(narrow, scaled_b.t())", ""),
        ('vars(layer).pop("forward", None)', "pass"),
    ],
)
def test_broken_lora_is_noticed(adapted, search, replacement):
    module = broken_copy(kernels, search, replacement)
    with pytest.raises((AssertionError, RuntimeError)):
        check_lora(module, copy.deepcopy(adapted()))


# --- log-probabilities -------------------------------------------------------------------------------------------


def check_logprobs(module, dtype=torch.float32, tokens=700, temperature=0.7):
    """Log-probabilities, entropy and gradient of `module.token_logprobs` beside those of plain torch in float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16).to(dtype), torch.randn(50, 16).to(dtype)
    targets, grad = torch.randint(50, (tokens,)), torch.randn(tokens)
    exact = hidden.float().clone().requires_grad_()
    table = (exact @ weight.float().t() / temperature).log_softmax(-1)
    wanted = table.gather(1, targets[:, None])[:, 0]
    wanted.backward(grad)
    hidden.requires_grad_()
    logprobs, entropy = module.token_logprobs(hidden, weight, targets, temperature)
    logprobs.backward(grad)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1), atol=1e-5, rtol=1e-5)
    assert hidden.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (hidden.grad.float() - exact.grad).norm() < tolerance * exact.grad.norm()
    with torch.no_grad():
        assert torch.equal(module.token_logprobs(hidden, weight, targets, temperature)[0], logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_tokens_are_those_of_a_table(dtype):
    check_logprobs(kernels, dtype)


def test_a_token_of_hardly_any_probability_has_a_finite_logarithm():
    logprobs, entropy = kernels.token_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [-300.0]]), torch.tensor([1]))
    assert float(logprobs) == -300
    assert float(entropy) == 0


@pytest.mark.parametrize(
    ("search", "replacement"),
    [
        (".div_(temperature)", ""),
        ("grad[:, None] / ctx.temperature", "grad[:, None]"),
        ("weight[targets[part]] - probabilities", "weight[targets[part]] + probabilities"),
        ("normaliser - logits.mul_", "normaliser + logits.mul_"),
        ("largest - probabilities", "largest + probabilities"),
        ("targets[part, None])[:, 0] - normaliser", "targets[: len(logits), None])[:, 0] - normaliser"),
    ],
)
def test_broken_log_probabilities_are_noticed(search, replacement):
    module = broken_copy(kernels, search, replacement)
    with pytest.raises(AssertionError):
        check_logprobs(module)
