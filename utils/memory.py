"""What training keeps in memory, by component: weights, gradients, optimizer states, activations; counted and predicted.

Left out of a process's real size: Python and its libraries, what kernels need while they run, blocks that are free and
not given back. What is counted is what has to be there between the forward pass and the optimizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from utils.kernels import FAST_ATTENTION, QUERIES
from utils.lab import LabError

COMPONENTS = ("weights", "gradients", "optimizer", "activations")


# --- counted -----------------------------------------------------------------------------------------------------


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind `tensors`, a storage that several of them share counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the forward pass inside the block keeps for the backward pass, without the model's own weights.

    The list fills while the block runs, and keeps the tensors alive: drop it when they are counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def memory_of_a_step(model: nn.Module, loss: Callable[[], Tensor], learning_rate: float = 1e-4) -> dict[str, int]:
    """Take one real step with AdamW and return the bytes of each of `COMPONENTS`. `model` is changed: give a copy.

    `loss` runs a forward pass of `model` and returns the loss, (). Only weights that require a gradient are trained.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        raise LabError("No weight of the model requires a gradient: there is nothing to train.")
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    with saved_for_backward(model) as kept:
        value = loss()
    activations = tensor_bytes(kept)
    kept.clear()
    value.backward()
    optimizer.step()
    states = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
    return {
        "weights": tensor_bytes(model.parameters()),
        "gradients": tensor_bytes(weight.grad for weight in trained if weight.grad is not None),
        "optimizer": tensor_bytes(states),
        "activations": activations,
    }


# --- predicted ---------------------------------------------------------------------------------------------------


def nf4_bits(*, block: int = 64, double_quantization: bool = True, outer_block: int = 256) -> float:
    """Bits a weight in NF4: 4 for the level, and its part of the scale of its block.

    A scale is an fp32 number for `block` weights; with double quantization one of 8 bits, and an fp32 number for
    `outer_block` scales. Dettmers et al. 2023 (arXiv:2305.14314), section 3: from 0.5 to 0.127 bits beside the 4.
    """
    if not double_quantization:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * outer_block)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that LoRA adapts by name: all but the output layer."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Weights of LoRA of rank `r` on matrices of `shapes` (out, in): r in for A, r out for B (Hu et al. 2021, section 4.1)."""
    return sum(r * (rows + columns) for rows, columns in shapes)


METHODS = ("full", "LoRA", "QLoRA")


def predict_memory(
    model: PreTrainedModel, method: str, *, r: int, batch: int, length: int, learned: int, weight_bytes: int = 2
) -> dict[str, float]:
    """Bytes of each of `COMPONENTS` for one step of `method`, one of `METHODS`; `model` may stand on the meta device.

    A step reads `batch` texts of `length` tokens, `learned` of them with a label. Weights have `weight_bytes` each, and so
    have their gradients and AdamW's two moments (those in fp32 too is another recipe, `architectures.training_bytes`); an
    adapter and what trains it are fp32. QLoRA keeps the linear layers in NF4 with double quantization, and the rest
    (embeddings, output layer, norms) as it was. Activations are `nan` for a model that is no LLaMA. Raises `LabError` on
    another method.
    """
    if method not in METHODS:
        raise LabError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    layers = linear_layers(model).values()
    everything = sum(weight.numel() for weight in model.parameters())
    in_layers = sum(layer.weight.numel() for layer in layers)
    adapter = 0 if method == "full" else lora_parameters((tuple(layer.weight.shape) for layer in layers), r)
    trained = 4 * adapter if adapter else weight_bytes * everything
    weights = weight_bytes * everything + 4 * adapter
    if method == "QLoRA":
        weights -= (weight_bytes - nf4_bits() / 8) * in_layers
    activations = math.nan
    if model.config.model_type == "llama":
        kept = weight_bytes == 2 and model.config._attn_implementation == FAST_ATTENTION
        rank = None if method == "full" else r
        activations = activation_bytes(
            model.config, batch, length, learned, r=rank, weight_bytes=weight_bytes, attention_kept=kept
        )
        if weight_bytes < 4:
            activations += weight_bytes * adapter  # the products run in the weights' format, on a copy of the adapter
    return {"weights": weights, "gradients": trained, "optimizer": 2 * trained, "activations": activations}


def activation_bytes(
    config: LlamaConfig,
    batch: int,
    length: int,
    learned: int,
    *,
    r: int | None = None,
    weight_bytes: int = 2,
    attention_kept: bool = False,
) -> float:
    """Bytes that a LLaMA keeps for the backward pass of `batch` texts of `length` tokens, with logits for `learned` of them.

    Term by term what each operation's derivative needs, without checkpointing. `r` is the rank of LoRA on every linear
    layer, None trains all weights. Fused attention computes its weights again in the backward pass; with `attention_kept`
    they are stored, as `kernels.CausalAttention` does. After Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, who
    count 34 bytes for each number of the hidden state in a block of a GPT with dropout, attention's squares apart.
    """
    h, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv, b, tokens = (
        heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        weight_bytes,
        batch * length,
    )
    norm = 4 * h + 4  # the input in fp32, and one over its root mean square
    if r is None:
        norm += b * h  # for the gradient of the norm's weight: the normalised input
    inputs = b * (h + q + h + f)  # of the linear layers: query, key and value share theirs, so do gate and up
    if r is not None:
        inputs += b * 7 * r  # the narrow product of each of the seven layers
    attention = b * (q + 2 * kv)
    attention += b * heads * _places_seen(length) if attention_kept else 4 * heads
    network = b * 3 * f  # the gate before and after SiLU, and what it multiplies
    norms = 2 * config.num_hidden_layers + (1 if r is None else 0)  # nothing is trained before the first one with LoRA
    logits = learned * (4 * config.vocab_size + (b * h if r is None else 0))  # log-probabilities in fp32
    return tokens * (config.num_hidden_layers * (inputs + attention + network) + norms * norm) + logits


def _places_seen(length: int) -> float:
    """To how many places a token looks on average where attention runs in parts of `QUERIES` tokens."""
    ends = [min(start + QUERIES, length) for start in range(0, length, QUERIES)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / length
