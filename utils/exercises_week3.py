"""Checks of week 3's exercises: each says what is wrong with an answer, from an oracle that is not the reference solution.

As in `utils.exercises`: a check raises `ExerciseError` with the first thing that is wrong, in the order in which one would
mend it, and returns a sentence that begins with "Right". Oracles are sums written out step by step, torch's losses, and
cases whose result is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils.exercises import call, name_the_flaw, require
from utils.lab import ExerciseError

Labelled = list[dict[str, str | float]]
Judge = Callable[[Sequence[str]], Sequence[float]]

# --- from preferences to a reward --------------------------------------------------------------------------------


def check_preference_loss(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Hold `answer(chosen, rejected) -> ()` to torch's cross-entropy of a choice between the two scores."""
    chosen, rejected = torch.tensor([2.0, 0.5, -1.0, 3.0]), torch.tensor([1.0, 2.5, -1.5, -1.0])
    difference = chosen - rejected
    name_the_flaw(
        call(answer, chosen, rejected, shape=()),
        F.cross_entropy(torch.stack([chosen, rejected], 1), torch.zeros(4, dtype=torch.long)),
        {
            "Yours is small where the rejected one scores higher: the difference is chosen minus rejected.": F.softplus(difference).mean(),
            "Yours is negative: the minus in front of the logarithm is missing.": F.logsigmoid(difference).mean(),
            "You add up the pairs: take the mean, or a larger batch would take larger steps.": F.softplus(-difference).sum(),
            "The logarithm is missing: 1 minus the probability hardly moves where a pair is badly wrong.": (1 - difference.sigmoid()).mean(),
            "The logarithm is missing: minus the probability is no log-likelihood.": -difference.sigmoid().mean(),
            "You average the scores first: each pair has a loss of its own, and their mean is taken last.": F.softplus(-difference.mean()),
            "Yours is a hinge, max(0, 1 - difference): Bradley-Terry is the logistic loss.": F.relu(1 - difference).mean(),
            "You take the logarithm of the mean probability: take the mean of the logarithms.": -difference.sigmoid().mean().log(),
        },
        "On four pairs your loss differs from torch's cross-entropy between the two scores",
    )  # fmt: skip
    equal = call(answer, torch.zeros(3), torch.zeros(3), shape=())
    require(
        abs(float(equal) - math.log(2)) < 1e-4,
        f"Two equal scores are a coin's toss, so the loss is ln 2 = 0.6931; yours is {float(equal):.4f}.",
    )

    far = torch.tensor([-200.0, 200.0])
    wrong = call(answer, far, far.flip(0), shape=())
    require(
        bool(wrong.isfinite()),
        f"A pair that is wrong by 400 gives {float(wrong)}: its sigmoid is 0 in float32, and the logarithm of 0 is not finite. "
        "Take both at once, with F.logsigmoid or F.softplus.",
    )
    require(
        abs(float(wrong) - 200) < 0.1, f"Wrong by 400 and right by 400 cost 200 on average, yours {float(wrong):.4g}."
    )

    learned = torch.zeros(2, requires_grad=True)
    loss = call(answer, learned, torch.tensor([0.0, 1.0]), shape=())
    require(
        loss.requires_grad,
        "No gradient reaches the scores: stay with tensors, without .item(), .detach() and torch.tensor(...).",
    )
    return "Right: the loss agrees with torch's, stays finite, and its gradient reaches the scores."


# --- KL divergence -----------------------------------------------------------------------------------------------


