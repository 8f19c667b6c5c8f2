"""Properties of the PPO engine under any input: padding, the order of rows, micro-batches, what stands in masked cells."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ppo import PROMPTS, load, make_trainer, without_seconds

from utils.ppo import exact_kl, gae, kl_estimate, masked_mean, masked_whiten, policy_loss, value_loss

GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e6, -1e6])
FEW = settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
QUICK = settings(max_examples=30, deadline=None)


@st.composite
def batches(draw):
    """Rewards, values and mask (rows, length): each row has at least one real token, which stand at its left."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rewards, values = torch.randn(2, len(lengths), max(lengths), generator=generator)
    return rewards, values, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def everything(rewards, values, mask, gamma=0.97, lam=0.9):
    """What the pure functions make of a batch, one after the other."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    whitened = masked_whiten(advantages, mask)
    kept = masked_whiten(rewards, mask, shift_mean=False)
    return advantages, returns, whitened, kept, masked_mean(rewards, mask)


@QUICK
@given(batches(), GARBAGE, st.integers(1, 4))
def test_padding_columns_and_what_stands_in_them_change_nothing(batch, garbage, columns):
    rewards, values, mask = batch
    plain = everything(*batch)
    dirty = [torch.where(mask, tensor, garbage) for tensor in (rewards, values)]
    wide = [torch.cat([tensor, torch.full((len(mask), columns), garbage)], 1) for tensor in dirty]
    mask_wide = torch.cat([mask, torch.zeros(len(mask), columns, dtype=torch.bool)], 1)
    for got in (everything(*dirty, mask), everything(*wide, mask_wide)):
        for one, other in zip(plain, got, strict=True):
            other = other[:, : mask.shape[1]] if other.dim() else other
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert all(
        torch.equal(t[:, mask.shape[1] :], torch.zeros(len(mask), columns)) for t in everything(*wide, mask_wide)[:4]
    )


@QUICK
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(batch, random):
    order = list(range(len(batch[2])))
    random.shuffle(order)
    for one, other in zip(everything(*batch), everything(*(tensor[order] for tensor in batch)), strict=True):
        torch.testing.assert_close(other, one[order] if one.dim() else one, atol=1e-5, rtol=1e-5)


@QUICK
@given(batches())
def test_with_lambda_one_the_returns_are_the_discounted_rewards_to_come(batch):
    rewards, values, mask = batch
    _, returns = gae(rewards, values, mask, 0.9, 1.0)
    for row, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            expected = sum(0.9**k * float(rewards[row, t + k]) for k in range(length - t))
            assert float(returns[row, t]) == pytest.approx(expected, abs=1e-5)


@QUICK
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_kl_is_the_expectation_of_k1_and_k3_and_k3_is_never_negative(logits, others):
    p, q = torch.tensor(logits), torch.tensor(others[: len(logits)])
    logprobs, ref_logprobs = p.log_softmax(-1), q.log_softmax(-1)
    exact = float(exact_kl(p, q))
    for kind in ("k1", "k3"):
        estimates = kl_estimate(logprobs, ref_logprobs, kind)
        assert float((logprobs.exp() * estimates).sum()) == pytest.approx(exact, abs=1e-5)
    assert bool((kl_estimate(logprobs, ref_logprobs, "k3") >= -1e-6).all())


@QUICK
@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0.05, 0.5))
def test_clipping_never_makes_a_loss_smaller(log_ratio, advantage, clip):
    x, zero, a = torch.tensor(log_ratio), torch.tensor(0.0), torch.tensor(advantage)
    assert float(policy_loss(x, zero, a, clip)) >= float(-a * x.exp())
    assert float(value_loss(x, zero, a, clip)) >= float((x - a) ** 2 / 2)


@pytest.fixture(params=["llama", "gpt2", "t5"])
def quick_tiny(request, tiny_folders):
    """A run of one minibatch, made anew from the same weights."""
    model, tokenizer = load(tiny_folders[request.param])

    def make(**given):
        plain = {
            "prompts": PROMPTS * 2,
            "batch_size": 8,
            "minibatch_size": 8,
            "micro_batch_size": 4,
            "steps": 1,
            "learning_rate": 1e-3,
        }
        return make_trainer(copy.deepcopy(model), tokenizer, **plain | given)

    return make


def learn(trainer, change=lambda rollout: None):
    """Metrics and gradients' effect of one update, after `change` has been at the rollout."""
    torch.manual_seed(7)
    rollout = trainer.rollout(trainer.rows)
    trainer.score(rollout)
    change(rollout)
    return trainer.update(rollout), [p.detach().clone() for p in trainer.parameters]


def same(one, other, tolerance):
    (metrics, weights), (others, other_weights) = one, other
    assert without_seconds([metrics])[0] == pytest.approx(without_seconds([others])[0], rel=1e-4, abs=1e-5)
    for a, b in zip(weights, other_weights, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-3)


@FEW
@given(garbage=GARBAGE)
def test_an_update_never_looks_at_masked_cells(quick_tiny, garbage):
    def spoil(rollout):
        for tensor in (rollout.logprobs, rollout.ref_logprobs, rollout.values):
            tensor[~rollout.mask] = garbage

    plain, dirty = (learn(quick_tiny(max_new_tokens=20), change) for change in (lambda rollout: None, spoil))
    assert plain[0] == dirty[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], dirty[1], strict=True))


@FEW
@given(micro=st.sampled_from([1, 2, 3, 4, 5, 8, 100]), completions=st.sampled_from([1, 2, 4]))
def test_micro_batches_of_any_size_give_the_same_update(quick_tiny, micro, completions):
    given_ = {
        "num_completions": completions,
        "batch_size": 8 // completions,
        "prompts": PROMPTS[: 8 // completions] * 2,
    }
    sizes = (8, micro)
    same(*(learn(quick_tiny(micro_batch_size=size, epochs=1, **given_)) for size in sizes), tolerance=3e-4)


@FEW
@given(order=st.permutations(range(8)))
def test_an_update_does_not_depend_on_the_order_of_rows(quick_tiny, order):
    def permute(rollout):
        for name in ("prompts", "prompt_ids", "completions"):
            setattr(rollout, name, [getattr(rollout, name)[i] for i in order])
        for name in ("logprobs", "ref_logprobs", "values", "mask", "scores"):
            setattr(rollout, name, getattr(rollout, name)[list(order)])
        rollout.micro_batches = [
            [[order.index(row) for row in rows] for rows in batch] for batch in rollout.micro_batches
        ]

    same(learn(quick_tiny()), learn(quick_tiny(), permute), tolerance=2e-4)
