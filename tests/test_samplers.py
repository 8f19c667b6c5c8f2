"""Samplers: each filter, the draw and beam search against transformers and torch; properties; what a break does."""

import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from utils import samplers
from utils.generation import generation_config
from utils.samplers import SamplerError

NEVER = float("-inf")


# --- logits to try -----------------------------------------------------------------------------------------------


def awkward_logits() -> dict[str, torch.Tensor]:
    """Rows that samplers get wrong: ties, one token that holds all, tokens ruled out before, nothing but equals."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(6, 40, generator=generator) * 4
    ruled_out = random.clone()
    ruled_out[:, ::3] = NEVER
    dominated = random.clone()
    dominated[:, 7] = 60.0
    return {
        "random": random,
        "ties": random.round(),
        "ruled out": ruled_out,
        "dominated": dominated,
        "all but one ruled out": torch.full((2, 5), NEVER).index_fill(1, torch.tensor([3]), 0.5),
        "equal": torch.zeros(2, 8),
        "shifted": random + 100,
        "one token": torch.tensor([[2.0]]),
        "embedded vocabulary": torch.randn(2, 49152, generator=generator),
    }


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def check_against(function, processor, values) -> None:
    """`function(logits, value)` gives what `processor(value)` of transformers gives, and leaves its argument alone."""
    for name, logits in awkward_logits().items():
        for value in values:
            before = logits.clone()
            assert same(function(logits, value), processor(value)(None, logits.clone())), (name, value)
            assert torch.equal(logits, before)


# --- named checks: of a module, so that they can be turned on a broken copy ----------------------------------------


def check_temperature(m):
    check_against(m.temperature, TemperatureLogitsWarper, [0.3, 1.0, 1.7])


def check_top_k(m):
    check_against(m.top_k, TopKLogitsWarper, [1, 2, 5, 39, 40, 41, 100_000])


def check_top_p(m):
    check_against(m.top_p, TopPLogitsWarper, [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0])


def check_min_p(m):
    check_against(m.min_p, MinPLogitsWarper, [0.0, 0.05, 0.3, 1.0])


def check_repetition_penalty(m):
    for logits in awkward_logits().values():
        batch, vocabulary = logits.shape
        ids = torch.randint(vocabulary, (batch, 9), generator=torch.Generator().manual_seed(1))
        ids[:, -1] = ids[:, 0]  # a token that stands there twice is penalised once
        for penalty in (0.7, 1.0, 1.3):
            theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
            assert same(m.repetition_penalty(logits, ids, penalty), theirs)
    nothing = torch.empty(1, 0, dtype=torch.long)
    assert torch.equal(m.repetition_penalty(torch.tensor([[1.0, -1.0]]), nothing, 2.0), torch.tensor([[1.0, -1.0]]))


ALL_AT_ONCE = dict(do_sample=True, repetition_penalty=1.3, temperature=1.6, top_k=30, top_p=0.8, min_p=0.05)


def check_order(m):
    """The chain equals the one that transformers documents: penalty, temperature, top-k, top-p, min-p."""
    logits = torch.randn(8, 60, generator=torch.Generator().manual_seed(2)) * 3
    ids = torch.randint(60, (8, 20), generator=torch.Generator().manual_seed(3))
    chain = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(1.6),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ]
    assert same(m.processed(logits, ids, **ALL_AT_ONCE), LogitsProcessorList(chain)(ids, logits.clone()))
    assert torch.equal(m.processed(logits, ids), logits)
    neutral = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert torch.equal(m.processed(logits, ids, **neutral), logits)
    assert torch.equal(m.processed(logits, ids, do_sample=False, temperature=0.2, top_k=1), logits)
    greedy = m.processed(logits, ids, repetition_penalty=1.3)
    assert same(greedy, RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()))


def check_sample(m):
    """The very tokens `torch.multinomial` draws from the same random numbers; never one that is ruled out; the right shares."""
    for logits in awkward_logits().values():
        for seed in range(3):
            mine = m.sample(logits, torch.Generator().manual_seed(seed))
            theirs = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
            assert torch.equal(mine, theirs)
            assert torch.isfinite(logits.gather(1, mine[:, None])).all()
    probabilities = torch.tensor([0.6, 0.3, 0.1, 0.0])
    draws = m.sample(probabilities.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = draws.bincount(minlength=4) / len(draws)
    assert torch.allclose(shares, probabilities, atol=0.015)  # four standard errors of the largest


def check_greedy(m):
    for logits in awkward_logits().values():
        assert torch.equal(m.greedy(logits), logits.argmax(-1))


def lively_model(kind: str):
    """A tiny model whose distributions are neither flat nor certain."""
    tokenizer = make_tokenizer(pad_is_eos=kind != "t5", chat=False)
    model = make_model(kind, len(tokenizer))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.25)
    return model, tokenizer


LIVELY = {kind: lively_model(kind) for kind in ("llama", "gpt2", "t5")}
PROMPTS = [[5, 9, 14], [20, 4], [7, 7, 8, 30, 11]]


def next_logits(model, prompt):
    """The function beam search asks for, without a cache, and the ids it begins with."""
    if model.config.is_encoder_decoder:
        source = torch.tensor([prompt])
        return (
            lambda ids: model(input_ids=source.expand(len(ids), -1), decoder_input_ids=ids).logits[:, -1],
            [model.config.decoder_start_token_id],
        )
    return lambda ids: model(ids, use_cache=False).logits[:, -1], prompt


def theirs_beams(model, prompt, *, eos, **config):
    """Transformers' own: the best new tokens and their score."""
    own = model.generation_config
    special = dict(pad_token_id=0, eos_token_id=eos or None, bos_token_id=1, decoder_start_token_id=0)
    wanted = dict(output_scores=True, return_dict_in_generate=True, do_sample=False)
    model.generation_config = GenerationConfig(**special, **wanted, **config)
    try:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=model.generation_config
            )
    finally:
        model.generation_config = own
    tokens = output.sequences[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end], float(output.sequences_scores[0]) if "sequences_scores" in output else None


