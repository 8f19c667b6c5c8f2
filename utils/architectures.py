"""Attention, positions and a LLaMA from scratch; what published models cost on paper; weights in 8 and 4 bits.

Left out of what `transformers` offers: dropout, padding inside a batch, fused kernels. Every from-scratch piece is held
to torch's or transformers' own by tests/test_architectures.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from utils.lab import LabError


class ArchitectureError(LabError):
    """Sizes that do not fit together, or a model that this code does not know."""


# --- masks: who may look at whom ---------------------------------------------------------------------------------


def bidirectional_mask(length: int) -> Tensor:
    """Encoder (BERT): every position sees every position. (length, length) bool, true where a row may attend to a column."""
    return torch.ones(length, length, dtype=torch.bool)


def causal_mask(length: int, past: int = 0) -> Tensor:
    """Decoder (GPT, LLaMA): position i sees positions 0 to i. (length, past + length) bool; `past` positions were read before."""
    return torch.ones(length, past + length, dtype=torch.bool).tril(diagonal=past)


def prefix_mask(prefix: int | Tensor, length: int) -> Tensor:
    """Prefix language model: all see the first `prefix` positions and their own past. (length, length) bool.

    With `prefix` (batch,) int64 one mask for each: (batch, length, length); 0 gives the causal mask. The non-causal decoder of Raffel
    et al. 2020, arXiv:1910.10683, figure 4, and of Wang et al. 2022, arXiv:2204.05832.
    """
    prefix = torch.as_tensor(prefix)
    if not ((prefix >= 0) & (prefix <= length)).all():
        raise ArchitectureError(
            f"prefix={prefix.tolist()} does not lie between 0 and length={length}: choose one that does."
        )
    sees_prefix = torch.arange(length) < prefix[..., None]
    return causal_mask(length) | sees_prefix[..., None, :]


def encoder_decoder_mask(source: int, target: int) -> Tensor:
    """Encoder-decoder (T5) as one picture, (source + target, source + target) bool.

    The source sees all of itself and nothing of the target; the target sees the whole source (cross-attention) and its
    own past (Raffel et al. 2020, arXiv:1910.10683, figure 3).
    """
    mask = torch.zeros(source + target, source + target, dtype=torch.bool)
    mask[:source, :source] = bidirectional_mask(source)
    mask[source:, :source] = True
    mask[source:, source:] = causal_mask(target)
    return mask


# --- attention ---------------------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention: what each query collects, and the weights it collected it with.

    query (..., n, d), key (..., m, d), value (..., m, v) give output (..., n, v) and weights (..., n, m); each row of
    weights sums to 1. `mask` (..., n, m) bool is true where a query may look; `bias` (..., n, m) is added to the scores.
    Vaswani et al. 2017 (arXiv:1706.03762), equation 1. Raises `ArchitectureError` on sizes that do not fit.
    """
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ArchitectureError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: query and key "
            "need the same last size, key and value the same last but one."
        )
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return weights @ value, weights


