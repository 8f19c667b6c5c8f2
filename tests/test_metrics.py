"""ROUGE against `rouge-score`, `rouge-metric`, the formulas written out and the paper's examples; intervals; verdicts.

Each check of ROUGE takes the module, so that the same check runs on the real one and on copies with one line broken.

Not every definition of `rouge-metric` is the paper's (Lin 2004): it follows the script ROUGE-1.5.5. Its ROUGE-S is compared
as it is; of ROUGE-W its table and its precision; of ROUGE-SU its pairs and its words (see the checks).
"""

import itertools
import random
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import scipy.stats
from conftest import broken_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_metric import PyRouge, py_rouge
from rouge_score import rouge_scorer

import utils.metrics as metrics
from utils.data import by_dialogue, load_dialogues
from utils.lab import LabError
from utils.metrics import ROUGE, bootstrap_interval, copied_share, rouge, rouge_text, verdict, wilson_interval

VOCABULARY = [
    "the",
    "The",
    "cat",
    "sat",
    "on",
    "mat.",
    "#Person1#",
    "don't",
    "7,50",
    "x2",
    "naïve",
    "–",
    "re-read",
    "\n",
]
KINDS = sorted(ROUGE)
SYMMETRIC = [kind for kind in KINDS if kind != "rougeLsum"]
THEIRS = ["rouge1", "rouge2", "rouge3", "rouge4", "rougeL", "rougeLsum"]
DISTANCES = [0, 1, 4, 9, None]
WEIGHTS = [1.0, 1.2, 2.0, 3.0]
BETAS = [0.5, 1.0, 3.0]
VALIDATION = load_dialogues(split="validation")
TEST = by_dialogue(load_dialogues(split="test"))
words = st.lists(st.sampled_from(list("abcde")), max_size=9)
repeatable = settings(derandomize=True, deadline=None, max_examples=100)


def random_pairs(number, *, longest=14, letters="abcdef", seed=0):
    draw = random.Random(seed)
    texts = [draw.choices(letters, k=draw.randrange(longest)) for _ in range(2 * number)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def real_pairs(number=50):
    """Two people's summaries of one dialogue, and a summary against its dialogue, as lists of words."""
    rows = TEST.select(range(number))
    pairs = [(row["references"][0], row["references"][1]) for row in rows]
    pairs += [(row["summary"], row["dialogue"]) for row in VALIDATION.select(range(number // 2))]
    return [(metrics.tokenize(a), metrics.tokenize(b)) for a, b in pairs]


def assert_as_rouge_score(rows, kinds=THEIRS, module=metrics):
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=False)
    for prediction, references in rows:
        several = [references] if isinstance(references, str) else references
        for kind, expected in scorer.score_multi(several, prediction).items():
            got = module.rouge_text(prediction, references, kind)
            assert got == pytest.approx(tuple(expected), abs=1e-12), (kind, prediction)


def by_rouge_metric(prediction, reference, *, alpha=0.5, **options):
    """Precision, recall and F of `rouge-metric`, for two lists of words."""
    theirs = PyRouge(rouge_n=[], rouge_l=False, alpha=alpha, mode="individual", **options)
    ((score,),) = (found.values() for found in theirs.evaluate_tokenized([[prediction]], [[[reference]]]))
    return score["p"], score["r"], score["f"]


def f_score(precision, recall, beta=1.0):
    """The formula of the script: one over the weighted mean of one over each."""
    alpha = 1 / (1 + beta**2)
    return 1 / (alpha / precision + (1 - alpha) / recall) if precision and recall else 0.0


# --- ROUGE: checks that take the module ----------------------------------------------------------------------------


def check_random_texts_against_rouge_score(m):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY, k=draw.randrange(25))) for _ in range(400)]
    assert_as_rouge_score(zip(texts[:200], texts[200:], strict=True), module=m)
    several = [texts[i : i + 3] for i in range(0, 180, 3)]
    assert_as_rouge_score(zip(texts[200:260], several, strict=True), module=m)


def check_lists_of_words_against_rouge_score(m):
    scorer = rouge_scorer.RougeScorer(["rouge2", "rougeL", "rougeLsum"], use_stemmer=False)
    for (a, b), (c, d) in zip(random_pairs(100), random_pairs(100, seed=1), strict=True):
        expected = scorer.score("\n".join([" ".join(b), " ".join(d)]), "\n".join([" ".join(a), " ".join(c)]))
        assert m.rouge_n([*a, *c], [*b, *d], 2) == pytest.approx(expected["rouge2"])
        assert m.rouge_l([*a, *c], [*b, *d]) == pytest.approx(expected["rougeL"])
        assert m.rouge_lsum([a, c], [b, d]) == pytest.approx(expected["rougeLsum"])


