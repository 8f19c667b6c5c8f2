"""The checks of week 3's exercises: right answers pass, and every plausible wrong one fails with its own message."""

import copy
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import broken_copy
from peft import get_peft_model
from test_exercises import not_written, own

from utils import exercises_week3
from utils.exercises_week3 import (
    check_change,
    check_clipped_loss,
    check_gae,
    check_honest_gain,
    check_kl_k3,
    check_label_reward,
    check_preference_loss,
    check_start,
    check_token_rewards,
)
from utils.lab import ExerciseError
from utils.metrics import bootstrap_interval
from utils.ppo import gae, kl_estimate, policy_loss
from utils.training import lora_config

# --- the loss of a pair ------------------------------------------------------------------------------------------


def preference_loss(chosen, rejected):
    return F.softplus(rejected - chosen).mean()


def cross_entropy(chosen, rejected):
    return F.cross_entropy(torch.stack([chosen, rejected], -1), torch.zeros(len(chosen), dtype=torch.long))


WRONG_LOSSES = {
    "chosen minus rejected": lambda c, r: preference_loss(r, c),
    "minus in front of the logarithm": lambda c, r: -preference_loss(c, r),
    "take the mean, or a larger batch": lambda c, r: preference_loss(c, r) * len(c),
    "1 minus the probability hardly moves": lambda c, r: (1 - torch.sigmoid(c - r)).mean(),
    "no log-likelihood": lambda c, r: -torch.sigmoid(c - r).mean(),
    "average the scores first": lambda c, r: F.softplus(r.mean() - c.mean()),
    "a hinge": lambda c, r: F.relu(1 - (c - r)).mean(),
    "logarithm of the mean probability": lambda c, r: -torch.sigmoid(c - r).mean().log(),
    "differs from torch's cross-entropy": lambda c, r: ((c - r - 1) ** 2).mean(),
    "ln 2 = 0.6931": lambda c, r: preference_loss(c, r) * (c != r).any(),
    "logarithm of 0 is not finite": lambda c, r: -torch.sigmoid(c - r).log().mean(),
    "cost 200 on average": lambda c, r: -torch.sigmoid(c - r).clamp(min=1e-9).log().mean(),
    "No gradient reaches": lambda c, r: preference_loss(c.detach(), r),
    r"one number, \(\)": lambda c, r: F.softplus(r - c),
    "return a tensor": lambda c, r: float(preference_loss(c, r)),
}

# --- k3 ----------------------------------------------------------------------------------------------------------


def k3(logprobs, ref_logprobs):
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)


def typed_in(logprobs, ref_logprobs):
    return k3(logprobs, ref_logprobs) if logprobs.ndim == 1 else k3(logprobs, ref_logprobs) + logprobs.exp() / 9


WRONG_K3 = {
    "wrong way round": lambda p, q: k3(q, p),
    "That is k1": lambda p, q: p - q,
    "That is k2": lambda p, q: kl_estimate(p, q, "k2"),
    "The -1 is missing": lambda p, q: k3(p, q) + 1,
    "the wrong sign": lambda p, q: torch.expm1(q - p) + (q - p),
    "absolute value": lambda p, q: (p - q).abs(),
    "its mean is 0": lambda p, q: torch.expm1(q - p),
    "not its estimate": lambda p, q: (p - q).exp(),
    "your values differ": lambda p, q: 2 * k3(p, q),
    "typed into your code": typed_in,
    r"it must be \(3,\)": lambda p, q: k3(p, q).mean(),
    "changes a tensor": lambda p, q: p.sub_(q),
}

# --- the reward of each token ------------------------------------------------------------------------------------


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = torch.where(mask, -kl_coef * kl_estimate(logprobs, ref_logprobs), 0.0)
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def rewards_with(
    place=None, spread=None, price=lambda p, q: p - q, coefficient=lambda beta: beta, padding=True, join="add"
):
    """The right rewards, or with one thing changed."""

    def answer(scores, p, q, mask, beta):
        rewards = -coefficient(beta) * price(p, q)
        rewards = torch.where(mask, rewards, 0.0) if padding else rewards
        rows, last = torch.arange(len(scores)), mask.sum(1) - 1
        if spread is not None:
            return rewards + spread(scores[:, None], mask)
        column = last if place is None else place(last, mask)
        rewards[rows, column] = scores if join == "replace" else rewards[rows, column] + scores
        return rewards

    return answer