# --- positions ---------------------------------------------------------------------------------------------------
# (Learned positions, as in BERT and GPT, are an nn.Embedding: a row for each place, trained like any other weight.)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Fixed positions added to the embeddings, (length, width) float32: sines at even places, cosines at odd ones.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5. Raises `ArchitectureError` on an odd width.
    """
    if width % 2:
        raise ArchitectureError(f"width={width} is odd, and sines come with cosines: make it even.")
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def rotary_frequencies(head_dim: int, base: float = 10_000.0) -> Tensor:
    """Radians by which each pair of a head's numbers turns from one position to the next, (head_dim / 2,) float32."""
    if head_dim % 2:
        raise ArchitectureError(f"head_dim={head_dim} is odd, and positions turn pairs of numbers: make it even.")
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `apply_rotary`, each (length, head_dim) float32, from positions (length,)."""
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)  # number i is paired with number i + head_dim / 2
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """A quarter turn of every pair (i, i + d/2) of the last dimension: (a, b) becomes (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (..., length, head_dim) by their position; scores then depend on distances alone.

    Su et al. 2021 (arXiv:2104.09864), equation 34, with transformers' pairing of the two halves.
    """
    return x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype)


def alibi_slopes(heads: int) -> Tensor:
    """How steeply each head's scores fall with distance, (heads,) float32. Press et al. 2022 (arXiv:2108.12409), section 3."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]  # heads beyond a power of two
    return torch.tensor(slopes + between)


def alibi_bias(heads: int, length: int) -> Tensor:
    """What ALiBi adds to the scores, (heads, length, length) float32: minus slope times distance."""
    position = torch.arange(length)
    return -alibi_slopes(heads)[:, None, None] * (position[:, None] - position[None, :]).abs()


def t5_buckets(
    query_length: int, key_length: int, *, bidirectional: bool = True, buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Which learned bias a pair of positions gets, (query_length, key_length) int64 in [0, buckets).

    Half of the buckets of a direction hold one distance each, the others grow by equal ratios up to `max_distance`; all
    beyond share the last. Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """
    distance = torch.arange(query_length)[:, None] - torch.arange(key_length)[None, :]  # positive: the key lies behind
    bucket = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket += (distance < 0) * buckets
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return bucket + torch.where(distance < exact, distance, far)


# --- a LLaMA -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of 1, then each number by a learned weight (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # squares of bf16 numbers lose too much
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SwiGLU(nn.Module):
    """The network applied to each token alone: one matrix opens or closes what the other lets through (arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KeyValueCache:
    """Keys and values of what was read, a pair (batch, kv_heads, length, head_dim) for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values and return those of all tokens."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        return self.layers[layer]


class GroupedQueryAttention(nn.Module):
    """Several heads of attention; `heads / kv_heads` query heads share a key and value head (Ainslie et al. 2023, arXiv:2305.13245).

    With `kv_heads == heads` it is multi-head attention, with `kv_heads == 1` multi-query attention. Raises
    `ArchitectureError` where the heads do not divide.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int | None = None, bias: bool = False):
        super().__init__()
        if heads % kv_heads or (head_dim is None and width % heads):
            raise ArchitectureError(
                f"heads={heads} must be a multiple of kv_heads={kv_heads}, and width={width} one of heads."
            )
        self.groups, self.head_dim = heads // kv_heads, head_dim or width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x (batch, n, width) gives output (batch, n, width) and weights (batch, heads, n, m)."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, n, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        key, value = key.repeat_interleave(self.groups, 1), value.repeat_interleave(self.groups, 1)
        output, weights = attention(query, key, value, mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights


class LlamaBlock(nn.Module):
    """Attention, then the network; each reads a normalised copy and adds to the stream that runs through."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(width, heads, kv_heads, config.head_dim, config.attention_bias)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = SwiGLU(width, config.intermediate_size, config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary, cache, layer)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A LLaMA (Touvron et al. 2023, arXiv:2302.13971) whose parts have transformers' names, so that its weights fit."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_parameters["rope_theta"])
        self.rotary_scale = 1.0

    @classmethod
    def from_transformers(cls, model: LlamaForCausalLM) -> Llama:
        """The same model in this code, in evaluation mode; it shares the weights, so it takes no further memory.

        Raises `ArchitectureError` for what is no LLaMA, or one with another activation or with angles that depend on
        the length of the text.
        """
        if not isinstance(model, LlamaForCausalLM):
            raise ArchitectureError(f"model is a {type(model).__name__}: give a LlamaForCausalLM.")
        config, kind = model.config, model.config.rope_parameters["rope_type"]
        if config.hidden_act != "silu" or kind in ("dynamic", "longrope"):
            raise ArchitectureError(
                f"hidden_act={config.hidden_act!r} with rope_type={kind!r} is not covered: give a LLaMA with 'silu' and fixed angles."
            )
        with torch.device("meta"):
            llama = cls(config)
        weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
        llama.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            llama.lm_head.weight = llama.embed_tokens.weight
        rotary = model.model.rotary_emb  # scaled kinds ("llama3", "yarn", ...) have their own frequencies
        fixed = rotary_frequencies(config.head_dim, config.rope_parameters["rope_theta"])
        llama.frequencies = fixed if kind == "default" else rotary.inv_freq.detach()
        llama.rotary_scale = rotary.attention_scaling
        return llama.eval()

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits (batch, n, vocabulary) for input_ids (batch, n) int64, which follow what `cache` holds.

        `cache` takes up the new tokens. With `last_only` n is 1: all that writing the next token needs.
        """
        n, past = input_ids.shape[1], cache.length if cache is not None else 0
        positions = torch.arange(past, past + n, device=input_ids.device)
        cos, sin = rotary_angles(positions, self.frequencies.to(input_ids.device))
        rotary = cos * self.rotary_scale, sin * self.rotary_scale
        mask = causal_mask(n, past).to(input_ids.device)
        x = self.embed_tokens(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, rotary, cache, i)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, eos_token_ids: Sequence[int] = (), use_cache: bool = True
    ) -> list[int]:
        """The likeliest continuation, token by token, of input_ids (1, n) int64; ends with an EOS token where one comes."""
        cache, written, unread = KeyValueCache() if use_cache else None, [], input_ids
        while len(written) < max_new_tokens and not (written and written[-1] in eos_token_ids):
            written.append(int(self(unread, cache, last_only=True)[0, -1].argmax()))
            new = input_ids.new_tensor([written])
            unread = new[:, -1:] if use_cache else torch.cat([input_ids, new], 1)
        return written


# --- attention of real heads -------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Sequence[int]) -> Tensor:
    """The weights of every head over one text, (layers, heads, n, n) float32 on the CPU; an encoder-decoder's encoder.

    The model is left with the attention implementation it had.
    """
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels never form the weights
    try:
        reader = model.get_encoder() if model.config.is_encoder_decoder else model
        ids = torch.tensor([list(input_ids)], device=model.device)
        return torch.cat(reader(input_ids=ids, output_attentions=True).attentions).float().cpu()
    finally:
        model.set_attn_implementation(used)


def head_patterns(input_ids: Sequence[int]) -> dict[str, Tensor]:
    """Simple things a head may look at, each (n, n) bool over the text `input_ids`.

    "after the last time" is the pattern of induction heads: the token that followed an earlier copy of this token
    (Olsson et al. 2022, arXiv:2209.11895).
    """
    ids = torch.tensor(list(input_ids))
    row, column = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None, :]
    earlier_copy = (ids[:, None] == ids[None, :]) & (column < row)
    return {
        "the first token": (column == 0) & (row > 0),
        "the token before": (column == row - 1) & (row > 0),
        "itself": (column == row) & (row > 0),
        "the same token, earlier": earlier_copy,
        "what followed the same token": earlier_copy.roll(1, dims=1) & (column < row) & (column > 0),
    }


# --- models on paper ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedModel:
    """A model by its published dimensions.

    `config` are fields of the transformers configuration `kind`; `parameters` the published count and `source` where it
    stands; `tokens` what it was trained on; `gpu_hours` (A100) and `flops` of that training where published, from `run_source`.
    """

    name: str
    kind: str
    config: dict[str, Any]
    parameters: float
    source: str
    tokens: float | None = None
    gpu_hours: float | None = None
    flops: float | None = None
    run_source: str = ""
    own_output_layer: bool = False  # where transformers would tie it to the embedding

    @property
    def active_share(self) -> float:
        """Share of the weights that a token meets: about half in an encoder-decoder (Brown et al. 2020, appendix D)."""
        return 0.5 if self.kind == "t5" else 1.0


_BERT, _GPT3 = "Devlin et al. 2019, arXiv:1810.04805, section 3", "Brown et al. 2020, arXiv:2005.14165"
_LLAMA, _BLOOM = "Touvron et al. 2023, arXiv:2302.13971", "BLOOM's model card, huggingface.co/bigscience/bloom"
_BLOOMBERG = "Wu et al. 2023, arXiv:2303.17564"


def _llama(name: str, width: int, inner: int, layers: int, heads: int, parameters: float, tokens: float, hours: float):
    config = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    run_source = f"{_LLAMA}, tables 2 and 15"
    return PublishedModel(
        name, "llama", config, parameters, f"{_LLAMA}, table 2", tokens, gpu_hours=hours, run_source=run_source
    )


PUBLISHED: dict[str, PublishedModel] = {
    model.name: model
    for model in (
        PublishedModel("BERT-base", "bert", {}, 110e6, _BERT),
        PublishedModel(
            "BERT-large", "bert",
            dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), 340e6, _BERT,
        ),
        PublishedModel(
            "GPT-3 175B", "gpt2", dict(n_embd=12288, n_layer=96, n_head=96, n_positions=2048), 175.0e9,
            f"{_GPT3}, table 2.1", tokens=300e9, flops=3.14e23, run_source=f"{_GPT3}, appendix D",
        ),
        PublishedModel(  # the paper rounds to 11 billion; the card of the same dimensions gives the digits
            "T5-11B", "t5", dict(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128), 11.30738e9,
            "model card of huggingface.co/google/t5-efficient-xxl; dimensions: Raffel et al. 2020, arXiv:1910.10683, section 3.7",
            tokens=1e12, flops=3.30e22, run_source=f"{_GPT3}, appendix D",
        ),
        PublishedModel(
            "FLAN-T5-XXL", "t5",
            dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"), 11e9,
            "Chung et al. 2022, arXiv:2210.11416, table 2", own_output_layer=True,
        ),
        PublishedModel(
            "BLOOM-176B", "bloom", dict(hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880), 176_247_271_424,
            _BLOOM, tokens=366e9, gpu_hours=1_082_990, run_source="Luccioni et al. 2022, arXiv:2211.02001, table 1",
        ),
        _llama("LLaMA-7B", 4096, 11008, 32, 32, 6.7e9, 1.0e12, 82_432),
        _llama("LLaMA-13B", 5120, 13824, 40, 40, 13.0e9, 1.0e12, 135_168),
        _llama("LLaMA-33B", 6656, 17920, 60, 52, 32.5e9, 1.4e12, 530_432),
        _llama("LLaMA-65B", 8192, 22016, 80, 64, 65.2e9, 1.4e12, 1_022_362),
        PublishedModel(  # Transformer-XL's relative positions (a fifth square matrix a layer), which XLNet has too
            "Chinchilla-70B", "xlnet", dict(vocab_size=32000, d_model=8192, n_layer=80, n_head=64, d_inner=32768), 70e9,
            "Hoffmann et al. 2022, arXiv:2203.15556, table 4", tokens=1.4e12, flops=5.76e23,
            run_source="Hoffmann et al. 2022, arXiv:2203.15556, section 4 (Gopher's budget)",
        ),
        PublishedModel(
            "BloombergGPT-50B", "bloom", dict(hidden_size=7680, n_layer=70, n_head=40, vocab_size=131072), 50_558_868_480,
            f"{_BLOOMBERG}, appendix A", tokens=569e9, gpu_hours=53 * 24 * 512, flops=2.36e23,
            run_source=f"{_BLOOMBERG}, table 4 and section 3.3 (53 days on 512 GPUs; operations done twice counted twice)",
        ),
        PublishedModel(
            "SmolLM2-135M (embedded)", "llama",
            dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True), 135e6,
            "Ben Allal et al. 2025, arXiv:2502.02737", tokens=2e12, run_source="Ben Allal et al. 2025, arXiv:2502.02737",
        ),
    )
}  # fmt: skip