def check_rouge_s_against_rouge_metric(m):
    for i, (a, b) in enumerate(random_pairs(300) + real_pairs(20)):
        distance, beta = DISTANCES[i % 5], BETAS[i % 3]
        expected = by_rouge_metric(a, b, rouge_s=True, skip_gap=distance, alpha=1 / (1 + beta**2))
        assert m.rouge_s(a, b, distance, beta=beta) == pytest.approx(expected, abs=1e-12)


def check_rouge_s_against_the_formulas(m):
    """Section 5: all pairs listed, each pair of the prediction crossed off in the reference; C(m, 2) of them in all."""
    for a, b in random_pairs(200, letters="abcd"):
        left = list(itertools.combinations(b, 2))
        found = 0
        for pair in itertools.combinations(a, 2):
            if pair in left:
                left.remove(pair)
                found += 1
        precision, recall = (found / (len(x) * (len(x) - 1) / 2) if len(x) > 1 else 0.0 for x in (a, b))
        assert m.rouge_s(a, b, None) == pytest.approx((precision, recall, f_score(precision, recall)), abs=1e-12)


def check_rouge_su(m):
    """Against pairs plus words of `rouge-metric`, and against the paper's other wording: pairs after a start mark.

    The ROUGE-SU of `rouge-metric`, as that of the script, lacks each text's last word, which the paper does not say.
    """
    for i, (a, b) in enumerate(random_pairs(300) + real_pairs(20)):
        distance = DISTANCES[i % 5]
        added = py_rouge._rouge_s_sentence_level(a, b, distance) + py_rouge._rouge_n_sentence_level(a, b, 1)
        expected = added.to_score(alpha=0.5)
        got = m.rouge_s(a, b, distance, unigrams=True)
        assert got == pytest.approx((expected["p"], expected["r"], expected["f"]), abs=1e-12)
        marked = by_rouge_metric(["<s>", *a], ["<s>", *b], rouge_s=True)
        assert m.rouge_s(a, b, None, unigrams=True) == pytest.approx(marked, abs=1e-12)


def check_rouge_w_against_rouge_metric(m):
    """The table is the paper's, so its last value is; precision and recall by section 4, with f and its inverse."""
    for i, (a, b) in enumerate(random_pairs(300, letters="abcd") + real_pairs(20)):
        weight, beta = WEIGHTS[i % 4], BETAS[i % 3]
        matched = py_rouge._wlcs_table(a, b, partial(lambda weight, k: k**weight, weight))[-1][-1]
        precision, recall = ((matched / len(x) ** weight) ** (1 / weight) if x else 0.0 for x in (a, b))
        expected = (precision, recall, f_score(precision, recall, beta))
        assert m.rouge_w(a, b, weight, beta=beta) == pytest.approx(expected, abs=1e-9)


def check_rouge_w_against_the_paper_line_by_line(m):
    """Section 4's dynamic programme with its tables c and w, (1) to (4), and f(k) = k ** weight."""
    for case, (x, y) in enumerate(random_pairs(200, letters="abc", seed=3)):
        weight = WEIGHTS[case % 4]
        f = partial(lambda weight, k: k**weight, weight)
        c, w = np.zeros((len(x) + 1, len(y) + 1)), np.zeros((len(x) + 1, len(y) + 1))
        for i, j in itertools.product(range(1, len(x) + 1), range(1, len(y) + 1)):
            if x[i - 1] == y[j - 1]:
                k = w[i - 1, j - 1]
                c[i, j] = c[i - 1, j - 1] + f(k + 1) - f(k)
                w[i, j] = k + 1
            elif c[i - 1, j] > c[i, j - 1]:
                c[i, j] = c[i - 1, j]
            else:
                c[i, j] = c[i, j - 1]
        recall, precision = ((c[-1, -1] / f(len(words))) ** (1 / weight) if words else 0.0 for words in (x, y))
        assert m.rouge_w(y, x, weight) == pytest.approx((precision, recall, f_score(precision, recall)), abs=1e-9)


