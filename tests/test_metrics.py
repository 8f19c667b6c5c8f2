"""ROUGE against the `rouge-score` package and by hand, bootstrap intervals against their definition, and verdicts."""

import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from utils.data import load_dialogues
from utils.lab import LabError
from utils.metrics import ROUGE, RougeMetric, bootstrap_interval, copied_share, rouge, rouge_l, rouge_n, verdict

VOCABULARY = ["the", "The", "cat", "sat", "on", "mat.", "#Person1#", "don't", "7,50", "x2", "naïve", "–", "re-read"]
KINDS = sorted(ROUGE)
words = st.lists(st.sampled_from(list("abcde")), max_size=9)
repeatable = settings(derandomize=True, deadline=None, max_examples=100)


def assert_as_rouge_score(pairs):
    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=False)
    for prediction, reference in pairs:
        for kind, expected in scorer.score(reference, prediction).items():
            assert ROUGE[kind](prediction, reference) == pytest.approx(tuple(expected), abs=1e-12), (kind, prediction)


# --- ROUGE -------------------------------------------------------------------------------------------------------


def test_rouge_equals_rouge_score_on_random_texts():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY, k=draw.randrange(25))) for _ in range(600)]
    assert_as_rouge_score(zip(texts[:300], texts[300:], strict=True))


def test_rouge_equals_rouge_score_on_every_validation_summary_and_dialogue():
    rows = load_dialogues(split="validation")
    assert_as_rouge_score([(row["summary"], row["dialogue"]) for row in rows])
    assert_as_rouge_score([(row["dialogue"], row["summary"]) for row in rows])


def test_rouge_equals_rouge_score_between_all_validation_summaries():
    summaries = load_dialogues(split="validation")["summary"]
    assert_as_rouge_score([(a, b) for a in summaries for b in summaries])


def test_rouge_by_hand():
    prediction, reference = "the cat sat on the mat", "the cat is on a mat today"
    assert rouge_n(prediction, reference, 1) == pytest.approx((4 / 6, 4 / 7, 8 / 13))
    assert rouge_n(prediction, reference, 2) == pytest.approx((1 / 5, 1 / 6, 2 / 11))
    assert rouge_n(prediction, reference, 3) == (0, 0, 0)
    assert rouge_l(prediction, reference) == pytest.approx((4 / 6, 4 / 7, 8 / 13))
    assert rouge_l("mat the on sat cat the", reference) == pytest.approx((2 / 6, 2 / 7, 4 / 13))


def test_a_repeated_word_counts_as_often_as_in_the_other_text():
    assert rouge_n("the the the the", "the cat the mat", 1) == pytest.approx((2 / 4, 2 / 4, 1 / 2))
    assert rouge_n("a b a b", "a b", 2) == pytest.approx((1 / 3, 1, 1 / 2))


def test_case_and_punctuation_do_not_matter_but_word_forms_do():
    assert rouge_n("The CAT, sat!", "the cat sat").fmeasure == 1
    assert rouge_n("cats", "cat").fmeasure == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prediction", "reference"), [("", "the cat"), ("the cat", ""), ("", ""), ("...", "?!")])
def test_an_empty_text_scores_zero(kind, prediction, reference):
    assert ROUGE[kind](prediction, reference) == (0, 0, 0)
    assert rouge([prediction], [reference], kind).tolist() == [0]


