"""Supervised fine-tuning, full or with adapters: TRL's SFTTrainer for decoder-only models, transformers'
Seq2SeqTrainer for encoder-decoders (TRL trains none), behind one function.

What is left out of both trainers' defaults: gradient checkpointing (it saves memory that a small model does not need
and costs a second forward pass), and logits before the first label (with prompts left out of the loss, nine tenths of the
head's work). Batches hold examples of like length. With `checkpoints` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from torch.utils.data import Sampler
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
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from utils.kernels import fused_lora
from utils.lab import LabError, progress, write_atomically
from utils.prompts import IGNORED


@dataclass
class FineTuneConfig:
    """Settings of one fine-tuning run. `batch_size` counts examples an optimizer step; `micro_batch_size` a forward pass.

    `save_steps`: optimizer steps between two checkpoints, where there are any.
    """

    learning_rate: float = 5e-4
    epochs: int = 1
    batch_size: int = 8
    micro_batch_size: int = 2
    warmup_share: float = 0.1
    seed: int = 0
    save_steps: int = 10


def task_type(model: PreTrainedModel) -> TaskType:
    """PEFT's name for what the model does."""
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def lora_config(
    model: PreTrainedModel, r: int = 8, alpha: int = 16, dropout: float = 0.0, upper_share: float = 1.0
) -> LoraConfig:
    """LoRA on every linear layer but the head (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

    With `upper_share` below 1 only that share of the blocks, the last ones, gets adapters: the backward pass ends at the lowest
    of them.
    """
    target: str | list[str] = "all-linear"
    if upper_share < 1:
        first = round(model.config.num_hidden_layers * (1 - upper_share))
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        # "model.layers.7.mlp.up_proj": the first number in the name is that of the block; the head has none
        target = [name for name in linear if (block := re.search(r"\.(\d+)\.", name)) and int(block[1]) >= first]
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type=task_type(model))


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    config: FineTuneConfig,
    *,
    adapter: PeftConfig | None = None,
    checkpoints: str | os.PathLike | None = None,
    description: str = "fine-tuning",
) -> tuple[PreTrainedModel | PeftModel, list[float]]:
    """Train on `examples` (`input_ids` and `labels`, see `encode_example`); return the model and the loss of each step.

    With `adapter` only the adapter is trained and the returned model is a `PeftModel` around `model`, whose own
    weights do not change; without, `model` itself is trained. A `model` that is a `PeftModel` is trained as it is.

    With a folder `checkpoints` the run is saved there every `save_steps` steps; called again after it was killed, it goes
    on from the last whole checkpoint to the same final weights, and removes the folder's checkpoints at its end. Raises
    `LabError` where no example has a label, or where the folder holds the checkpoints of another run.
    """
    if not any(label != IGNORED for example in examples for label in example["labels"]):
        raise LabError("No example has a label to learn: every label is -100. Build examples with `encode_example`.")
    micro = min(config.micro_batch_size, config.batch_size)
    if config.batch_size % micro:
        raise LabError(f"batch_size={config.batch_size} must be a multiple of micro_batch_size={micro}.")
    torch.manual_seed(config.seed)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    with contextlib.ExitStack() as stack:
        if checkpoints is None:
            folder, last = stack.enter_context(tempfile.TemporaryDirectory()), None
        else:
            folder, last = os.fspath(checkpoints), _last_checkpoint(Path(checkpoints), model, examples, config)
        encoder_decoder = model.config.is_encoder_decoder
        arguments = (Seq2SeqTrainingArguments if encoder_decoder else SFTConfig)(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_share,
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=config.save_steps,
            seed=config.seed,
            **common_arguments(model),
            **({} if encoder_decoder else {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}),
        )
        trainer = (_EncoderDecoderTrainer if encoder_decoder else _CompletionTrainer)(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(_columns(examples, encoder_decoder)),
            data_collator=_collator(model, tokenizer),
            processing_class=tokenizer,
            callbacks=[ProgressBar(description)],
        )
        trainer.remove_callback(PrinterCallback)
        with fused_lora(model):
            trainer.train(resume_from_checkpoint=last)
        if checkpoints is not None:
            shutil.rmtree(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return restore_forward(trainer.accelerator.unwrap_model(trainer.model)).eval(), losses


def common_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments that all trainers of this project share: the model's format and device, and a log that only we show."""
    return dict(
        activation_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
    )


def restore_forward(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Give the transformers model in `model` its own `forward` again; return `model`.

    TRL's trainers put one in its place that keeps hold of the model itself, so that a copy would go on calling the original.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    vars(inner).pop("forward", None)
    return model


@torch.no_grad()
def label_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    batch_size: int = 8,
) -> list[np.ndarray]:
    """Cross-entropy of each label of each example, in nats: one (labels,) float32 an example, in the order of `examples`.

    Examples of like length are read together. The model is in evaluation mode meanwhile.
    """
    columns = _columns(examples, model.config.is_encoder_decoder)
    by_length = sorted(range(len(columns)), key=lambda i: len(columns[i]["input_ids"]))
    collate, was_training, losses = _collator(model, tokenizer), model.training, {}
    model.eval()
    with fused_lora(model):
        for first in progress(range(0, len(columns), batch_size), description="measuring the loss"):
            numbers = by_length[first : first + batch_size]
            batch = collate([columns[i] for i in numbers]).to(model.device)
            logits, labels = _where_labelled(model, batch)
            each = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
            counts = [sum(label != IGNORED for label in columns[i]["labels"]) for i in numbers]
            losses.update(zip(numbers, (part.numpy() for part in each.split(counts)), strict=True))
    model.train(was_training)
    return [losses[i] for i in range(len(columns))]


def mean_loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    batch_size: int = 8,
) -> float:
    """Mean of all `label_losses`, in nats a token."""
    return float(np.concatenate(label_losses(model, tokenizer, examples, batch_size)).mean(dtype=np.float64))


