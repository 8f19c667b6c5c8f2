"""Batched generation for decoder-only and encoder-decoder models, made fast on a CPU.

`generate` sorts the prompts by length, reads what all of them begin with (the worked examples) once and prompts of like
length together, and returns the completions in the order of the prompts. What makes it fast: a cache that has room for
what comes (`RoomyLayer`), attention by plain matrix products (`utils.kernels`), and bfloat16 weights in the order
in which the processor multiplies them (`_packed_weights`). Left out of what `transformers` offers: assisted decoding,
streaming. Left out, too: dropping the rows that have ended. Eight rows cost the linear layers four fifths of what sixteen
do, and with fewer rows a seed would draw other samples.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import DoraCaching
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from utils.kernels import fused_lora
from utils.lab import progress
from utils.models import choose_dtype
from utils.prompts import encode


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, as in `DynamicLayer`, which copies all it holds for every token; this one does so
    for every 64th, and writes the others into the room it then has.

    Only for passes without gradients. `keys` and `values` (batch, kv_heads, length, head_dim) are the filled part of
    their attribute `buffer` (batch, kv_heads, length and room, head_dim), zero where nothing is written. What other
    methods make of them (repeated, chosen, cut) has no such attribute, and gets a buffer of its own with the next update.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, kv_heads, length, head_dim) with the new ones behind those held."""
        start = self.get_seq_length()
        self.keys = _append(self.keys, start, key_states)
        self.values = _append(self.values, start, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values


def _append(held: Tensor | None, start: int, new: Tensor) -> Tensor:
    """`held`, which is `start` long or nothing yet, and `new` behind it, both (batch, kv_heads, length, head_dim)."""
    batch, kv_heads, length, head_dim = new.shape
    buffer = getattr(held, "buffer", None)
    if buffer is None or buffer.shape[2] < start + length:
        buffer = new.new_zeros(batch, kv_heads, (start + length) // 64 * 64 + 64, head_dim)
        if start:
            buffer[:, :, :start] = held
    buffer[:, :, start : start + length] = new
    filled = buffer[:, :, : start + length]
    filled.buffer = buffer
    return filled


def _roomy_cache(model: PreTrainedModel | PeftModel) -> DynamicCache:
    """An empty cache for `model`. Layers that look back over a window only, or keep a state, stay transformers' own."""
    cache = DynamicCache(config=base_model(model).config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextlib.contextmanager
def _packed_weights(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Meanwhile linear layers in bfloat16 on a CPU multiply by a copy of their weight in oneDNN's own order.

    Otherwise oneDNN brings the weight into that order for each product, which is 40 % of their time with 16 rows.
    The results are the same to the bit; the copy takes the memory of the weights once more.
    """
    layers = []
    if model.device.type == "cpu" and choose_dtype(model.device) == torch.bfloat16:
        layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16]
        layers = [layer for layer in layers if "forward" not in vars(layer)]  # somebody else has put one there
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
            layer.forward = partial(_multiply_packed, weight, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _multiply_packed(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. `token_ids` ends with the EOS token unless `truncated`."""

    text: str
    token_ids: list[int]
    truncated: bool


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, **settings
) -> GenerationConfig:
    """Greedy decoding of 64 tokens with every processor neutral, changed only by `settings` (`GenerationConfig` fields).

    Only the special tokens are taken from the model's own generation configuration. `generate` also keeps transformers
    from filling what is unset here out of that configuration: a `repetition_penalty` saved with a model would
    otherwise apply unseen. (For sampling `top_k` is set to 0, off: transformers' own default is 50.)
    """
    own = base_model(model).generation_config
    tokens = dict(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    if tokens["decoder_start_token_id"] is None and model.config.is_encoder_decoder:
        tokens["decoder_start_token_id"] = model.config.decoder_start_token_id
    defaults = dict(do_sample=False, max_new_tokens=64)
    if settings.get("do_sample"):
        defaults["top_k"] = 0
    return GenerationConfig(**(defaults | tokens | settings))


def eos_token_ids(config: GenerationConfig) -> list[int]:
    """The end-of-sequence ids, which a configuration may hold as one number or as a list."""
    return [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id)


def pad_left(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, (batch, length) int64, from token lists of several lengths."""
    length = max(map(len, sequences))
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, length - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, length - len(sequence) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `pad_left`, with the padding at the other end: what encoders with absolute positions need."""
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sequence, dtype=torch.long) for sequence in sequences], True, pad_token_id
    )
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids.to(device), attention_mask.to(device)


def completion_length(token_ids: Sequence[int], eos_ids: Sequence[int]) -> int:
    """How many tokens a completion has: up to and with the first EOS, all of them where there is none.

    Counted from EOS and never from `!= pad`: many tokenizers use EOS as padding.
    """
    return next((i + 1 for i, token in enumerate(token_ids) if token in eos_ids), len(token_ids))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    batch_size: int = 16,
    completions_per_prompt: int = 1,
    description: str = "generating",
    show_progress: bool = True,
    **settings,
) -> list[Completion]:
    """Completions of each prompt, in order. `settings` are fields of `GenerationConfig`; the default is greedy, 64 tokens.

    `batch_size` counts prompts. With `completions_per_prompt` above 1 (for sampling) the completions of one prompt follow
    each other. A decoder-only model reads each prompt once for all of them, and what all prompts begin with once.
    Prompts are strings or chat messages. The model is in evaluation mode meanwhile and left as it was.
    """
    config = generation_config(model, tokenizer, **settings)
    eos_ids = eos_token_ids(config)
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    own_config, base = base_model(model).generation_config, base_model(model)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    each = completions_per_prompt
    completions: list[Completion | None] = [None] * (len(encoded) * each)
    was_training = model.training
    model.eval()
    base.generation_config = config
    # Beams reorder a cache of their own, and a learned prompt stands in front of what is read.
    learned_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    reads_ahead = not (model.config.is_encoder_decoder or (config.num_beams or 1) > 1 or learned_prompt)
    shared = _shared_prefix(encoded) if reads_ahead else []
    try:
        with (
            fused_lora(model),
            DoraCaching(),  # else the length of every column is measured again for every token
            _packed_weights(model),
            progress(total=len(encoded), description=description, disable=not show_progress) as bar,
        ):
            if reads_ahead:
                prefix = _read(model, torch.tensor([shared], dtype=torch.long, device=model.device))
            for first_row in range(0, len(by_length), batch_size):
                rows = by_length[first_row : first_row + batch_size]
                extra = {}
                if reads_ahead:
                    input_ids, attention_mask, cache = _read_batch(
                        model, [encoded[i] for i in rows], prefix, tokenizer.pad_token_id
                    )
                    if each > 1:
                        cache.batch_repeat_interleave(each)
                    extra["past_key_values"] = cache
                else:
                    pad = pad_right if model.config.is_encoder_decoder else pad_left
                    input_ids, attention_mask = pad([encoded[i] for i in rows], tokenizer.pad_token_id, model.device)
                output = model.generate(
                    input_ids=input_ids.repeat_interleave(each, 0),
                    attention_mask=attention_mask.repeat_interleave(each, 0),
                    generation_config=config,
                    **extra,
                )
                first = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
                places = [i * each + k for i in rows for k in range(each)]
                for i, ids in zip(places, output[:, first:].tolist(), strict=True):
                    ids = ids[: completion_length(ids, eos_ids)]
                    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                    completions[i] = Completion(text, ids, truncated=not ids or ids[-1] not in eos_ids)
                bar.update(len(rows))
    finally:
        base.generation_config = own_config
        model.train(was_training)
    return completions


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that all prompts begin with, where reading them once saves something; every prompt keeps one of its own."""
    if len(prompts) < 2:
        return []
    shortest = min(map(len, prompts))
    differ = (i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    length = min(next(differ, shortest), shortest - 1)
    return list(prompts[0][:length]) if length >= 16 else []


def _read_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prefix: DynamicCache, pad_token_id: int
) -> tuple[Tensor, Tensor, DynamicCache]:
    """`input_ids` and `attention_mask`, (rows, length), of `prompts`, longest first, and a cache of all but the last token.

    `prefix` holds what all prompts begin with; padding may stand before and after it. Prompts of like length are read
    together, so that little padding is, and then padded to one length.
    """
    known = prefix.get_seq_length()
    roomy = all(type(layer) is RoomyLayer for layer in prefix.layers)  # others do not know of padding put in later
    parts, groups = [], []
    for prompt in prompts:
        # A prompt of one token would leave nothing to read. What is less than 16 shorter is not worth a pass of its own.
        length, longest = len(prompt) - known, len(groups[-1][0]) - known if groups else 0
        if not groups or (roomy and length > 1 and length < min(0.8 * longest, longest - 16)):
            groups.append([])
        groups[-1].append(prompt)
    width = len(prompts[0])
    for group in groups:
        rest, rest_mask = pad_left([prompt[known:] for prompt in group], pad_token_id, model.device)
        start = torch.tensor(group[0][:known], dtype=torch.long, device=model.device).expand(len(group), -1)
        input_ids = torch.cat([start, rest], 1)
        attention_mask = torch.cat([torch.ones_like(start), rest_mask], 1)
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(group))
        cache = _read(model, input_ids[:, :-1], attention_mask[:, :-1], cache)
        padding = (width - input_ids.shape[1], 0)
        parts.append((F.pad(input_ids, padding, value=pad_token_id), F.pad(attention_mask, padding), cache))
    ids, masks, caches = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(masks), _stack(caches)


def _stack(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of all, zeros before what is shorter than the first."""
    first = caches[0]
    if len(caches) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            length = layers[0].get_seq_length()
            for name in ("keys", "values"):
                held = [getattr(layer, name) for layer in layers]
                setattr(layers[0], name, torch.cat([F.pad(t, (0, 0, length - t.shape[2], 0)) for t in held]))
    return first


def _read(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DynamicCache | None = None
) -> DynamicCache:
    """Keys and values of `input_ids` (batch, length), of which `cache` may hold the beginning already."""
    cache = _roomy_cache(model) if cache is None else cache
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    known = cache.get_seq_length()
    if input_ids.shape[1] > known:
        model(
            input_ids=input_ids[:, known:],
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, known:],
            past_key_values=cache,
            logits_to_keep=torch.tensor([-1], device=model.device),  # with 1 the head is copied for each row
        )
    return cache