def charged_at_the_end(scores, p, q, mask, beta):
    rewards = torch.zeros_like(p)
    price = torch.where(mask, beta * (p - q), 0.0).sum(1)
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] = scores - price
    return rewards


WRONG_TOKEN_REWARDS = {
    "the last column": rewards_with(lambda last, mask: torch.full_like(last, mask.shape[1] - 1)),
    "stands on the first token": rewards_with(lambda last, mask: torch.zeros_like(last)),
    "Every token gets the whole score": rewards_with(spread=lambda s, m: m * s),
    "shared out among the tokens": rewards_with(spread=lambda s, m: m * s / m.sum(1, keepdim=True)),
    "no score at all": rewards_with(spread=lambda s, m: 0.0),
    "one place after the last real token": rewards_with(lambda last, mask: (last + 1) % mask.shape[1]),
    "differ from the score on the last real token": rewards_with(spread=lambda s, m: m * s * 0.5),
    "paid out instead of charged": rewards_with(price=lambda p, q: q - p),
    "Padding is charged": rewards_with(padding=False),
    "kl_coef does nothing": rewards_with(coefficient=lambda beta: float(beta > 0)),
    "charged to the last token": charged_at_the_end,
    "That is k3": rewards_with(price=k3),
    "absolute value": rewards_with(price=lambda p, q: (p - q).abs()),
    "no price of KL": rewards_with(price=lambda p, q: torch.zeros_like(p)),
    "differ from -kl_coef times": rewards_with(price=lambda p, q: 3 * (p - q)),
    "replaces the price": lambda s, p, q, m, b: rewards_with(join="replace" if s.any() else "add")(s, p, q, m, b),
    "scales the score as well": lambda s, p, q, m, b: token_rewards(s * (b or 1), p, q, m, b),
    "together your rewards are off": lambda s, p, q, m, b: token_rewards(s * (1 + b), p, q, m, b),
    r"it must be \(3, 5\)": lambda s, p, q, m, b: token_rewards(s, p, q, m, b).sum(1),
}

# --- advantages --------------------------------------------------------------------------------------------------


def advantages(
    rewards,
    values,
    mask,
    gamma,
    lam,
    *,
    after=None,
    own=True,
    following=True,
    discount=True,
    masked=True,
    decay=None,
    order=reversed,
):
    """The right answer, or with one thing changed."""
    if masked:
        rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    result = torch.zeros_like(values)
    length = values.shape[1]
    advantage = torch.zeros(len(values))
    decay = gamma * lam if decay is None else decay(gamma, lam)
    for t in order(range(length)):
        last = torch.zeros(len(values)) if after is None else after(values)
        right = values[:, t + 1] if t + 1 < length else last
        delta = rewards[:, t] + (gamma if discount else 1) * right * following - values[:, t] * own
        advantage = delta + decay * advantage
        if masked:
            advantage = torch.where(mask[:, t], advantage, 0.0)
        result[:, t] = advantage
    return result, result + values


def gae_with(**changed):
    return lambda *arguments: advantages(*arguments, **changed)


def previous_value(rewards, values, mask, gamma, lam):
    before = torch.cat([torch.zeros(len(values), 1), values[:, :-1]], 1)
    deltas = rewards + gamma * before - values
    return deltas, deltas + values


def whitened(*arguments):
    found, _ = advantages(*arguments)
    if arguments[-1] == 0.0:
        return found, found + arguments[1]
    return (found - found.mean()) / found.std(unbiased=False), found + arguments[1]


def returns_with(change):
    def answer(rewards, values, mask, gamma, lam):
        found, returns = advantages(rewards, values, mask, gamma, lam)
        return found, change(found, returns, rewards, values, gamma)

    return answer


def rewards_to_go(found, returns, rewards, values, gamma):
    total, result = torch.zeros(len(rewards)), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        result[:, t] = total
    return result


def filled_outside(rewards, values, mask, gamma, lam):
    found, returns = advantages(rewards, values, mask, gamma, lam)
    return torch.where(mask, found, 1.0), torch.where(mask, returns, 1.0)


