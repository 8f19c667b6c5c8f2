"""Two ways past PPO, both from TRL: DPO, which learns from pairs without sampling, and RLOO, which samples without values.

DPO: Rafailov et al. 2023, arXiv:2305.18290. RLOO, REINFORCE whose baseline is the mean of a prompt's other samples: Ahmadian et
al. 2024, arXiv:2402.14740. Both trainers take decoder-only models, and both put a forward method of their own on the model they are
given: train a copy. Left out of their defaults: activation checkpointing, which a small model does not need, and dropout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from utils.generation import Completion
from utils.kernels import fused_lora
from utils.lab import LabError
from utils.prompts import encode, render
from utils.training import ProgressBar, common_arguments, restore_forward

Prompt = str | list[dict[str, str]]


class _TokenizedDPO(DPOTrainer):
    """Takes `prompt_ids`, `chosen_ids` and `rejected_ids` as they are: a text that was cut off gets no EOS that it never had."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, Completion, Completion]],
    *,
    adapter: PeftConfig,
    beta: float = 0.1,
    learning_rate: float = 5e-4,
    epochs: int = 1,
    batch_size: int = 8,
    micro_batch_size: int = 4,
    seed: int = 0,
) -> PeftModel:
    """Train an adapter on `model` by DPO. `pairs`: prompt, the completion that was preferred, and the other.

    `beta`: how strongly the policy is held at the reference, `model` itself. Sizes count pairs. Raises `LabError` for an
    encoder-decoder, for sizes that do not fit, and where there is no pair.
    """
    if not pairs:
        raise LabError("DPO learns from pairs: `pairs` is empty.")
    rows = [
        {
            "prompt_ids": encode(tokenizer, prompt),
            "chosen_ids": list(chosen.token_ids),
            "rejected_ids": list(rejected.token_ids),
        }
        for prompt, chosen, rejected in pairs
    ]
    settings = dict(beta=beta, max_length=None, num_train_epochs=epochs)
    return _train(
        DPOConfig, _TokenizedDPO, model, tokenizer, rows, settings, adapter=adapter, learning_rate=learning_rate,
        batch_size=batch_size, micro_batch_size=micro_batch_size, seed=seed, description="DPO",
    )  # fmt: skip


def train_rloo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward: Callable[..., list[float]],
    *,
    adapter: PeftConfig,
    num_completions: int,
    beta: float = 0.05,
    learning_rate: float = 5e-4,
    epochs: int = 2,
    batch_size: int = 16,
    minibatch_size: int = 16,
    micro_batch_size: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> PeftModel:
    """Train an adapter on `model` by RLOO, reading each of `prompts` once, in order.

    A step samples `num_completions` for each prompt, `batch_size` completions in all, and learns from them for `epochs` passes in
    minibatches, as `PPOConfig` has it. `reward(prompts, completions) -> list[float]` is that of `PPOTrainer`; `beta` is the price of a nat of
    KL. Raises `LabError` for an encoder-decoder and for sizes that do not fit.
    """
    completions = len(prompts) * num_completions
    if num_completions < 2 or not completions or completions % batch_size or batch_size % minibatch_size:
        raise LabError(
            f"{len(prompts)} prompts with num_completions={num_completions} (at least 2) give {completions} samples: this must be a "
            f"multiple of batch_size={batch_size}, and that of minibatch_size={minibatch_size}."
        )
    rows = [
        {"prompt": render(tokenizer, prompt), "read": prompt if isinstance(prompt, str) else prompt[-1]["content"]}
        for prompt in prompts
    ]

    def scores(prompts: list[str], completions: list[str], read: list[str], **_: Any) -> list[float]:
        return reward(read, completions)

    micro = min(micro_batch_size, minibatch_size)
    settings = dict(
        beta=beta,
        num_generations=num_completions,
        steps_per_generation=batch_size // micro,
        num_iterations=epochs,
        max_steps=completions // minibatch_size * epochs,
        temperature=temperature,
        max_completion_length=max_new_tokens,
        shuffle_dataset=False,
        lr_scheduler_type="linear",
    )
    return _train(
        RLOOConfig, RLOOTrainer, model, tokenizer, rows, settings, adapter=adapter, learning_rate=learning_rate,
        batch_size=minibatch_size, micro_batch_size=micro, seed=seed, description="RLOO", reward_funcs=scores,
    )  # fmt: skip


def _train(
    make_config: type,
    make_trainer: type,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    settings: dict[str, Any],
    *,
    adapter: PeftConfig,
    learning_rate: float,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    description: str,
    **more: Any,
) -> PeftModel:
    if model.config.is_encoder_decoder:
        raise LabError(f"TRL's {description} trainer takes decoder-only models, and {type(model).__name__} is none.")
    micro = min(micro_batch_size, batch_size)
    if batch_size % micro:
        raise LabError(f"batch_size={batch_size} must be a multiple of micro_batch_size={micro}.")
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # TRL's samplers ask for it
    try:
        with tempfile.TemporaryDirectory() as scratch:
            config = make_config(
                output_dir=scratch,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=batch_size // micro,
                learning_rate=learning_rate,
                disable_dropout=True,
                save_strategy="no",
                seed=seed,
                **common_arguments(model),
                **settings,
            )
            trainer = make_trainer(
                model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter,
                callbacks=[ProgressBar(description)], **more,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            with fused_lora(trainer.model):
                trainer.train()
    finally:
        tokenizer.padding_side = side
    return restore_forward(trainer.accelerator.unwrap_model(trainer.model)).eval()