def compare_beams(m, kind, prompt, **config):
    model, _ = LIVELY[kind]
    function, start = next_logits(model, prompt)
    eos = config.pop("eos")
    best = m.beam_search(function, start, eos_token_ids=eos, **config)[0]
    tokens, score = theirs_beams(model, prompt, eos=eos, **config)
    assert best.token_ids == tokens, (kind, prompt, eos, config)
    if score is not None:
        assert best.score == pytest.approx(score, abs=1e-4)
    return best


def frequent_tokens(kind, count=3):
    """Tokens the model likes to write: as EOS they end beams at several lengths."""
    model, _ = LIVELY[kind]
    function, start = next_logits(model, PROMPTS[0])
    return samplers.beam_search(function, start, num_beams=3, max_new_tokens=8)[0].token_ids[2 : 2 + count]


def check_beam_search(m):
    lengths = set()
    for prompt, beams, penalty in itertools.product(PROMPTS, (1, 2, 4), (0.0, 1.0, 2.0)):
        for eos in ([], frequent_tokens("llama", 1), frequent_tokens("llama", 3)):
            config = dict(num_beams=beams, length_penalty=penalty, max_new_tokens=8)
            best = compare_beams(m, "llama", prompt, eos=eos, **config)
            lengths.add(len(best.token_ids))
    assert len(lengths) > 2  # so that ends early and late were compared


def check_beams_are_exhaustive_when_wide(m):
    """With room for every text beam search finds the likeliest one, which greedy decoding misses here."""
    table = torch.tensor([[0.0, 0.2, -9.0], [0.1, 0.0, 0.1], [4.0, -4.0, -4.0]])  # token 2 leads to a sure thing

    def chain(ids):
        return table[ids[:, -1]]

    logprobs = table.log_softmax(-1)
    every = {
        text: sum(float(logprobs[a, b]) for a, b in itertools.pairwise((1, *text)))
        for text in itertools.product(range(3), repeat=3)
    }
    best = m.beam_search(chain, [1], num_beams=27, max_new_tokens=3, length_penalty=0.0)
    assert tuple(best[0].token_ids) == max(every, key=every.get)
    assert best[0].log_probability == pytest.approx(max(every.values()), abs=1e-5)
    assert {tuple(beam.token_ids) for beam in best} == set(every)
    assert [beam.score for beam in best] == sorted((beam.score for beam in best), reverse=True)
    greedy = m.beam_search(chain, [1], num_beams=1, max_new_tokens=3)[0]
    assert greedy.token_ids[0] == int(logprobs[1].argmax())
    assert greedy.log_probability < best[0].log_probability