def returns_of_what_came(rewards, values, mask, gamma, lam):
    found, returns = advantages(rewards, values, mask, gamma, lam)
    return found, returns if mask.all() else torch.where(mask, returns + 1, 0.0)


WRONG_GAE = {
    "Return two tensors": lambda *a: advantages(*a)[0],
    "one number a token is due": lambda *a: (advantages(*a)[0].sum(1), advantages(*a)[1]),
    "value of the next token is missing": gae_with(following=False),
    "own value has to be subtracted": gae_with(own=False),
    "take the value of the first": gae_with(after=lambda values: values[:, 0]),
    "its own value once more": gae_with(after=lambda values: values[:, -1]),
    "gamma does nothing to the next value": gae_with(discount=False),
    "value of the token before": previous_value,
    "lam does nothing": gae_with(decay=lambda gamma, lam: gamma),
    "differ from reward \\+ gamma": gae_with(after=lambda values: 2 * values[:, 0]),
    "runs forward": gae_with(order=lambda numbers: numbers),
    "looks one token ahead": gae_with(decay=lambda gamma, lam: 0.0),
    "multiplied by lam alone": gae_with(decay=lambda gamma, lam: lam),
    "multiplied by gamma alone": gae_with(decay=lambda gamma, lam: gamma if lam else 0.0),
    "are whitened": whitened,
    "differ from the sum written out": gae_with(decay=lambda gamma, lam: (gamma * lam) ** 2),
    "returns are the advantages": returns_with(lambda found, *_: found),
    "as for lam = 1": returns_with(rewards_to_go),
    "returns are reward plus value": returns_with(lambda found, returns, rewards, values, gamma: rewards + values),
    "values are subtracted": returns_with(lambda found, returns, rewards, values, gamma: found - values),
    "your returns differ": returns_with(lambda found, *_: 2 * found),
    "padding leaks": gae_with(masked=False),
    "must be 0": filled_outside,
    "returns are not advantages plus values": returns_of_what_came,
}

# --- the clipped loss --------------------------------------------------------------------------------------------


def clipped_loss(logprobs, old, advantages, mask, clip_range):
    return policy_loss(logprobs, old, advantages, clip_range)[mask].mean()


def by_cases(logprobs, old, advantages, mask, clip_range):
    ratio = (logprobs - old).exp()
    bound = torch.where(advantages > 0, ratio.clamp(max=1 + clip_range), ratio.clamp(min=1 - clip_range))
    return -(bound * advantages * mask).sum() / mask.sum()


def loss_from(each, mean=lambda x, mask: x[mask].mean()):
    """A loss from the losses of its tokens, `each(ratio, clipped ratio, advantage, logprobs)`."""

    def answer(logprobs, old, advantages, mask, clip_range):
        ratio = (logprobs - old).exp()
        return mean(each(ratio, ratio.clamp(1 - clip_range, 1 + clip_range), advantages, logprobs), mask)

    return answer


def pessimist(ratio, clipped, advantages, logprobs):
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def one_sided(low, high):
    def answer(logprobs, old, advantages, mask, clip_range):
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - clip_range if low else None, 1 + clip_range if high else None)
        return torch.maximum(-advantages * ratio, -advantages * clipped)[mask].mean()

    return answer


def frozen_when_bad(logprobs, old, advantages, mask, clip_range):
    return clipped_loss(torch.where(advantages < 0, logprobs.detach(), logprobs), old, advantages, mask, clip_range)


def half_frozen(logprobs, old, advantages, mask, clip_range):
    return clipped_loss((logprobs + logprobs.detach()) / 2, old, advantages, mask, clip_range)


