"""The ROUGE family from scratch, and bootstrap intervals for what it measures.

ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, whose sections are named below. Words are
lower-cased runs of letters and digits, as in the `rouge-score` package. Left out: stemming, stop words, and the
jackknife of section 2.1 (the best of every M - 1 of M references, averaged, so that people and systems can be
compared); here the reference with the highest F-measure counts, as in `rouge-score`.

Lin's own script, ROUGE-1.5.5, parts from his paper in ROUGE-W and ROUGE-SU, where the paper is followed here. In ROUGE-W
the script applies the weight to the reference's length twice, so that a text does not recall all of itself, and takes
words for neighbours that are so in the reference alone. In ROUGE-SU it leaves out each text's last word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import datasets
import evaluate
import numpy as np

from utils.lab import LabError


class Score(NamedTuple):
    """Precision, recall and their weighted harmonic mean, each between 0 and 1."""

    precision: float
    recall: float
    fmeasure: float


# --- words to score: pure functions of lists of words ----------------------------------------------------------------


def rouge_n(prediction: Sequence[str], reference: Sequence[str], n: int = 1, *, beta: float = 1.0) -> Score:
    """ROUGE-N (section 2): the n-grams that match, each counted at most as often as in the other list of words.

    `beta` says how many times as much recall weighs as precision in F: 1 gives F1. Raises `LabError` on an `n` below 1.
    All five functions raise it on a `beta` that is negative or not finite and on a text in place of a list of words.
    """
    if n < 1:
        raise LabError(f"n={n}: an n-gram has at least one word.")
    return _overlap(prediction, reference, partial(_ngrams, n=n), beta)


def rouge_l(prediction: Sequence[str], reference: Sequence[str], *, beta: float = 1.0) -> Score:
    """ROUGE-L (section 3.1): the longest common subsequence of words, which need not stand next to each other."""
    return rouge_lsum([prediction], [reference], beta=beta)


def rouge_lsum(prediction: Sequence[Sequence[str]], reference: Sequence[Sequence[str]], *, beta: float = 1.0) -> Score:
    """ROUGE-Lsum (section 3.2): ROUGE-L of a text of several sentences, each a list of words.

    A word of a reference sentence is found when it stands in a longest common subsequence with any sentence of the
    prediction: the union of the subsequences counts. No word counts more often than the prediction has it, which the
    paper does not say and its script does. Two subsequences can be equally long; which one is taken is as in
    `rouge-score`. The union is over the reference's words, so precision and recall need not swap with the texts.
    """
    _refuse_texts(*prediction, *reference)
    found = Counter()
    for theirs in reference:
        positions = set().union(*(_common_positions(theirs, ours) for ours in prediction))
        found.update(theirs[i] for i in positions)
    matches = found & Counter(chain.from_iterable(prediction))
    return _score(matches.total(), sum(map(len, prediction)), sum(map(len, reference)), beta)


def rouge_w(prediction: Sequence[str], reference: Sequence[str], weight: float = 1.2, *, beta: float = 1.0) -> Score:
    """ROUGE-W (section 4): ROUGE-L in which a run of k matches in a row weighs f(k) = k ** weight.

    The inverse of f brings the weighted shares back to a scale of words. `weight` 1 is ROUGE-L; 1.2 is what Lin's script
    was run with at DUC. Raises `LabError` on a weight below 1, under which scattered words would weigh more.
    """
    if not 1 <= weight < math.inf:
        raise LabError(f"weight={weight}: take at least 1, or words far apart count for more than words in a row.")
    _refuse_texts(prediction, reference)
    matched = _weighted_common_subsequence(prediction, reference, weight)
    precision, recall = (_share(matched, len(words) ** weight) ** (1 / weight) for words in (prediction, reference))
    return _f_score(precision, recall, beta)


def rouge_s(
    prediction: Sequence[str],
    reference: Sequence[str],
    max_distance: int | None = 4,
    *,
    unigrams: bool = False,
    beta: float = 1.0,
) -> Score:
    """ROUGE-S (section 5): pairs of words in their order, with at most `max_distance` other words between them.

    0 gives ROUGE-2, None any distance. With `unigrams` single words count as well: ROUGE-SU, the section's extension,
    which tells a text in reverse from one that has no word in common. Raises `LabError` on a negative distance.
    """
    if max_distance is not None and max_distance < 0:
        raise LabError(f"max_distance={max_distance}: take 0 for neighbours, more for a gap, None for any distance.")

    def units(words: Sequence[str]) -> Counter:
        pairs = _skip_bigrams(words, max_distance)
        return pairs + _ngrams(words, 1) if unigrams else pairs

    return _overlap(prediction, reference, units, beta)


# --- texts to score --------------------------------------------------------------------------------------------------


def tokenize(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


ROUGE: dict[str, Callable[..., Score]] = {
    **{f"rouge{n}": partial(rouge_n, n=n) for n in range(1, 5)},
    "rougeL": rouge_l,
    "rougeLsum": rouge_lsum,
    "rougeW": rouge_w,
    "rougeS": rouge_s,
    "rougeSU": partial(rouge_s, unigrams=True),
}


def rouge_text(
    prediction: str,
    references: str | Sequence[str],
    kind: str = "rouge1",
    *,
    beta: float = 1.0,
    weight: float = 1.2,
    max_distance: int | None = 4,
) -> Score:
    """ROUGE of one text, against the one of its `references` that gives the highest F-measure.

    `kind` is one of `ROUGE`; for rougeLsum a newline ends a sentence. `weight` is read by rougeW, `max_distance` by
    rougeS and rougeSU. Raises `LabError` on an unknown kind, on no reference, and on what the function of that kind refuses.
    """
    _check_kind(kind)
    several = [references] if isinstance(references, str) else references
    if not several:
        raise LabError("There is no reference to compare with: give at least one text.")
    options = {"beta": beta}
    if kind == "rougeW":
        options["weight"] = weight
    if kind in ("rougeS", "rougeSU"):
        options["max_distance"] = max_distance
    split = _sentences if kind == "rougeLsum" else tokenize
    ours = split(prediction)
    return max((ROUGE[kind](ours, split(text), **options) for text in several), key=lambda score: score.fmeasure)


def rouge(predictions: Sequence[str], references: Sequence[str | Sequence[str]], kind: str = "rouge1") -> np.ndarray:
    """ROUGE F-measure of each prediction, shape (n,), float64. With several references the best one counts.

    One value a dialogue, not one mean: intervals are taken over dialogues. Raises `LabError` on unequal lengths, on
    an unknown `kind`, and on a row without a reference.
    """
    return np.array([score.fmeasure for score in _rouge_rows(predictions, references, kind)], dtype=np.float64)


class RougeMetric(evaluate.Metric):
    """The ROUGE family behind the interface of `evaluate` (whose own `rouge` has to be fetched from the Hub).

    `RougeMetric().compute(predictions=[...], references=[...])` gives the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L;
    a reference is a string or a list of them. Options of `compute`: `rouge_types`, any of `ROUGE`; `measure`, a field of
    `Score`; `use_aggregator=False` for one value a prediction in place of the mean; `beta`, `weight`, `max_distance` as
    in `rouge_text`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": datasets.Value("string"), "references": references})
            for references in (datasets.Sequence(datasets.Value("string")), datasets.Value("string"))
        ]
        return evaluate.MetricInfo(description=__doc__, citation="Lin 2004", inputs_description="", features=features)

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        rouge_types: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
        measure: str = "fmeasure",
        use_aggregator: bool = True,
        **options: float | None,
    ) -> dict[str, float] | dict[str, list[float]]:
        if measure not in Score._fields:
            raise LabError(f"There is no measure {measure!r}: choose one of {', '.join(Score._fields)}.")
        values = {
            kind: [getattr(score, measure) for score in _rouge_rows(predictions, references, kind, **options)]
            for kind in rouge_types
        }
        return {kind: float(np.mean(row)) for kind, row in values.items()} if use_aggregator else values


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, one value a dialogue.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. For a comparison pass the differences
    (after minus before, dialogue by dialogue): pairing takes out how hard each dialogue is.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise LabError(f"An interval needs at least two values in one row, got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise LabError(f"An interval needs finite values, got {values[~np.isfinite(values)][0]}.")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share, `successes` of `n` (Wilson 1927); `z` standard errors, 95 % by default.

    For few items, and where all or none succeed: a bootstrap of equal values would have width zero. The items must be
    independent. Raises `LabError` where `successes` is not between 0 and `n`.
    """
    if not 0 <= successes <= n or n < 1:
        raise LabError(f"successes={successes} of n={n}: there must be an item, and no more successes than items.")
    share, spread = successes / n, z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(
    name: str, values: Sequence[float] | np.ndarray, *, unit: str = "dialogues", digits: int = 3, seed: int = 0
) -> str:
    """A sentence about a paired difference, one value a `unit`, computed from it: a gain, a loss, or no difference shown."""
    low, high = bootstrap_interval(values, seed=seed)
    mean = float(np.mean(values))
    numbers = f"{mean:+.{digits}f}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}, {len(values)} {unit}"
    if low <= 0 <= high:
        return f"{name}: no difference shown ({numbers})."
    return f"{name}: {'higher' if mean > 0 else 'lower'} ({numbers})."


def best_of_n_chances(scores: np.ndarray, n: int) -> np.ndarray:
    """How likely each of a pool of samples is the best of `n` drawn from it without replacement: (rows, pool), rows sum to 1.

    `scores` (rows, pool): one row a prompt. The sum of chance times any measure is the expectation of that measure for best-of-n,
    over all ways to draw: less noise than one draw. Of equal scores the one further right counts as better. Its KL from the
    sampler is log n - (n - 1) / n nats at most, and about that where equal samples are rare (Beirami et al. 2024,
    arXiv:2401.01879). Raises `LabError` on an `n` that the pool does not have.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise LabError(f"n={n} of scores of shape {scores.shape}: give (rows, pool) and an n from 1 to the pool.")
    pool = scores.shape[1]
    ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")  # 0 is the worst
    by_rank = np.array([math.comb(rank, n - 1) / math.comb(pool, n) for rank in range(pool)])
    return by_rank[ranks]


def copied_share(prediction: str, source: str, n: int = 3) -> float:
    """Share of the prediction's word n-grams that stand in `source`: 1 is a transcript, 0 is all in new words."""
    ours = _ngrams(tokenize(prediction), n)
    theirs = _ngrams(tokenize(source), n)
    total = sum(ours.values())
    return sum(count for gram, count in ours.items() if gram in theirs) / total if total else 0.0


def _check_kind(kind: str) -> None:
    if kind not in ROUGE:
        raise LabError(f"There is no metric {kind!r}: choose one of {', '.join(ROUGE)}.")


def _rouge_rows(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], kind: str, **options: float | None
) -> list[Score]:
    _check_kind(kind)
    if len(predictions) != len(references):
        raise LabError(f"{len(predictions)} predictions for {len(references)} rows of references: give one for each.")
    for i, several in enumerate(references):
        if not isinstance(several, str) and not several:
            raise LabError(f"Row {i} has no reference summary.")
    rows = zip(predictions, references, strict=True)
    return [rouge_text(prediction, several, kind, **options) for prediction, several in rows]


