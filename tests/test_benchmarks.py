"""Benchmarks: scores against lm-eval's own HFLM, whole runs on tiny models, measures against hand cases."""

import numpy as np
import pytest
import torch
from conftest import broken_copy
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from utils import benchmarks
from utils.benchmarks import (
    COPIES,
    LOCAL,
    REPORT,
    Copies,
    SharedContextLM,
    TaskResult,
    baselines,
    bins_for,
    by_family,
    calibration_floor,
    confidence_and_correct,
    evaluate,
    evaluate_copies,
    expected_calibration_error,
    gendered_words,
    paired,
    report_rows,
)
from utils.lab import LabError
from utils.models import load_model
from utils.training import lora_config

ONE_EACH = {"GLUE": ["lab_sentiment"], "SuperGLUE": ["lab_copa"], "BIG-bench Hard": ["lab_boolean_expressions"]}
CONTEXTS = [
    "the cat sat on",
    "a dog ran to the big red house and the river",
    "the",
    "person1 asks person2",
    "on the mat",
    "",
]
OPTIONS = ["the mat", "a", "a big blue house", "the river and the small dog ran"]


def scoring_requests():
    pairs = [(context, f" {option}" if context else option) for context in CONTEXTS for option in OPTIONS]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def same_scores(ours, theirs, atol=2e-4):
    return [greedy for _, greedy in ours] == [greedy for _, greedy in theirs] and np.allclose(
        [score for score, _ in ours], [score for score, _ in theirs], atol=atol
    )


def with_greedy_ones(model, tokenizer, requests):
    """The requests, and for each context the token that the model finds likeliest, so that some options are greedy."""
    more = []
    for context in CONTEXTS[:-1]:
        ids = torch.tensor([tokenizer.encode(context)])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                logits = model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
            else:
                logits = model(ids).logits
        more.append(Instance("loglikelihood", {}, (context, " " + tokenizer.decode(logits[0, -1].argmax())), 0))
    return requests + more


def hflm(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5)


# --- the scores ------------------------------------------------------------------------------------------------------


def test_scores_and_greedy_flags_are_those_of_lm_eval(tiny):
    model, tokenizer = tiny
    requests = with_greedy_ones(model, tokenizer, scoring_requests())
    ours = SharedContextLM(model, tokenizer, batch_size=3).loglikelihood(requests)
    theirs = hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert same_scores(ours, theirs)
    assert any(greedy for _, greedy in ours)
    assert not all(greedy for _, greedy in ours)


def test_what_is_written_is_what_lm_eval_cuts(tiny):
    model, tokenizer = tiny
    for until in (["tells"], ["\n", "Q:"], "e"):
        settings = {"until": until, "do_sample": False, "max_gen_toks": 9}
        requests = [Instance("generate_until", {}, (context, settings), 0) for context in CONTEXTS[:-1]]
        ours = SharedContextLM(model, tokenizer).generate_until(requests)
        theirs = [text for r in requests for text in hflm(model, tokenizer).generate_until([r], disable_tqdm=True)]
        for text, theirs_too in zip(ours, theirs, strict=True):
            # HFLM lets an encoder-decoder write as many tokens more as the context has.
            assert theirs_too.startswith(text) if model.config.is_encoder_decoder else theirs_too == text
        assert not any(stop in text for text in ours for stop in ([until] if isinstance(until, str) else until))


def test_each_context_is_read_once(tiny_folders):
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    context = "the cat sat on the mat and the dog ran to the river " * 4
    requests = [Instance("loglikelihood", {}, (context.strip(), f" {option}"), 0) for option in ("a", "the", "big")]
    SharedContextLM(model, tokenizer).loglikelihood(requests)
    assert sum(read) == len(tokenizer.encode(context.strip()))


def by_hand(model, tokenizer, request):
    """One option in one sequence, no batch, no cache."""
    context, option = request.args
    start, ids = len(tokenizer.encode(context)), tokenizer.encode(context + option)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -len(ids) :]
    scores = logits.float().log_softmax(-1)
    chosen = [(scores[i - 1, ids[i]].item(), scores[i - 1].argmax().item() == ids[i]) for i in range(start, len(ids))]
    return sum(score for score, _ in chosen), all(greedy for _, greedy in chosen)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_adapters_score_as_by_hand(tiny_folders, method):
    model, tokenizer = load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")
    plain = SharedContextLM(model, tokenizer).loglikelihood(scoring_requests()[:20])
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    configs = {
        "lora": lora_config(model, r=2),
        "prompt": PromptTuningConfig(**settings),
        "prefix": PrefixTuningConfig(**settings),
    }
    torch.manual_seed(0)
    adapted = get_peft_model(model, configs[method]).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    requests = scoring_requests()[:20]
    ours = SharedContextLM(adapted, tokenizer, batch_size=3).loglikelihood(requests)
    assert same_scores(ours, [by_hand(adapted, tokenizer, request) for request in requests])
    assert not same_scores(ours, plain)


