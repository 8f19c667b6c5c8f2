"""What makes training and scoring on a CPU fast: attention by plain matrix products, LoRA as one step of the graph, and
log-probabilities without a table of the vocabulary.

`FAST_ATTENTION` is the name under which transformers finds the attention (`attn_implementation`); `load_model` sets it for
decoders. Elsewhere than on a CPU, in other dtypes than bfloat16, with dropout or an additive mask it is
`scaled_dot_product_attention`, whose backward pass in bfloat16 on a CPU takes three times as long. `fused_lora` is for the
time of a training run or of a measurement. `benchmarks/sft.py` measures both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FAST_ATTENTION = "sdpa_fast_cpu"
QUERIES = 128  # a part's scores stay in the processor's cache
AT_ONCE = 256  # tokens: one table of float32 for the embedded model's vocabulary has 50 MB


def fast_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """`sdpa`, but many queries in bfloat16 go through `CausalAttention` and one query is two matrix products.

    query (batch, heads, queries, head_dim) against key and value (batch, kv_heads, length, head_dim): the query heads
    that share a key-value head become rows of one matrix, so nothing is repeated in memory. A text that is scored and one
    that is trained on take the same way, so that their log-probabilities are equal to the bit.
    """
    queries = query.shape[2]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    plain_mask = attention_mask is None or attention_mask.dtype == torch.bool
    biased = kwargs.get("position_bias") is not None
    if (
        queries > 1
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and getattr(module, "is_causal", False)
        and plain_mask
        and not (dropout or biased)
    ):
        return CausalAttention.apply(query, key, value, attention_mask, scaling), None
    if queries > 1 or torch.is_grad_enabled() or biased:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return _one_query(query, key, value, attention_mask, scaling), None


AttentionInterface.register(FAST_ATTENTION, fast_attention)
AttentionMaskInterface.register(FAST_ATTENTION, sdpa_mask)


class CausalAttention(torch.autograd.Function):
    """Causal attention of the last `queries` of `length` positions, part by part; what comes later is left out, not masked.

    Forward: query (batch, heads, queries, head_dim), key and value (batch, kv_heads, length, head_dim), mask boolean
    (batch, 1, queries, length) or None, scaling a number. Returns (batch, queries, heads, head_dim). Half the products and
    half the softmax of attention over a masked square; the weights are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        batch, heads, queries, head_dim = query.shape
        kv_heads, length = key.shape[1:3]
        if mask is None:
            mask = torch.ones(1, 1, queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
        hidden = ~mask
        query = (query * scaling).view(batch, kv_heads, heads // kv_heads, queries, head_dim)
        keys = key.transpose(2, 3)
        output = query.new_empty(batch, queries, heads, head_dim)
        lowest = torch.finfo(query.dtype).min  # not -inf, of which padding, which sees nothing, would become NaN
        weights = []
        for start in range(0, queries, QUERIES):
            end = min(start + QUERIES, queries)
            seen = length - queries + end
            scores = query[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim) @ keys[..., :seen]
            scores = scores.view(batch, heads, -1, seen).masked_fill_(hidden[:, :, start:end, :seen], lowest)
            part = torch.softmax(scores, dim=-1).view(batch, kv_heads, -1, seen)
            output[:, start:end] = (part @ value[:, :, :seen]).view(batch, heads, -1, head_dim).transpose(1, 2)
            weights.append(part)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *weights = ctx.saved_tensors
        batch, kv_heads, group, queries, head_dim = query.shape
        heads, end = kv_heads * group, 0
        grad_query = grad.new_empty(batch, heads, queries, head_dim)
        grad_key = torch.zeros_like(key, dtype=torch.float32)  # a sum over parts
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for part in weights:
            start, end, seen = end, end + part.shape[2] // group, part.shape[3]
            grad_part = grad[:, start:end].transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
            grad_value[:, :, :seen] += part.transpose(2, 3) @ grad_part
            grad_weights = grad_part @ value[:, :, :seen].transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_weights, part, -1, part.dtype)
            grad_query[:, :, start:end] = (grad_scores @ key[:, :, :seen]).view(batch, heads, -1, head_dim)
            part_query = query[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
            grad_key[:, :, :seen] += grad_scores.transpose(2, 3) @ part_query
        return grad_query.mul_(ctx.scaling), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """A decoding step: query (batch, heads, 1, head_dim); returns (batch, 1, heads, head_dim)."""
    batch, heads, _, head_dim = query.shape
    # A part of a buffer would be copied for each product, so its free places are multiplied, too, and hidden.
    keys, values = getattr(key, "buffer", key), getattr(value, "buffer", value)
    scores = (query * scaling).view(batch, keys.shape[1], -1, head_dim) @ keys.transpose(2, 3)
    if mask is None:
        scores[..., key.shape[2] :] = float("-inf")
    else:
        scores += _bias(mask, key.shape[2], scores)
    return (torch.softmax(scores, dim=-1) @ values).view(batch, heads, 1, head_dim).transpose(1, 2)


def _bias(mask: Tensor, length: int, scores: Tensor) -> Tensor:
    """What is added to `scores` (..., places), of which `length` are filled: -inf where nothing is to be seen.

    `mask` (batch, 1, 1, length or more) is boolean or to be added itself. It is one for all layers, and keeps what was made of it.
    """
    shape = length, scores.shape[-1]
    made_for, bias = getattr(mask, "bias", (None, None))
    if made_for != shape:
        bias = mask[..., :length]
        if mask.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=scores.dtype).masked_fill_(~bias, float("-inf"))
        bias = F.pad(bias, (0, shape[1] - length), value=float("-inf"))
        mask.bias = shape, bias
    return bias


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[None]:
    """Meanwhile each frozen linear layer with a LoRA adapter, as PEFT makes it, is one step of the graph (`LoraProduct`).

    PEFT's own forward pass turns each input into the adapter's float32 and, under autocast, back, and keeps it twice.
    Layers that are anything else than base and one adapter (DoRA, dropout, merged, quantised) stay PEFT's. Those that are
    fused already stay so afterwards: a benchmark generates while it measures.
    """
    layers = [m for m in model.modules() if type(m) is LoraLinear and "forward" not in vars(m) and _is_plain(m)]
    # Where there are no gradients now, no weight changes meanwhile, and the factors are made once.
    made = [None if torch.is_grad_enabled() else _factors(layer) for layer in layers]
    for layer, factors in zip(layers, made, strict=True):
        layer.forward = partial(_lora_forward, layer, factors)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_plain(layer: LoraLinear) -> bool:
    """Whether `layer` is W x + B A x alone, with W frozen in bfloat16 on a CPU."""
    weight, active = layer.base_layer.weight, layer.active_adapters
    return (
        type(layer.base_layer) is nn.Linear
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
        and len(active) == 1
        and active[0] in layer.lora_A
        and isinstance(layer.lora_dropout[active[0]], nn.Identity)
        and not (layer.lora_variant or layer.lora_bias[active[0]] or layer.disable_adapters or layer.merged)
    )


def _lora_forward(layer: LoraLinear, factors: tuple[Tensor, Tensor] | None, inputs: Tensor) -> Tensor:
    base, name = layer.base_layer, layer.active_adapters[0]
    inputs = inputs.to(base.weight.dtype)
    if torch.is_grad_enabled():
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return LoraProduct.apply(inputs, base, a, b, layer.scaling[name])
    rows = inputs.reshape(-1, inputs.shape[-1])
    return _product(rows, base, *factors or _factors(layer))[0].view(*inputs.shape[:-1], -1)


@torch.no_grad()
def _factors(layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """The adapter's A (r, in) and scaled B (out, r) in the dtype of the products."""
    name, dtype = layer.active_adapters[0], layer.base_layer.weight.dtype
    return _narrow(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], dtype)


def _narrow(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return a.to(dtype), (b * scaling).to(dtype)


def _product(rows: Tensor, base: nn.Linear, narrow_a: Tensor, scaled_b: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output and the narrow x A'."""
    narrow = rows @ narrow_a.t()
    return base(rows).addmm_(narrow, scaled_b.t()), narrow


class LoraProduct(torch.autograd.Function):
    """x W' + bias + scaling x A' B' with gradients for x, A and B (Hu et al. 2021, equation 3).

    Forward: inputs (..., in) in the dtype of `base`, a frozen linear layer in to out, in which the products are computed,
    a (r, in) and b (out, r) in any dtype, scaling a number. Returns (..., out). `base` is called, since generation may have
    given it a faster way to the same numbers. Kept for the backward pass are the inputs, once, and the narrow x A'.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # hooks of `base`, a profiler's, find no graph in here
        narrow_a, scaled_b = _narrow(a, b, scaling, rows.dtype)
        output, narrow = _product(rows, base, narrow_a, scaled_b)
        ctx.save_for_backward(rows, base.weight, narrow_a, scaled_b, narrow)
        ctx.scaling = scaling
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, narrow_a, scaled_b, narrow = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        grad_narrow = grad @ scaled_b
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (grad @ weight).addmm_(grad_narrow, narrow_a).view(*shape[:-1], -1)
        # narrow' grad and not grad' narrow: half the time for the same numbers, turned round
        return grad_inputs, None, grad_narrow.t() @ rows, (narrow.t() @ grad).t() * ctx.scaling, None


# --- log-probabilities of tokens ---------------------------------------------------------------------------------


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(hidden weight' / temperature), in nats.

    hidden (tokens, width) and weight (vocabulary, width), of one dtype, targets (tokens,) int64; both results are float32,
    (tokens,). The gradient is that of the log-probabilities for `hidden` alone. No table (tokens, vocabulary) outlives the
    call, and `AT_ONCE` tokens of one are all there is at a time.
    """
    return TokenLogprobs.apply(hidden, weight, targets, temperature)


class TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`.

    A token's log-probability depends on its own hidden state alone, and its derivative is the chosen row of the weight less
    the mean of all rows under the softmax. It is computed while the probabilities are there, and kept in their place.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        derivative = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        exact_weight = weight.float()
        for start in range(0, len(hidden), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            logits = F.linear(hidden[part].float(), exact_weight).div_(temperature)
            # One pass over the table, where the logarithm of a sum of exponentials takes four.
            probabilities = logits.softmax(1)
            largest, where = logits.max(1)
            normaliser = largest - probabilities.gather(1, where[:, None])[:, 0].log()
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0] - normaliser
            entropy[part] = normaliser - logits.mul_(probabilities).sum(1)
            if derivative is not None:
                derivative[part] = weight[targets[part]] - probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(derivative)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return (grad[:, None] / ctx.temperature * derivative).to(derivative.dtype), None, None, None