def label_loss(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, list[int]]]
) -> torch.Tensor:
    """Mean cross-entropy of the labels of one batch, a scalar with its graph."""
    columns = _columns(examples, model.config.is_encoder_decoder)
    logits, labels = _where_labelled(model, _collator(model, tokenizer)(columns).to(model.device))
    return F.cross_entropy(logits.float(), labels)


def _columns(examples: Sequence[dict[str, list[int]]], encoder_decoder: bool) -> list[dict[str, list[int]]]:
    """What the trainers read. Nothing predicts a decoder's first token, and they would count its label."""
    rows = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
    return rows if encoder_decoder else [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in rows]


def _collator(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Callable:
    """Pads `input_ids` and `labels`, a decoder's on the right; gives an encoder-decoder its `decoder_input_ids`."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    collate = DataCollatorForSeq2Seq(tokenizer, model=inner if model.config.is_encoder_decoder else None)

    def padded_right(rows: list[dict[str, list[int]]]):
        side, tokenizer.padding_side = tokenizer.padding_side, "right"
        try:
            return collate(rows)
        finally:
            tokenizer.padding_side = side

    return padded_right


def _where_labelled(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary) and labels (tokens,) at every position that has a label."""
    labels = batch["labels"]
    if "decoder_input_ids" in batch:
        logits = model(**batch).logits
    else:
        labels = labels[:, 1:]  # a position predicts the next token
        first = int((labels != IGNORED).any(0).nonzero()[0])
        labels = labels[:, first:]
        # Counted from the end, so that a learned prompt in front changes nothing; a number instead of a list would leave
        # rows that do not lie side by side, for each of which the head is copied.
        kept = torch.arange(-labels.shape[1] - 1, 0, device=labels.device)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    keep = labels != IGNORED
    return logits[keep], labels[keep]


class LikeLengths(Sampler[int]):
    """Indices in an order in which neighbours have like lengths, another in each epoch.

    transformers' own `LengthGroupedSampler` takes its order from the state of torch's generator, so that a run that goes on
    in the middle of an epoch would read the rest of another order.
    """

    def __init__(self, texts: Sequence[Sequence[int]], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = [len(text) for text in texts], batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _LabelsOnly:
    """A trainer whose loss is a mean over the labels of a whole step, and whose checkpoints appear whole or not at all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = _where_labelled(model, inputs)
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def _get_train_sampler(self, train_dataset=None):
        return LikeLengths(self.train_dataset["input_ids"], self.args.train_batch_size, self.args.seed)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.args.output_dir = os.fspath(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = os.fspath(folder)
        older = list(folder.glob("checkpoint-*"))
        for written in partial.iterdir():
            os.replace(written, folder / written.name)
        for path in older:
            shutil.rmtree(path)


class _CompletionTrainer(_LabelsOnly, SFTTrainer):
    """TRL's, for decoders."""


class _EncoderDecoderTrainer(_LabelsOnly, Seq2SeqTrainer):
    """transformers', for encoder-decoders."""


def _last_checkpoint(
    folder: Path, model: nn.Module, examples: Sequence[dict[str, list[int]]], config: FineTuneConfig
) -> str | None:
    """The newest whole checkpoint of this very run in `folder`, or None where it has not begun."""
    adapter = model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else None
    everything = [asdict(config), adapter, model.config.to_dict(), list(examples)]
    run = hashlib.sha256(json.dumps(everything, sort_keys=True, default=_plain).encode()).hexdigest()
    mark = folder / "run.sha256"
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if found and (not mark.is_file() or mark.read_text(encoding="utf-8") != run):
        raise LabError(
            f"{folder} holds checkpoints of a run with other settings, data or model: delete the folder, or give `checkpoints` another."
        )
    write_atomically(mark, run)
    return os.fspath(found[-1]) if found else None


def _plain(value: object) -> object:
    """For JSON: a set has no order that would be the same in the next process."""
    return sorted(value) if isinstance(value, set) else str(value)


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