def test_a_context_that_is_too_long_loses_its_beginning(tiny_folders):
    model, tokenizer = load_model(tiny_folders["gpt2"], dtype=torch.float32, device="cpu")
    requests = [Instance("loglikelihood", {}, ("the cat " * 700 + "sat", " on"), 0)]
    ours = SharedContextLM(model, tokenizer).loglikelihood(requests)
    short = [Instance("loglikelihood", {}, (("the cat " * 511 + "sat").strip(), " on"), 0)]
    assert ours[0][0] == pytest.approx(SharedContextLM(model, tokenizer).loglikelihood(short)[0][0], abs=1e-4)


@pytest.mark.parametrize(
    ("search", "replacement"),
    {
        "position_ids=mask.sum(1)[places, None] + ": "position_ids=",
        "torch.cat([mask[places], option_mask], 1)": "torch.cat([torch.ones_like(mask[places]), option_mask], 1)",
        "position_ids=(mask.cumsum(1) - 1).clamp(min=0)": "position_ids=(mask.cumsum(1) * 0 + torch.arange(mask.shape[1]))",
        "read.past_key_values.batch_select_indices(places)": "read.past_key_values.batch_select_indices(places * 0)",
        "scores[k] += _pairs(row[: len(options[k]) - 1], options[k][1:])": "pass",
        "chosen - logits.logsumexp(-1)": "chosen",
        "all(greedy for _, greedy in parts)": "any(greedy for _, greedy in parts)",
        "answers[i] = answer\n": "answers[len(answers) - 1 - i] = answer\n",
    }.items(),
)
def test_a_broken_scorer_is_noticed(tiny_folders, search, replacement):
    model, tokenizer = load_model(tiny_folders["gpt2"], dtype=torch.float32, device="cpu")
    requests = with_greedy_ones(model, tokenizer, scoring_requests())
    # The likeliest token and another after it: greedy in part.
    requests += [Instance("loglikelihood", {}, (r.args[0], r.args[1] + " zz"), 0) for r in requests[-5:]]
    broken = broken_copy(benchmarks, search, replacement).SharedContextLM(model, tokenizer, batch_size=3)
    assert not same_scores(
        broken.loglikelihood(requests), hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    )


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny_folders):
    return load_model(tiny_folders["llama"], dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def results(llama):
    return evaluate(*llama, ONE_EACH, limit=6)


def test_a_run_returns_every_item(results):
    assert [r.family for r in results.values()] == list(ONE_EACH)
    assert list(results) == [name for names in ONE_EACH.values() for name in names]
    for result in results.values():
        assert len(result.ids) == len(set(result.ids)) == len(result.prompts) == len(result.correct) == 6
        assert all(name.startswith(result.task.removeprefix("lab_")) for name in result.ids)
    sentiment, copa, written = results.values()
    assert sentiment.options[0] == ["negative", "positive"]
    assert sentiment.chance == copa.chance == 0.5
    for result in (sentiment, copa):
        assert [int(np.argmax(p)) for p in result.probabilities] == result.answers
        assert [float(a == t) for a, t in zip(result.answers, result.targets, strict=True)] == list(result.correct)
        assert all(p.sum() == pytest.approx(1) for p in result.probabilities)
    assert written.probabilities is None
    assert set(written.targets) <= {"True", "False"}


def test_a_run_leaves_the_model_as_it_was_and_is_silent(llama, capfd):
    model, tokenizer = llama
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    evaluate(model, tokenizer, {"GLUE": ["lab_sentiment"]}, limit=2)
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_an_encoder_decoder_runs_too(tiny_folders):
    model, tokenizer = load_model(tiny_folders["t5"], dtype=torch.float32, device="cpu")
    assert all(len(r.ids) == 2 for r in evaluate(model, tokenizer, ONE_EACH, limit=2).values())


def test_the_limit_is_shared_out_and_spread_evenly(llama):
    run = evaluate(*llama, {"MMLU": ["lab_mmlu"], "GLUE": LOCAL["GLUE"]}, limit=12)
    assert len({name.rpartition("_")[0] for name in run["lab_mmlu"].ids}) == 12
    assert [len(run[name].ids) for name in LOCAL["GLUE"]] == [4, 4, 4]


def test_the_copies_stand_beside_their_originals(llama):
    copies = evaluate_copies(*llama, limit=6)
    assert [c.kind for c in copies] == [kind for kind in COPIES for _ in range(3)]
    for pair in copies:
        assert pair.clean.ids == pair.changed.ids
        assert pair.clean.targets == pair.changed.targets
        assert all(a != b for a, b in zip(pair.clean.prompts, pair.changed.prompts, strict=True))
        assert pair.clean.family == pair.changed.family


def test_every_template_is_filled_in(llama):
    run = evaluate(*llama, limit=16)
    run |= {pair.changed.task: pair.changed for pair in evaluate_copies(*llama, limit=9)}
    assert len(run) == 19
    for result in run.values():
        assert not any("{" in text for texts in (result.prompts, *result.options) for text in texts)
    cause = run["lab_copa"]
    assert len({tuple(options) for options in cause.options}) == len(cause.ids)
    assert all(option[0].islower() for options in cause.options for option in options)


def result(answers, targets, task="lab_x", family="F", probabilities=True, ids=None):
    return TaskResult(
        task=task, family=family, ids=ids or [f"x_{i}" for i in range(len(answers))], prompts=["?"] * len(answers),
        options=[["a", "b"]] * len(answers), targets=targets, answers=answers,
        correct=np.array([float(a == t) for a, t in zip(answers, targets, strict=True)]),
        probabilities=[np.array([0.6, 0.4])] * len(answers) if probabilities else None,
    )  # fmt: skip


def test_baselines_come_from_the_items():
    chosen = result([0] * 4, [0, 0, 0, 1])
    written = result(["x"] * 4, ["a", "a", "b", "c"], probabilities=False)
    assert (chosen.chance, chosen.majority) == (0.5, 0.75)
    assert (written.chance, written.majority) == (pytest.approx(6 / 16), 0.5)
    assert baselines([chosen, written]) == (pytest.approx((0.5 + 6 / 16) / 2), 0.625)


def test_paired_changes_are_item_by_item():
    before = {"lab_x": result([0, 0, 1], [0, 1, 1])}
    after = {"lab_x": result([1, 1, 1], [0, 1, 1])}
    assert {name: list(change) for name, change in paired(before, after).items()} == {
        "F": [-1, 1, 0],
        "all": [-1, 1, 0],
    }
    with pytest.raises(LabError, match="different items"):
        paired(before, {"lab_x": result([0, 0], [0, 1])})


def test_an_answer_that_changes_from_wrong_to_wrong_is_counted_as_changed():
    pair = Copies("gender", result([0, 1, 0], [2, 1, 0]), result([1, 1, 1], [2, 1, 0]))
    assert list(pair.change) == [0, 0, -1]
    assert list(pair.answer_differs) == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "limit", "words"),
    [
        ("bigger", None, "'bigger'"),
        ({"F": ["lab_none"]}, None, "'lab_none'.*lab_boolq"),
        ({"F": ["lab_copa"]}, 0, "limit=0"),
    ],
)
def test_what_cannot_be_run_is_an_error(llama, arguments, limit, words):
    with pytest.raises(LabError, match=words):
        evaluate(*llama, arguments, limit=limit)