def _sentences(text: str) -> list[list[str]]:
    return [tokenize(line) for line in text.split("\n")]


def _refuse_texts(*token_lists: Sequence[str]) -> None:
    for words in token_lists:
        if isinstance(words, str):
            raise LabError(f"{words[:40]!r} is a text, not a list of words: `tokenize` it, or call `rouge_text`.")


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _skip_bigrams(words: Sequence[str], max_distance: int | None) -> Counter:
    farthest = len(words) if max_distance is None else min(max_distance + 1, len(words))
    return Counter(chain.from_iterable(zip(words, words[step:], strict=False) for step in range(1, farthest + 1)))


def _overlap(
    prediction: Sequence[str], reference: Sequence[str], units: Callable[[Sequence[str]], Counter], beta: float
) -> Score:
    _refuse_texts(prediction, reference)
    ours, theirs = units(prediction), units(reference)
    return _score((ours & theirs).total(), ours.total(), theirs.total(), beta)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _score(matches: int, in_prediction: int, in_reference: int, beta: float) -> Score:
    return _f_score(_share(matches, in_prediction), _share(matches, in_reference), beta)


def _f_score(precision: float, recall: float, beta: float) -> Score:
    """Lin 2004, equation 4, which van Rijsbergen gave in 1979."""
    if not 0 <= beta < math.inf:
        raise LabError(f"beta={beta}: take 1 for F1, more to favour recall; for recall alone read `.recall`.")
    return Score(precision, recall, _share((1 + beta**2) * precision * recall, recall + beta**2 * precision))


