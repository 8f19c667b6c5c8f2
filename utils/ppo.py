"""Proximal policy optimisation of a language model, held near a reference model by a KL penalty.

PPO: Schulman et al. 2017, arXiv:1707.06347. Its use on summaries, with the KL penalty in the reward: Ziegler et al.
2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325.

Left out of the textbook version, and why: no second model for the values (one linear layer on the policy's own trunk)
and none for the reference (the same weights with the adapter off); no dropout anywhere (it would make the ratio of a
policy to itself differ from 1); no whitening of returns. A minibatch is drawn once a rollout and kept for all epochs, so
that old and new log-probabilities come from the same padded tensors and their first ratio is exactly 1.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from utils import generation, ppo_run, ppo_shards
from utils.generation import Completion, Read, base_model, pad_right
from utils.kernels import fused_lora, token_logprobs
from utils.lab import progress
from utils.ppo_run import PPOConfig, PPOError, RunningMoments
from utils.prompts import encode

Prompt = str | list[dict[str, str]]
Reward = Callable[..., list[float]]


# --- pure functions ----------------------------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(policy || reference) from samples of the policy, elementwise, in nats.

    `logprobs` and `ref_logprobs`: log-probabilities of the sampled tokens, same shape. k1 is unbiased and may be
    negative; k2 is biased with low variance; k3 is unbiased and never negative (Schulman 2020, "Approximating KL
    Divergence"). Raises `ValueError` on another `kind`.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)) in nats, summed over the last dimension (the vocabulary)."""
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    difference = logprobs - ref_logprobs
    return (logprobs.exp() * torch.where(logprobs.isinf(), 0.0, difference)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is true; what stands elsewhere, even NaN, has no effect."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `x` to variance 1 over `mask`, and to mean 0 unless `shift_mean` is false; zero outside the mask.

    The variance is the population's (divided by the count). Rewards are whitened with `shift_mean=False`: taking
    their mean away would change what is rewarded.
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask.bool(), scaled if shift_mean else scaled + mean, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438): advantages and returns.

    All arguments (batch, length); `mask` marks the real tokens of a completion, which stand at the left of each row.
    Beyond the last real token the value is 0: the episode is over. Both results are 0 outside the mask.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float = 0.2) -> Tensor:
    """PPO's clipped objective with its sign turned, elementwise (equation 7 of the paper).

    A token whose ratio has left `1 ± clip_range` in the direction its advantage favours has gradient 0.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float = 0.2) -> Tensor:
    """Half the squared error of the values, elementwise, the worse of it with and without clipping around the old values."""
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, kl: float, n: int) -> None:
        """Nothing: the coefficient is fixed."""


class AdaptiveKLController:
    """Raise the coefficient where KL exceeds `target`, lower it where it falls short (Ziegler et al. 2019, section 2.2).

    `target` is a KL a sequence, in nats; `horizon` counts episodes.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, kl: float, n: int) -> None:
        """Account for `n` episodes whose mean KL was `kl` nats a sequence."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


# --- what a rollout holds ----------------------------------------------------------------------------------------


LOGGED = (
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio",
)  # fmt: skip


@dataclass
class Rollout:
    """Completions of a batch of prompts, and what the policy thought of them. Tensors are (rows, longest completion).

    `PPOTrainer.rollout` fills it in from the top to the bottom. `graphs` holds what `update` can go on from, by the rows of a
    micro-batch: log-probabilities, values and entropy with their gradients (see `PPOConfig.keep_graphs`).
    """

    prompts: list[Prompt]
    columns: dict[str, list]
    prompt_ids: list[list[int]]
    micro_batches: list[list[list[int]]]  # minibatches of micro-batches of row numbers
    completions: list[Completion]
    graphs: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    mask: Tensor | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]


# --- the trainer -------------------------------------------------------------------------------------------------


class PPOTrainer:
    """Train `model` so that `reward` of its completions rises while KL from `reference` stays small.

    model: decoder-only or encoder-decoder, plain or PEFT; only parameters that require gradients change.
    reward: called as `reward(prompts, completions, **columns)` with lists of strings, returns one finite number each.
    prompts: strings, chat messages, or rows with a column `prompt`; further columns go to the reward.
    reference: by default a frozen copy of `model`, or, where `model` is PEFT, the same weights with only its frozen adapter
        on (an SFT adapter that was kept, called "reference" if there are several), or with none (an SFT adapter that was merged).

    `train` repeats the three public steps: `rollout` samples and scores under both models, `score` asks the reward,
    `update` learns. Started by `torchrun`, each process samples and learns from its share of a step, and the gradients are
    added up. Each is handed the whole model, and keeps it, or with `PPOConfig.shard` one shard of it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt | dict[str, Any]],
        config: PPOConfig,
        reference: PreTrainedModel | None = None,
    ):
        self.model, self.reward, self.tokenizer, self.config = model.eval(), reward, tokenizer, config
        self.rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        ppo_run.check_config(config, self.rows)
        ppo_run.check_model(model, reference)
        self.head_learns = any(p.requires_grad for p in base_model(model).get_output_embeddings().parameters())
        if any("relative_attention_bias" in name for name, p in model.named_parameters() if p.requires_grad):
            # Fused attention takes another path, rounding otherwise, where T5's position bias is being trained.
            model.set_attn_implementation("eager")
        self.processes = ppo_run.Processes(model.device)
        self.processes.start_alike([p for p in model.parameters() if p.requires_grad])
        shared = reference is None and isinstance(model, PeftModel)
        self.reference_adapter = ppo_run.frozen_adapter(model) if shared else None
        if reference is None and not shared:
            reference = copy.deepcopy(model)
        self.reference = reference.eval().requires_grad_(False) if reference is not None else None
        self.in_shards = config.shard and self.processes.number > 1
        if self.in_shards:
            ppo_shards.check_passes(config, self.processes.number)
            ppo_shards.shard(model, self.processes.number)
            if reference is not None:
                ppo_shards.shard(reference, self.processes.number)
        width = model.config.get_text_config(decoder=True).hidden_size
        self.value_head = nn.Linear(width, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = [*self.trainable.values(), *self.value_head.parameters()]
        groups = [{"params": parameters} for parameters in ppo_shards.alike(self.parameters)]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
        self.kl_controller = FixedKLController(config.kl_coef)
        if config.kl_target is not None:
            self.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.moments = RunningMoments()
        self.step = self.optimizer_steps = 0
        self.history: list[dict[str, float]] = []
        self.tensorboard = ppo_run.tensorboard_writer(config) if self.processes.is_main else None

    def train(
        self, resume_from: str | os.PathLike | None = None, on_step: Callable[[list[dict]], None] | None = None
    ) -> list[dict[str, float]]:
        """Run the steps that are left and return the metrics of every step.

        `resume_from` is a checkpoint, or "last": the newest in `output_dir`, if there is one yet. Every random draw of a
        step follows from the seed and the step's number, so a resumed run goes on as the uninterrupted one would have.
        `on_step` is called after each step with the metrics so far.
        """
        ppo_run.begin(self, resume_from)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        main = self.processes.is_main
        try:
            with progress(total=self.config.steps, initial=self.step, description="PPO", disable=not main) as bar:
                while self.step < self.config.steps:
                    with torch.random.fork_rng(devices):
                        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
                        metrics = self._one_step()
                    self.history.append(metrics)
                    self.step += 1
                    bar.set_postfix(score=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.2f}")
                    bar.update(1)
                    ppo_run.keep_step(self)
                    if main and on_step is not None:
                        on_step(self.history)
        except KeyboardInterrupt:
            if main:
                print(f"Stopped in step {self.step}. {ppo_run.where_to_resume(self.config)}")
            raise
        return self.history

    # --- the three steps ---

    @torch.no_grad()
    def rollout(self, rows: Sequence[Prompt | dict[str, Any]]) -> Rollout:
        """Sample completions of each prompt; log-probabilities under policy and reference, and values, of every token.

        The `num_completions` of one prompt are consecutive rows.
        """
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        rows = [row for row in rows for _ in range(self.config.num_completions)]
        prompts = [row["prompt"] for row in rows]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        prompt_ids = [encode(self.tokenizer, prompt) for prompt in prompts]
        # What is drawn follows from one seed, whichever process draws it.
        random = torch.Generator().manual_seed(self.processes.from_main(int(torch.randint(2**40, ()))))
        rollout = Rollout(prompts, columns, prompt_ids, ppo_run.minibatches(self.config, prompt_ids, random), [])
        draws = torch.rand(len(rows), self.config.max_new_tokens, generator=random)
        mine = [batch for minibatch in rollout.micro_batches for batch in self.processes.share(minibatch)]
        rollout.completions = [None] * len(rows)
        # Micro-batches are sampled together, but where layers look back over a window and take no padding later.
        size, found = 1, []
        if mine and generation.can_join(DynamicCache(config=base_model(self.model).config)):
            size = max(1, self.config.rollout_batch_size // len(mine[0]))
        with ppo_shards.whole(self.model):
            for first in range(0, len(mine), size):
                found += self._sample_and_score(rollout, mine[first : first + size], draws)
        with self._reference_model() as reference, ppo_shards.whole(reference):
            references = [self._forward(reference, rollout, batch)[0] for batch in mine]
        for row, completion in self.processes.gather([(row, rollout.completions[row]) for row in chain(*mine)]):
            rollout.completions[row] = completion
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
        rollout.mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tensors = torch.zeros(3, *rollout.mask.shape)  # and zero they stay where another process has the row
        for batch, (logprobs, values, _), ref_logprobs in zip(mine, found, references, strict=True):
            tensors[:, batch, : values.shape[1]] = torch.stack([logprobs, ref_logprobs, values]).cpu()
        rollout.logprobs, rollout.ref_logprobs, rollout.values = self.processes.sum(tensors)
        return rollout

    def score(self, rollout: Rollout) -> Tensor:
        """Ask the reward for one number a completion, (rows,), and keep it in the rollout. Only the main process asks."""
        scores = None
        if self.processes.is_main:
            # of a chat its last message
            prompts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in rollout.prompts]
            scores = [float(score) for score in self.reward(prompts, rollout.texts, **rollout.columns)]
        rollout.scores = torch.tensor(self.processes.from_main(scores))
        if len(rollout.scores) != len(rollout.texts):
            raise PPOError(f"The reward gave {len(rollout.scores)} numbers for {len(rollout.texts)} completions.")
        if not rollout.scores.isfinite().all():
            raise PPOError(
                f"Step {self.step}: the reward gave {rollout.scores.tolist()}: it must be finite, so look at what it makes of "
                "an empty or very long completion."
            )
        if self.config.missing_eos_penalty is not None:
            truncated = torch.tensor([completion.truncated for completion in rollout.completions])
            rollout.scores -= self.config.missing_eos_penalty * truncated
        return rollout.scores

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from a scored rollout; the step's metrics, over real tokens only, under TRL's names."""
        config, mask = self.config, rollout.mask
        kl = torch.where(mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"), 0.0)
        sequence_kl = kl.sum(1)
        mean_kl = float(sequence_kl.mean())
        if not math.isfinite(mean_kl) or abs(mean_kl) > config.max_kl:
            raise PPOError(
                f"Step {self.step}: KL from the reference is {mean_kl:.4g} nats a sequence: lower learning_rate "
                f"(now {config.learning_rate}) or raise kl_coef (now {config.kl_coef}). {ppo_run.where_to_resume(config)}"
            )
        self.moments.update(rollout.scores)
        scores = rollout.scores / self.moments.std if config.scale_scores else rollout.scores
        kl_penalty = -self.kl_controller.value * kl
        rewards = kl_penalty.clone()
        last = mask.sum(1) - 1
        rewards[torch.arange(len(last)), last] += scores
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        advantages = masked_whiten(advantages, mask)

        statistics, norms, tokens = torch.zeros(len(LOGGED)), [], 0
        minibatches = [minibatch for _ in range(config.epochs) for minibatch in rollout.micro_batches]
        for minibatch in minibatches:
            minibatch_tokens = sum(int(mask[rows].sum()) for rows in minibatch)
            sums = torch.zeros(len(LOGGED))
            for rows in self.processes.share(minibatch):
                sums += self._backward(rollout, rows, advantages, returns, minibatch_tokens)
            sums = self.processes.sum(sums)
            statistics += sums
            tokens += minibatch_tokens
            approxkl = float(sums[LOGGED.index("policy/approxkl_avg")]) / minibatch_tokens
            if config.target_kl is not None and approxkl > config.target_kl:
                self.optimizer.zero_grad(set_to_none=True)
                break
            norms.append(self._optimizer_step())
        metrics = {
            "objective/kl": mean_kl,
            "objective/kl_coef": self.kl_controller.value,
            "objective/entropy": float(-torch.where(mask, rollout.logprobs, 0.0).sum(1).mean()),
            "objective/scores": float(rollout.scores.mean()),
            "objective/scores_running_mean": self.moments.mean,
            "objective/scores_running_std": self.moments.std,
            "objective/non_score_reward": float(kl_penalty.sum(1).mean()),
            "objective/rlhf_reward": float((scores + kl_penalty.sum(1)).mean()),
            **{name: float(total) / tokens for name, total in zip(LOGGED, statistics, strict=True)},
            "val/num_eos_tokens": float(sum(not completion.truncated for completion in rollout.completions)),
            "val/explained_variance": _explained_variance(rollout.values[mask], returns[mask]),
            "response/length_mean": float(mask.sum(1).float().mean()),
            "response/truncated_frac": sum(c.truncated for c in rollout.completions) / len(mask),
            "grad_norm": sum(norms) / max(1, len(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "optimizer_steps": float(self.optimizer_steps),
        }
        self.kl_controller.update(metrics["objective/kl"], len(mask))
        return metrics

    # --- pieces of a step ---

    def _one_step(self) -> dict[str, float]:
        left = 1 - self.step / self.config.steps if self.config.lr_scheduler_type == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * left
        begin, rollout = time.perf_counter(), self.rollout(ppo_run.rows_of_step(self.config, self.rows, self.step))
        sampled, _ = time.perf_counter(), self.score(rollout)
        scored, metrics = time.perf_counter(), self.update(rollout)
        seconds = sampled - begin, scored - sampled, time.perf_counter() - scored
        return metrics | dict(zip(("seconds/rollout", "seconds/score", "seconds/update"), seconds, strict=True))

    def _sample_and_score(self, rollout: Rollout, batches: list[list[int]], draws: Tensor) -> list[tuple]:
        """Sample completions of some micro-batches, together; log-probabilities and values of each. Prompts are read once."""
        # Of the first minibatch alone: after a step of the optimizer the weights are no longer those of the graph.
        kept = self.processes.share(rollout.micro_batches[0])[: self.config.keep_graphs]
        reads, found = [], []
        for batch in batches:
            with torch.set_grad_enabled(batch in kept):
                reads.append(self._read(self.model, rollout, batch))
        self._sample(rollout, [*chain(*batches)], reads, draws)
        for batch, read in zip(batches, reads, strict=True):
            with torch.set_grad_enabled(batch in kept):
                found.append(self._forward(self.model, rollout, batch, read))
        rollout.graphs |= {tuple(batch): made for batch, made in zip(batches, found, strict=True) if batch in kept}
        return found

    def _sample(self, rollout: Rollout, rows: list[int], reads: list[Read], draws: Tensor) -> None:
        """Sample a completion for each of `rows`. `draws` (all rows, tokens) are uniform on [0, 1): one decides a token."""
        base, config = base_model(self.model), self.config
        eos_ids = generation.eos_token_ids(generation.generation_config(self.model, self.tokenizer))
        with fused_lora(self.model), generation.packed_weights(self.model):
            read = generation.join(reads, room=config.max_new_tokens)
            chances = dict(temperature=config.temperature, draws=draws[rows].to(base.device))
            sampled = generation.decode(base, read, eos_ids, config.max_new_tokens, **chances)
        for row, token_ids in zip(rows, sampled, strict=True):
            rollout.completions[row] = generation.completion(self.tokenizer, token_ids, eos_ids)

    def _backward(
        self, rollout: Rollout, rows: list[int], advantages: Tensor, returns: Tensor, minibatch_tokens: int
    ) -> Tensor:
        """Add one micro-batch's gradient; sums over its tokens of what is `LOGGED`.

        Dividing by the tokens of the whole minibatch makes the gradient independent of how it is cut into micro-batches
        and shared among processes.
        """
        logprobs, values, entropy = rollout.graphs.pop(tuple(rows), None) or self._forward(self.model, rollout, rows)
        device, width = logprobs.device, logprobs.shape[1]
        mask = rollout.mask[rows][:, :width].to(device)
        old_logprobs, old_values, advantages, returns = (
            tensor[rows][:, :width].to(device) for tensor in (rollout.logprobs, rollout.values, advantages, returns)
        )
        token_policy_loss = policy_loss(logprobs, old_logprobs, advantages, self.config.clip_range)
        token_value_loss = value_loss(values, old_values, returns, self.config.value_clip_range)
        token_loss = token_policy_loss + self.config.value_coef * token_value_loss
        (torch.where(mask, token_loss, 0.0).sum() / minibatch_tokens).backward()
        with torch.no_grad():
            log_ratio = logprobs - old_logprobs
            ratio = log_ratio.exp()
            clipped = token_policy_loss > -advantages * ratio
            value_clipped = token_value_loss > (values - returns) ** 2 / 2
            logged = log_ratio**2 / 2, clipped, entropy, token_policy_loss, token_value_loss, value_clipped, ratio
            return torch.stack([torch.where(mask, each.float(), 0.0).sum() for each in logged]).cpu()

    def _optimizer_step(self) -> float:
        self.processes.sum_gradients(self.parameters)
        norm = ppo_shards.clip_gradients(self.parameters, self.config.max_grad_norm)
        if not math.isfinite(norm):
            raise PPOError(
                f"Step {self.step}: the gradient's norm is {norm}: lower learning_rate (now {self.config.learning_rate}). "
                + ppo_run.where_to_resume(self.config)
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return norm

    # --- the forward pass that old, new and reference log-probabilities share ---

    def _read(self, model: nn.Module, rollout: Rollout, rows: list[int]) -> Read:
        """The prompts of `rows`, each read once for all its completions that follow each other."""
        prompts, base = [rollout.prompt_ids[i] for i in rows], base_model(model)
        # Of what all prompts begin with only keys and values are used, and a pass without a result asks for no shards again.
        prefix = DynamicCache(config=base.config) if self.in_shards else None
        with self._precision(model):
            return generation.read_prompts(base, prompts, self.tokenizer.pad_token_id, prefix=prefix)

    def _forward(
        self, model: nn.Module, rollout: Rollout, rows: list[int], read: Read | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, value and entropy of every completion token of `rows`, each (rows, longest of them), fp32.

        `read` is what this very model has made of the prompts, where that is known.
        """
        completions = [rollout.completions[i].token_ids for i in rows]
        targets, mask = pad_right(completions, self.tokenizer.pad_token_id, model.device)
        mask = mask.bool()
        read = self._read(model, rollout, rows) if read is None else read
        head = base_model(model).get_output_embeddings()
        with self._precision(model):
            if model.config.is_encoder_decoder:
                hidden, logits = (tensor[mask] for tensor in self._encoder_decoder(model, read, targets))
            else:
                hidden = self._decoder_only(model, read, completions)[:, : mask.shape[1]][mask]
                logits = None if type(head) is nn.Linear else head(hidden)
        if logits is None and head.bias is None and not self.head_learns:
            chosen, entropy = token_logprobs(hidden, head.weight, targets[mask], self.config.temperature)
        else:
            if logits is None:  # in float32 a head's parameters: the weight, and the bias where there is one
                logits = F.linear(hidden.float(), *(parameter.float() for parameter in head.parameters()))
            logprobs = (logits.float() / self.config.temperature).log_softmax(-1)  # (tokens, vocabulary), no padding
            chosen = logprobs.gather(-1, targets[mask][:, None])[:, 0]
            entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        found = chosen, self.value_head(hidden.float())[:, 0], entropy
        return tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat) for flat in found)

    @contextmanager
    def _precision(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile products are in the weights' format, those of LoRA, too."""
        bfloat16 = model.dtype == torch.bfloat16
        with fused_lora(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            yield

    def _decoder_only(self, model: nn.Module, read: Read, completions: list[list[int]]) -> Tensor:
        """Hidden states (rows, completion or longer, hidden) from which each completion token is predicted.

        A prompt's keys and values serve all its completions. These are padded on the right and all begin in the same column;
        position ids count real tokens.
        """
        trunk, last, prompt_mask = base_model(model).base_model, read.last[read.index], read.mask[read.index]
        if self.config.max_new_tokens == 1:
            return last
        # The last token of a completion predicts nothing. If it is the only one, it is read, so that all make as many passes.
        answers = [ids[:-1] or ids for ids in completions]
        answers, answer_mask = pad_right(answers, self.tokenizer.pad_token_id, model.device)
        hidden = trunk(
            input_ids=answers,
            attention_mask=torch.cat([prompt_mask, answer_mask], 1),
            position_ids=prompt_mask.sum(1, keepdim=True) + torch.arange(answers.shape[1], device=model.device),
            past_key_values=generation.select_rows(read.cache, read.index),
        ).last_hidden_state
        return torch.cat([last, hidden], 1)

    def _encoder_decoder(self, model: nn.Module, read: Read, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder hidden states and logits, (rows, completion, ...). The first generated token is predicted from the start token."""
        start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
        seen, decoder = [], base_model(model).get_decoder()
        with decoder.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state)):
            output = model(
                encoder_outputs=BaseModelOutput(read.last[read.index]),
                attention_mask=read.mask[read.index],
                decoder_input_ids=torch.cat([start, targets[:, :-1]], 1),
                use_cache=False,
            )
        return seen[0], output.logits

    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        """The frozen reference; where it shares the policy's weights, the policy's adapter is on again afterwards."""
        if self.reference is not None:
            yield self.reference
            return
        # PEFT turns gradients on and off with its adapters
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        active = list(self.model.active_adapters)
        try:
            if self.reference_adapter is None:
                with self.model.disable_adapter():
                    yield self.model
            else:
                self.model.base_model.set_adapter(self.reference_adapter, inference_mode=True)
                yield self.model
        finally:
            if self.reference_adapter is not None:
                self.model.base_model.set_adapter(active)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def save_checkpoint(self, folder: str | os.PathLike) -> Path:
        """Write all that a resumed run needs, whole or not at all. All processes call it, the main one writes.

        Raises `PPOError` where it cannot.
        """
        return ppo_run.save_checkpoint(self, Path(folder))

    def load_checkpoint(self, folder: str | os.PathLike) -> None:
        """Take up a run where `save_checkpoint` left it. Raises `PPOError` where `folder` is no checkpoint of this run."""
        ppo_run.load_checkpoint(self, Path(folder))


# --- helpers -----------------------------------------------------------------------------------------------------


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    variance = returns.var(unbiased=False)
    return float(1 - (returns - values).var(unbiased=False) / variance) if variance > 0 else 0.0


if __name__ == "__main__":
    from utils.ppo_command import main

    raise SystemExit(main())