def test_without_a_network_the_error_says_what_to_set(llama, monkeypatch):
    def no_network(self, names):
        raise ConnectionError("Couldn't reach 'sst2' on the Hub")

    monkeypatch.setattr(benchmarks.TaskManager, "load", no_network)
    with pytest.raises(LabError, match=r"'sst2'.*ConnectionError.*BENCHMARKS = \"local\""):
        evaluate(*llama, "hub")


def test_the_benchmarks_of_the_hub_exist_in_lm_eval():
    manager = benchmarks.task_manager(local=False)
    for names in benchmarks.HUB.values():
        assert all(manager.match_tasks([name]) == [name] for name in names)


# --- measures --------------------------------------------------------------------------------------------------------


def ece_by_loop(confidence, correct, bins):
    """Another way: walk through the items from the least confident on, filling one group after another."""
    ranked, total, at = sorted(zip(confidence, correct, strict=True)), 0.0, 0
    for k in range(bins):
        size = len(ranked) // bins + (k < len(ranked) % bins)
        group, at = ranked[at : at + size], at + size
        total += abs(sum(c - y for c, y in group))
    return total / len(ranked)


def check_calibration(module):
    # Two groups: confidence 0.55 and none right; 0.95 and all right.
    assert module.expected_calibration_error([0.5, 0.9, 0.6, 1.0], [0, 1, 0, 1], bins=2) == pytest.approx(
        (2 * 0.55 + 2 * 0.05) / 4
    )
    # Too sure in one group and not sure enough in the other does not cancel.
    assert module.expected_calibration_error([0.5, 0.5, 0.9, 0.9], [1, 1, 1, 0], bins=2) == pytest.approx(0.45)
    generator = np.random.default_rng(1)
    for size, bins in ((23, 5), (40, 10), (7, 1)):
        confidence, correct = generator.random(size), generator.integers(0, 2, size)
        expected = ece_by_loop(confidence, correct, bins)
        assert module.expected_calibration_error(confidence, correct, bins) == pytest.approx(expected)