def build_on_meta(published: PublishedModel) -> PreTrainedModel:
    """The whole model without its numbers: on the meta device a weight has a shape and takes no memory."""
    config = AutoConfig.for_model(published.kind, **published.config)
    loader = {"bert": AutoModelForPreTraining, "t5": AutoModelForSeq2SeqLM}.get(published.kind, AutoModelForCausalLM)
    with torch.device("meta"):
        model = loader.from_config(config)
        if published.own_output_layer:
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model.eval()


WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "4 bit": 0.5}

# Bytes a weight while it is trained with Adam, without activations. In bf16 an fp32 copy of the weights and both of
# Adam's moments stay in fp32 (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1); "int8" is Adam with moments in
# 8 bits (Dettmers et al. 2022, arXiv:2110.02861); in "4 bit" the weights are frozen and a LoRA adapter is trained in
# their stead (Dettmers et al. 2023, arXiv:2305.14314).
TRAINING_BYTES = {
    "fp32": {"weights": 4.0, "gradients": 4.0, "Adam's moments": 8.0},
    "bf16": {"weights": 2.0, "gradients": 2.0, "fp32 copy": 4.0, "Adam's moments": 8.0},
    "int8": {"weights": 2.0, "gradients": 2.0, "fp32 copy": 4.0, "Adam's moments": 2.0},
    "4 bit": {"weights": 0.5},
}


