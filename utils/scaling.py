"""Scaling laws: a language whose entropy is known exactly, tiny decoders trained on it, and fits of loss against size and data.

The language is a Markov chain over words: the next word depends on the last one alone, so its entropy rate is a sum
that can be written down, and a fitted law has something to be right about. Two things in it make learning slow. Words are
unequal (Zipf), so that rare ones are met rarely: that is a price of little data, as in Hutter 2021, "Learning Curve Theory"
(arXiv:2102.04074). And what follows a word is made of patterns of falling importance, more than a small model has
dimensions: that is the price of few parameters, as in Bahri et al. 2021, "Explaining neural scaling laws" (arXiv:2102.06701).

The fit is that of Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv:2203.15556), called
Chinchilla here, section 3.3: the Huber loss between logarithms, from several starts. Their L-BFGS is replaced by
Gauss-Newton steps, which do hundreds of bootstrap fits at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from utils.lab import LabError, progress

# --- a language with a known entropy -------------------------------------------------------------------------------


class Language(NamedTuple):
    """A Markov chain over words, in float64."""

    transition: Tensor  # (vocabulary, vocabulary): probability of the column's word after the row's
    stationary: Tensor  # (vocabulary,): share of each word in a long text
    entropy: float  # nats a word; no model's expected loss is below it


def markov_language(transition: Tensor) -> Language:
    """The language of a (vocabulary, vocabulary) matrix of transition probabilities, each row of which sums to 1.

    Entropy rate: the sum over words of the word's share times the entropy of what follows it (Cover and Thomas, "Elements of
    Information Theory", 2006, theorem 4.2.4). Raises `LabError` where a row is no distribution.
    """
    transition = transition.double()
    if transition.ndim != 2 or len(transition) != transition.shape[1]:
        raise LabError(f"`transition` has shape {tuple(transition.shape)}: give a square matrix, one row a word.")
    if (transition < 0).any() or not torch.allclose(transition.sum(1), torch.ones(()).double(), atol=1e-9):
        raise LabError("A row of `transition` is no distribution: its values must not be negative and must sum to 1.")
    # stationary @ transition = stationary, with one of these dependent equations replaced by: the shares sum to 1
    equations = transition.T - torch.eye(len(transition), dtype=torch.float64)
    equations[-1] = 1
    stationary = torch.linalg.solve(equations, torch.eye(len(transition), dtype=torch.float64)[-1])
    entropy = -(stationary[:, None] * torch.xlogy(transition, transition)).sum()
    return Language(transition, stationary, entropy.item())


def zipf_language(
    vocabulary: int = 128, *, zipf: float = 0.5, strength: float = 1.2, decay: float = 0.9, seed: int = 0
) -> Language:
    """A random language: words of Zipf frequency, and after each its own mixture of patterns.

    The score of word j after word i is `-zipf * log(j)` plus the sum over patterns k of `strength * k ** -decay * u[i, k] * v[j, k]`,
    with u and v standard normal; the softmax of the scores is row i. English has a `zipf` near 1. Here it is lower, so that
    no single word makes up most of a text and languages of different seeds are alike in entropy.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    u, v = torch.randn(2, vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    scores = -zipf * rank.log() + (u * strength * rank**-decay) @ v.T
    return markov_language(scores.softmax(1))


def sample(language: Language, sequences: int, length: int, *, seed: int = 0) -> Tensor:
    """Independent texts, (sequences, length) int64, each begun with a word drawn by the words' shares in the language."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = len(language.stationary)
    # All rows' running sums laid end to end, row i between i and i + 1: one search finds the next word of every text.
    sums = (language.transition.cumsum(1) + torch.arange(vocabulary)[:, None]).flatten()
    words = [torch.multinomial(language.stationary, sequences, replacement=True, generator=generator)]
    for _ in range(length - 1):
        drawn = torch.rand(sequences, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(sums, words[-1] + drawn, right=True) - words[-1] * vocabulary
        words.append(place.clamp(0, vocabulary - 1))  # a running sum may miss 1 by rounding
    return torch.stack(words, 1)


# --- a family of tiny decoders -------------------------------------------------------------------------------------


def tiny_decoder(vocabulary: int, width: int, *, seed: int = 0) -> LlamaForCausalLM:
    """One Llama block of an even `width` between two tables, embeddings and head, with random weights."""
    if width < 2 or width % 2:
        raise LabError(f"`width` is {width}: rotary positions turn pairs of dimensions, so give an even number.")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    # From 0.02, the usual scale, the first few steps of a rare word would overwrite where it began.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    return model


@torch.no_grad()
def expected_loss(model: PreTrainedModel, language: Language, texts: Tensor, *, batch_size: int = 256) -> float:
    """The model's expected cross-entropy in nats a word, at the positions of `texts` (sequences, length).

    The entropy of the language plus the mean Kullback-Leibler divergence from the true next-word distribution to the model's: the
    words that happened to follow add no noise.
    """
    total = 0.0
    for batch in texts[:, :-1].split(batch_size):
        truth = language.transition[batch].float()
        logprobs = model(batch).logits.float().log_softmax(-1)
        total += (torch.xlogy(truth, truth) - truth * logprobs).sum().item()
    return language.entropy + total / texts[:, :-1].numel()


def train_and_read(
    model: PreTrainedModel,
    texts: Tensor,
    reads: Sequence[int],
    evaluate: Callable[[PreTrainedModel], float],
    *,
    batch_size: int = 32,
    learning_rate: float = 0.02,
    description: str = "training",
) -> list[float]:
    """Train in place, once over `texts` (sequences, length), and call `evaluate` when each number of words in `reads` is used.

    A loss read half-way through a schedule that decays later is too high for its number of words (Hoffmann et al., section
    2). So the learning rate is constant after a warm-up and does not know where the run ends, and what is
    evaluated is an average of the weights in which step t counts as t to the power 8 (polynomial-decay averaging, Shamir and Zhang
    2013, arXiv:1212.1824): it does for the noise what decay would do, at every step.

    AdamW with no momentum and a long memory of squared gradients, betas (0, 0.999): a rare word's is remembered until it is met
    again. The gradient's norm is clipped to 1. Without that the loss of wide models rises again and again, since one rare word's
    large gradient moves all of the head. The rate falls as the square root of the width: wider sums need smaller steps.

    Runs on one thread, `evaluate` as well: the matrices are so small that threads would wait for each other longer than they work.
    """
    per_step = batch_size * (texts.shape[1] - 1)
    steps = [round(read / per_step) for read in reads]
    if not steps or min(steps) < 1 or max(steps) * batch_size > len(texts):
        raise LabError(
            f"`reads` asks for {min(reads, default=0)} to {max(reads, default=0)} words of {len(texts) * (texts.shape[1] - 1)}, "
            f"{per_step} a step: ask for at least one step and for no more than there is."
        )
    average = type(model)(model.config).eval()
    average.load_state_dict(model.state_dict())
    weights, averaged = list(model.parameters()), list(average.parameters())
    rate = learning_rate * (8 / model.config.hidden_size) ** 0.5
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    losses = []
    with _one_thread():
        for step in progress(range(1, max(steps) + 1), description=description):
            batch = texts[(step - 1) * batch_size : step * batch_size]
            logits = model(batch[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
            torch._foreach_lerp_([w.data for w in averaged], [w.data for w in weights], 9 / (step + 8))
            if step in steps:
                losses += [evaluate(average)] * steps.count(step)
    return losses


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch work on one thread, and afterwards on as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the law, and its fit ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalingLaw:
    """Loss in nats a token, `E + A / N ** alpha + B / D ** beta`, of N parameters trained on D tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """The predicted loss, of the shape that the two arguments have together."""
        parameters, tokens = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def tokens_to_reach(self, loss: float, parameters: ArrayLike) -> np.ndarray:
        """Tokens after which a model of that size has that loss; infinite where it never gets there."""
        left = loss - self.E - self.A / np.asarray(parameters, dtype=float) ** self.alpha
        return np.where(left > 0, self.B / np.maximum(left, 1e-300), np.inf) ** (1 / self.beta)

    def compute_optimal(self, compute: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss for a budget in floating-point operations, at 6 N D of them.

        Hoffmann et al. 2022, equation 4: where the law's slopes along the line of equal compute balance.
        """
        if not compute > 0:
            raise LabError(f"`compute` is {compute}: give a budget of more than 0 floating-point operations.")
        total = self.alpha + self.beta
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        parameters = balance * (compute / 6) ** (self.beta / total)
        return parameters, compute / 6 / parameters


def fit_scaling_law(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> ScalingLaw:
    """Fit the law to runs, one value each of parameters, tokens and loss (nats a token), all of shape (runs,)."""
    data = _as_runs(parameters, tokens, losses)
    return _as_law(_best_fit(*data))


def bootstrap_laws(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, *, resamples: int = 300, seed: int = 0
) -> list[ScalingLaw]:
    """Fits to resamples of a grid of runs, for intervals: sizes and read-outs are both drawn anew, with replacement.

    Losses read off one run share its luck, and those at one number of tokens share its data, so single cells are no
    independent draws. Whole rows and whole columns are drawn (the pigeonhole bootstrap: Owen 2007, arXiv:0711.1990). A resample with
    fewer than three different sizes or numbers of tokens says nothing about a curve and is drawn again.
    """
    data = _as_runs(parameters, tokens, losses)
    rows, columns = (np.unique(values, return_inverse=True)[1] for values in data[:2])
    generator = np.random.default_rng(seed)
    counts = [
        _draws(generator, resamples, row.max() + 1)[:, row] for row in (rows, columns)
    ]  # each (resamples, runs): how often the run's size, or its number of tokens, was drawn
    start = _best_fit(*data)
    fits, _ = _fit(*data, starts=np.tile(start, (resamples, 1)), weights=counts[0] * counts[1])
    return [_as_law(fit) for fit in fits]


def _draws(generator: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """How often each of n is drawn in n draws, (resamples, n), at least three of them once."""
    counts = np.empty((resamples, n))
    for i in range(resamples):
        while True:
            counts[i] = np.bincount(generator.integers(n, size=n), minlength=n)
            if (counts[i] > 0).sum() >= 3:
                break
    return counts


def _as_runs(*columns: ArrayLike) -> list[np.ndarray]:
    parameters, tokens, losses = (np.asarray(column, dtype=float).ravel() for column in columns)
    if not len(parameters) == len(tokens) == len(losses):
        raise LabError(
            f"{len(parameters)} parameters, {len(tokens)} tokens, {len(losses)} losses: give one of each a run."
        )
    if not all((np.isfinite(column) & (column > 0)).all() for column in (parameters, tokens, losses)):
        raise LabError("Parameters, tokens and losses must be positive numbers: look for a run that diverged.")
    if len(np.unique(parameters)) < 3 or len(np.unique(tokens)) < 3:
        raise LabError(
            f"{len(np.unique(parameters))} sizes and {len(np.unique(tokens))} numbers of tokens: a curve with a floor needs "
            "three of each."
        )
    return [parameters, tokens, losses]


def _as_law(fit: np.ndarray) -> ScalingLaw:
    e, a, alpha, b, beta = fit
    return ScalingLaw(math.exp(e), math.exp(a), float(alpha), math.exp(b), float(beta))


def _best_fit(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The best of the fits from a grid of starts, as Hoffmann et al. do: (5,), of log E, log A, alpha, log B, beta."""
    starts = []
    for floor, term, alpha, beta in itertools.product((0.3, 0.6, 0.9), (0.03, 0.3), (0.3, 0.6, 1.2), (0.3, 0.6, 1.2)):
        # floor and terms as shares of the lowest loss, each term in the middle of the grid
        e, log_term = np.log(np.array([floor, term]) * losses.min())
        starts.append(
            [e, log_term + alpha * np.log(parameters).mean(), alpha, log_term + beta * np.log(tokens).mean(), beta]
        )
    fits, objectives = _fit(parameters, tokens, losses, starts=np.array(starts))
    return fits[np.argmin(objectives)]


def _fit(
    parameters: np.ndarray,
    tokens: np.ndarray,
    losses: np.ndarray,
    *,
    starts: np.ndarray,
    weights: np.ndarray | None = None,
    delta: float = 1e-3,
    iterations: int = 300,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits from `starts` (fits, 5), all at once, and their objectives (fits,). `weights` (fits, runs) counts each run.

    Levenberg-Marquardt steps on the Huber loss of the logarithms' differences: a run further than `delta` from the
    curve pulls with constant force, so one bad run cannot bend it.
    """
    weights = np.ones((len(starts), len(losses))) if weights is None else weights
    log_n, log_d, target = np.log(parameters), np.log(tokens), np.log(losses)

    def evaluate(fits):
        e, a, alpha, b, beta = fits.T[:, :, None]
        terms = np.stack([e + 0 * log_n, a - alpha * log_n, b - beta * log_d])  # log of each term, (3, fits, runs)
        predicted = np.logaddexp.reduce(terms)
        share, residual = np.exp(terms - predicted), predicted - target
        slopes = np.stack([share[0], share[1], -share[1] * log_n, share[2], -share[2] * log_d], axis=-1)
        size = np.abs(residual)
        huber = np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))
        return slopes, residual, (weights * huber).sum(1)

    fits, damping = np.array(starts, dtype=float), np.full(len(starts), 1e-2)
    slopes, residual, objective = evaluate(fits)
    for _ in range(iterations):
        pull = weights * np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))
        curvature = np.einsum("srk,sr,srl->skl", slopes, pull, slopes)
        gradient = np.einsum("srk,sr->sk", slopes, pull * residual)
        diagonal = np.einsum("skk->sk", curvature)
        damped = curvature + (damping[:, None] * diagonal + 1e-12)[:, None] * np.eye(5)
        moved = fits - np.clip(np.linalg.solve(damped, gradient[..., None])[..., 0], -5, 5)
        new_slopes, new_residual, new_objective = evaluate(moved)
        better = new_objective < objective
        fits = np.where(better[:, None], moved, fits)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        residual = np.where(better[:, None], new_residual, residual)
        objective = np.where(better, new_objective, objective)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return fits, objective


# --- published laws and models -------------------------------------------------------------------------------------

# Hoffmann et al. 2022, approach 3, with the exponents before rounding; their own other two approaches disagree with it.
CHINCHILLA = ScalingLaw(E=1.6934, A=406.4, alpha=0.3392, B=410.7, beta=0.2849)
# Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt" (arXiv:2404.10102): the same runs, read off the paper's
# figure and fitted again; what was wrong was an optimizer that stopped too early.
REPLICATION = ScalingLaw(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


def kaplan_optimal(compute: float) -> tuple[float, float]:
    """Parameters and tokens that Kaplan et al. 2020 (arXiv:2001.08361, section 6.1) would have advised for a budget in operations.

    Parameters: 1.3e9 times the budget in petaflop-days to the power 0.73. Tokens: what is left at 6 N D.
    """
    parameters = 1.3e9 * (compute / 8.64e19) ** 0.73
    return parameters, compute / 6 / parameters


class Published(NamedTuple):
    """A published model: its parameters, the tokens it was trained on, and where both stand."""

    parameters: float
    tokens: float
    source: str

    @property
    def compute(self) -> float:
        """Floating-point operations of its training, 6 N D."""
        return 6 * self.parameters * self.tokens


TRAINING_RUNS = {
    "GPT-3": Published(175e9, 300e9, "Brown et al. 2020, arXiv:2005.14165"),
    "Gopher": Published(280e9, 300e9, "Rae et al. 2021, arXiv:2112.11446"),
    "Chinchilla": Published(70e9, 1.4e12, "Hoffmann et al. 2022, arXiv:2203.15556"),
    "BLOOM": Published(176e9, 366e9, "BigScience 2022, arXiv:2211.05100"),
    "LLaMA-7B": Published(6.7e9, 1.0e12, "Touvron et al. 2023, arXiv:2302.13971"),
    "LLaMA-13B": Published(13.0e9, 1.0e12, "Touvron et al. 2023, arXiv:2302.13971"),
    "LLaMA-33B": Published(32.5e9, 1.4e12, "Touvron et al. 2023, arXiv:2302.13971"),
    "LLaMA-65B": Published(65.2e9, 1.4e12, "Touvron et al. 2023, arXiv:2302.13971"),
    "BloombergGPT": Published(50.6e9, 569e9, "Wu et al. 2023, arXiv:2303.17564"),
    "SmolLM2-135M": Published(134.5e6, 2.0e12, "Allal et al. 2025, arXiv:2502.02737"),
}