def test_calibration_error_by_hand_and_by_another_way():
    check_calibration(benchmarks)


@pytest.mark.parametrize(
    ("search", "replacement"),
    {
        "size * abs(accuracy - mean)": "size * (accuracy - mean)",
        "size * abs(accuracy - mean) for": "abs(accuracy - mean) for",
        'np.argsort(confidence, kind="stable")': "np.arange(len(confidence))",
        "float(correct[part].mean())": "float(correct.mean())",
        "min(bins, len(order))": "min(bins + 1, len(order))",
    }.items(),
)
def test_a_broken_calibration_error_is_noticed(search, replacement):
    with pytest.raises(AssertionError):
        check_calibration(broken_copy(benchmarks, search, replacement))


def test_the_floor_is_what_a_calibrated_model_gets():
    assert calibration_floor([1.0] * 20) == 0
    # One group of one item of confidence 1/2 is always 1/2 away.
    assert calibration_floor([0.5], bins=1) == 0.5
    few, many = calibration_floor(np.full(24, 0.7), 3), calibration_floor(np.full(2400, 0.7), 3)
    assert few > 5 * many > 0


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "words"),
    [([0.5], [1, 0], 2, "give one of each"), ([], [], 2, "give one of each"), ([1.5], [1], 2, "between 0 and 1"),
     ([float("nan")], [1], 2, "between 0 and 1"), ([0.5], [1], 0, "bins=0")],
)  # fmt: skip
def test_a_calibration_error_of_nonsense_is_an_error(confidence, correct, bins, words):
    with pytest.raises(LabError, match=words):
        expected_calibration_error(confidence, correct, bins)


def test_few_items_get_few_bins():
    assert [bins_for(n) for n in (1, 15, 16, 48, 1000)] == [1, 1, 2, 6, 10]


def test_only_tasks_with_options_have_a_confidence():
    confidence, correct = confidence_and_correct([result([0, 1], [0, 0]), result(["x"], ["x"], probabilities=False)])
    assert list(confidence) == [0.6, 0.6]
    assert list(correct) == [1, 0]


def test_gendered_words_are_whole_words():
    assert gendered_words(["She told HIM that the heroine's brother", "the mango man, sherry and here"]) == (1, 3)


def test_a_report_leaves_blank_what_does_not_apply(results, llama):
    copies = {"base": evaluate_copies(*llama, limit=3)}
    texts = {
        "base": {"texts": ["she " * 9 + "he"], "hostile": [True], "tokens_a_second": 5.0, "parameters": 2e6},
        "people": {"texts": ["he"], "hostile": [False]},
    }
    rows = {(family, name): values for family, name, values in report_rows({"base": results}, copies, texts)}
    assert all(set(values) <= set(REPORT) for values in rows.values())
    assert [name for family, name in rows if family == "GLUE"] == ["base", "guessing", "commonest answer"]
    assert list(rows["BIG-bench Hard", "base"]) == ["accuracy"]
    assert len(rows["GLUE", "base"]) == 6
    assert list(rows["GLUE", "guessing"].values()) == [0.5]
    assert [round(v, 2) for v in rows["summaries", "base"].values()] == [1.0, 0.4, 5.0, 2.0]
    assert list(rows["summaries", "people"].values()) == [0.0]  # one gendered word says nothing
    assert sum(len(r) for r in by_family(results).values()) == 3