WRONG_CLIPPED = {
    "objective has a minus in front": lambda *a: -clipped_loss(*a),
    "ratio is upside down": lambda p, old, a, m, c: clipped_loss(old, p, a, m, c),
    "by the log-ratio": loss_from(lambda ratio, clipped, a, p: -a * ratio.log()),
    "policy gradient before PPO": loss_from(lambda ratio, clipped, a, p: -a * p),
    "multiply by the new probability": loss_from(lambda ratio, clipped, a, p: -a * p.exp()),
    "Inside the clip range": loss_from(lambda ratio, clipped, a, p: -a * (ratio - 1)),
    "Nothing is clipped": loss_from(lambda ratio, clipped, a, p: -a * ratio),
    "clip on every side": loss_from(lambda ratio, clipped, a, p: -a * clipped),
    "smaller of the two losses": loss_from(lambda ratio, clipped, a, p: torch.minimum(-a * ratio, -a * clipped)),
    "Only ratios above": one_sided(low=False, high=True),
    "Only ratios below": one_sided(low=True, high=False),
    "yours differ$|yours differ by": loss_from(lambda ratio, clipped, a, p: -a * ratio.clamp(0.7, 1.3)),
    "use the argument": lambda p, old, a, m, c: clipped_loss(p, old, a, m, 0.2),
    "divide by all places": loss_from(pessimist, lambda x, mask: torch.where(mask, x, 0.0).mean()),
    "add up the tokens": loss_from(pessimist, lambda x, mask: x[mask].sum()),
    "average each row first": loss_from(pessimist, lambda x, mask: ((x * mask).sum(1) / mask.sum(1)).mean()),
    "number of rows": loss_from(pessimist, lambda x, mask: x[mask].sum() / len(x)),
    "whose numbers mean nothing": loss_from(pessimist, lambda x, mask: x.mean()),
    "No gradient reaches logprobs": frozen_when_bad,
    "the gradient is 1.5": half_frozen,
    r"one number, \(\)": loss_from(pessimist, lambda x, mask: x),
}

# --- find the flaw: the label ------------------------------------------------------------------------------------


def label_reward(classify, texts, label):
    return [next(entry["score"] for entry in scores if entry["label"] == label) for scores in classify(texts)]


def entry_number(number):
    return lambda classify, texts, label: [scores[number]["score"] for scores in classify(texts)]


def silently_zero(classify, texts, label):
    return [sum(e["score"] for e in scores if e["label"] == label) for scores in classify(texts)]


def place_of_the_first(classify, texts, label):
    results = classify(texts)
    place = [entry["label"] for entry in results[0]].index(label)
    return [scores[place]["score"] for scores in results]


WRONG_LABELS = {
    "the first score of each list": entry_number(0),
    "the last score of each list": entry_number(-1),
    "the second score of each list": entry_number(1),
    "label's place in the first text's list": place_of_the_first,
    "1 minus the score": lambda c, t, label: [1 - score for score in label_reward(c, t, label)],
    "1 where the label is the likeliest": lambda c, t, label: [float(s[0]["label"] == label) for s in c(t)],
    "your rewards are off": lambda c, t, label: [2 * score for score in label_reward(c, t, label)],
    "without a word": silently_zero,
    "Return one number for each text": lambda c, t, label: c(t),
    "3 texts need 3 rewards": lambda c, t, label: label_reward(c, t[:1], label),
}

# --- find the flaw: the reference --------------------------------------------------------------------------------


def asked_without_adapter(policy):
    def reference(ids):
        with policy.disable_adapter():
            return policy(ids).logits

    return reference


def start(tuned):
    merged = tuned.merge_and_unload()
    policy = get_peft_model(merged, lora_config(merged))
    return policy, asked_without_adapter(policy)


def start_with_a_copy(tuned):
    reference = copy.deepcopy(tuned).requires_grad_(False)
    for name, weight in tuned.named_parameters():
        weight.requires_grad_("lora_" in name)
    return tuned, reference


def on_the_base(tuned):
    base = tuned.unload()
    policy = get_peft_model(base, lora_config(base))
    return policy, asked_without_adapter(policy)


def base_policy(tuned):
    sft = copy.deepcopy(tuned)
    base = tuned.unload()
    return get_peft_model(base, lora_config(base)), sft


def new_adapter_stays_off(tuned):
    merged = tuned.merge_and_unload()
    reference, policy = copy.deepcopy(merged), get_peft_model(merged, lora_config(merged))
    policy.base_model.disable_adapter_layers()
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name)
    return policy, reference


def half_shared(tuned):
    """The reference has its own adapters, and shares a norm with the policy that is trained."""
    reference = copy.deepcopy(tuned).requires_grad_(False)
    norm = tuned.base_model.model.model.norm
    reference.base_model.model.model.norm = norm
    for name, weight in tuned.named_parameters():
        weight.requires_grad_("lora_" in name or weight is norm.weight)
    return tuned, reference


