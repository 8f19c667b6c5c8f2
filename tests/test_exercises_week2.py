"""The checks of week 2's exercises whose answers are classes or whole batches: right answers pass, wrong ones are told why."""

import re

import numpy as np
import pytest
import torch
from test_exercises import solution
from torch import nn

from utils.benchmarks import expected_calibration_error
from utils.exercises import check_calibration_error, check_lora_linear, check_mixing_rates, check_training_batch
from utils.lab import ExerciseError
from utils.prompts import IGNORED

# --- week 2: the batch that is trained on ------------------------------------------------------------------------


def training_batch(prompts, completions, length, pad):
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt = prompt[-(length - len(completion)) :]
        n, free = len(prompt), length - len(prompt) - len(completion)
        rows.append(
            (
                prompt + completion + [pad] * free,
                [1] * (length - free) + [0] * free,
                [IGNORED] * n + completion + [IGNORED] * free,
            )
        )
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True))


def changed(change):
    def answer(prompts, completions, length, pad):
        return change(*training_batch(prompts, completions, length, pad), pad)

    return answer


def cut_right(prompts, completions, length, pad):
    rows = [[*p, *c][:length] for p, c in zip(prompts, completions, strict=True)]
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return ids, ids, ids


def cut_prompts_end(prompts, completions, length, pad):
    return training_batch(
        [p[: length - len(c)] for p, c in zip(prompts, completions, strict=True)], completions, length, pad
    )


def padded_left(prompts, completions, length, pad):
    ids, mask, labels = training_batch(prompts, completions, length, pad)
    shifts = (length - mask.sum(1)).tolist()
    return tuple(torch.stack([row.roll(n) for row, n in zip(t, shifts, strict=True)]) for t in (ids, mask, labels))


WRONG_BATCHES = {
    "Return three tensors": lambda *a: training_batch(*a)[:2],
    "two rows of length 10 in whole numbers": changed(lambda i, m, y, p: (i, m.float(), y)),
    "lost part of its completion": cut_right,
    "The prompt has lost its end": cut_prompts_end,
    "The padding stands in front": padded_left,
    "lets the model read the padding": changed(lambda i, m, y, p: (i, torch.ones_like(m), y)),
    "hides the EOS": changed(lambda i, m, y, p: (i, (i != p).long(), y)),
    "No token has a label": changed(lambda i, m, y, p: (i, m, torch.full_like(y, IGNORED))),
    "The prompt has labels": changed(lambda i, m, y, p: (i, m, i.masked_fill(m == 0, IGNORED))),
    "one place to the left": changed(lambda i, m, y, p: (i, m, y.roll(-1, 1))),
    "The padding has labels": changed(lambda i, m, y, p: (i, m, y.masked_fill(m == 0, p))),
    "never learns to stop": changed(lambda i, m, y, p: (i, m, y.masked_fill(y == p, IGNORED))),
    "stops with": lambda *a: 1 / 0,
}


def test_the_right_training_batch_passes():
    assert check_training_batch(training_batch).startswith("Right")


@pytest.mark.parametrize("message", WRONG_BATCHES)
def test_a_wrong_training_batch_is_told_what_is_wrong(message):
    with pytest.raises(ExerciseError, match=message):
        check_training_batch(WRONG_BATCHES[message])


# --- week 2: LoRA ------------------------------------------------------------------------------------------------


class Right(nn.Module):
    def __init__(self, linear, r, alpha):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scaling, self.r, self.alpha = alpha / r, r, alpha

    def forward(self, x):
        return self.linear(x) + self.scaling * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def merged(self):
        single = nn.Linear(self.linear.in_features, self.linear.out_features, bias=self.linear.bias is not None)
        single.weight.copy_(self.linear.weight + self.scaling * self.B @ self.A)
        if single.bias is not None:
            single.bias.copy_(self.linear.bias)
        return single


def variant(**methods):
    """`Right` with other methods; `setup` runs at the end of `__init__`."""

    class Wrong(Right):
        def __init__(self, linear, r, alpha):
            super().__init__(linear, r, alpha)
            methods.get("setup", lambda self: None)(self)

    for name, method in methods.items():
        setattr(Wrong, name, method)
    return Wrong


def merge_in_place(self):
    with torch.no_grad():
        self.linear.weight += self.scaling * self.B @ self.A
    return nn.Linear(12, 20)


def merge_without(what):
    def merged(self):
        single = Right.merged(self)
        if what == "bias":
            single.bias = None
        else:
            with torch.no_grad():
                single.weight.copy_(self.linear.weight + self.B @ self.A)
        return single

    return merged


