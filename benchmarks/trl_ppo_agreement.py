"""PPO: do `utils.ppo` and TRL 1.12.0, the last TRL with a PPO trainer, make the same of the same tensors?

    python benchmarks/trl_ppo_agreement.py --trl-python PATH [--cases 20]

Random log-probabilities, values, scores and lengths go through `PPOTrainer.update` here and through TRL's own lines, taken
from the source of its `PPOTrainer.train` and run as they stand but for two things in which TRL differs on purpose: it puts the
score one place behind the last token of a completion that ended, and whitens with the variance of a sample (n - 1). Compared are
advantages, returns, both losses, the shares that are clipped, and the gradients for log-probabilities and values. Printed is the
largest difference of each, with TRL's two ways aligned and as they are. The status is 1 where they do not agree.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from ppo import trl_hint  # benchmarks/ppo.py

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOLERANCE = 1e-5  # float32, sums over some hundred tokens
SETTINGS = {"gamma": 0.99, "lam": 0.95, "kl_coef": 0.1}
# pieces of TRL's source: the line where each begins, and the one before which it ends
REWARDS = "logprobs = torch.masked_fill(logprobs, padding_mask", "# Do multiple epochs of PPO"
LOSSES = "new_logprobs = torch.masked_fill(", "accelerator.backward(loss)"
CLIPPED = "pg_clipfrac = masked_mean(", "prob_dist ="
BEHIND = "sequence_lengths_p1 = sequence_lengths + 1"


def between(source: str, start: str, end: str) -> str:
    """The lines of `source` from the one that holds `start` up to the one that holds `end`."""
    first = source.index(start)
    lines = source[source.rindex("\n", 0, first) + 1 : source.index(end, first)]
    return textwrap.dedent(lines.rpartition("\n")[0])


def make_case(seed: int, rows: int = 16, length: int = 24) -> SimpleNamespace:
    """Tensors of a rollout, (rows, length): some completions end early, some are cut off, one has a single token."""
    import torch

    torch.manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,))
    lengths[:2] = torch.tensor([1, length])
    old = -3 * torch.rand(rows, length)
    values = torch.randn(rows, length)
    return SimpleNamespace(
        lengths=lengths,
        mask=torch.arange(length) < lengths[:, None],
        logprobs=old,
        ref_logprobs=old + 0.3 * torch.randn(rows, length),
        new_logprobs=old + 0.3 * torch.randn(rows, length),  # far enough for a third to be clipped
        values=values,
        new_values=values + 0.3 * torch.randn(rows, length),
        scores=3 * torch.randn(rows),
        whiten_rewards=bool(seed % 2),
    )


def ours(case: SimpleNamespace) -> dict:
    """What `PPOTrainer.update` makes of a case."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.generation import Completion
    from utils.ppo import PPOConfig, PPOTrainer, Rollout

    new_logprobs, new_values = case.new_logprobs.clone().requires_grad_(), case.new_values.clone().requires_grad_()
    seen = {}

    class Given(PPOTrainer):
        """The forward pass gives the case's tensors."""

        def _forward(self, model, rollout, rows):
            return new_logprobs[rows], new_values[rows], torch.zeros_like(new_values[rows])

        def _backward(self, rollout, rows, advantages, returns, minibatch_tokens):
            seen.update(advantages=advantages, returns=returns)
            return super()._backward(rollout, rows, advantages, returns, minibatch_tokens)

    rows = len(case.lengths)
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    settings = dict(
        batch_size=rows, minibatch_size=rows, micro_batch_size=rows, epochs=1, whiten_rewards=case.whiten_rewards
    )
    trainer = Given(
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **size)), None, None, ["prompt"], PPOConfig(**settings, **SETTINGS)
    )
    trainer._optimizer_step = lambda: 0.0  # the model had no part in it
    completions = [Completion("", [0] * int(n), truncated=False) for n in case.lengths]
    rollout = Rollout(
        prompts=[""] * rows, columns={}, prompt_ids=[[0]] * rows, micro_batches=[[list(range(rows))]],
        completions=completions, mask=case.mask, logprobs=case.logprobs, ref_logprobs=case.ref_logprobs,
        values=case.values, scores=case.scores,
    )  # fmt: skip
    metrics = trainer.update(rollout)
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg")
    return (
        seen
        | {name: torch.tensor(metrics[name]) for name in names}
        | {"gradient of logprobs": new_logprobs.grad, "gradient of values": new_values.grad}
    )