def check_examples_of_the_paper(m):
    """Lin 2004, as printed there: sections 3.1, 3.2, 4 and 5, with F1."""
    s1, s2, s3, s4, s5 = (
        sentence.split()
        for sentence in (
            "police killed the gunman",
            "police kill the gunman",
            "the gunman kill police",
            "the gunman police killed",
            "gunman the killed police",
        )
    )
    assert m.rouge_n(s2, s1, 2).fmeasure == m.rouge_n(s3, s1, 2).fmeasure == pytest.approx(1 / 3)
    assert [m.rouge_l(s, s1).fmeasure for s in (s2, s3, s4)] == pytest.approx([0.75, 0.5, 0.5])
    assert [m.rouge_s(s, s1, None).fmeasure for s in (s2, s3, s4)] == pytest.approx([0.5, 0.167, 0.333], abs=5e-4)
    assert m.rouge_s(s5, s1, None) == (0, 0, 0)  # and ROUGE-SU tells it from a text without a common word:
    assert m.rouge_s(s5, s1, None, unigrams=True) == pytest.approx((0.4, 0.4, 0.4))
    assert m.rouge_lsum([list("12678"), list("13895")], [list("12345")]).recall == pytest.approx(4 / 5)
    x, y1, y2 = "ABCDEFG", "ABCDHIK", "AHBKCID"
    assert m.rouge_l(list(y1), list(x)) == m.rouge_l(list(y2), list(x)) == pytest.approx((4 / 7,) * 3)
    assert [m.rouge_w(list(y), list(x), 2).fmeasure for y in (y1, y2)] == pytest.approx([0.571, 0.286], abs=5e-4)
    # The paper prints no ROUGE-W of the sentences about the gunman. By hand, f(k) = k ** 2: runs of 1 and 2; of 2; of 2.
    assert [m.rouge_w(s, s1, 2).fmeasure for s in (s2, s3, s4)] == pytest.approx([5**0.5 / 4, 0.5, 0.5])


def check_by_hand(m):
    prediction, reference = "the cat sat on the mat", "the cat is on a mat today"
    assert m.rouge_text(prediction, reference, "rouge1") == pytest.approx((4 / 6, 4 / 7, 8 / 13))
    assert m.rouge_text(prediction, reference, "rouge2") == pytest.approx((1 / 5, 1 / 6, 2 / 11))
    assert m.rouge_text(prediction, reference, "rouge3") == (0, 0, 0)
    assert m.rouge_text(prediction, reference, "rougeL") == pytest.approx((4 / 6, 4 / 7, 8 / 13))
    assert m.rouge_text("mat the on sat cat the", reference, "rougeL") == pytest.approx((2 / 6, 2 / 7, 4 / 13))
    assert m.rouge_text("the the the the", "the cat the mat", "rouge1") == pytest.approx((2 / 4, 2 / 4, 1 / 2))
    assert m.rouge_text("a b a b", "a b", "rouge2") == pytest.approx((1 / 3, 1, 1 / 2))
    # With precision 1/4, recall 1/2 and beta 2: 5 * 1/8 / (1/2 + 4 * 1/4).
    assert m.rouge_text("a b c d", "a x", "rouge1", beta=2).fmeasure == pytest.approx(5 / 12)
    assert m.rouge_text("a b c d", "a x", "rouge1", beta=0).fmeasure == 1 / 4


def check_options_reach_the_kinds_they_are_for(m):
    a, b = "a b x y c d e", "a b c y z d e"
    ours, theirs = a.split(), b.split()
    options = {"beta": 2.0, "weight": 2.0, "max_distance": 1}
    assert m.rouge_text(a, b, "rougeW", **options) == m.rouge_w(ours, theirs, 2.0, beta=2.0)
    assert m.rouge_text(a, b, "rougeS", **options) == m.rouge_s(ours, theirs, 1, beta=2.0)
    assert m.rouge_text(a, b, "rougeSU", **options) == m.rouge_s(ours, theirs, 1, unigrams=True, beta=2.0)
    assert m.rouge_text(a, b, "rougeL", **options) == m.rouge_l(ours, theirs, beta=2.0)
    assert m.rouge_text(a, b, "rougeS", max_distance=None) == m.rouge_s(ours, theirs, None)
    assert m.rouge_text(a, b, "rougeW") == m.rouge_w(ours, theirs, 1.2) == m.rouge_w(ours, theirs)
    assert m.rouge_w(ours, theirs, 1.2) != m.rouge_w(ours, theirs, 2.0)
    assert m.rouge_text(a, b, "rougeS") == m.rouge_s(ours, theirs, 4) == m.rouge_s(ours, theirs)
    assert m.rouge_s(ours, theirs, 4) != m.rouge_s(ours, theirs, None)
    assert m.rouge_text("a\nb", "b\na", "rougeLsum").fmeasure == 1 > m.rouge_text("a\nb", "b\na", "rougeL").fmeasure
    # Of "a b x y c" against "a b c y z" match: a b; then b y; then a y and b c; then a c.
    distances = [m.rouge_s(ours[:5], theirs[:5], distance).precision for distance in (0, 1, 2, 3, None)]
    assert distances == pytest.approx([1 / 4, 2 / 7, 4 / 9, 5 / 10, 5 / 10])