def test_rouge_gives_one_value_a_row_and_the_best_reference_counts():
    values = rouge(["a b", "a b", "c"], ["a b", ["c d", "a b c d", "a"], ["d", "e"]])
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [1, 2 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(rouge(["a b"], [["a", "c d", "b a"]], "rouge2"), [0])


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_uses_the_metric_that_is_named(kind):
    prediction, reference = "a b c d e", "a b d c x e"
    assert rouge([prediction], [reference], kind)[0] == ROUGE[kind](prediction, reference).fmeasure
    expected = {"rouge1": 10 / 11, "rouge2": 2 / 9, "rougeL": 8 / 11}
    assert rouge([prediction], [reference], kind)[0] == pytest.approx(expected[kind])


@repeatable
@given(words)
def test_a_text_against_itself_scores_one(text):
    assume(len(text) >= 2)
    assert all(ROUGE[kind](" ".join(text), " ".join(text)) == (1, 1, 1) for kind in KINDS)


@repeatable
@given(words, words)
def test_swapping_the_texts_swaps_precision_and_recall(a, b):
    for kind in KINDS:
        forth, back = ROUGE[kind](" ".join(a), " ".join(b)), ROUGE[kind](" ".join(b), " ".join(a))
        assert (forth.precision, forth.recall) == (back.recall, back.precision)
        assert forth.fmeasure == pytest.approx(back.fmeasure, abs=1e-12)
        assert all(0 <= value <= 1 for value in forth)


@repeatable
@given(words, words, st.randoms(use_true_random=False))
def test_the_order_of_words_does_not_matter_for_rouge1(a, b, shuffler):
    shuffled = shuffler.sample(a, len(a))
    assert rouge_n(" ".join(shuffled), " ".join(b)) == rouge_n(" ".join(a), " ".join(b))


@repeatable
@given(words, words)
def test_rouge_l_is_never_above_rouge1(a, b):
    assert rouge_l(" ".join(a), " ".join(b)).fmeasure <= rouge_n(" ".join(a), " ".join(b)).fmeasure + 1e-12


def test_rouge_refuses_what_it_cannot_score():
    with pytest.raises(LabError, match=r"'bleu'.*rouge1, rouge2, rougeL"):
        rouge(["a"], ["a"], "bleu")
    with pytest.raises(LabError, match="2 predictions for 1 rows"):
        rouge(["a", "b"], ["a"])
    with pytest.raises(LabError, match="Row 1 has no reference"):
        rouge(["a", "b"], [["a"], []])


# --- intervals and verdicts --------------------------------------------------------------------------------------


def test_interval_of_two_values_follows_from_the_four_resamples():
    """Means of resamples of (0, 1): 0, 0.5, 0.5, 1, each as likely."""
    assert bootstrap_interval([0, 1], confidence=0.95) == (0, 1)
    assert bootstrap_interval([0, 1], confidence=0.6) == (0, 1)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([3, 3, 3]) == (3, 3)


def test_interval_of_many_values_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(2, 5, size=400)
    low, high = bootstrap_interval(values)
    error = values.std() / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(list(values), seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_interval_covers_the_true_mean_about_95_times_in_100():
    samples = np.random.default_rng(3).beta(2, 4, size=(200, 40))  # true mean 1/3, skewed as ROUGE is
    intervals = [bootstrap_interval(sample, resamples=2000, seed=i) for i, sample in enumerate(samples)]
    assert 0.88 <= np.mean([low <= 1 / 3 <= high for low, high in intervals]) <= 0.99


def test_interval_is_narrower_for_more_data_and_wider_for_more_confidence():
    values = np.random.default_rng(4).normal(size=400)

    def width(values, **options):
        low, high = bootstrap_interval(values, **options)
        return high - low

    assert width(values) < 0.6 * width(values[:50])
    assert width(values, confidence=0.99) > 1.1 * width(values) > 1.1 * width(values, confidence=0.8)


@pytest.mark.parametrize("values", [[], [1.0], 1.0, [[1.0, 2.0], [3.0, 4.0]]])
def test_interval_refuses_fewer_than_two_values_and_tables(values):
    with pytest.raises(LabError, match="at least two values"):
        bootstrap_interval(values)


def test_verdict_follows_the_interval():
    noise = np.random.default_rng(5).normal(0, 0.1, size=100)
    noise -= noise.mean()
    for shift, word in (
        (0.2, "higher"),
        (-0.2, "lower"),
        (0.005, "no difference shown"),
        (-0.005, "no difference shown"),
    ):
        low, high = bootstrap_interval(noise + shift)
        sentence = verdict("ROUGE-1", noise + shift)
        assert sentence == (f"ROUGE-1: {word} ({shift:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, 100 dialogues).")


def test_an_interval_that_touches_zero_shows_no_difference():
    assert verdict("x", [0, 1]).startswith("x: no difference shown (+0.500, 95 % interval +0.000 to +1.000, 2 ")
    assert verdict("x", [0, -1]).startswith("x: no difference shown")
    assert verdict("x", [0.0] * 5, digits=1).startswith("x: no difference shown (+0.0, 95 % interval +0.0 to +0.0, 5 ")


def test_a_value_that_is_not_a_number_is_no_finding():
    with pytest.raises(LabError):
        verdict("x", [float("nan"), 1.0, 2.0])


# --- copying -----------------------------------------------------------------------------------------------------


def test_copied_share_is_one_for_an_extract_and_zero_for_new_words():
    source = "#Person1#: Is the big pool closed?\n#Person2#: Till three. The schools have got their gala."
    assert copied_share("The schools have got their gala.", source) == 1
    assert copied_share("the big POOL closed: #Person2# till three", source) == 1  # punctuation aside
    assert copied_share("A guard explains why swimmers wait.", source) == 0
    assert copied_share("", source) == copied_share("gala", "") == 0


def test_copied_share_by_hand():
    assert copied_share("a b c d x", "a b c d e") == pytest.approx(2 / 3)
    assert copied_share("a b c d x", "a b c d e", n=1) == pytest.approx(4 / 5)
    assert copied_share("a b c a b c", "a b c", n=3) == pytest.approx(2 / 4)  # a copy that repeats is still a copy
    assert copied_share("c b a", "a b c", n=3) == 0


def test_the_metric_of_evaluate_gives_the_mean_of_each_kind():
    predictions, references = ["the cat sat", "a dog"], [["the cat ran", "no"], ["a dog", "the dog"]]
    scores = RougeMetric().compute(predictions=predictions, references=references)
    assert scores == {kind: pytest.approx(rouge(predictions, references, kind).mean()) for kind in ROUGE}
    assert RougeMetric().compute(predictions=["a"], references=["a"])["rouge1"] == 1.0