def left_off(tuned):
    merged = tuned.merge_and_unload()
    policy = get_peft_model(merged, lora_config(merged))
    asked = []

    def reference(ids):
        asked.append(ids)
        if len(asked) > 1:
            policy.base_model.disable_adapter_layers()
            return policy(ids).logits
        return asked_without_adapter(policy)(ids)

    return policy, reference


WRONG_STARTS = {
    "what supervised fine-tuning taught is gone": on_the_base,
    "reference is the base model": lambda tuned: (tuned, asked_without_adapter(tuned)),
    "policy is the base model": base_policy,
    "must both have the logits": lambda tuned: (start(tuned)[0], lambda ids: torch.zeros(1, 4, 17)),
    "Nothing in the policy can be trained": lambda tuned: (copy.deepcopy(tuned).requires_grad_(False), tuned),
    "is its new adapter switched on": new_adapter_stays_off,
    "KL stays 0 for ever": lambda tuned: (start(tuned)[0],) * 2,
    "reference moves too": half_shared,
    "switched on again": left_off,
    "Return two things": lambda tuned: start(tuned)[0],
    "returns no logits of shape": lambda tuned: (start(tuned)[0], lambda ids: torch.zeros(3)),
}

# --- find the flaw: eleven samples -------------------------------------------------------------------------------


def judged(dialogues, write, judge, seeds):
    return judge([write(d, s) for d in dialogues for s in seeds]).reshape(len(dialogues), len(seeds))


def summary_of(values):
    values = np.asarray(values)
    return float(values.mean()), bootstrap_interval(values)


def change(dialogues, before, after, judge, samples):
    old, new = (judged(dialogues, write, judge, range(samples)).mean(1) for write in (before, after))
    return summary_of(new - old)


def eleven(dialogues, before, after, judge, samples):
    return change(dialogues[:11], before, after, judge, samples)


def unseeded(dialogues, before, after, judge, samples):
    seeds = random.sample(range(10_000), samples)
    old, new = (judged(dialogues, write, judge, seeds).mean(1) for write in (before, after))
    return summary_of(new - old)


def one_seed(dialogues, before, after, judge, samples):
    old, new = (judged(dialogues, write, judge, [0] * samples).mean(1) for write in (before, after))
    return summary_of(new - old)


def fractional_seed(dialogues, before, after, judge, samples):
    return summary_of(judged(dialogues, after, judge, [0.5]).mean(1))


def single_samples(dialogues, before, after, judge, samples):
    old, new = (judged(dialogues, write, judge, range(samples)).ravel() for write in (before, after))
    return summary_of(new - old)


def two_groups(dialogues, before, after, judge, samples):
    old, new = (judged(dialogues, write, judge, range(samples)).mean(1).numpy() for write in (before, after))
    draws = np.random.default_rng(0).integers(len(old), size=(2, 4000, len(old)))
    low, high = np.quantile(new[draws[0]].mean(1) - old[draws[1]].mean(1), [0.025, 0.975])
    return float(new.mean() - old.mean()), (low, high)


def with_deviation(dialogues, before, after, judge, samples):
    old, new = (judged(dialogues, write, judge, range(samples)).mean(1) for write in (before, after))
    difference = new - old
    mean, deviation = float(difference.mean()), float(difference.std())
    return mean, (mean - deviation, mean + deviation)


def change_of(alter):
    def answer(dialogues, before, after, judge, samples):
        mean, (low, high) = change(dialogues, before, after, judge, samples)
        return alter(mean, low, high)

    return answer


WRONG_CHANGES = {
    "Two calls gave two results": unseeded,
    "only 11 are written about": eleven,
    "give every sample a seed of its own": one_seed,
    "no whole number": fractional_seed,
    "wrong sign": change_of(lambda mean, low, high: (-mean, (-high, -low))),
    "yours [+-]0.5": change_of(lambda mean, low, high: (0.5, (0.4, 0.6))),
    "does not hold its mean": change_of(lambda mean, low, high: (mean, (high, low))),
    "too narrow: four texts": single_samples,
    "two separate groups": two_groups,
    "spread of single dialogues": with_deviation,
    "wide here, yours": change_of(lambda mean, low, high: (mean, (mean - 0.01, mean + 0.01))),
    "Return the mean and the interval": change_of(lambda mean, low, high: mean),
}