def check_kl_k3(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Hold `answer(logprobs, ref_logprobs)`, elementwise, to what an estimator of KL must do on three tokens, added up exactly."""
    policy, reference = [0.5, 0.25, 0.25], [0.05, 0.475, 0.475]
    ours, theirs = torch.tensor(policy).log(), torch.tensor(reference).log()
    result = call(answer, ours, theirs, shape=(3,))
    pairs = list(zip(policy, reference, strict=True))
    ratios = torch.tensor([q / p for p, q in pairs])
    name_the_flaw(
        result,
        torch.tensor([q / p - 1 - math.log(q / p) for p, q in pairs]),
        {
            "Your ratio is the wrong way round: policy / reference. With samples of the policy, the mean of that is not KL; the ratio is reference / policy.": 1 / ratios - 1 + ratios.log(),
            "That is k1, the log-ratio alone: add the ratio minus 1, which has mean zero.": -ratios.log(),
            "That is k2, half the square of the log-ratio.": ratios.log() ** 2 / 2,
            "The -1 is missing: where policy and reference agree, the estimate must be 0.": ratios - ratios.log(),
            "The log-ratio has the wrong sign: the ratio is reference / policy, so its logarithm is subtracted.": ratios - 1 + ratios.log(),
            "That is the absolute value of k1: never negative, but its mean is not KL.": ratios.log().abs(),
            "That is ratio - 1 alone: its mean is 0, whatever the KL.": ratios - 1,
            "That is policy / reference, not its estimate of KL.": 1 / ratios,
        },
        "On three tokens your values differ from reference / policy - 1 - log(reference / policy)",
    )  # fmt: skip
    many = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    values = call(answer, many[0], many[1], shape=(4, 6))
    true = F.kl_div(many[1], many[0], log_target=True, reduction="none").sum(-1)  # torch's KL(policy || reference)
    require(
        torch.allclose((many[0].exp() * values).sum(-1), true, atol=1e-4),
        "On other distributions the mean over the policy is not torch's KL: is a number of the example typed into your code?",
    )
    return "Right: never negative, 0 where both agree, and its mean over the policy is KL."


# --- PPO in pieces -----------------------------------------------------------------------------------------------


def check_token_rewards(answer: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """Hold `answer(scores, logprobs, ref_logprobs, mask, kl_coef)` to rewards written out token by token."""
    lengths, width = [5, 3, 1], 5
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, width, generator=generator) * 0.3 - 2
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ours, theirs = (torch.where(mask, x, 7.0 + k) for k, x in enumerate((ours, theirs)))  # padding holds anything
    scores = torch.tensor([1.0, -2.0, 3.0])
    log_ratio = torch.where(mask, ours - theirs, 0.0)

    def rewards(scores: Tensor, kl_coef: float) -> Tensor:
        return call(answer, scores, ours, theirs, mask, kl_coef, shape=(3, width))

    # 1. The score alone.
    only = rewards(scores, 0.0)
    by_row = [[scores[i].item() if t == n - 1 else 0.0 for t in range(width)] for i, n in enumerate(lengths)]
    last_column = torch.zeros(3, width)
    last_column[:, -1] = scores
    first_column = last_column.flip(1)
    name_the_flaw(
        only,
        torch.tensor(by_row),
        {
            "The score stands in the last column, which is padding where a completion is shorter: it belongs on the last real token, number mask.sum(1) - 1.": last_column,
            "The score stands on the first token: the reward has read the whole completion, so it belongs on the last one.": first_column,
            "Every token gets the whole score, so long completions are paid more: only the last real token gets it.": mask * scores[:, None],
            "The score is shared out among the tokens: the last real token gets all of it.": mask * scores[:, None] / mask.sum(1, keepdim=True),
            "There is no score at all in your rewards.": torch.zeros(3, width),
            "The score stands one place after the last real token: that token is number mask.sum(1) - 1.": torch.tensor(by_row).roll(1, 1),
        },
        "With kl_coef = 0 your rewards differ from the score on the last real token",
    )  # fmt: skip

    # 2. The price of KL alone.
    price = rewards(torch.zeros(3), 0.5)
    whole = torch.zeros(3, width)
    whole[torch.arange(3), torch.tensor(lengths) - 1] = -0.5 * log_ratio.sum(1)
    name_the_flaw(
        price,
        -0.5 * log_ratio,
        {
            "KL is paid out instead of charged: the sign of the price is minus.": 0.5 * log_ratio,
            "Padding is charged for KL: whatever the log-probabilities are there, the reward is 0.": -0.5 * (ours - theirs),
            "kl_coef does nothing in yours: multiply the log-ratio by it.": -log_ratio,
            "The whole completion's KL is charged to the last token: each token pays for itself.": whole,
            "That is k3: in the reward stands k1, the log-ratio itself.": -0.5 * torch.where(mask, torch.expm1(-log_ratio) + log_ratio, 0.0),
            "You charge the absolute value: a token less likely than under the reference gets something back.": -0.5 * log_ratio.abs(),
            "There is no price of KL in your rewards.": torch.zeros(3, width),
        },
        "With scores of 0 your rewards differ from -kl_coef times the log-ratio",
    )  # fmt: skip

    # 3. Both.
    together = rewards(scores, 0.5)
    overwritten = torch.where(torch.tensor(by_row) != 0, torch.tensor(by_row), -0.5 * log_ratio)
    name_the_flaw(
        together,
        torch.tensor(by_row) - 0.5 * log_ratio,
        {
            "On the last token the score replaces the price of KL: add it.": overwritten,
            "kl_coef scales the score as well: it is the price of KL alone.": 0.5 * torch.tensor(by_row) - 0.5 * log_ratio,
        },
        "Score and price are right alone; together your rewards are off",
    )  # fmt: skip
    return "Right: every real token pays for its KL, the last real one gets the score, padding gets nothing."


def check_gae(answer: Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]) -> str:
    """Hold `answer(rewards, values, mask, gamma, lam) -> (advantages, returns)` to the sums of the paper's equation 16, term by term."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 1, 5, generator=generator)
    everything = torch.ones(1, 5, dtype=torch.bool)

    def both(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
        result = call(answer, rewards, values, mask, gamma, lam)
        require(
            isinstance(result, tuple | list) and len(result) == 2 and all(isinstance(x, Tensor) for x in result),
            "Return two tensors: advantages and returns.",
        )
        for name, tensor in zip(("advantages", "returns"), result, strict=True):
            require(
                tensor.shape == rewards.shape,
                f"{name} has shape {tuple(tensor.shape)}: one number a token is due, {tuple(rewards.shape)}.",
            )
        return result[0], result[1]

    def deltas(rewards: Tensor, values: Tensor, gamma: float, after: float = 0.0) -> list[float]:
        r, v = rewards[0].tolist(), [*values[0].tolist(), after]
        return [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]

    def summed(terms: list[float], decay: float) -> Tensor:
        n = len(terms)
        return torch.tensor([[sum(decay ** (k - t) * terms[k] for k in range(t, n)) for t in range(n)]])

    def forward(terms: list[float], decay: float) -> Tensor:
        return summed(terms[::-1], decay).flip(1)

    # 1. One step ahead: lambda = 0.
    gamma = 0.9
    advantages, _ = both(rewards, values, everything, gamma, 0.0)
    r, v = rewards, values
    wrapped = r + gamma * v.roll(-1, 1) - v
    name_the_flaw(
        advantages,
        torch.tensor([deltas(r, v, gamma)]),
        {
            "With lam = 0 yours is reward minus value: the value of the next token is missing.": r - v,
            "With lam = 0 yours is reward plus the next value: the token's own value has to be subtracted.": r + gamma * torch.cat([v[:, 1:], torch.zeros(1, 1)], 1),
            "After the last token you take the value of the first: beyond the end the value is 0.": wrapped,
            "After the last token you take its own value once more: beyond the end the value is 0.": torch.tensor([deltas(r, v, gamma, float(v[0, -1]))]),
            "gamma does nothing to the next value in yours.": torch.tensor([deltas(r, v, 1.0)]),
            "You take the value of the token before: the one after is meant.": r + gamma * torch.cat([torch.zeros(1, 1), v[:, :-1]], 1) - v,
            "lam does nothing in yours: with 0 a token hears of the next one only.": summed(deltas(r, v, gamma), gamma),
        },
        "With lam = 0 your advantages differ from reward + gamma * next value - value",
    )  # fmt: skip

    # 2. All that follows.
    lam = 0.7
    advantages, returns = both(rewards, values, everything, gamma, lam)
    terms = deltas(r, v, gamma)
    expected = summed(terms, gamma * lam)
    name_the_flaw(
        advantages,
        expected,
        {
            "Your sum runs forward: a token is praised for what came before it. Start at the last token.": forward(terms, gamma * lam),
            "Yours looks one token ahead, whatever lam is: add gamma * lam times the advantage of the next token.": torch.tensor([terms]),
            "The advantage of the next token is multiplied by lam alone: by gamma * lam is due.": summed(terms, lam),
            "The advantage of the next token is multiplied by gamma alone: by gamma * lam is due.": summed(terms, gamma),
            "The advantages are whitened: returns have to be computed before, and whitening is a step of its own.": (expected - expected.mean()) / expected.std(unbiased=False),
        },
        f"With gamma = {gamma} and lam = {lam} your advantages differ from the sum written out",
    )  # fmt: skip
    name_the_flaw(
        returns,
        expected + values,
        {
            "Your returns are the advantages: add the values.": expected,
            "Your returns are the rewards added up, as for lam = 1: they are advantages plus values.": summed(
                r[0].tolist(), gamma
            ),
            "Your returns are reward plus value: advantages plus values are due.": r + v,
            "The values are subtracted: returns are advantages plus values.": expected - values,
        },
        "The advantages are right, your returns differ from advantages plus values",
    )

    # 3. Rows of unequal length.
    lengths = [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, 3, 5, generator=generator)
    junk = [torch.where(mask, x, 1e3) for x in (rewards, values)]
    advantages, returns = both(*junk, mask, gamma, lam)
    for i, n in enumerate(lengths):
        row = summed(deltas(rewards[i : i + 1, :n], values[i : i + 1, :n], gamma), gamma * lam)[0]
        require(
            torch.allclose(advantages[i, :n], row, atol=1e-4),
            f"A row of {n} tokens in a batch of width 5 has other advantages than alone: padding leaks into them. Set rewards and values to 0 outside the mask.",
        )
        require(
            not advantages[i, n:].any() and not returns[i, n:].any(),
            f"Outside the mask, in row {i}, advantages and returns must be 0.",
        )
        require(torch.allclose(returns[i, :n], row + values[i, :n], atol=1e-4), f"In row {i} returns are not advantages plus values.")  # fmt: skip
    return "Right: advantages and returns agree with the sum written out, and padding does not leak."


def check_clipped_loss(answer: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> str:
    """Hold `answer(logprobs, old_logprobs, advantages, mask, clip_range) -> ()` to the four cases of the clip, worked by hand."""
    one = torch.ones(1, 1, dtype=torch.bool)

    def loss_of(ratio: float, advantage: float, clip_range: float = 0.2) -> Tensor:
        old = torch.tensor([[-3.0]])
        return call(answer, old + math.log(ratio), old, torch.tensor([[advantage]]), one, clip_range, shape=())

    # 1. Inside the clip: minus advantage times ratio.
    name_the_flaw(
        loss_of(1.1, 2.0),
        torch.tensor(-2.2),
        {
            "A good token makes your loss larger: the optimizer goes down, so the objective has a minus in front.": torch.tensor(2.2),
            "The ratio is upside down: new over old, exp(logprobs - old_logprobs).": torch.tensor(-2 / 1.1),
            "You multiply the advantage by the log-ratio: the ratio is its exponential.": torch.tensor(-2 * math.log(1.1)),
            "You multiply the advantage by the log-probability: that is the policy gradient before PPO, without the ratio to the old policy.": torch.tensor(-2 * (math.log(1.1) - 3)),
            "You multiply by the new probability: the old one is missing under it.": torch.tensor(-2 * 1.1 * math.exp(-3)),
        },
        "Inside the clip range the loss is minus advantage times ratio; yours differs",
    )  # fmt: skip

    # 2. Outside: the four cases.
    cases = [(1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)]
    mine = torch.stack([loss_of(ratio, advantage) for ratio, advantage, _ in cases])
    name_the_flaw(
        mine,
        torch.tensor([loss for *_, loss in cases]),
        {
            "Nothing is clipped: a token that is favoured already goes on being favoured more.": torch.tensor([-1.5, 1.5, -0.5, 0.5]),
            "You clip on every side: a token that went the wrong way (ratio 1.5, advantage -1) must keep its gradient. Take the larger of the two losses, clipped and not.": torch.tensor([-1.2, 1.2, -0.8, 0.8]),
            "You take the smaller of the two losses: PPO is the pessimist and takes the larger.": torch.tensor([-1.5, 1.2, -0.8, 0.5]),
            "Only ratios above 1 + clip_range are clipped: below 1 - clip_range as well.": torch.tensor([-1.2, 1.5, -0.5, 0.5]),
            "Only ratios below 1 - clip_range are clipped: above 1 + clip_range as well.": torch.tensor([-1.5, 1.5, -0.5, 0.8]),
        },
        "At ratios 1.5 and 0.5, advantages +1 and -1, the losses are -1.2, 1.5, -0.5, 0.8; yours differ",
    )  # fmt: skip
    require(
        abs(float(loss_of(1.5, 1.0, 0.4)) + 1.4) < 1e-4,
        f"With clip_range = 0.4 and ratio 1.5 the loss is -1.4, yours {float(loss_of(1.5, 1.0, 0.4)):.4g}: use the argument.",
    )

    # 3. Over a batch with padding.
    lengths = [4, 2, 1]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 4, generator=generator) - 3
    new, advantages = old + 0.1 * torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    each = -(advantages * (new - old).exp().clamp(0.5, 1.5))  # no ratio is near the clip of 0.5
    filled = [torch.where(mask, x, junk) for x, junk in ((new, 2.0), (old, 0.0), (advantages, 50.0))]
    real = each[mask]
    name_the_flaw(
        call(answer, *filled, mask, 0.5, shape=()),
        real.mean(),
        {
            "You divide by all places, padding included: divide by the number of real tokens.": real.sum() / mask.numel(),
            "You add up the tokens: take their mean.": real.sum(),
            "You average each row first, so a token of a short completion counts for more: take the mean over all real tokens.": torch.stack([each[i, :n].mean() for i, n in enumerate(lengths)]).mean(),
            "You divide by the number of rows: divide by the number of real tokens.": real.sum() / 3,
        },
        "With padding (whose numbers mean nothing) your loss is off: it is the mean over real tokens",
    )  # fmt: skip

    # 4. What learns.
    for ratio, advantage, expected in ((1.5, 1.0, 0.0), (1.5, -1.0, 1.5)):
        logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss = call(answer, logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), one, 0.2, shape=())
        gradient = torch.autograd.grad(loss, logprob)[0].item() if loss.requires_grad else 0.0
        require(
            gradient != 0.0 or expected == 0.0,
            f"No gradient reaches logprobs at ratio {ratio}, advantage {advantage:+g}: only old log-probabilities and advantages are constants.",
        )
        require(
            abs(gradient - expected) < 1e-4,
            f"At ratio {ratio}, advantage {advantage:+g} the gradient is {expected:g}, yours {gradient:g}.",
        )
    return "Right: ratio, both sides of the clip, mean over real tokens, and gradient where it is due."


# --- find the flaw -----------------------------------------------------------------------------------------------


def check_label_reward(
    answer: Callable[[Callable[[Sequence[str]], list[Labelled]], Sequence[str], str], list[float]],
) -> str:
    """Hold `answer(classify, texts, label)` to classifiers whose scores are known, sorted as transformers' pipeline sorts them."""
    known = {
        "a": {"kind": 0.7, "dull": 0.15, "rude": 0.1, "odd": 0.05},
        "b": {"kind": 0.3, "dull": 0.05, "rude": 0.5, "odd": 0.15},
        "c": {"kind": 0.05, "dull": 0.1, "rude": 0.25, "odd": 0.6},
    }

    def classify(texts: Sequence[str]) -> list[Labelled]:
        rows = [[{"label": name, "score": score} for name, score in known[text].items()] for text in texts]
        return [sorted(row, key=lambda entry: -float(entry["score"])) for row in rows]

    def rewards(texts: list[str], label: str) -> Tensor:
        result = call(answer, classify, texts, label)
        try:
            numbers = [float(value) for value in result]
        except (TypeError, ValueError):
            raise ExerciseError(f"Return one number for each text; {result!r} came.") from None
        require(len(numbers) == len(texts), f"{len(texts)} texts need {len(texts)} rewards, {len(numbers)} came.")
        return torch.tensor(numbers)

    texts = ["a", "b", "c"]
    for label in ("rude", "kind", "odd", "dull"):
        ranked = [sorted(known[text].values(), reverse=True) for text in texts]
        at_first = sorted(known["a"], key=known["a"].get, reverse=True).index(label)
        name_the_flaw(
            rewards(texts, label),
            torch.tensor([known[text][label] for text in texts]),
            {
                "You take the first score of each list: the list is sorted, so that is the likeliest label, whichever it is.": torch.tensor([row[0] for row in ranked]),
                "You take the last score of each list: the list is sorted, so that is the least likely label, whichever it is.": torch.tensor([row[-1] for row in ranked]),
                "You take the second score of each list: a label has no fixed place in a sorted list.": torch.tensor([row[1] for row in ranked]),
                "You look up the label's place in the first text's list and take it from all lists: each is sorted on its own.": torch.tensor([row[at_first] for row in ranked]),
                "You take 1 minus the score: the score of the label itself is the reward.": torch.tensor([1 - known[text][label] for text in texts]),
                "You give 1 where the label is the likeliest and 0 elsewhere: the score itself says more.": torch.tensor([float(max(known[text], key=known[text].get) == label) for text in texts]),
            },
            f"For the label {label!r} your rewards are off",
        )  # fmt: skip
    try:
        silent = answer(classify, texts, "civil")
    except NotImplementedError:
        raise
    except Exception:  # any error is better than a number
        return "Right: the label is found by its name in every list, and a label that is not there is an error."
    raise ExerciseError(
        f"There is no label 'civil' here, and yours gives {silent} without a word: a typing error would train for hours. Raise an error."
    )


def check_start(answer: Callable[[nn.Module], tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> str:
    """Hold `answer(tuned) -> (policy, reference)` to the logits of `tuned`, a tiny PEFT model, before and after the policy is trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tuned = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:  # as after supervised fine-tuning
                weight.normal_(std=0.5)
    ids = torch.tensor([[3, 5, 7, 11]])

    @torch.no_grad()
    def base_logits() -> Tensor:
        with tuned.disable_adapter():
            return tuned(ids).logits.clone()

    with torch.no_grad():
        sft, base = tuned(ids).logits.clone(), base_logits()
    result = call(answer, copy.deepcopy(tuned))
    require(
        isinstance(result, tuple | list)
        and len(result) == 2
        and isinstance(result[0], nn.Module)
        and callable(result[1]),
        "Return two things: the policy, a model, and the reference, a function of token ids that returns logits.",
    )
    policy, reference = result
    policy.eval()  # no dropout: the same logits every time

    def logits(of: Callable[[Tensor], Tensor], what: str) -> Tensor:
        with torch.no_grad():
            given = of(ids)
        given = getattr(given, "logits", given)
        require(
            isinstance(given, Tensor) and given.shape == sft.shape,
            f"{what} returns no logits of shape {tuple(sft.shape)}.",
        )
        return given.float().clone()

    ours, theirs = logits(policy, "The policy"), logits(reference, "The reference")
    same = {name: (torch.allclose(ours, x, atol=1e-4), torch.allclose(theirs, x, atol=1e-4)) for name, x in (("sft", sft), ("base", base))}  # fmt: skip
    require(
        not all(same["base"]),
        "Policy and reference are both the base model: what supervised fine-tuning taught is gone. Merge the adapter, do not unload it.",
    )
    require(
        not same["base"][1],
        "Your reference is the base model from before supervised fine-tuning, so KL is not 0 at the start: PPO would be pulled back to a model nobody asked for.",
    )
    require(
        not same["base"][0],
        "Your policy is the base model: it has to start from the fine-tuned one.",
    )
    require(all(same["sft"]), "At the start policy and reference must both have the logits of the fine-tuned model.")
    trainable = [weight for weight in policy.parameters() if weight.requires_grad]
    require(trainable, "Nothing in the policy can be trained: no parameter requires a gradient.")
    with torch.no_grad():
        for weight in trainable:
            weight.add_(0.3 * torch.randn(weight.shape))
    ours, theirs = logits(policy, "The policy"), logits(reference, "The reference")
    require(
        not torch.allclose(ours, sft, atol=1e-4),
        "The policy's trainable weights change nothing in its logits: is its new adapter switched on?",
    )
    require(
        not torch.allclose(ours, theirs, atol=1e-5),
        "When the policy is trained the reference changes with it, so KL stays 0 for ever: both names stand for the same weights.",
    )
    require(
        torch.allclose(theirs, sft, atol=1e-4),
        "When the policy is trained the reference moves too: it shares weights with the policy that are being trained.",
    )
    require(
        torch.allclose(logits(policy, "The policy"), ours, atol=1e-5),
        "After the reference was asked, the policy gives other logits: its adapter has to be switched on again.",
    )
    return "Right: both start from the fine-tuned model, and the reference stays there while the policy moves."


def check_change(
    answer: Callable[..., tuple[float, tuple[float, float]]],
) -> str:
    """Hold `answer(dialogues, before, after, judge, samples)` to systems whose change on every dialogue is known."""
    generator = np.random.default_rng(0)
    dialogues = [f"dialogue {i}" for i in range(40)]
    hard = dict(zip(dialogues, generator.normal(0, 1.0, 40), strict=True))  # how hostile a dialogue is: large
    gain = dict(zip(dialogues, generator.normal(-0.15, 0.2, 40), strict=True))  # what the change does to it: small
    noise = generator.normal(0, 0.3, (2, 40, 12))
    asked: list[tuple[str, str, int]] = []

    def writer(side: str) -> Callable[[str, int], str]:
        def write(dialogue: str, seed: int) -> str:
            require(
                isinstance(seed, int) and not isinstance(seed, bool),
                f"The seed {seed!r} is no whole number: a sample nobody can draw again.",
            )
            asked.append((side, dialogue, seed))
            return f"{side}|{dialogue}|{seed}"

        return write

    def score(text: str) -> float:
        side, dialogue, seed = text.split("|")
        i = dialogues.index(dialogue)
        return (
            hard[dialogue] + (gain[dialogue] if side == "after" else 0) + noise[int(side == "after"), i, int(seed) % 12]
        )

    def judge(texts: Sequence[str]) -> Tensor:
        return torch.tensor([score(text) for text in texts], dtype=torch.float64)

    def run() -> tuple[float, float, float]:
        asked.clear()
        result = call(answer, list(dialogues), writer("before"), writer("after"), judge, 4)
        try:
            mean, (low, high) = result
            return float(mean), float(low), float(high)
        except (TypeError, ValueError):
            raise ExerciseError(f"Return the mean and the interval (low, high); {result!r} came.") from None

    mean, low, high = run()
    first = sorted(asked)
    again = run()
    require(
        sorted(asked) == first and again == (mean, low, high),
        "Two calls gave two results: choose seeds instead of drawing them, so that others get your number.",
    )
    used = {side: {d for s, d, _ in first if s == side} for side in ("before", "after")}
    for side, some in used.items():
        require(
            len(some) == len(dialogues),
            f"Of {len(dialogues)} dialogues only {len(some)} are written about {side}: take all there are.",
        )
    seeds = {key: [n for s, d, n in first if (s, d) == key] for key in {(s, d) for s, d, _ in first}}
    few = min(seeds.values(), key=lambda some: len(set(some)))
    require(
        len(set(few)) == 4,
        f"samples=4, and a dialogue gets {len(set(few))} different text{'s' * (len(set(few)) != 1)}: give every sample a seed of its own.",
    )
    values = np.array([[[score(f"{s}|{d}|{n}") for n in seeds[s, d]] for d in dialogues] for s in ("before", "after")])
    difference = (values[1] - values[0]).mean(1)  # one value a dialogue
    require(
        abs(mean + difference.mean()) > 1e-6,
        "Your change has the wrong sign: after minus before, so that less hostile is negative.",
    )
    require(
        abs(mean - difference.mean()) < 1e-6,
        f"The change is {difference.mean():+.4f} on average, yours {mean:+.4f}: the mean after minus the mean before, over all dialogues and samples.",
    )
    require(low < mean < high, f"The interval {low:+.3f} to {high:+.3f} does not hold its mean {mean:+.3f}.")

    def width(values: np.ndarray) -> float:  # of a 95 % interval, by the normal distribution
        return 2 * 1.96 * values.std(ddof=1) / len(values) ** 0.5

    wide, due = high - low, width(difference)
    unpaired = math.hypot(*(width(side.mean(1)) for side in values))
    single = width((values[1] - values[0]).ravel())
    mistakes = (
        (single, "Yours counts every sample as a case of its own, so the interval is too narrow: four texts about one dialogue are one case. Average them first."),
        (unpaired, "Yours compares two separate groups, so the interval is far too wide: take the difference dialogue by dialogue."),
        (2 * difference.std(), "That is the spread of single dialogues, mean plus and minus a standard deviation: an interval of the *mean* shrinks with their number."),
    )  # fmt: skip
    other, message = min(mistakes, key=lambda mistake: abs(wide / mistake[0] - 1))
    require(abs(wide / due - 1) < 0.15 or abs(wide / other - 1) > 0.15, message)
    require(
        abs(wide / due - 1) < 0.15,
        f"The 95 % interval of the mean over 40 dialogues is {due:.3f} wide here, yours {wide:.3f}.",
    )
    return "Right: all dialogues, several samples each, paired, one value a dialogue, and the same result every time."


def check_honest_gain(answer: Callable[[Sequence[Sequence[str]], Judge, Judge], Sequence[float]]) -> str:
    """Hold `answer(candidates, reward, judge)` to candidates whose reward and hostility are known."""
    generator = np.random.default_rng(0)
    shape = (12, 4)
    paid = generator.permutation(48).reshape(shape) / 10.0
    harsh = generator.permutation(48).reshape(shape) / 48.0
    candidates = [[f"{i}|{j}" for j in range(shape[1])] for i in range(shape[0])]

    def lookup(values: np.ndarray) -> Judge:
        def read(texts: Sequence[str]) -> list[float]:
            require(not isinstance(texts, str), "Reward and judge take a list of texts, a single text came.")
            places = [tuple(map(int, text.split("|"))) for text in texts]
            return [float(values[place]) for place in places]

        return read

    reward, judge = lookup(paid), lookup(harsh)
    result = call(answer, [list(row) for row in candidates], reward, judge)
    try:
        mine = np.array([float(value) for value in result])
    except (TypeError, ValueError):
        raise ExerciseError(f"Return one number for each dialogue; {result!r} came.") from None
    require(len(mine) == shape[0], f"{shape[0]} dialogues need {shape[0]} differences, {len(mine)} came.")
    rows, best = np.arange(shape[0]), paid.argmax(1)
    chosen, average = harsh[rows, best], harsh.mean(1)
    name_the_flaw(
        torch.tensor(mine),
        torch.tensor(chosen - average),
        {
            "You measure with the reward that chose the text: its largest value is above its mean whatever it rewards. Let the judge measure.": torch.tensor(paid[rows, best] - paid.mean(1)),
            "The judge has chosen and measures its own choice: the reward chooses, the judge measures.": torch.tensor(harsh.min(1) - average),
            "The judge has chosen the worst and measures its own choice: the reward chooses, the judge measures.": torch.tensor(harsh.max(1) - average),
            "The sign is turned round: hostility of the chosen text minus that of a text taken at random.": torch.tensor(average - chosen),
            "You compare with the text of the lowest reward: the comparison is with a text taken at random, the mean over the candidates.": torch.tensor(chosen - harsh[rows, paid.argmin(1)]),
            "You take the text of the lowest reward.": torch.tensor(harsh[rows, paid.argmin(1)] - average),
            "You compare with the first candidate: its mean over all candidates is the same question with less chance in it.": torch.tensor(chosen - harsh[:, 0]),
            "There is nothing to compare with: subtract the mean hostility of the candidates.": torch.tensor(chosen),
            "You compare with the mean over all dialogues: each has candidates of its own.": torch.tensor(chosen - harsh.mean()),
        },
        "The change in hostility, dialogue by dialogue, is off",
    )  # fmt: skip
    try:
        fooled = answer([list(row) for row in candidates], judge, judge)
    except NotImplementedError:
        raise
    except Exception:  # any error is better than a number
        return "Right: the reward chooses, the judge measures against a text at random, and one cannot stand in for the other."
    raise ExerciseError(
        f"With the judge as the reward yours still gives a result ({np.mean(np.array([float(v) for v in fooled])):+.3f} on average): raise an error where both are the same."
    )