def check_one_beam_is_greedy(m):
    """It ends with the end token it picked, although another text, gone on with, would have the better mean."""
    table = torch.tensor([[9.0, 0.0, 0.0], [1.0, -9.0, 1.1], [9.0, 0.0, 0.0]])
    assert m.beam_search(lambda ids: table[ids[:, -1]], [1], num_beams=1, eos_token_ids=[2])[0].token_ids == [2]
    assert m.beam_search(lambda ids: table[ids[:, -1]], [1], num_beams=2, eos_token_ids=[2])[0].token_ids[0] == 0


def check_first_step(m):
    """It gives the ids and logits of the model, and leaves the model's own settings out and as they were."""
    for model, tokenizer in LIVELY.values():
        model.generation_config.repetition_penalty = 1.9  # a setting saved with the model
        own = model.generation_config
        try:
            ids, logits, scores = m.first_step(model, tokenizer, "the cat sat on the mat", **ALL_AT_ONCE)
            assert same(m.processed(logits, ids, **ALL_AT_ONCE), scores)
            _, _, plain = m.first_step(model, tokenizer, "the cat sat on the mat")
            assert same(plain, logits)
            assert model.generation_config is own
        finally:
            model.generation_config.repetition_penalty = None
        function, start = next_logits(model, tokenizer("the cat sat on the mat").input_ids)
        assert ids.tolist() == [start]
        with torch.no_grad():
            assert torch.allclose(logits, function(torch.tensor([start])), atol=1e-5)


def check_next_logits_of(m):
    """The function made from a model and a prompt gives what the model gives, for several beams at once, and greedy text from it."""
    prompt = "the cat sat on the mat"
    for model, tokenizer in LIVELY.values():
        expected, start = next_logits(model, tokenizer(prompt).input_ids)
        function, begin = m.next_logits_of(model, tokenizer, prompt)
        assert begin == start
        beams = torch.tensor([[*start, 5, 9], [*start, 8, 11]])
        with torch.no_grad():
            assert torch.allclose(function(beams), expected(beams), atol=1e-5)


CHECKS = [
    check_temperature,
    check_top_k,
    check_top_p,
    check_min_p,
    check_repetition_penalty,
    check_order,
    check_sample,
    check_greedy,
    check_beam_search,
    check_beams_are_exhaustive_when_wide,
    check_one_beam_is_greedy,
    check_first_step,
    check_next_logits_of,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_samplers_equal_transformers_and_torch(check):
    check(samplers)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_equals_transformers_in_other_families(kind, beams):
    for prompt in PROMPTS[:2]:
        compare_beams(
            samplers, kind, prompt, eos=frequent_tokens(kind, 1), num_beams=beams, length_penalty=1.0, max_new_tokens=7
        )


# --- properties --------------------------------------------------------------------------------------------------

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
numbers = st.one_of(st.integers(-4, 4).map(float), st.floats(-15, 15, width=32))  # whole numbers make ties
rows = st.integers(2, 9).flatmap(
    lambda size: st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1, max_size=3).map(torch.tensor)
)
shares = st.floats(0.01, 0.99)
FILTERS = [
    lambda x: samplers.top_k(x, 2),
    lambda x: samplers.top_p(x, 0.7),
    lambda x: samplers.min_p(x, 0.2),
]


@quick
@given(rows, shares)
def test_top_p_keeps_the_smallest_set_that_holds_p(logits, p):
    kept = torch.isfinite(samplers.top_p(logits, p))
    for row, keep in zip(logits.double().softmax(-1), kept, strict=True):
        assert row[keep].sum() >= p - 1e-5
        assert keep.sum() == 1 or row[keep].sum() - row[keep].min() < p + 1e-5
        assert not (~keep).any() or row[keep].min() >= row[~keep].max()


@quick
@given(rows)
def test_filters_keep_the_likeliest_token_and_the_logits_of_what_stays(logits):
    for keep in FILTERS:
        result = keep(logits)
        stays = torch.isfinite(result)
        assert torch.equal(result[stays], logits[stays])
        assert torch.equal(result.amax(-1), logits.amax(-1))
        assert (result[~stays] == NEVER).all()


@quick
@given(rows)
def test_a_filter_treats_each_row_alone_and_twice_is_once(logits):
    for keep in FILTERS:
        assert torch.equal(keep(logits), torch.cat([keep(row[None]) for row in logits]))
        if keep is not FILTERS[1]:  # what stays of top-p is a new distribution, of which p may be less
            assert torch.equal(keep(keep(logits)), keep(logits))