def check_identical_and_disjoint_texts(m):
    text = "one two three one two five"
    for kind in KINDS:
        for options in ({}, {"weight": 1.7, "max_distance": 0, "beta": 3.0}, {"weight": 3.0, "max_distance": None}):
            assert m.rouge_text(text, text, kind, **options) == (1, 1, 1)
            assert m.rouge_text(text, "six seven", kind, **options) == (0, 0, 0)
            assert m.rouge_text("", text, kind, **options) == m.rouge_text("", "", kind, **options) == (0, 0, 0)


def check_the_best_reference_counts(m):
    values = m.rouge(["a b", "a b", "c"], ["a b", ["c d", "a b c d", "a"], ["d", "e"]])
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [1, 2 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(m.rouge(["a b"], [["a", "c d", "b a"]], "rouge2"), [0])
    for (a, b), (c, d) in zip(random_pairs(60, seed=5), random_pairs(60, seed=6), strict=True):
        prediction, *several = (" ".join(x) for x in (a, b, c, d))
        for kind, single in (("rougeW", {"rouge_w": True}), ("rougeS", {"rouge_s": True, "skip_gap": 4})):
            got = m.rouge_text(prediction, several, kind, weight=1.0)  # at weight 1 both ROUGE-W are one
            each = [by_rouge_metric(a, x, rouge_w_weight=1.0, **single) for x in (b, c, d)]
            assert got == pytest.approx(max(each, key=lambda score: score[2]), abs=1e-9)


def check_the_metric_of_evaluate(m):
    predictions, references = ["the cat sat", "a dog"], [["the cat ran", "no"], ["a dog", "the dog"]]
    compute = partial(m.RougeMetric().compute, predictions=predictions, references=references)
    assert compute() == {kind: m.rouge(predictions, references, kind).mean() for kind in ("rouge1", "rouge2", "rougeL")}
    assert m.RougeMetric().compute(predictions=["a"], references=["a"])["rouge1"] == 1.0
    options = {"beta": 2.0, "weight": 3.0, "max_distance": 0}
    rows = list(zip(predictions, references, strict=True))
    each = {kind: [m.rouge_text(*row, kind, **options) for row in rows] for kind in KINDS}
    for field in ("precision", "recall", "fmeasure"):
        expected = {kind: [getattr(score, field) for score in scores] for kind, scores in each.items()}
        assert compute(rouge_types=KINDS, measure=field, use_aggregator=False, **options) == expected
        means = {kind: pytest.approx(sum(values) / 2) for kind, values in expected.items()}
        assert compute(rouge_types=KINDS, measure=field, **options) == means
    precise = m.RougeMetric().compute(
        predictions=["a"], references=["a b"], measure="precision", rouge_types=["rouge1"]
    )
    assert precise == {"rouge1": 1.0}


def check_refusals(m):
    calls = [
        (lambda: m.rouge(["a"], ["a"], "bleu"), r"'bleu'.*rouge1, rouge2.*rougeL, .*rougeSU"),
        (lambda: m.rouge(["a", "b"], ["a"]), "2 predictions for 1 rows"),
        (lambda: m.rouge(["a", "b"], [["a"], []]), "Row 1 has no reference"),
        (lambda: m.rouge_text("a", [], "rouge1"), "no reference"),
        (lambda: m.rouge_text("a", "a", "rouge9"), "'rouge9'"),
        (lambda: m.rouge_n(["a"], ["a"], 0), "n=0"),
        (lambda: m.rouge_w(["a"], ["a"], 0.5), r"weight=0\.5"),
        (lambda: m.rouge_w(["a"], ["a"], float("inf")), "weight=inf"),
        (lambda: m.rouge_s(["a"], ["a"], -1), "max_distance=-1"),
        (lambda: m.rouge_l(["a"], ["a"], beta=-1), "beta=-1"),
        (lambda: m.rouge_l(["a"], ["a"], beta=float("inf")), r"beta=inf.*\.recall"),
        (lambda: m.rouge_n("a cat", ["a"]), "'a cat' is a text"),
        (lambda: m.rouge_l(["a"], "a cat"), "'a cat' is a text"),
        (lambda: m.rouge_lsum(["a cat"], [["a"]]), "'a cat' is a text"),
        (lambda: m.rouge_w(["a"], "a cat"), "'a cat' is a text"),
        (lambda: m.rouge_s(["a"], "a cat"), "'a cat' is a text"),
        (lambda: m.RougeMetric().compute(predictions=["a"], references=["a"], measure="f1"), "'f1'.*fmeasure"),
    ]
    for call, message in calls:
        with pytest.raises(LabError, match=message):
            call()


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS)
def test_rouge(check):
    CHECKS[check](metrics)


# --- ROUGE: on real texts --------------------------------------------------------------------------------------------