def training_bytes(parameters: float, recipe: str, adapter_share: float = 0.01) -> dict[str, float]:
    """Bytes that training `parameters` weights with Adam takes, by component (`TRAINING_BYTES`), without activations.

    `adapter_share` is the adapter's size as a share of the weights under "4 bit"; the adapter is trained in fp32.
    """
    if recipe not in TRAINING_BYTES:
        raise ArchitectureError(f"There is no recipe {recipe!r}: choose one of {', '.join(TRAINING_BYTES)}.")
    parts = {part: each * parameters for part, each in TRAINING_BYTES[recipe].items()}
    if recipe == "4 bit":
        parts["adapter"] = sum(TRAINING_BYTES["fp32"].values()) * parameters * adapter_share
    return parts


def cache_bytes(config: LlamaConfig, length: int, batch: int = 1, bytes_each: float = 2) -> float:
    """Bytes of a LLaMA's key-value cache: two vectors a token for each layer and key-value head."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * batch * bytes_each


def flops_per_token(parameters: float, active_share: float = 1.0, training: bool = False) -> float:
    """The rule of thumb: 2 operations a weight to read a token, 6 to train on it (Kaplan et al. 2020, arXiv:2001.08361, section 2.1)."""
    return (6 if training else 2) * parameters * active_share


def counted_flops(model: PreTrainedModel, length: int) -> float:
    """Operations a token as torch counts them, reading `length` tokens (of source and of target each, where there are both)."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() / (length * len(inputs))