@quick
@given(rows, st.integers(1, 12), st.integers(1, 12), st.floats(0.2, 5.0))
def test_the_order_does_not_matter_for_top_k(logits, k, other, value):
    assert torch.equal(
        samplers.temperature(samplers.top_k(logits, k), value), samplers.top_k(samplers.temperature(logits, value), k)
    )
    both = samplers.top_k(samplers.top_k(logits, k), other)
    assert torch.equal(both, samplers.top_k(samplers.top_k(logits, other), k))
    assert torch.equal(both, samplers.top_k(logits, min(k, other)))


def test_the_order_matters_for_top_p():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    hot_first = samplers.top_p(samplers.temperature(logits, 3.0), 0.8)
    hot_last = samplers.temperature(samplers.top_p(logits, 0.8), 3.0)
    assert torch.isfinite(hot_first).sum() == 3
    assert torch.isfinite(hot_last).sum() == 2


@quick
@given(rows, st.randoms(use_true_random=False))
def test_filters_do_not_care_where_a_token_stands_in_the_vocabulary(logits, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    for keep in (FILTERS[0], FILTERS[2]):
        assert torch.equal(keep(logits[:, order]), keep(logits)[:, order])
    if all(len(set(row)) == len(row) for row in logits.tolist()):  # ties at the edge of top-p are broken by place
        mine, theirs = FILTERS[1](logits[:, order]), FILTERS[1](logits)[:, order]
        differ = mine != theirs
        mass = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
        assert not differ.any() or ((mass - 0.7).abs() < 1e-5).any()


@quick
@given(rows, st.integers(1, 8), shares, shares)
def test_a_looser_filter_keeps_all_that_a_stricter_one_keeps(logits, k, p, q):
    low, high = sorted((p, q))
    pairs = [
        (samplers.top_k(logits, k), samplers.top_k(logits, k + 1)),
        (samplers.top_p(logits, low), samplers.top_p(logits, high)),
        (samplers.min_p(logits, high), samplers.min_p(logits, low)),
    ]
    for strict, loose in pairs:
        assert not (torch.isfinite(strict) & ~torch.isfinite(loose)).any()


@quick
@given(rows, st.floats(0.3, 3.0))
def test_temperature_sharpens_below_one_and_flattens_above(logits, value):
    before, after = logits.softmax(-1).amax(-1), samplers.temperature(logits, value).softmax(-1).amax(-1)
    assert (after >= before - 1e-6).all() if value <= 1 else (after <= before + 1e-6).all()


@quick
@given(rows, st.floats(1.0, 3.0), st.data())
def test_a_repetition_penalty_makes_no_seen_token_likelier_and_no_unseen_logit_other(logits, penalty, data):
    batch, vocabulary = logits.shape
    row = st.lists(st.integers(0, vocabulary - 1), min_size=3, max_size=3)
    ids = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    result = samplers.repetition_penalty(logits, ids, penalty)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(result[~seen], logits[~seen])
    assert (result[seen] <= logits[seen]).all()


@quick
@given(rows, st.integers(0, 1000))
def test_a_draw_is_one_of_those_that_stay(logits, seed):
    for keep in FILTERS:
        kept = keep(logits)
        draw = samplers.sample(kept, torch.Generator().manual_seed(seed))
        assert torch.isfinite(kept.gather(1, draw[:, None])).all()
    assert torch.equal(samplers.sample(samplers.top_k(logits + torch.arange(logits.shape[1]) * 40.0, 1)),
                       samplers.greedy(logits + torch.arange(logits.shape[1]) * 40.0))  # fmt: skip


# --- errors ------------------------------------------------------------------------------------------------------

ROW = torch.tensor([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: samplers.temperature(ROW, 0.0), "temperature is 0.0"),
        (lambda: samplers.temperature(ROW, float("inf")), "temperature is inf"),
        (lambda: samplers.top_k(ROW, 0), "top_k is 0"),
        (lambda: samplers.top_k(ROW, 2.0), "top_k is 2.0"),
        (lambda: samplers.top_p(ROW, 1.5), "top_p is 1.5"),
        (lambda: samplers.min_p(ROW, -0.1), "min_p is -0.1"),
        (lambda: samplers.repetition_penalty(ROW, torch.tensor([[0]]), 0.0), "repetition_penalty is 0.0"),
        (lambda: samplers.repetition_penalty(ROW, torch.tensor([[3]]), 1.2), "ids from 3 to 3"),
        (lambda: samplers.repetition_penalty(ROW, torch.tensor([0]), 1.2), "one row of ids for each of the 1 rows"),
        (lambda: samplers.processed(ROW, torch.tensor([[0]]), do_sample=True, topp=0.9), "no setting 'topp'"),
        (lambda: samplers.greedy(ROW[0]), r"shape \(3,\)"),
        (lambda: samplers.sample(ROW.long()), "torch.int64"),
        (lambda: samplers.sample(torch.tensor([[0.0], [NEVER]])), "Row 1 of logits has -inf"),
        (lambda: samplers.top_k(torch.tensor([[float("nan"), 1.0]]), 1), "Row 0 of logits has nan"),
        (lambda: samplers.beam_search(lambda ids: ROW, [1], num_beams=0), "num_beams is 0"),
        (lambda: samplers.beam_search(lambda ids: ROW, []), "input_ids has shape"),
        (lambda: samplers.beam_search(lambda ids: ROW, [[1], [2]]), r"shape \(2, 1\)"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(call, words):
    with pytest.raises(SamplerError, match=words):
        call()


def test_beams_never_take_a_token_that_is_ruled_out():
    def only_two(ids):
        return torch.tensor([[0.0, NEVER, -1.0, NEVER]]).expand(len(ids), -1)

    beams = samplers.beam_search(only_two, [0], num_beams=5, max_new_tokens=2)
    assert len(beams) == 4
    assert {token for beam in beams for token in beam.token_ids} == {0, 2}


def test_the_settings_of_generate_serve_both(tmp_path):
    """`processed` takes every word that `generation_config` is given in the lab, and gives transformers' scores."""
    model, tokenizer = LIVELY["llama"]
    for words in (
        dict(do_sample=True, temperature=0.5),
        dict(do_sample=True, top_k=3),
        dict(do_sample=True, top_p=0.4),
        dict(do_sample=True, min_p=0.3),
        dict(do_sample=True, top_k=100_000),
        dict(do_sample=True, top_p=1.0),
        dict(do_sample=False, repetition_penalty=1.5),
    ):
        assert generation_config(model, tokenizer, **words).top_k != 50
        ids, logits, scores = samplers.first_step(model, tokenizer, "the cat sat", **words)
        assert same(samplers.processed(logits, ids, **words), scores), words


# --- mutations: a broken copy is caught ----------------------------------------------------------------------------

SOURCE = Path(samplers.__file__).read_text(encoding="utf-8")
MUTATIONS = {
    "temperature multiplies": ("return logits / value", "return logits * value", check_temperature),
    "temperature is left out": ("return logits / value", "return logits", check_temperature),
    "top-k drops the last of the k": ("logits < smallest_kept", "logits <= smallest_kept", check_top_k),
    "top-k keeps one more": ("min(k, logits", "min(k + 1, logits", check_top_k),
    "top-k stumbles over a large k": ("logits.topk(min(k, logits.shape[-1]))", "logits.topk(k)", check_top_k),
    "top-k keeps the unlikely": ("logits < smallest_kept", "logits > smallest_kept", check_top_k),
    "top-k takes one threshold for all rows": (".values[:, -1:]", ".values[:1, -1:]", check_top_k),
    "top-p stops before p": ("<= 1 - p", "<= 1 - p + 0.1", check_top_p),
    "top-p strict where it meets p": ("cumsum(-1) <= 1 - p", "cumsum(-1) < 1 - p", check_top_p),
    "top-p measures from the wrong end": ("<= 1 - p", "<= p", check_top_p),
    "top-p sorts the wrong way": ("logits.sort(dim=-1)", "logits.sort(dim=-1, descending=True)", check_top_p),
    "top-p may empty a row": ("    remove[:, -1] = False\n", "", check_top_p),
    "top-p sums logits": ("ascending.softmax(-1).cumsum(-1)", "ascending.cumsum(-1)", check_top_p),
    "top-p sums along the batch": ("softmax(-1).cumsum(-1)", "softmax(-1).cumsum(0)", check_top_p),
    "top-p leaves the mask sorted": ("remove.scatter(1, order, remove)", "remove", check_top_p),
    "top-p gathers instead of scatters": ("remove.scatter(1, order, remove)", "remove.gather(1, order)", check_top_p),
    "min-p is not relative": ("p * probabilities.amax(-1, keepdim=True)", "p", check_min_p),
    "min-p keeps the unlikely": ("probabilities < p *", "probabilities > p *", check_min_p),
    "min-p forgets the softmax": ("probabilities = logits.softmax(-1)", "probabilities = logits", check_min_p),
    "penalty rewards negative logits": ("logits * penalty, logits / penalty", "logits / penalty, logits / penalty", check_repetition_penalty),
    "penalty the wrong way round": ("torch.where(logits < 0,", "torch.where(logits > 0,", check_repetition_penalty),
    "penalty on the unseen": ("scatter(1, input_ids, True)", "scatter(1, input_ids, True).logical_not()", check_repetition_penalty),
    "top-p before temperature": ('WARPERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p,', 'WARPERS = {"top_p": top_p, "temperature": temperature, "top_k": top_k,', check_order),
    "warpers without sampling": ('settings.get("do_sample", False)', 'settings.get("do_sample", True) or True', check_order),
    "the penalty is left out": ('if settings.get("repetition_penalty", 1.0) != 1.0', "if False", check_order),
    "the race is lost": ("probabilities / waiting", "probabilities * waiting", check_sample),
    "the race is fixed": (".exponential_(generator=generator)", ".fill_(1.0)", check_sample),
    "the race is flat": ("logits.float().softmax(-1)\n", "torch.isfinite(logits).float()\n", check_sample),
    "greedy takes the least": ("return logits.argmax(-1)", "return logits.argmin(-1)", check_greedy),
    "beams forget their past": ("(totals[:, None] + logits", "(0 * totals[:, None] + logits", check_beam_search),
    "beams are not normalised": ("logits.float().log_softmax(-1)", "logits.float()", check_beam_search),
    "beams continue another's text": ("indices // vocabulary", "indices * 0", check_beam_search),
    "beams have no candidates to spare": ("max(2, 1 + len(eos)) * num_beams", "num_beams", check_beam_search),
    "an end among the spare counts": ("strict=True))[:num_beams]", "strict=True))", check_beam_search),
    "an end goes on": ("(~ends).nonzero()", "(ends | ~ends).nonzero()", check_beam_search),
    "length is not penalised": ("total / length**length_penalty", "total", check_beam_search),
    "beams stop at the first end": ("if len(finished) == num_beams and float", "if finished and float", check_beam_search),
    "beams stop when places are taken": ("<= finished[-1].score", "<= 0", check_beam_search),
    "the worst beam comes first": ("beam.score, reverse=True", "beam.score", check_beams_are_exhaustive_when_wide),
    "one beam waits for a second end": ("len(finished) == num_beams", "len(finished) == num_beams > 1", check_one_beam_is_greedy),
    "the model's own settings leak in": ("    base.generation_config = config  #", "    pass  #", check_first_step),
    "beams read the start token as the prompt": ("return after, [start]", "return after, ids", check_next_logits_of),
    "beams see the last but one": ("source.expand(len(beams), -1), decoder_input_ids=beams).logits[:, -1]", "source.expand(len(beams), -1), decoder_input_ids=beams).logits[:, -2]", check_next_logits_of),
    "the model's settings are not put back": ("base.generation_config = own_config", "pass", check_first_step),
}  # fmt: skip


def broken_copy(search: str, replacement: str) -> types.ModuleType:
    """The module with one place of its source changed; the place must exist."""
    assert SOURCE.count(search) >= 1, f"{search!r} is no longer in utils/samplers.py: write the mutation anew"
    module = types.ModuleType("broken_samplers")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(SOURCE.replace(search, replacement), "broken_samplers.py", "exec"), module.__dict__)  # noqa: S102 - our own source
    finally:
        del sys.modules[module.__name__]
    return module


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_break_is_caught_by_its_check(name):
    search, replacement, check = MUTATIONS[name]
    module = broken_copy(search, replacement)
    with pytest.raises((AssertionError, RuntimeError, IndexError, SamplerError, module.SamplerError)):
        check(module)


def test_a_mutation_that_has_nothing_to_change_fails():
    with pytest.raises(AssertionError, match="no longer in"):
        broken_copy("a line that was never there", "x")


def test_the_unbroken_copy_passes():
    check_top_p(broken_copy("return logits / value", "return logits / value"))