def test_rouge_equals_rouge_score_on_every_validation_summary_and_dialogue():
    rows = VALIDATION
    assert_as_rouge_score([(row["summary"], row["dialogue"]) for row in rows])
    assert_as_rouge_score([(row["dialogue"], row["summary"]) for row in rows])


def test_rouge_equals_rouge_score_with_three_references():
    summaries = TEST["references"]
    rows = [(summaries[i - 1][0], summaries[i]) for i in range(len(summaries))]
    rows += [(three[0], three[1:]) for three in summaries]
    assert_as_rouge_score(rows)
    assert {len(references) for _, references in rows} == {2, 3}


def test_rouge_equals_rouge_score_between_all_validation_summaries():
    summaries = VALIDATION["summary"]
    assert_as_rouge_score(itertools.combinations_with_replacement(summaries, 2), ["rouge1", "rouge2", "rougeL"])


def test_case_and_punctuation_do_not_matter_but_word_forms_do():
    assert rouge_text("The CAT, sat!", "the cat sat").fmeasure == 1
    assert rouge_text("cats", "cat").fmeasure == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prediction", "reference"), [("", "the cat"), ("the cat", ""), ("", ""), ("...", "?!")])
def test_an_empty_text_scores_zero(kind, prediction, reference):
    assert rouge_text(prediction, reference, kind) == (0, 0, 0)
    assert rouge([prediction], [reference], kind).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_uses_the_metric_that_is_named(kind):
    prediction, reference = "a b c d e", "a b d c x e"
    assert rouge([prediction], [reference], kind)[0] == rouge_text(prediction, reference, kind).fmeasure
    # At most 4 words stand between any two: 10 pairs of 5 words, 15 of 6, and 9 match (not "c d"); 5 single words match.
    expected = {"rouge1": 10 / 11, "rouge2": 2 / 9, "rougeL": 8 / 11, "rougeLsum": 8 / 11, "rouge3": 0, "rouge4": 0}
    expected |= {"rougeS": 18 / 25, "rougeSU": 28 / 36}
    f, inverse = (lambda k: k**1.2), (lambda k: k ** (1 / 1.2))
    precision, recall = (inverse((f(2) + 2 * f(1)) / f(length)) for length in (5, 6))
    expected["rougeW"] = 2 * precision * recall / (precision + recall)
    assert rouge([prediction], [reference], kind)[0] == pytest.approx(expected[kind])


def test_a_text_of_three_hundred_words_takes_milliseconds():
    """About 15 ms at most where this was written; listing what matches what would take seconds."""
    draw = random.Random(0)
    ours, theirs = (" ".join(draw.choices([f"w{i}" for i in range(80)], k=300)) for _ in range(2))
    for kind in KINDS:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            rouge_text(ours, theirs, kind, max_distance=None)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.2, kind


# --- ROUGE: where it parts from rouge-metric and the script -----------------------------------------------------------


def test_rouge_w_of_rouge_metric_weights_the_reference_twice_and_looks_at_its_runs_alone():
    """Why only its table is compared: as in ROUGE-1.5.5, four words do not recall all of themselves."""
    text = list("abcd")
    precision, recall, _ = by_rouge_metric(text, text, rouge_w=True, rouge_w_weight=2)
    assert (precision, recall) == (1, 1 / 4)
    assert metrics.rouge_w(text, text, 2) == (1, 1, 1)
    assert by_rouge_metric(list("axb"), list("ab"), rouge_w=True, rouge_w_weight=2)[0] == pytest.approx(2 / 3)
    assert metrics.rouge_w(list("axb"), list("ab"), 2).precision == pytest.approx(2**0.5 / 3)


def test_rouge_w_is_that_of_rouge_metric_at_weight_one_and_never_more_precise():
    same = 0
    pairs = random_pairs(300, letters="abcd", seed=8)
    for a, b in pairs:
        assert metrics.rouge_w(a, b, 1.0) == pytest.approx(
            by_rouge_metric(a, b, rouge_w=True, rouge_w_weight=1), abs=1e-9
        )
        theirs = by_rouge_metric(a, b, rouge_w=True, rouge_w_weight=2)[0]
        assert metrics.rouge_w(a, b, 2).precision <= theirs + 1e-9
        same += metrics.rouge_w(a, b, 2).precision == pytest.approx(theirs, abs=1e-9)
    assert 60 < same < len(pairs)


def test_rouge_su_of_rouge_metric_lacks_the_last_word():
    assert by_rouge_metric(["a"], ["a"], rouge_su=True) == (0, 0, 0)
    assert metrics.rouge_s(["a"], ["a"], unigrams=True) == (1, 1, 1)