@dataclass(frozen=True)
class TrainingRun:
    """What a training run takes. `gpu_hours` and `cost` rest on assumptions: peak, utilisation and price are arguments."""

    flops: float
    gpu_hours: float
    cost: float


def training_run(
    parameters: float,
    tokens: float,
    *,
    active_share: float = 1.0,
    peak_flops: float = 312e12,
    utilisation: float = 0.4,
    price_per_hour: float = 2.0,
) -> TrainingRun:
    """Operations, GPU hours and cost of training `parameters` weights on `tokens` tokens.

    `peak_flops` is what a GPU can do a second (312e12: an A100 in bf16), `utilisation` the share of it that a run reaches.
    """
    if not 0 < utilisation <= 1:
        raise ArchitectureError(f"utilisation={utilisation} is no share: give a number above 0 and at most 1.")
    flops = flops_per_token(parameters, active_share, training=True) * tokens
    hours = flops / (peak_flops * utilisation) / 3600
    return TrainingRun(flops, hours, hours * price_per_hour)


# --- weights in 8 and 4 bits -------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are kept in 8 bits with a scale a row, or in 4 bits with a scale and a lowest value
    for each `GROUP` of a row; torch's kernels multiply the packed weights without writing them out. CPU only."""

    GROUP = 64
    weight = None  # T5 looks at its layers' weights; with none it leaves the layer's input alone

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        wide, dtype = weight.detach().float().contiguous(), weight.dtype
        if bits == 8:
            scale = wide.abs().amax(1).clamp(min=1e-9) / 127
            self.register_buffer("packed", (wide / scale[:, None]).round().to(torch.int8))
            self.register_buffer("scale", scale.to(dtype))
        else:
            grouped = wide.unflatten(1, (-1, self.GROUP))
            low, high = grouped.amin(-1), grouped.amax(-1)
            scale = ((high - low) / 15).clamp(min=1e-9)
            levels = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15)
            self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1))
            zero = low + 8 * scale  # the kernel reads level 8 as nothing
            self.register_buffer("scale", torch.stack([scale, zero], -1).transpose(0, 1).contiguous().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.bits = bits

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whether the kernels take a weight of this shape (out, in); other layers stay as they are."""
        return weight.shape[0] % 16 == 0 and weight.shape[1] % cls.GROUP == 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8 and len(rows) > 64:  # a prompt: the kernel is made for few rows, writing the weights out pays
            output = (rows @ self.packed.to(rows.dtype).T) * self.scale
        elif self.bits == 8:
            output = torch._weight_int8pack_mm(rows, self.packed, self.scale)
        else:
            output = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.GROUP, self.scale)
        output = output.view(*x.shape[:-1], -1)
        return output if self.bias is None else output + self.bias


def quantize(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Replace the model's linear layers, in place, by ones in 8 or 4 bits; embeddings, output layer and norms stay.

    Rounding to the nearest level, no calibration: the simplest member of the family of GPTQ, AWQ and NF4. Raises
    `ArchitectureError` off the CPU, for other bits, and where no layer could be replaced.
    """
    if bits not in (4, 8) or model.device.type != "cpu":
        raise ArchitectureError(f"bits={bits} on {model.device} is not covered: use 4 or 8 bits, on the CPU.")
    output, replaced = model.get_output_embeddings(), 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear | Conv1D) or layer is output:
                continue
            weight = (
                layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            )  # GPT-2 keeps its matrices transposed
            if QuantizedLinear.fits(weight):
                setattr(parent, name, QuantizedLinear(weight, layer.bias, bits))
                replaced += 1
    if not replaced:
        raise ArchitectureError(
            f"No linear layer of this {type(model).__name__} has sizes that the {bits}-bit kernel takes."
        )
    return model


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, each counted once however many layers share it."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
