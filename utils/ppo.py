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
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from utils.generation import Completion, base_model, generate, pad_left, pad_right
from utils.lab import LabError, progress
from utils.prompts import encode

Prompt = str | list[dict[str, str]]
Reward = Callable[..., list[float]]


class PPOError(LabError):
    """Training cannot go on; the message names the step, the value and what to try."""


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


# --- configuration and what a rollout holds ----------------------------------------------------------------------


@dataclass
class PPOConfig:
    """Settings of one run. Lengths are in tokens, KL in nats a sequence.

    `steps` rollouts of `batch_size` prompts each, `num_completions` for every prompt; a rollout is learned from for `epochs`
    passes in minibatches of `minibatch_size` completions (one optimizer step each), computed `micro_batch_size` at a time. With `kl_target` the
    coefficient adapts, without it stays at `kl_coef`. The policy is `softmax(logits / temperature)`: the one temperature
    applies to sampling, policy and reference alike, so what is scored is what is sampled.
    """

    steps: int = 10
    batch_size: int = 16
    num_completions: int = 1
    minibatch_size: int = 8
    micro_batch_size: int = 4
    epochs: int = 2
    max_new_tokens: int = 48
    temperature: float = 1.0
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    max_grad_norm: float = 1.0
    max_kl: float = 1000.0
    generation_kwargs: dict[str, Any] | None = None
    output_dir: str | None = None
    save_steps: int | None = None
    seed: int = 0