def heaviest(a, b, weight):
    """The largest weight of any common subsequence, all alignments tried."""
    best = 0.0
    for size in range(1, min(len(a), len(b)) + 1):
        for places, others in itertools.product(
            itertools.combinations(range(len(a)), size), itertools.combinations(range(len(b)), size)
        ):
            if all(a[i] == b[j] for i, j in zip(places, others, strict=True)):
                lengths = [1]
                for (i, j), following in itertools.pairwise(zip(places, others, strict=True)):
                    lengths = [*lengths[:-1], lengths[-1] + 1] if following == (i + 1, j + 1) else [*lengths, 1]
                best = max(best, sum(length**weight for length in lengths))
    return best


def test_the_subsequence_of_rouge_w_is_common_and_mostly_but_not_always_the_heaviest():
    pairs = random_pairs(150, letters="abc", longest=7, seed=9)
    found = [(metrics._weighted_common_subsequence(a, b, 2), heaviest(a, b, 2)) for a, b in pairs]
    assert all(ours <= best + 1e-9 for ours, best in found)
    assert 0.8 < np.mean([ours == pytest.approx(best) for ours, best in found]) < 1
    assert (metrics._weighted_common_subsequence("ab", "abb", 2), heaviest("ab", "abb", 2)) == (2, 4)


# --- ROUGE: properties -----------------------------------------------------------------------------------------------


@repeatable
@given(st.lists(st.sampled_from(list("abcde")), min_size=4, max_size=9))
def test_a_text_against_itself_scores_one(text):
    assert all(rouge_text(" ".join(text), " ".join(text), kind) == (1, 1, 1) for kind in KINDS)


@repeatable
@given(words, st.lists(st.sampled_from(list("vwxyz")), max_size=9))
def test_texts_without_a_common_word_score_zero(a, b):
    assert all(rouge_text(" ".join(a), " ".join(b), kind) == (0, 0, 0) for kind in KINDS)


@repeatable
@given(words, words, st.sampled_from(WEIGHTS), st.sampled_from(DISTANCES))
def test_swapping_the_texts_swaps_precision_and_recall(a, b, weight, distance):
    for kind in SYMMETRIC:
        options = {"weight": weight, "max_distance": distance}
        forth = rouge_text(" ".join(a), " ".join(b), kind, **options)
        back = rouge_text(" ".join(b), " ".join(a), kind, **options)
        assert (forth.precision, forth.recall) == (back.recall, back.precision)
        assert forth.fmeasure == pytest.approx(back.fmeasure, abs=1e-12)
        assert all(0 <= value <= 1 for value in forth)


def test_the_union_over_sentences_makes_lsum_one_sided():
    """Each of two sentences finds its words in the one; the one has an equally long match in both and takes "a" twice."""
    assert rouge_text("a b", "a\nb a", "rougeLsum") == pytest.approx((1, 2 / 3, 0.8))
    assert rouge_text("a\nb a", "a b", "rougeLsum") == pytest.approx((1 / 3, 1 / 2, 0.4))


@repeatable
@given(words, words, st.floats(0.1, 9))
def test_beta_moves_f_from_precision_to_recall(a, b, beta):
    for kind in KINDS:
        score = rouge_text(" ".join(a), " ".join(b), kind, beta=beta)
        assert score.fmeasure == pytest.approx(f_score(score.precision, score.recall, beta), abs=1e-12)
        low, high = sorted(score[:2])
        assert low - 1e-12 <= score.fmeasure <= high + 1e-12
    assert rouge_text(" ".join(a), " ".join(b), beta=1e6).fmeasure == pytest.approx(
        rouge_text(" ".join(a), " ".join(b)).recall
    )


@repeatable
@given(words, words, st.randoms(use_true_random=False))
def test_the_order_of_words_does_not_matter_for_rouge1(a, b, shuffler):
    shuffled = shuffler.sample(a, len(a))
    assert metrics.rouge_n(shuffled, b) == metrics.rouge_n(a, b)


@repeatable
@given(words, words)
def test_rouge_l_is_never_above_rouge1(a, b):
    assert metrics.rouge_l(a, b).fmeasure <= metrics.rouge_n(a, b).fmeasure + 1e-12


@repeatable
@given(words, words, st.floats(1, 8))
def test_rouge_w_is_never_above_rouge_l_and_equals_it_at_weight_one(a, b, weight):
    """Runs that are apart weigh less than one run of their words, and the table may take a shorter subsequence."""
    assert metrics.rouge_w(a, b, 1) == pytest.approx(metrics.rouge_l(a, b), abs=1e-12)
    for ours, theirs in zip(metrics.rouge_w(a, b, weight), metrics.rouge_l(a, b), strict=True):
        assert 0 <= ours <= theirs + 1e-9


