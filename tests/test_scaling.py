"""The language of known entropy, the tiny decoders trained on it, and the fits, each against a value found another way."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.lab import LabError
from utils.scaling import (
    CHINCHILLA,
    PUBLISHED,
    REPLICATION,
    ScalingLaw,
    bootstrap_laws,
    expected_loss,
    fit_scaling_law,
    kaplan_optimal,
    markov_language,
    sample,
    tiny_decoder,
    train_and_read,
    zipf_language,
)

LAW = ScalingLaw(E=1.2, A=30.0, alpha=0.5, B=90.0, beta=0.6)
SIZES, TOKENS = np.meshgrid([1e3, 3e3, 1e4, 3e4, 1e5], [3e3, 1e4, 3e4, 1e5, 3e5])


@pytest.mark.parametrize(
    ("rows", "entropy"),
    [
        (torch.full((8, 8), 1 / 8), math.log(8)),
        (torch.eye(5).roll(1, 1), 0.0),
        # shares 5/6 and 1/6; entropies of the rows 0.325083 and 0.693147 nats
        (torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64), 5 / 6 * 0.3250829734 + 1 / 6 * math.log(2)),
    ],
    ids=["uniform", "a cycle", "two words"],
)
def test_entropy_is_that_worked_out_by_hand(rows, entropy):
    assert markov_language(rows).entropy == pytest.approx(entropy, abs=1e-9)


def test_shares_are_those_after_many_steps():
    language = zipf_language(16)
    power = torch.linalg.matrix_power(language.transition, 2000)
    torch.testing.assert_close(power, language.stationary.expand(16, 16), atol=1e-9, rtol=0)


def test_sampled_texts_follow_the_language():
    language = zipf_language(6, seed=2)
    texts = sample(language, 2000, 60)
    places = (texts[:, :-1].flatten(), texts[:, 1:].flatten())
    pairs = torch.zeros(6, 6).index_put_(places, torch.ones(()), accumulate=True)
    seen = pairs.sum(1) > 2000
    rows = pairs / pairs.sum(1, keepdim=True)
    torch.testing.assert_close(rows[seen], language.transition.float()[seen], atol=0.03, rtol=0)
    assert torch.equal(texts, sample(language, 2000, 60))


@pytest.mark.parametrize("rows", [torch.ones(2, 3) / 3, torch.ones(2, 2), torch.tensor([[1.5, -0.5], [0.5, 0.5]])])
def test_rows_that_are_no_distribution_are_refused(rows):
    with pytest.raises(LabError, match="transition"):
        markov_language(rows)


def test_a_model_that_knows_the_language_has_its_entropy_as_loss():
    language = zipf_language(8)
    texts = sample(language, 20, 10)
    knows = lambda batch: SimpleNamespace(logits=language.transition[batch].log())  # noqa: E731
    guesses = lambda batch: SimpleNamespace(logits=torch.zeros(*batch.shape, 8))  # noqa: E731
    assert expected_loss(knows, language, texts) == pytest.approx(language.entropy, abs=1e-5)
    rows = language.transition[texts[:, :-1]]
    by_hand = language.entropy + math.log(8) + torch.xlogy(rows, rows).sum(-1).mean().item()
    assert expected_loss(guesses, language, texts) == pytest.approx(by_hand, abs=1e-5)


def test_training_approaches_the_entropy_and_is_repeatable():
    language = zipf_language(16)
    texts, fresh = sample(language, 400, 33), sample(language, 40, 33, seed=1)
    runs = [
        train_and_read(tiny_decoder(16, 8), texts, (2048, 12_288), lambda model: expected_loss(model, language, fresh))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    early, late = runs[0]
    assert math.log(16) > early > late > language.entropy


def test_reads_beyond_the_text_and_odd_widths_are_refused():
    texts = sample(zipf_language(8), 32, 9)
    with pytest.raises(LabError, match="reads"):
        train_and_read(tiny_decoder(8, 4), texts, (10_000,), lambda model: 0.0)
    with pytest.raises(LabError, match="width"):
        tiny_decoder(8, 5)


def test_a_law_is_found_again_from_its_own_losses():
    found = fit_scaling_law(SIZES, TOKENS, LAW.loss(SIZES, TOKENS))
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=1e-3)


def test_one_bad_run_does_not_bend_the_curve():
    losses = LAW.loss(SIZES, TOKENS)
    losses[2, 2] *= 1.3
    found = fit_scaling_law(SIZES, TOKENS, losses)
    assert abs(found.E / LAW.E - 1) < 0.01


def test_the_interval_of_the_floor_holds_the_true_one_and_has_a_width():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.003, SIZES.shape))
    floors = [law.E for law in bootstrap_laws(SIZES, TOKENS, LAW.loss(SIZES, TOKENS) * noise, resamples=100)]
    low, high = np.quantile(floors, [0.025, 0.975])
    assert low < LAW.E < high
    assert high - low < 0.5


@pytest.mark.parametrize("law", [LAW, CHINCHILLA, REPLICATION], ids=["made up", "Chinchilla", "replication"])
def test_the_optimum_is_where_a_search_along_the_budget_finds_it(law):
    parameters, tokens = law.compute_optimal(1e21)
    assert 6 * parameters * tokens == pytest.approx(1e21)
    grid = parameters * np.exp(np.linspace(-1, 1, 2001))
    assert grid[law.loss(grid, 1e21 / 6 / grid).argmin()] == pytest.approx(parameters, rel=2e-3)


def test_tokens_to_reach_a_loss_reach_it():
    tokens = LAW.tokens_to_reach(2.0, 1e4)
    assert LAW.loss(1e4, tokens) == pytest.approx(2.0)
    assert np.isinf(LAW.tokens_to_reach(LAW.E, 1e4))


def test_published_laws_give_what_their_papers_say():
    gopher = PUBLISHED["Gopher"].compute
    parameters, _ = CHINCHILLA.compute_optimal(gopher)
    assert 30e9 < parameters < 80e9  # Hoffmann et al., table 3: 40 to 70 billion by their three approaches
    assert kaplan_optimal(gopher)[0] > 2 * parameters
    replicated, tokens = REPLICATION.compute_optimal(gopher)
    assert 15 < tokens / replicated < 30  # Besiroglu et al.: about 20 tokens a parameter


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([1e3, 2e3], [1e3, 2e3, 3e3], [2.0, 2.0, 2.0]), "one of each a run"),
        (([1e3, 2e3, 3e3], [1e3, 2e3, 3e3], [2.0, math.nan, 2.0]), "diverged"),
        (([1e3, 1e3, 3e3], [1e3, 2e3, 3e3], [2.0, 2.0, 2.0]), "three of each"),
    ],
)
def test_runs_that_cannot_be_fitted_are_refused(columns, words):
    with pytest.raises(LabError, match=words):
        fit_scaling_law(*columns)
