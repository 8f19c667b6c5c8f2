"""Supervised fine-tuning, full or with adapters: TRL's SFTTrainer for decoder-only models, transformers'
Seq2SeqTrainer for encoder-decoders (TRL trains none), behind one function.

What is left out of both trainers' defaults: gradient checkpointing (it saves memory that a small model does not need
and costs a second forward pass), and logits where no label is (with prompts left out of the loss, nine tenths of the
head's work). Batches hold examples of like length.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer
from trl import SFTConfig, SFTTrainer

from utils.generation import base_model
from utils.lab import LabError, progress
from utils.prompts import IGNORED


@dataclass
class FineTuneConfig:
    """Settings of one fine-tuning run. `batch_size` counts examples an optimizer step; `micro_batch_size` a forward pass."""

    learning_rate: float = 5e-4
    epochs: int = 1
    batch_size: int = 8
    micro_batch_size: int = 2
    warmup_share: float = 0.1
    seed: int = 0


def lora_config(
    model: PreTrainedModel, r: int = 8, alpha: int = 16, dropout: float = 0.0, upper_share: float = 1.0
) -> LoraConfig:
    """LoRA on every linear layer but the head (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    With `upper_share` below 1 only that share of the blocks, the last ones, gets adapters: the backward pass ends at the lowest
    of them.
    """
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    target: str | list[str] = "all-linear"
    if upper_share < 1:
        first = round(model.config.num_hidden_layers * (1 - upper_share))
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        # "model.layers.7.mlp.up_proj": the first number in the name is that of the block; the head has none
        target = [name for name in linear if (block := re.search(r"\.(\d+)\.", name)) and int(block[1]) >= first]
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type=task)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    config: FineTuneConfig,
    *,
    adapter: PeftConfig | None = None,
    description: str = "fine-tuning",
) -> tuple[PreTrainedModel | PeftModel, list[float]]:
    """Train on `examples` (`input_ids` and `labels`, see `encode_example`); return the model and the loss of each step.

    With `adapter` only the adapter is trained and the returned model is a `PeftModel` around `model`, whose own
    weights do not change; without, `model` itself is trained. Raises `LabError` where no example has a label.
    """
    if not any(label != IGNORED for example in examples for label in example["labels"]):
        raise LabError("No example has a label to learn: every label is -100. Build examples with `encode_example`.")
    micro = min(config.micro_batch_size, config.batch_size)
    if config.batch_size % micro:
        raise LabError(f"batch_size={config.batch_size} must be a multiple of micro_batch_size={micro}.")
    torch.manual_seed(config.seed)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        shared = dict(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_share,
            train_sampling_strategy="group_by_length",
            activation_checkpointing=False,
            bf16=model.dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type == "cuda",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
            seed=config.seed,
        )
        bar = ProgressBar(description)
        columns = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
        if (
            not model.config.is_encoder_decoder
        ):  # nothing predicts the first token, and the trainer would count its label
            columns = [{**e, "labels": [IGNORED, *e["labels"][1:]]} for e in columns]
        dataset = Dataset.from_list(columns)
        if model.config.is_encoder_decoder:
            trainer = _EncoderDecoderTrainer(
                model=model,
                args=Seq2SeqTrainingArguments(**shared),
                train_dataset=dataset,
                data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
                processing_class=tokenizer,
                callbacks=[bar],
            )
        else:
            trainer = _CompletionTrainer(
                model=model,
                args=SFTConfig(**shared, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[bar],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.accelerator.unwrap_model(trainer.model).eval(), losses


class _CompletionTrainer(SFTTrainer):
    """SFTTrainer that computes logits only where a completion token is predicted."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        causal = base_model(self.accelerator.unwrap_model(model))
        keep = _labelled_positions(inputs["labels"])
        hidden = causal.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = causal.get_output_embeddings()(hidden[:, :-1][keep])
        return _mean_over_step(logits, inputs["labels"][:, 1:][keep], num_items_in_batch)


class _EncoderDecoderTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer whose loss is a mean over the tokens of a whole step; T5's own is one over each micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**inputs).logits, inputs["labels"]
        keep = labels != IGNORED
        return _mean_over_step(logits[keep], labels[keep], num_items_in_batch)


def _mean_over_step(
    logits: torch.Tensor, labels: torch.Tensor, tokens_of_step: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross-entropy of (tokens, vocabulary) logits, divided by the label count of all micro-batches of the step."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / (len(labels) if tokens_of_step is None else tokens_of_step)


def _labelled_positions(labels: torch.Tensor) -> torch.Tensor:
    """(batch, length - 1) bool: the positions whose next token has a label."""
    return labels[:, 1:] != IGNORED


class ProgressBar(TrainerCallback):
    """A progress bar with the last loss and the time left."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress(total=state.max_steps, description=self.description)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