def _common_positions(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Where in `a` the words of one longest common subsequence with `b` stand, the last first."""
    table = [[0] * (len(b) + 1)]  # table[i][j]: length for a[:i] and b[:j]
    for word in a:
        above, row = table[-1], [0]
        for j, other in enumerate(b, 1):
            row.append(above[j - 1] + 1 if word == other else max(above[j], row[-1]))
        table.append(row)
    positions, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            positions.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return positions


def _weighted_common_subsequence(a: Sequence[str], b: Sequence[str], weight: float) -> float:
    """Weight of the common subsequence that section 4 builds: each run of k words, in a row in both, adds k ** weight.

    As in the paper a match always extends the run that it ends, so that the subsequence is sometimes not the heaviest.
    """
    f = [k**weight for k in range(min(len(a), len(b)) + 1)]
    table = [[0.0] * (len(b) + 1)]  # table[i][j]: weight for a[:i] and b[:j]
    runs = [0] * (len(b) + 1)  # runs[j]: how many words in a row match, the last being the latest of `a` and b[j - 1]
    for i, word in enumerate(a, 1):
        above, row, before, runs = table[-1], [0.0], runs, [0]
        table.append(row)
        for j, other in enumerate(b, 1):
            run = before[j - 1] + 1 if word == other else 0
            runs.append(run)
            row.append(table[i - run][j - run] + f[run] if run else max(above[j], row[-1]))
    return table[-1][-1]