def merge_with_bias(self):
    single = Right.merged(self)
    single.bias = single.bias if single.bias is not None else nn.Parameter(torch.zeros(20))
    return single


def forward_with(factor):
    return lambda self, x: self.linear(x) + factor(self) * (x @ self.A.T @ self.B.T)


WRONG_LORA = {
    "no nn.Module": lambda linear, r, alpha: 1,
    "not written yet": variant(forward=lambda self, x: (_ for _ in ()).throw(NotImplementedError)),
    r"A is not an nn.Parameter": variant(setup=lambda self: setattr(self, "A", None)),
    r"B has shape \(4, 20\)": variant(setup=lambda self: setattr(self, "B", nn.Parameter(torch.zeros(4, 20)))),
    "B does not start at zero": variant(setup=lambda self: nn.init.normal_(self.B)),
    "A starts at zero": variant(setup=lambda self: nn.init.zeros_(self.A)),
    "linear.weight and linear.bias would be trained too": variant(setup=lambda self: self.linear.requires_grad_(True)),
    "forward stops with RuntimeError": variant(forward=lambda self, x: self.linear(x) + x @ self.A @ self.B),
    "not scaled": variant(forward=forward_with(lambda self: 1)),
    "upside down": variant(forward=forward_with(lambda self: self.r / self.alpha)),
    "multiplied by alpha": variant(forward=forward_with(lambda self: self.alpha)),
    "do not change the output": variant(forward=lambda self, x: self.linear(x)),
    "not exactly that of the layer": variant(forward=lambda self, x: self.scaling * (x @ self.A.T @ self.B.T)),
    "differs from PEFT's by": variant(forward=lambda self, x: self.linear(x) + self.scaling * (x @ self.A.T @ self.B.T).relu()),
    "No gradient reaches A": variant(
        forward=lambda self, x: self.linear(x) + self.scaling * (x @ self.A.detach().T @ self.B.T)
    ),
    "returns no nn.Linear": variant(merged=lambda self: self.linear.weight + self.scaling * self.B @ self.A),
    "returns the layer it was given": variant(merged=lambda self: self.linear),
    "weights of the layer have changed": variant(merged=merge_in_place),
    "lost its bias": variant(merged=merge_without("bias")),
    "merged layer differs from PEFT's": variant(merged=merge_without("scale")),
    "without a bias has one": variant(merged=merge_with_bias),
}  # fmt: skip


def test_the_right_lora_passes():
    assert check_lora_linear(Right).startswith("Right")


@pytest.mark.parametrize("message", WRONG_LORA)
def test_a_wrong_lora_is_told_what_is_wrong(message):
    with pytest.raises(ExerciseError, match=message):
        check_lora_linear(WRONG_LORA[message])


# --- week 2: mixing tasks ----------------------------------------------------------------------------------------


def mixing(sizes, cap, temperature):
    warm = [min(size, cap) ** (1 / temperature) for size in sizes]
    return [value / sum(warm) for value in warm]


def mixing_with_arrays(sizes, cap, temperature):
    rates = np.minimum(sizes, cap) / np.minimum(sizes, cap).sum()
    rates = rates ** (1 / temperature)
    return rates / rates.sum()


def mixing_in_place(sizes, cap, temperature):
    for i, size in enumerate(sizes):
        sizes[i] = min(size, cap)
    return mixing(sizes, cap, temperature)


def temperature_before_cap(sizes, cap, temperature):
    warm = [min(size ** (1 / temperature), cap) for size in sizes]
    return [value / sum(warm) for value in warm]


def no_second_sum(sizes, cap, temperature):
    return [rate ** (1 / temperature) for rate in mixing(sizes, cap, 1.0)]


def softmax_of_shares(sizes, cap, temperature):
    return (
        mixing(sizes, cap, 1.0)
        if temperature == 1
        else torch.tensor(mixing(sizes, cap, 1.0)).div(temperature).softmax(0)
    )


WRONG_MIXING = {
    "changes the list": mixing_in_place,
    "4 tasks need 4 rates": lambda s, c, t: mixing(s, c, t)[:2],
    "numbers of examples": lambda s, c, t: [min(size, c) for size in s],
    "cap does nothing": lambda s, c, t: mixing(s, float("inf"), t),
    "raise small tasks": lambda s, c, t: mixing([max(size, c) for size in s], float("inf"), t),
    "before the cap, so that": lambda s, c, t: [min(size, c) / sum(s) for size in s],
    "mixes all tasks equally": lambda s, c, t: [1 / len(s)] * len(s),
    "differ from those of a pool": lambda s, c, t: mixing([size + 1 for size in s], c, t),
    "that no task reaches": lambda s, c, t: mixing(s, min(c, 25), t),
    "temperature does nothing": lambda s, c, t: mixing(s, c, 1.0),
    "after the power, not before": no_second_sum,
    "temperature sharpens": lambda s, c, t: mixing(s, c, 1 / t),
    "comes before the cap": temperature_before_cap,
    "has 3.536 times": softmax_of_shares,
    "stops with TypeError": lambda s, c, t: s / c,
}