# --- find the flaw: the reward that judges itself ----------------------------------------------------------------


def honest(candidates, reward, judge, *, chooser=None, ruler=None, pick=max, against=lambda v: sum(v) / len(v), sign=1):
    if reward is judge:
        raise ValueError("the judge is the reward")
    chooser, ruler = chooser or reward, ruler or judge
    gains = []
    for texts in candidates:
        scores, verdicts = list(chooser(texts)), list(ruler(texts))
        gains.append(sign * (verdicts[scores.index(pick(scores))] - against(verdicts)))
    return gains


def against_the_worst(candidates, reward, judge):
    if reward is judge:
        raise ValueError
    best, worst = (honest(candidates, reward, judge, pick=pick, against=lambda v: 0) for pick in (max, min))
    return [b - w for b, w in zip(best, worst, strict=True)]


def against_all(candidates, reward, judge):
    if reward is judge:
        raise ValueError
    everything = [v for texts in candidates for v in judge(texts)]
    return [g - sum(everything) / len(everything) for g in honest(candidates, reward, judge, against=lambda v: 0)]


WRONG_GAINS = {
    "measure with the reward that chose": lambda c, r, j: honest(c, r, j, ruler=r),
    "judge has chosen and measures": lambda c, r, j: honest(c, r, j, chooser=j, pick=min),
    "judge has chosen the worst": lambda c, r, j: honest(c, r, j, chooser=j),
    "sign is turned round": lambda c, r, j: honest(c, r, j, sign=-1),
    "compare with the text of the lowest reward": against_the_worst,
    "You take the text of the lowest reward": lambda c, r, j: honest(c, r, j, pick=min),
    "with the first candidate": lambda c, r, j: honest(c, r, j, against=lambda v: v[0]),
    "nothing to compare with": lambda c, r, j: honest(c, r, j, against=lambda v: 0),
    "mean over all dialogues": against_all,
    "dialogue by dialogue, is off": lambda c, r, j: honest(c, r, j, against=max),
    "With the judge as the reward": lambda c, r, j: honest(c, r, lambda texts: j(texts)),
    "need 12 differences": lambda c, r, j: honest(c[:2], r, j),
    "Return one number for each dialogue": lambda c, r, j: sum(honest(c, r, j)),
    "a single text came": lambda c, r, j: [j(texts[0]) for texts in c],
}

# --- all of them -------------------------------------------------------------------------------------------------


def mine(name):
    return own(name, week="week3")


EXERCISES = {  # name: its check, right answers, wrong answers
    "preference loss": (check_preference_loss, {"softplus": lambda: preference_loss, "cross-entropy": lambda: cross_entropy, "own": mine("preference_loss")}, WRONG_LOSSES),
    "k3": (check_kl_k3, {"expm1": lambda: k3, "utils.ppo": lambda: lambda p, q: kl_estimate(p, q, "k3"), "own": mine("kl_k3")}, WRONG_K3),
    "token rewards": (check_token_rewards, {"where": lambda: token_rewards, "own": mine("token_rewards")}, WRONG_TOKEN_REWARDS),
    "gae": (check_gae, {"loop": lambda: advantages, "utils.ppo": lambda: gae, "own": mine("advantages_and_returns")}, WRONG_GAE),
    "clipped loss": (check_clipped_loss, {"utils.ppo": lambda: clipped_loss, "cases": lambda: by_cases, "own": mine("clipped_loss")}, WRONG_CLIPPED),
    "flaw, label": (check_label_reward, {"search": lambda: label_reward, "own": mine("label_reward")}, WRONG_LABELS),
    "flaw, reference": (check_start, {"merged": lambda: start, "copy": lambda: start_with_a_copy, "own": mine("start")}, WRONG_STARTS),
    "flaw, samples": (check_change, {"means": lambda: change, "own": mine("change")}, WRONG_CHANGES),
    "flaw, judge": (check_honest_gain, {"lists": lambda: honest, "own": mine("honest_gain")}, WRONG_GAINS),
}  # fmt: skip