@repeatable
@given(words, words)
def test_rouge_s_is_rouge2_for_neighbours_and_counts_all_pairs_without_a_limit(a, b):
    assert metrics.rouge_s(a, b, 0) == metrics.rouge_n(a, b, 2)
    assert metrics.rouge_s(a, b, None) == metrics.rouge_s(a, b, 99)
    for distance in (0, 1, 3, None):
        literal = Counter(
            (a[i], a[j])
            for i, j in itertools.combinations(range(len(a)), 2)
            if distance is None or j - i - 1 <= distance
        )
        assert metrics._skip_bigrams(a, distance) == literal


@repeatable
@given(words, words)
def test_lsum_of_one_sentence_is_rouge_l(a, b):
    assert rouge_text(" ".join(a), " ".join(b), "rougeLsum") == rouge_text(" ".join(a), " ".join(b), "rougeL")


# --- mutations: one line broken, and the check that must notice ---------------------------------------------------

MUTATIONS = [
    ("partial(_ngrams, n=n), beta", "partial(_ngrams, n=1), beta", "check_lists_of_words_against_rouge_score"),
    ("for n in range(1, 5)", "for n in range(0, 4)", "check_random_texts_against_rouge_score"),
    ("partial(rouge_n, n=n) for n", "partial(rouge_n, n=2) for n", "check_by_hand"),
    ("range(len(words) - n + 1)", "range(len(words) - n)", "check_by_hand"),
    ("(ours & theirs).total(), ours", "(ours | theirs).total(), ours", "check_by_hand"),
    ("(ours & theirs).total(), ours", "len(ours & theirs), ours", "check_rouge_s_against_the_formulas"),
    ("ours.total(), theirs.total(), beta", "theirs.total(), ours.total(), beta", "check_by_hand"),
    ("(1 + beta**2) * precision", "(1 + beta) * precision", "check_by_hand"),
    ("recall + beta**2 * precision)", "precision + beta**2 * recall)", "check_by_hand"),
    ("part / whole if whole else 0.0", "part / whole", "check_identical_and_disjoint_texts"),
    ("above[j - 1] + 1 if word == other", "above[j] + 1 if word == other", "check_lists_of_words_against_rouge_score"),
    ("else max(above[j], row[-1]))\n        table.append(row)", "else above[j - 1])\n        table.append(row)",
     "check_lists_of_words_against_rouge_score"),
    ("if table[i][j - 1] > table[i - 1][j]:", "if table[i][j - 1] >= table[i - 1][j]:",
     "check_lists_of_words_against_rouge_score"),
    ("_common_positions(theirs, ours) for ours in prediction)", "_common_positions(theirs, ours) for ours in prediction[:1])",
     "check_examples_of_the_paper"),
    ("found & Counter(chain.from_iterable(prediction))", "found", "check_lists_of_words_against_rouge_score"),
    ("sum(map(len, prediction)), sum(map(len, reference)), beta", "sum(map(len, reference)), sum(map(len, prediction)), beta",
     "check_by_hand"),
    ("_sentences if kind == \"rougeLsum\" else", "_sentences if kind == \"rougeLSum\" else",
     "check_options_reach_the_kinds_they_are_for"),
    ("text.split(\"\\n\")", "text.split(\". \")", "check_random_texts_against_rouge_score"),
    ("[k**weight for k in range(min", "[k * weight for k in range(min", "check_examples_of_the_paper"),
    ("before[j - 1] + 1 if word == other", "1 if word == other", "check_examples_of_the_paper"),
    ("before[j - 1] + 1 if word == other", "before[j] + 1 if word == other", "check_examples_of_the_paper"),
    ("table[i - run][j - run] + f[run]", "table[i - 1][j - 1] + f[run]", "check_examples_of_the_paper"),
    ("table[i - run][j - run] + f[run] if run", "max(above[j], row[-1], table[i - run][j - run] + f[run]) if run",
     "check_rouge_w_against_the_paper_line_by_line"),
    ("if run else max(above[j], row[-1])", "if run else above[j]", "check_rouge_w_against_the_paper_line_by_line"),
    ("if run else max(above[j], row[-1])", "if run else row[-1]", "check_rouge_w_against_rouge_metric"),
    ("len(words) ** weight)", "len(words))", "check_rouge_w_against_rouge_metric"),
    (" ** (1 / weight) for words", " for words", "check_rouge_w_against_rouge_metric"),
    (" ** (1 / weight) for words in (prediction, reference)", " ** (1 / weight) for words in (reference, prediction)",
     "check_rouge_w_against_rouge_metric"),
    ("reference: Sequence[str], weight: float = 1.2", "reference: Sequence[str], weight: float = 2.0",
     "check_options_reach_the_kinds_they_are_for"),
    ("min(max_distance + 1, len(words))", "min(max_distance, len(words))", "check_rouge_s_against_rouge_metric"),
    ("min(max_distance + 1, len(words))", "max_distance + 2", "check_options_reach_the_kinds_they_are_for"),
    ("len(words) if max_distance is None", "5 if max_distance is None", "check_rouge_s_against_the_formulas"),
    ("range(1, farthest + 1)", "range(farthest + 1)", "check_rouge_s_against_rouge_metric"),
    ("range(1, farthest + 1)", "range(1, farthest)", "check_rouge_s_against_rouge_metric"),
    ("zip(words, words[step:], strict=False)", "zip(words[1:], words[step:], strict=False)",
     "check_options_reach_the_kinds_they_are_for"),
    ("pairs + _ngrams(words, 1) if", "pairs | _ngrams(words[:-1], 1) if", "check_rouge_su"),
    ("if unigrams else pairs", "if not unigrams else pairs", "check_examples_of_the_paper"),
    ("partial(rouge_s, unigrams=True)", "rouge_s", "check_options_reach_the_kinds_they_are_for"),
    ("    max_distance: int | None = 4,\n    *,", "    max_distance: int | None = None,\n    *,",
     "check_options_reach_the_kinds_they_are_for"),
    ("options[\"weight\"] = weight", "pass", "check_options_reach_the_kinds_they_are_for"),
    ("in (\"rougeS\", \"rougeSU\"):", "in (\"rougeS\",):", "check_options_reach_the_kinds_they_are_for"),
    ("options = {\"beta\": beta}", "options = {}", "check_options_reach_the_kinds_they_are_for"),
    ("return max((ROUGE[kind]", "return min((ROUGE[kind]", "check_the_best_reference_counts"),
    ("key=lambda score: score.fmeasure", "key=lambda score: score.recall", "check_the_best_reference_counts"),
    ("[references] if isinstance(references, str) else", "references if isinstance(references, str) else", "check_by_hand"),
    ("[score.fmeasure for score", "[score.recall for score", "check_the_best_reference_counts"),
    ("getattr(score, measure) for", "score.fmeasure for", "check_the_metric_of_evaluate"),
    ("references, kind, **options)]\n            for", "references, kind)]\n            for", "check_the_metric_of_evaluate"),
    ("if use_aggregator else values", "if not use_aggregator else values", "check_the_metric_of_evaluate"),
    ("for kind in rouge_types", "for kind in ROUGE", "check_the_metric_of_evaluate"),
    ("if not 1 <= weight", "if not 0 < weight", "check_refusals"),
    ("if not 0 <= beta < math.inf", "if not 0 <= beta", "check_refusals"),
    ("        if isinstance(words, str):", "        if isinstance(words, bytes):", "check_refusals"),
    ("_refuse_texts(*prediction, *reference)", "_refuse_texts(*prediction)", "check_refusals"),
    ("if not isinstance(several, str) and not several", "if False", "check_refusals"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("search", "replacement", "check"), MUTATIONS, ids=[f"{m[2][6:]}-{i}" for i, m in enumerate(MUTATIONS)]
)
def test_a_broken_line_is_noticed(search, replacement, check):
    module = broken_copy(metrics, search, replacement)
    with pytest.raises(
        (AssertionError, ArithmeticError, LookupError, LabError, TypeError, ValueError, pytest.fail.Exception)
    ):
        CHECKS[check](module)


def test_every_check_catches_a_mutation():
    assert {row[2] for row in MUTATIONS} == set(CHECKS)


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


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (26, 26), (17, 26), (1, 1)])
def test_interval_of_a_share_is_scipy_s(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_interval_of_a_share_refuses_counts_that_cannot_be(successes, n):
    with pytest.raises(LabError, match=f"successes={successes} of n={n}"):
        wilson_interval(successes, n)


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


# --- best of n ---------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_over_all_ways_to_draw():
    draw = np.random.default_rng(0)
    scores, measure = draw.normal(size=(3, 6)), draw.normal(size=(3, 6))
    for n in range(1, 7):
        by_hand = [
            np.mean([m[max(drawn, key=lambda i, s=s: s[i])] for drawn in itertools.combinations(range(6), n)])
            for s, m in zip(scores, measure, strict=True)
        ]
        chances = metrics.best_of_n_chances(scores, n)
        assert np.allclose(chances.sum(1), 1)
        assert np.allclose((chances * measure).sum(1), by_hand)


def test_equal_scores_share_nothing_twice():
    assert metrics.best_of_n_chances(np.ones((1, 4)), 4).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_than_there_are_is_refused(n):
    with pytest.raises(LabError, match=rf"n={n}.*\(2, 3\)"):
        metrics.best_of_n_chances(np.ones((2, 3)), n)
