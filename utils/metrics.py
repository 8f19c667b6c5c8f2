"""The ROUGE family from scratch, and bootstrap intervals for what it measures.

ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. Words are lower-cased runs of letters and
digits, without stemming, as in the `rouge-score` package.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import datasets
import evaluate
import numpy as np

from utils.lab import LabError


class Score(NamedTuple):
    """Precision, recall and their harmonic mean, each between 0 and 1."""

    precision: float
    recall: float
    fmeasure: float


def tokenize(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_n(prediction: str, reference: str, n: int = 1) -> Score:
    """ROUGE-N: how many n-grams of the two texts match, each n-gram counted at most as often as in the other text."""
    ours, theirs = _ngrams(tokenize(prediction), n), _ngrams(tokenize(reference), n)
    return _score(sum((ours & theirs).values()), sum(ours.values()), sum(theirs.values()))


def rouge_l(prediction: str, reference: str) -> Score:
    """ROUGE-L: the longest common subsequence of words, which need not stand next to each other."""
    ours, theirs = tokenize(prediction), tokenize(reference)
    return _score(_longest_common_subsequence(ours, theirs), len(ours), len(theirs))


ROUGE: dict[str, Callable[[str, str], Score]] = {
    "rouge1": lambda prediction, reference: rouge_n(prediction, reference, 1),
    "rouge2": lambda prediction, reference: rouge_n(prediction, reference, 2),
    "rougeL": rouge_l,
}


def rouge(predictions: Sequence[str], references: Sequence[str | Sequence[str]], kind: str = "rouge1") -> np.ndarray:
    """ROUGE F-measure of each prediction, shape (n,), float64. With several references the best one counts.

    One value a dialogue, not one mean: intervals are taken over dialogues. Raises `LabError` on unequal lengths, on
    an unknown `kind`, and on a row without a reference.
    """
    if kind not in ROUGE:
        raise LabError(f"There is no metric {kind!r}: choose one of {', '.join(ROUGE)}.")
    if len(predictions) != len(references):
        raise LabError(f"{len(predictions)} predictions for {len(references)} rows of references: give one for each.")
    values = np.empty(len(predictions))
    for i, (prediction, several) in enumerate(zip(predictions, references, strict=True)):
        several = [several] if isinstance(several, str) else several
        if not several:
            raise LabError(f"Row {i} has no reference summary.")
        values[i] = max(ROUGE[kind](prediction, reference).fmeasure for reference in several)
    return values


class RougeMetric(evaluate.Metric):
    """The ROUGE family behind the interface of `evaluate` (whose own `rouge` has to be fetched from the Hub).

    `RougeMetric().compute(predictions=[...], references=[...])` gives the mean F-measure of each kind; a reference is a
    string or a list of them.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": datasets.Value("string"), "references": references})
            for references in (datasets.Sequence(datasets.Value("string")), datasets.Value("string"))
        ]
        return evaluate.MetricInfo(description=__doc__, citation="Lin 2004", inputs_description="", features=features)

    def _compute(self, predictions: list[str], references: list[str] | list[list[str]]) -> dict[str, float]:
        return {kind: float(rouge(predictions, references, kind).mean()) for kind in ROUGE}


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


def copied_share(prediction: str, source: str, n: int = 3) -> float:
    """Share of the prediction's word n-grams that stand in `source`: 1 is a transcript, 0 is all in new words."""
    ours = _ngrams(tokenize(prediction), n)
    theirs = _ngrams(tokenize(source), n)
    total = sum(ours.values())
    return sum(count for gram, count in ours.items() if gram in theirs) / total if total else 0.0


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _score(matches: int, in_prediction: int, in_reference: int) -> Score:
    precision = matches / in_prediction if in_prediction else 0.0
    recall = matches / in_reference if in_reference else 0.0
    total = precision + recall
    return Score(precision, recall, 2 * precision * recall / total if total else 0.0)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: length for the part of `a` read so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