@pytest.mark.parametrize("right", [mixing, mixing_with_arrays])
def test_the_check_of_mixing_takes_right_answers(right):
    assert check_mixing_rates(right).startswith("Right")


@pytest.mark.parametrize("message", WRONG_MIXING)
def test_the_check_of_mixing_names_the_flaw(message):
    with pytest.raises(ExerciseError, match=message):
        check_mixing_rates(WRONG_MIXING[message])


# --- week 2: calibration -----------------------------------------------------------------------------------------


def calibration_error(probabilities, targets, bins=10, *, sort=True, signed=False, top="max", weigh="size", drop=False):
    """The right answer, or one with a flaw."""
    confidence, answers = probabilities.max(1)
    if top == "target":
        confidence = probabilities[torch.arange(len(targets)), targets]
    right = (answers == targets).float()
    order = confidence.argsort() if sort else torch.arange(len(targets))
    if drop:
        order = order[: len(order) // bins * bins]
    error = 0
    for part in torch.tensor_split(order, bins):
        gap = confidence[part].mean() - right[part].mean()
        error = (
            error
            + (gap if signed else gap.abs()) * {"size": len(part) / len(order), "none": 1, "bins": 1 / bins}[weigh]
        )
    return error.abs()


def equal_width(probabilities, targets, bins=10):
    confidence, answers = probabilities.max(1)
    right, place = (answers == targets).float(), (confidence * bins).ceil()
    return sum(((confidence - right)[place == k].sum()).abs() for k in range(bins + 1)) / len(right)


def no_groups(probabilities, targets, bins=10):
    confidence, answers = probabilities.max(1)
    return (confidence - (answers == targets).float()).abs().mean()


def changes_its_input(probabilities, targets, bins=10):
    probabilities.mul_(2)
    return calibration_error(probabilities / 2, targets, bins)


WRONG_CALIBRATION = {
    "cancel in yours": lambda p, t, b: calibration_error(p, t, b, signed=True),
    "probability of the right answer": lambda p, t, b: calibration_error(p, t, b, top="target"),
    "compares each single item": no_groups,
    "gaps of 0.3 and 0.4": lambda p, t, b: torch.tensor(0.5),
    "order of the items": lambda p, t, b: calibration_error(p, t, b, sort=len(p) < 10),
    "equally wide": lambda p, t, b: equal_width(p, t, b) if len(p) > 10 else calibration_error(p, t, b),
    "adds up the groups": lambda p, t, b: calibration_error(p, t, b, weigh="none" if len(p) > 10 else "size"),
    "use `bins`": lambda p, t, b: calibration_error(p, t, 2),
    "6, 6, 6 and 5": lambda p, t, b: calibration_error(p, t, b, drop=True),
    "decimals": lambda p, t, b: torch.tensor(1),
    "returns a float": lambda p, t, b: 0.65,
    "changes a tensor": changes_its_input,
    "stops with ZeroDivisionError": lambda p, t, b: 1 / 0,
}


def test_the_check_of_calibration_takes_a_right_answer():
    assert check_calibration_error(calibration_error).startswith("Right: ")


def test_the_check_of_calibration_takes_another_right_answer():
    def by_numpy(p, t, b):
        return torch.tensor(expected_calibration_error(p.amax(1), (p.argmax(1) == t).numpy(), b))

    assert check_calibration_error(by_numpy).startswith("Right: ")


@pytest.mark.parametrize("words", WRONG_CALIBRATION)
def test_the_check_of_calibration_names_the_flaw(words):
    with pytest.raises(ExerciseError, match=words):
        check_calibration_error(WRONG_CALIBRATION[words])


def test_every_flaw_of_calibration_has_its_own_message():
    messages = []
    for answer in WRONG_CALIBRATION.values():
        with pytest.raises(ExerciseError) as caught:
            check_calibration_error(answer)
        messages.append(str(caught.value))
    for words in WRONG_CALIBRATION:
        assert sum(bool(re.search(words, message)) for message in messages) == 1, words


# --- the solutions of the committed notebook ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("training_batch", check_training_batch),
        ("LoRALinear", check_lora_linear),
        ("mixing", check_mixing_rates),
        ("calibration_error", check_calibration_error),
    ],
)
def test_the_notebooks_own_solution_passes(name, check):
    assert check(solution("week2", name)).startswith("Right: ")