def theirs(case: SimpleNamespace, aligned: bool) -> dict:
    """What TRL's lines make of a case."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    if source.count(BEHIND) != 1:
        raise SystemExit("TRL's source is not that of 1.12.0.")
    if aligned:
        source = source.replace(BEHIND, "sequence_lengths_p1 = sequence_lengths")
    names = dict(vars(ppo_trainer))
    if aligned:
        population = partial(ppo_trainer.masked_var, unbiased=False)
        whiten = ppo_trainer.masked_whiten
        names["masked_whiten"] = type(whiten)(
            whiten.__code__, names | {"masked_var": population}, None, whiten.__defaults__
        )
    new_logprobs, new_values = case.new_logprobs.clone().requires_grad_(), case.new_values.clone().requires_grad_()
    rows, length = case.mask.shape
    places = torch.arange(length).repeat(rows, 1)
    sequence_lengths = case.lengths - 1
    names |= dict(
        args=SimpleNamespace(
            **SETTINGS, whiten_rewards=case.whiten_rewards, kl_estimator="k1", cliprange=0.2, cliprange_value=0.2, vf_coef=0.1
        ),
        responses=torch.zeros(rows, length, dtype=torch.long), response_idxs=places, sequence_lengths=sequence_lengths,
        padding_mask=places > sequence_lengths[:, None], logprobs=case.logprobs.clone(),
        ref_logprobs=case.ref_logprobs.clone(), values=case.values.clone(), scores=case.scores.clone(),
    )  # fmt: skip
    exec(between(source, *REWARDS), names)  # noqa: S102 - the lines of an installed package
    every = torch.arange(rows)
    # TRL cuts the completion out of values of the whole text: here there is one place before it and one behind
    whole = torch.nn.functional.pad(new_values, (0, 1))[..., None]
    names |= dict(
        micro_batch_inds=every, context_length=1, new_logprobs=new_logprobs, vpred_temp=whole, mb_logprobs=names["logprobs"],
        mb_values=names["values"], mb_return=names["returns"], mb_advantage=names["advantages"],
    )  # fmt: skip
    exec(between(source, *LOSSES), names)  # noqa: S102
    names["loss"].backward()
    exec(between(source, *CLIPPED), names)  # noqa: S102
    return {
        "advantages": names["advantages"],
        "returns": torch.where(case.mask, names["returns"], 0.0),
        "loss/policy_avg": names["pg_loss"].detach(),
        "loss/value_avg": names["vf_loss"].detach(),
        "policy/clipfrac_avg": names["pg_clipfrac"],
        "val/clipfrac_avg": names["vf_clipfrac"],
        "gradient of logprobs": new_logprobs.grad,
        "gradient of values": new_values.grad,
    }


def compare(cases: int) -> int:
    """Print the largest difference of each quantity over all cases; 1 where an aligned one is above the tolerance."""
    largest: dict[str, list[float]] = {}
    for seed in range(cases):
        case = make_case(seed)
        mine = ours(case)
        for column, aligned in enumerate((True, False)):
            for name, value in theirs(case, aligned).items():
                difference = float((value - mine[name]).abs().max())
                kept = largest.setdefault(name, [0.0, 0.0])
                kept[column] = max(kept[column], difference)
    print(
        f"Largest difference over {cases} rollouts of 16 completions, in float32\n{'':24}{'aligned':>12}{'as TRL is':>12}"
    )
    for name, (aligned, as_it_is) in largest.items():
        print(f"{name:24}{aligned:12.1e}{as_it_is:12.1e}")
    worst = max(aligned for aligned, _ in largest.values())
    agree = worst <= TOLERANCE
    print(
        f"Aligned, they {'agree' if agree else 'DO NOT agree'}: nothing is above {worst:.1e} (tolerance {TOLERANCE:.0e})."
    )
    return 0 if agree else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--trl-python", type=Path, help="the Python of an environment with trl==1.12.0")
    parser.add_argument("--cases", type=int, default=20, help="random rollouts")
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compare:
        sys.exit(compare(given.cases))
    if given.trl_python is None:
        print(trl_hint())
        sys.exit()
    command = [given.trl_python, __file__, "--compare", f"--cases={given.cases}"]
    sys.exit(subprocess.run(command, check=False).returncode)  # noqa: S603 - this very file
