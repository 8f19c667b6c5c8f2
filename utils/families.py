"""The families of fine-tuning side by side: what each trains, as PEFT (or nothing but the model) does it.

The three kinds of Lialin et al. 2023 ("Scaling Down to Scale Up", section 3): selective (some of the model's own weights),
additive (new weights), reparameterised (a change of low rank), and full fine-tuning beside them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    ShiraConfig,
)
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.lab import LabError, PeakMemory
from utils.memory import linear_layers
from utils.models import load_model
from utils.training import FineTuneConfig, fine_tune, label_loss, lora_config, task_type

Examples = Sequence[dict[str, list[int]]]


@dataclass(frozen=True)
class Family:
    """One way to fine-tune. `learning_rate` is a common one for it, not tuned.

    `adapter(model, tokenizer, examples)` gives PEFT's configuration, or None where the model itself is trained.
    """

    name: str
    kind: str
    learning_rate: float
    adapter: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Examples], PeftConfig | None]
    quantized: bool = False


@dataclass(frozen=True)
class Trained:
    """What `train_family` gives: the model, its costs, the loss of each step. Memory beyond what was held before."""

    family: Family
    model: PreTrainedModel | PeftModel
    trainable: int
    share: float
    stored_mb: float
    peak_mb: float
    tokens_per_second: float
    losses: list[float]


def norm_names(model: nn.Module) -> list[str]:
    """Names of the normalisation layers, whatever a model calls them."""
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def largest_gradients(layer: nn.Linear, r: int, **_) -> torch.Tensor:
    """A mask (out, in) over the r (out + in) weights with the largest gradient: as many numbers as LoRA of rank r has.

    The gradient of one batch has to be in `layer.weight.grad`. Selection by gradient: Guo et al. 2021 ("Parameter-efficient
    transfer learning with diff pruning") learn it, Sung et al. 2021 ("Training neural networks with fixed sparse masks") take it
    from Fisher information, which is the squared gradient.
    """
    if layer.weight.grad is None:
        raise LabError(
            "`largest_gradients` needs the gradient of a batch in `layer.weight.grad`: call `backward` first."
        )
    magnitude = layer.weight.grad.abs().flatten().float()
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask[magnitude.topk(r * sum(layer.weight.shape)).indices] = True
    return mask.view(layer.weight.shape)


def _sparse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> ShiraConfig:
    model.requires_grad_(True)
    label_loss(model, tokenizer, examples[:4]).backward()
    config = ShiraConfig(r=8, target_modules=list(linear_layers(model)), task_type=task_type(model))
    config.mask_fn = largest_gradients
    return config


FAMILIES = (
    Family("full", "full", 1e-4, lambda model, *_: None),
    Family(
        "norms",
        "selective",
        1e-2,
        lambda model, *_: LNTuningConfig(target_modules=norm_names(model), task_type=task_type(model)),
    ),
    Family("sparse", "selective", 1e-3, _sparse),
    Family("IA3", "additive", 1e-2, lambda model, *_: IA3Config(task_type=task_type(model))),
    Family(
        "prompt tuning",
        "additive",
        3e-2,
        lambda model, *_: PromptTuningConfig(
            num_virtual_tokens=20,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
            task_type=task_type(model),
        ),
    ),
    Family(
        "prefix tuning",
        "additive",
        1e-2,
        lambda model, *_: PrefixTuningConfig(num_virtual_tokens=20, task_type=task_type(model)),
    ),
    Family("LoRA", "reparameterised", 1e-3, lambda model, *_: lora_config(model)),
    Family("DoRA", "reparameterised", 1e-3, lambda model, *_: _dora(model)),
    Family("QLoRA", "reparameterised", 1e-3, lambda model, *_: lora_config(model), quantized=True),
)


def families(names: Sequence[str]) -> list[Family]:
    """Those of `FAMILIES` that are named. Raises `LabError` at a name that none has."""
    known = {family.name: family for family in FAMILIES}
    for name in names:
        if name not in known:
            raise LabError(f"There is no method {name!r}: choose among {', '.join(known)}.")
    return [known[name] for name in names]


def _dora(model: PreTrainedModel) -> PeftConfig:
    config = lora_config(model)
    config.use_dora = True
    return config


def nf4() -> BitsAndBytesConfig:
    """Four bits a weight in NormalFloat, the scales quantised once more (Dettmers et al. 2023, "QLoRA", section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def train_family(family: Family, source: str, examples: Examples, config: FineTuneConfig) -> Trained:
    """Load the model `source` afresh, train it as `family` does, with its own learning rate, and measure what that took."""
    with PeakMemory() as memory:
        model, tokenizer = load_model(source, quantization_config=nf4() if family.quantized else None)
        total = sum(_count(parameter) for parameter in model.parameters())
        adapter = family.adapter(model, tokenizer, examples)
        begin = time.perf_counter()
        model, losses = fine_tune(
            model,
            tokenizer,
            examples,
            replace(config, learning_rate=family.learning_rate),
            adapter=adapter,
            description=family.name,
        )
        seconds = time.perf_counter() - begin
    model.zero_grad()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    tokens = sum(len(example["input_ids"]) for example in examples) * config.epochs
    return Trained(
        family, model, trainable, trainable / total, stored / 2**20, memory.peak_mb, tokens / seconds, losses
    )


def _count(parameter: nn.Parameter) -> int:
    """Numbers in `parameter`: one in four bits holds two in each byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