@dataclass
class Rollout:
    """Completions of a batch of prompts, and what the policy thought of them. Tensors are (rows, longest completion)."""

    prompts: list[Prompt]
    columns: dict[str, list]
    prompt_ids: list[list[int]]
    completions: list[Completion]
    micro_batches: list[list[list[int]]]  # minibatches of micro-batches of row numbers
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    mask: Tensor
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
    reference: by default the same weights with the adapter off where `model` is PEFT (so merge an adapter that was
        fine-tuned before), else a frozen copy of `model`.

    `train` repeats the three public steps: `rollout` samples and scores under both models, `score` asks the reward,
    `update` learns.
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
        if not self.rows:
            raise LabError("PPO needs at least one prompt.")
        if config.lr_scheduler_type not in ("linear", "constant"):
            raise LabError(
                f"lr_scheduler_type={config.lr_scheduler_type!r}: choose 'linear' (down to 0) or 'constant'."
            )
        if config.temperature <= 0:
            raise LabError(f"temperature={config.temperature}: PPO samples, so it must be above 0.")
        completions = config.batch_size * config.num_completions
        if completions % config.minibatch_size or config.minibatch_size % config.num_completions:
            raise LabError(
                f"batch_size={config.batch_size} prompts with num_completions={config.num_completions} give {completions} "
                f"rows: this must be a multiple of minibatch_size={config.minibatch_size}, and that one of num_completions."
            )
        self.generation_kwargs = _only_neutral(config.generation_kwargs or {})
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise LabError("No parameter of the model requires gradients: pass a PEFT model or unfreeze the model.")
        if any("relative_attention_bias" in name for name in self.trainable):
            # Fused attention takes another path, rounding otherwise, where T5's position bias is being trained.
            model.set_attn_implementation("eager")
        if reference is None and not isinstance(model, PeftModel):
            reference = copy.deepcopy(model)
        self.reference = reference.eval().requires_grad_(False) if reference is not None else None
        self.value_head = nn.Linear(_hidden_size(model), 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.optimizer = torch.optim.AdamW(
            [*self.trainable.values(), *self.value_head.parameters()], lr=config.learning_rate, weight_decay=0.0
        )
        self.kl_controller = (
            FixedKLController(config.kl_coef)
            if config.kl_target is None
            else AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        )
        self.step = self.optimizer_steps = 0
        self.history: list[dict[str, float]] = []

    def train(self, resume_from: str | os.PathLike | None = None) -> list[dict[str, float]]:
        """Run the steps that are left and return the metrics of every step.

        `resume_from` is a folder that an earlier run wrote. Every random draw of a step follows from the seed and the
        step's number, so a resumed run goes on as the uninterrupted one would have.
        """
        if resume_from is not None:
            self.load_checkpoint(resume_from)
        with progress(total=self.config.steps, initial=self.step, description="PPO") as bar:
            while self.step < self.config.steps:
                devices = [self.model.device] if self.model.device.type == "cuda" else []
                with torch.random.fork_rng(devices):
                    torch.manual_seed(self.config.seed * 1_000_003 + self.step)
                    self._set_learning_rate()
                    seconds = [time.perf_counter()]
                    rollout = self.rollout(self._next_rows())
                    seconds.append(time.perf_counter())
                    self.score(rollout)
                    seconds.append(time.perf_counter())
                    metrics = self.update(rollout)
                    seconds.append(time.perf_counter())
                for i, name in enumerate(("rollout", "score", "update")):
                    metrics[f"seconds/{name}"] = seconds[i + 1] - seconds[i]
                self.history.append(metrics)
                self.step += 1
                bar.set_postfix(score=f"{metrics['objective/scores']:.2f}", kl=f"{metrics['objective/kl']:.2f}")
                bar.update(1)
                if self.config.output_dir and self.config.save_steps and self.step % self.config.save_steps == 0:
                    self.save_checkpoint(Path(self.config.output_dir) / f"step-{self.step}")
        return self.history

    # --- the three steps ---

    @torch.no_grad()
    def rollout(self, rows: Sequence[Prompt | dict[str, Any]]) -> Rollout:
        """Sample completions of each prompt; log-probabilities under policy and reference, and values, of every token.

        The `num_completions` of one prompt are consecutive rows.
        """
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        prompts = [row["prompt"] for row in rows]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        completions = generate(
            self.model,
            self.tokenizer,
            prompts,
            batch_size=len(prompts),
            completions_per_prompt=self.config.num_completions,
            show_progress=False,
            do_sample=True,
            temperature=self.config.temperature,
            max_new_tokens=self.config.max_new_tokens,
            **self.generation_kwargs,
        )
        repeats = [row for row in range(len(rows)) for _ in range(self.config.num_completions)]
        prompts = [prompts[i] for i in repeats]
        columns = {key: [values[i] for i in repeats] for key, values in columns.items()}
        prompt_ids = [encode(self.tokenizer, prompt) for prompt in prompts]
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        empty = torch.zeros(mask.shape, dtype=torch.float32)
        rollout = Rollout(prompts, columns, prompt_ids, completions, [], empty, empty.clone(), empty.clone(), mask)
        rollout.micro_batches = self._minibatches(rollout)
        for rows_of_batch in _flatten(rollout.micro_batches):
            logprobs, values, _ = self._forward(self.model, rollout, rows_of_batch)
            _store(rollout.logprobs, rows_of_batch, logprobs)
            _store(rollout.values, rows_of_batch, values)
            with self._reference_model() as reference:
                _store(rollout.ref_logprobs, rows_of_batch, self._forward(reference, rollout, rows_of_batch)[0])
        return rollout

    def score(self, rollout: Rollout) -> Tensor:
        """Ask the reward for one number a completion, (rows,), and keep it in the rollout."""
        prompts = [_last_text(prompt) for prompt in rollout.prompts]
        scores = self.reward(prompts, rollout.texts, **rollout.columns)
        if len(scores) != len(rollout.texts):
            raise PPOError(f"The reward gave {len(scores)} numbers for {len(rollout.texts)} completions.")
        rollout.scores = torch.tensor([float(score) for score in scores])
        if not rollout.scores.isfinite().all():
            raise PPOError(f"Step {self.step}: the reward gave {rollout.scores.tolist()}: it must be finite.")
        if self.config.missing_eos_penalty is not None:
            truncated = torch.tensor([completion.truncated for completion in rollout.completions])
            rollout.scores -= self.config.missing_eos_penalty * truncated
        return rollout.scores

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from a scored rollout; the step's metrics, over real tokens only, under TRL's names."""
        config, mask = self.config, rollout.mask
        kl = torch.where(mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"), 0.0)
        sequence_kl = kl.sum(1)
        self._check(sequence_kl)
        kl_penalty = -self.kl_controller.value * kl
        rewards = kl_penalty.clone()
        last = mask.sum(1) - 1
        rewards[torch.arange(len(last)), last] += rollout.scores
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        advantages = masked_whiten(advantages, mask)

        sums: dict[str, float] = {}
        norms, tokens = [], 0
        for _epoch in range(config.epochs):
            for minibatch in rollout.micro_batches:
                minibatch_tokens = sum(int(mask[rows].sum()) for rows in minibatch)
                for rows in minibatch:
                    statistics = self._backward(rollout, rows, advantages, returns, minibatch_tokens)
                    for name, value in statistics.items():
                        sums[name] = sums.get(name, 0.0) + value
                tokens += minibatch_tokens
                norms.append(self._optimizer_step())
        metrics = {
            "objective/kl": float(sequence_kl.mean()),
            "objective/kl_coef": self.kl_controller.value,
            "objective/entropy": float(-(rollout.logprobs * mask).sum(1).mean()),
            "objective/scores": float(rollout.scores.mean()),
            "objective/non_score_reward": float(kl_penalty.sum(1).mean()),
            "objective/rlhf_reward": float((rollout.scores + kl_penalty.sum(1)).mean()),
            **{name: value / tokens for name, value in sums.items()},
            "val/num_eos_tokens": float(sum(not completion.truncated for completion in rollout.completions)),
            "val/explained_variance": _explained_variance(rollout.values[mask], returns[mask]),
            "response/length_mean": float(mask.sum(1).float().mean()),
            "response/truncated_frac": sum(c.truncated for c in rollout.completions) / len(mask),
            "grad_norm": sum(norms) / len(norms),
            "optimizer_steps": float(self.optimizer_steps),
        }
        self.kl_controller.update(metrics["objective/kl"], len(mask))
        return metrics

    # --- pieces of the update ---

    def _backward(
        self, rollout: Rollout, rows: list[int], advantages: Tensor, returns: Tensor, minibatch_tokens: int
    ) -> dict[str, float]:
        """Add one micro-batch's gradient; sums over its tokens of what is logged.

        Dividing by the tokens of the whole minibatch makes the gradient independent of how it is cut into micro-batches.
        """
        logprobs, values, entropy = self._forward(self.model, rollout, rows)
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
            logged = {
                "policy/approxkl_avg": log_ratio**2 / 2,
                "policy/clipfrac_avg": clipped.float(),
                "policy/entropy_avg": entropy,
                "loss/policy_avg": token_policy_loss,
                "loss/value_avg": token_value_loss,
                "val/clipfrac_avg": value_clipped.float(),
                "val/ratio": ratio,
            }
            return {name: float(torch.where(mask, value, 0.0).sum()) for name, value in logged.items()}

    def _set_learning_rate(self) -> None:
        left = 1 - self.step / self.config.steps if self.config.lr_scheduler_type == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * left

    def _optimizer_step(self) -> float:
        parameters = [*self.trainable.values(), *self.value_head.parameters()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise PPOError(
                f"Step {self.step}: the gradient's norm is {norm}: lower learning_rate (now {self.config.learning_rate})."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return norm

    def _check(self, sequence_kl: Tensor) -> None:
        kl = float(sequence_kl.mean())
        if not math.isfinite(kl) or abs(kl) > self.config.max_kl:
            raise PPOError(
                f"Step {self.step}: KL from the reference is {kl:.4g} nats a sequence: lower learning_rate "
                f"(now {self.config.learning_rate}) or raise kl_coef (now {self.config.kl_coef})."
            )

    # --- the forward pass that old, new and reference log-probabilities share ---

    def _forward(self, model: nn.Module, rollout: Rollout, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, value and entropy of every completion token of `rows`, each (rows, longest of them), fp32."""
        completions = [rollout.completions[i].token_ids for i in rows]
        targets, _ = pad_right(completions, self.tokenizer.pad_token_id, model.device)
        mask = rollout.mask[rows][:, : targets.shape[1]].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            if model.config.is_encoder_decoder:
                hidden, logits = self._encoder_decoder(model, [rollout.prompt_ids[i] for i in rows], targets)
                logits = logits[mask]
            else:
                hidden = self._decoder_only(model, [rollout.prompt_ids[i] for i in rows], completions)
                logits = None
        if logits is None:
            head = base_model(model).get_output_embeddings()
            logits = F.linear(hidden[mask].float(), head.weight.float(), _float_or_none(head.bias))
        logprobs = (logits.float() / self.config.temperature).log_softmax(-1)  # (tokens, vocabulary): none for padding
        chosen = logprobs.gather(-1, targets[mask][:, None])[:, 0]
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
        values = self.value_head(hidden[mask].float())[:, 0]
        return tuple(
            torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat) for flat in (chosen, values, entropy)
        )

    def _decoder_only(self, model, prompt_ids, completions) -> Tensor:
        """Hidden states (rows, completion, hidden) from which each completion token is predicted.

        Each prompt goes through the model once; its keys and values then serve all its completions. Prompts are padded on
        the left, completions on the right, so all completions begin in the same column; position ids count real tokens.
        """
        unique = [ids for i, ids in enumerate(prompt_ids) if i == 0 or ids != prompt_ids[i - 1]]
        row = -1
        index = [row := row + (i == 0 or ids != prompt_ids[i - 1]) for i, ids in enumerate(prompt_ids)]
        prompts, prompt_mask = pad_left(unique, self.tokenizer.pad_token_id, model.device)
        read = _trunk(model)(
            input_ids=prompts,
            attention_mask=prompt_mask,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=base_model(model).config),
        )
        index = torch.tensor(index, device=model.device)
        last = read.last_hidden_state[index, -1:]
        # the last token of a completion predicts nothing
        answers, answer_mask = pad_right([ids[:-1] for ids in completions], self.tokenizer.pad_token_id, model.device)
        if answers.shape[1] == 0:
            return last
        positions = torch.arange(answers.shape[1], device=model.device)
        cache = read.past_key_values
        cache.batch_select_indices(index)
        hidden = _trunk(model)(
            input_ids=answers,
            attention_mask=torch.cat([prompt_mask[index], answer_mask], 1),
            position_ids=prompt_mask[index].sum(1, keepdim=True) + positions,
            past_key_values=cache,
        ).last_hidden_state
        return torch.cat([last, hidden], 1)

    def _encoder_decoder(self, model, prompt_ids, targets) -> tuple[Tensor, Tensor]:
        """Decoder hidden states and logits, (rows, completion, ...). The first generated token is predicted from the start token."""
        inputs, attention_mask = pad_right(prompt_ids, self.tokenizer.pad_token_id, model.device)
        start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
        output = model(
            input_ids=inputs,
            attention_mask=attention_mask,
            decoder_input_ids=torch.cat([start, targets[:, :-1]], 1),
            output_hidden_states=True,
            use_cache=False,
        )
        return output.decoder_hidden_states[-1], output.logits

    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        """The frozen reference; where it is the policy with its adapter off, the adapter is on again afterwards."""
        if self.reference is not None:
            yield self.reference
            return
        with self.model.disable_adapter():
            yield self.model

    # --- batches ---

    def _next_rows(self) -> list[dict[str, Any]]:
        """The prompts of this step: passes over all prompts, each in its own order, that follow from the seed alone."""
        first = self.step * self.config.batch_size
        rows = []
        for position in range(first, first + self.config.batch_size):
            epoch, index = divmod(position, len(self.rows))
            generator = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
            rows.append(self.rows[torch.randperm(len(self.rows), generator=generator)[index]])
        return rows

    def _minibatches(self, rollout: Rollout) -> list[list[list[int]]]:
        """Random minibatches, each cut into micro-batches of like length. Completions of one prompt stay together."""
        group = self.config.num_completions
        size, micro = self.config.minibatch_size // group, max(1, self.config.micro_batch_size // group)
        order = torch.randperm(len(rollout.prompts) // group).tolist()
        minibatches = []
        for start in range(0, len(order), size):
            prompts = sorted(order[start : start + size], key=lambda p: len(rollout.prompt_ids[p * group]))
            rows = [[p * group + k for k in range(group)] for p in prompts]
            minibatches.append([[*chain(*rows[i : i + micro])] for i in range(0, len(rows), micro)])
        return minibatches

    # --- checkpoints: safetensors and JSON, written to a new name and then renamed ---

    def save_checkpoint(self, folder: str | os.PathLike) -> Path:
        """Write all that a resumed run needs: trainable weights, value head, optimizer, coefficient, position, metrics."""
        folder = Path(folder)
        tensors = {f"policy.{name}": p.detach() for name, p in self.trainable.items()}
        tensors |= {f"value_head.{name}": p.detach() for name, p in self.value_head.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        state = {
            "step": self.step,
            "optimizer_steps": self.optimizer_steps,
            "kl_coef": self.kl_controller.value,
            "history": self.history,
            "config": asdict(self.config),
        }
        partial = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
            (partial / "state.json").write_text(json.dumps(state, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            raise PPOError(f"The checkpoint {folder} cannot be written ({error}).") from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def load_checkpoint(self, folder: str | os.PathLike) -> None:
        """Take up a run where `save_checkpoint` left it. Raises `PPOError` where the folder is not such a checkpoint."""
        folder = Path(folder)
        try:
            tensors = load_file(folder / "state.safetensors")
            state = json.loads((folder / "state.json").read_text())
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter.copy_(tensors[f"policy.{name}"])
                for name, parameter in self.value_head.named_parameters():
                    parameter.copy_(tensors[f"value_head.{name}"])
        except Exception as error:
            raise PPOError(f"{folder} is not a checkpoint of this model ({type(error).__name__}: {error}).") from error
        saved: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, field = name.split(".", 2)
                saved.setdefault(int(index), {})[field] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved})
        self.step, self.optimizer_steps = state["step"], state["optimizer_steps"]
        self.kl_controller.value, self.history = state["kl_coef"], state["history"]


# --- helpers -----------------------------------------------------------------------------------------------------


def _only_neutral(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuse settings that would make the sampled distribution differ from the scored one."""
    neutral = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": True, "num_beams": 1}
    for name, value in kwargs.items():
        if name not in neutral or value != neutral[name]:
            raise LabError(
                f"generation_kwargs {name}={value!r} changes the distribution that is sampled, while KL and the ratio are "
                "computed from the policy's own: leave it out"
                + (" and set PPOConfig.temperature." if name == "temperature" else ".")
            )
    return kwargs


def _trunk(model: nn.Module) -> nn.Module:
    return base_model(model).base_model


def _hidden_size(model: nn.Module) -> int:
    config = model.config.get_text_config(decoder=True)
    return config.hidden_size


def _float_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _store(target: Tensor, rows: list[int], values: Tensor) -> None:
    target[rows, : values.shape[1]] = values.detach().float().cpu()


def _flatten(minibatches: list[list[list[int]]]) -> Iterator[list[int]]:
    for minibatch in minibatches:
        yield from minibatch


def _last_text(prompt: Prompt) -> str:
    """What the reward sees of a prompt: the string, or the content of the last chat message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    variance = returns.var(unbiased=False)
    return float(1 - (returns - values).var(unbiased=False) / variance) if variance > 0 else 0.0