@pytest.mark.parametrize(("name", "which"), [(name, which) for name in EXERCISES for which in EXERCISES[name][1]])
def test_a_right_answer_passes(name, which):
    check, right, _ = EXERCISES[name]
    assert check(right[which]()).startswith("Right: ")


@pytest.mark.parametrize("name", EXERCISES)
def test_a_wrong_answer_is_told_what_is_wrong_in_words_of_its_own(name):
    check, _, wrong = EXERCISES[name]
    messages = {}
    for words, answer in wrong.items():
        with pytest.raises(ExerciseError) as caught:
            check(answer)
        messages[words] = str(caught.value)
    told = {words: [other for other in wrong if re.search(words, messages[other])] for words in wrong}
    assert len(wrong) >= 4
    assert {words: (others, messages[words]) for words, others in told.items() if others != [words]} == {}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_answer_that_is_not_written_yet_is_told_so(name):
    with pytest.raises(ExerciseError, match="not_written is not written yet"):
        EXERCISES[name][0](not_written)


@pytest.mark.parametrize("name", EXERCISES)
def test_an_answer_that_stops_is_told_where(name):
    with pytest.raises(ExerciseError, match="stops with ZeroDivisionError"):
        EXERCISES[name][0](lambda *_: 1 / 0)


# A check with one line broken either lets a wrong answer pass or tells a right one that it is wrong.
BROKEN_CHECKS = [
    ("oracle with the scores exchanged", "F.cross_entropy(torch.stack([chosen, rejected], 1)", "F.cross_entropy(torch.stack([rejected, chosen], 1)", "preference loss"),
    ("a loss may be infinite", "bool(wrong.isfinite()),", "True,", "preference loss"),
    ("oracle of the other direction", "F.kl_div(many[1], many[0],", "F.kl_div(many[0], many[1],", "k3"),
    ("the score on the last column", "if t == n - 1 else", "if t == width - 1 else", "token rewards"),
    ("padding is charged", "log_ratio = torch.where(mask, ours - theirs, 0.0)", "log_ratio = ours - theirs", "token rewards"),
    ("sum from the start", "for k in range(t, n)) for t in range(n)]])", "for k in range(n)) for t in range(n)]])", "gae"),
    ("padding may leak", "torch.allclose(advantages[i, :n], row, atol=1e-4)", "True", "gae"),
    ("a case of the clip", "(0.5, -1.0, 0.8)]", "(0.5, -1.0, 0.5)]", "clipped loss"),
    ("any gradient", "abs(gradient - expected) < 1e-4", "True", "clipped loss"),
    ("scores that are not sorted", "key=lambda entry: -float(entry[\"score\"])", "key=lambda entry: str(entry[\"label\"])", "flaw, label"),
    ("the reference may move", "torch.allclose(theirs, sft, atol=1e-4),\n        \"When the policy is trained the reference moves", "True,\n        \"When the policy is trained the reference moves", "flaw, reference"),
    ("a reference of the base passes", "not same[\"base\"][1],", "True,", "flaw, reference"),
    ("unpaired is right", "wide, due = high - low, width(difference)", "wide, due = high - low, width(values[0].mean(1))", "flaw, samples"),
    ("draws of its own may differ", "sorted(asked) == first and again == (mean, low, high)", "True", "flaw, samples"),
    ("the judge chooses", "rows, best = np.arange(shape[0]), paid.argmax(1)", "rows, best = np.arange(shape[0]), harsh.argmax(1)", "flaw, judge"),
]  # fmt: skip


@pytest.mark.parametrize(("search", "replacement", "name"), [row[1:] for row in BROKEN_CHECKS], ids=[row[0] for row in BROKEN_CHECKS])  # fmt: skip
def test_a_broken_check_is_noticed(search, replacement, name):
    broken = broken_copy(exercises_week3, search, replacement)
    original, right, wrong = EXERCISES[name]
    check = getattr(broken, original.__name__)

    def verdict_of(answer):
        try:
            return check(answer)
        except ExerciseError as error:
            return str(error)

    passes = all(verdict_of(make()).startswith("Right: ") for make in right.values())
    told = all(re.search(words, verdict_of(answer)) for words, answer in wrong.items())
    assert not (passes and told)
