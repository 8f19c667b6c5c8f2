"""Batched generation for decoder-only and encoder-decoder models, made fast on a CPU.

`generate` sorts the prompts by length, reads what all of them begin with (the worked examples) once and prompts of like
length together, and returns the completions in the order of the prompts. What makes it fast: a cache that has room for
what comes (`RoomyLayer`), attention by plain matrix products (`utils.kernels`), bfloat16 weights in the order in which the
processor multiplies them (`packed_weights`), and for greedy decoding a loop of its own (`decode`), which leaves out rows that
have ended; all else that `GenerationConfig` knows is left to transformers' loop. PPO samples with the same pieces. Left out of
what `transformers` offers: assisted decoding, streaming.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import DoraCaching
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

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

    @classmethod
    def joining(cls, layers: Sequence[DynamicLayer], indices: Sequence[Tensor], length: int, room: int) -> RoomyLayer:
        """Rows of several layers, of each those its index names, zeros before what is not `length` long, `room` behind."""
        layer = cls()
        for name in ("keys", "values"):
            held = [getattr(part, name) for part in layers]
            rows, (_, kv_heads, _, head_dim) = sum(map(len, indices)), held[0].shape
            buffer, end = held[0].new_zeros(rows, kv_heads, length + room, head_dim), 0
            for part, index in zip(held, indices, strict=True):
                start, end = end, end + len(index)
                buffer[start:end, :, length - part.shape[2] : length] = part[index]
            filled = buffer[:, :, :length]
            filled.buffer = buffer
            setattr(layer, name, filled)
        layer.dtype, layer.device, layer.is_initialized = buffer.dtype, buffer.device, True
        return layer


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


@contextlib.contextmanager
def packed_weights(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Meanwhile linear layers in bfloat16 on a CPU multiply by a copy of their weight in oneDNN's own order.

    Otherwise oneDNN brings the weight into that order for each product, which is 40 % of their time with 16 rows.
    The results are the same to the bit; the copy takes the memory of the weights once more.
    """
    layers = []
    if model.device.type == "cpu" and choose_dtype(model.device) == torch.bfloat16:
        layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.bfloat16]
        layers = [layer for layer in layers if not isinstance(layer.weight, DTensor)]  # a shard, which is not all of it
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
    eos_ids, each = eos_token_ids(config), completions_per_prompt
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    own_config, base = base_model(model).generation_config, base_model(model)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    completions: list[Completion | None] = [None] * (len(encoded) * each)
    was_training = model.training
    model.eval()
    base.generation_config = config
    # Beams reorder a cache of their own, and a learned prompt stands in front of what is read.
    learned_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    reads_ahead = not (model.config.is_encoder_decoder or (config.num_beams or 1) > 1 or learned_prompt)
    plain = config.max_new_tokens is not None and set(settings) <= {"max_new_tokens", "eos_token_id"}
    try:
        with (
            fused_lora(model),
            DoraCaching(),  # else the length of every column is measured again for every token
            packed_weights(model),
            progress(total=len(encoded), description=description, disable=not show_progress) as bar,
        ):
            prefix = _read_prefix(base, _shared_prefix(encoded)) if reads_ahead else None
            for first_row in range(0, len(by_length), batch_size):
                rows = by_length[first_row : first_row + batch_size]
                batch = [encoded[i] for i in rows for _ in range(each)]
                if reads_ahead:
                    read = _read_batch(base, batch, tokenizer.pad_token_id, prefix, config.max_new_tokens or 0)
                    if plain:
                        output = decode(base, read, eos_ids, config.max_new_tokens, logits=read.last[:, 0])
                    else:
                        output = _go_on(model, read, config)
                else:
                    pad = pad_right if model.config.is_encoder_decoder else pad_left
                    input_ids, attention_mask = pad(batch, tokenizer.pad_token_id, model.device)
                    first = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
                    output = model.generate(
                        input_ids=input_ids, attention_mask=attention_mask, generation_config=config
                    )[:, first:].tolist()
                places = [i * each + k for i in rows for k in range(each)]
                for i, ids in zip(places, output, strict=True):
                    completions[i] = completion(tokenizer, ids, eos_ids)
                bar.update(len(rows))
    finally:
        base.generation_config = own_config
        model.train(was_training)
    return completions


def completion(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], eos_ids: Sequence[int]) -> Completion:
    """What was written, up to and with the first EOS, as text too."""
    token_ids = token_ids[: completion_length(token_ids, eos_ids)]
    text = tokenizer.decode(token_ids, skip_special_tokens=True).strip()
    return Completion(text, token_ids, truncated=not token_ids or token_ids[-1] not in eos_ids)


# --- reading prompts ------------------------------------------------------------------------------------------------


@dataclass
class Read:
    """Prompts that a model has read, and what it needs to go on from there.

    `index` (rows,): which of the prompts read each row has. `mask` (prompts, length), int64, 0 for padding, and `input_ids`.
    A decoder: `last` (prompts, 1, hidden or vocabulary) is what it made of the last token, `cache` holds keys and values of
    all. An encoder: `last` (prompts, length, hidden) are its states.
    """

    index: Tensor
    input_ids: Tensor
    mask: Tensor
    last: Tensor
    cache: DynamicCache | None = None


def read_prompts(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    *,
    prefix: DynamicCache | None = None,
    head: bool = False,
) -> Read:
    """`prompts` (token ids), one a row, read by `model`: those that follow themselves once.

    What all prompts begin with, a decoder reads once, too (`prefix`, where somebody has done so already); padding stands
    behind it. With `head` what comes out are logits.
    """
    new = [i == 0 or (prompt is not prompts[i - 1] and prompt != prompts[i - 1]) for i, prompt in enumerate(prompts)]
    index = torch.tensor(new, device=model.device).cumsum(0) - 1
    prompts = [prompt for prompt, is_new in zip(prompts, new, strict=True) if is_new]
    if model.config.is_encoder_decoder:
        input_ids, mask = pad_right(prompts, pad_token_id, model.device)
        return Read(index, input_ids, mask, model.get_encoder()(input_ids, attention_mask=mask).last_hidden_state)
    prefix = _read_prefix(model, _shared_prefix(prompts)) if prefix is None else prefix
    known = prefix.get_seq_length()
    rest, rest_mask = pad_left([prompt[known:] for prompt in prompts], pad_token_id, model.device)
    start = torch.tensor(prompts[0][:known], dtype=torch.long, device=model.device).expand(len(prompts), -1)
    mask = torch.cat([torch.ones_like(start), rest_mask], 1)
    inputs = dict(
        input_ids=rest,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, known:],
        past_key_values=(cache := select_rows(prefix, torch.zeros_like(rest[:, 0]))),
    )
    if head:  # with the number 1 in its place the head would be copied for each row
        last = model(**inputs, logits_to_keep=torch.tensor([-1], device=model.device)).logits
    else:
        last = model.base_model(**inputs).last_hidden_state[:, -1:]
    return Read(index, torch.cat([start, rest], 1), mask, last, cache)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that all prompts begin with, where reading them once saves something; every prompt keeps one of its own."""
    if len(prompts) < 2:
        return []
    shortest = min(map(len, prompts))
    differ = (i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    length = min(next(differ, shortest), shortest - 1)
    return list(prompts[0][:length]) if length >= 16 else []


def _read_prefix(model: PreTrainedModel, tokens: list[int]) -> DynamicCache:
    """Keys and values of `tokens`, in one row; an empty cache where there are none."""
    cache = DynamicCache(config=model.config)
    if tokens:
        model.base_model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache)
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of its own with the `rows` (n,) of another, each as often as it is named."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    if cache.get_seq_length():
        chosen.batch_select_indices(rows)
    return chosen


def _read_batch(
    model: PreTrainedModel, prompts: Sequence[list[int]], pad_token_id: int, prefix: DynamicCache, room: int
) -> Read:
    """`prompts`, longest first; those of like length are read together, so that little padding is."""
    parts = [slice(len(prompts))]
    if can_join(prefix):
        parts = like_lengths([len(prompt) - prefix.get_seq_length() for prompt in prompts])
    return join([read_prompts(model, prompts[part], pad_token_id, prefix=prefix, head=True) for part in parts], room)


def like_lengths(lengths: Sequence[int], most: int | None = None) -> list[slice]:
    """`lengths`, the longest first, in parts of `most` or fewer: the next begins where padding would cost more than a pass of its own."""
    starts = [0] if lengths else []
    for i, length in enumerate(lengths):
        longest = lengths[starts[-1]]
        # What is less than 16 shorter is not worth a pass of its own.
        if length < min(0.8 * longest, longest - 16) or i - starts[-1] == most:
            starts.append(i)
    return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]


def can_join(cache: DynamicCache) -> bool:
    """Whether padding may be put into `cache` later: not where layers look back over a window or keep a state."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def join(reads: Sequence[Read], room: int = 0) -> Read:
    """One `Read` of the rows of all, each a prompt of its own; a decoder's has `room` for so many tokens in its cache.

    What is shorter gets padding, in front, or behind where it was read by an encoder. Several reads of a decoder have to be
    of the kind for which `can_join` is true.
    """
    width, decoder = max(read.mask.shape[1] for read in reads), reads[0].cache is not None

    def rows(name: str, padded: bool = True) -> Tensor:
        parts = [getattr(read, name)[read.index] for read in reads]
        if padded:
            deeper = [0, 0] * (parts[0].dim() - 2)
            missing = [width - part.shape[1] for part in parts]
            parts = [
                F.pad(part, [*deeper, n, 0] if decoder else [*deeper, 0, n])
                for part, n in zip(parts, missing, strict=True)
            ]
        return torch.cat(parts)

    mask = rows("mask")
    joined = Read(
        torch.arange(len(mask), device=mask.device), rows("input_ids"), mask, rows("last", padded=not decoder)
    )
    if decoder and can_join(reads[0].cache):
        joined.cache = copy.copy(reads[0].cache)
        layers = zip(*(read.cache.layers for read in reads), strict=True)
        joined.cache.layers = [RoomyLayer.joining(each, [read.index for read in reads], width, room) for each in layers]
    elif decoder:
        (read,) = reads
        joined.cache = select_rows(read.cache, read.index)
    return joined


# --- writing --------------------------------------------------------------------------------------------------------


def _go_on(model: PreTrainedModel | PeftModel, read: Read, config: GenerationConfig) -> list[list[int]]:
    """What transformers' own loop writes after the prompts of `read`, whose cache is used up."""
    read.cache.crop(-1)  # it begins with the last token
    output = model.generate(
        input_ids=read.input_ids, attention_mask=read.mask, past_key_values=read.cache, generation_config=config
    )
    return output[:, read.mask.shape[1] :].tolist()


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    read: Read,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    *,
    logits: Tensor | None = None,
    temperature: float = 1.0,
    draws: Tensor | None = None,
) -> list[list[int]]:
    """Token ids after the prompts of `read`, whose cache is used up; behind the first EOS of a row anything may stand.

    `logits` (rows, vocabulary) are those of a decoder's first token, where they are known. Greedy without `draws`. With them,
    (rows, max_new_tokens), uniform on [0, 1), each token comes from softmax(logits / temperature): it is the one at which the
    cumulative sum passes the draw. So a row's tokens do not depend on the rows beside it, and rows that have ended are left
    out as soon as they are half of all.
    """
    mask, cache, states = read.mask, read.cache, read.last
    rows, unfinished = torch.arange(len(mask), device=mask.device), torch.ones_like(mask[:, 0], dtype=torch.bool)
    eos = torch.tensor(list(eos_ids), device=mask.device)
    written: list[list[int]] = [[] for _ in rows]
    encoder_decoder = model.config.is_encoder_decoder
    if logits is None and not encoder_decoder:
        logits = model.get_output_embeddings()(read.last[:, 0])
    if encoder_decoder:
        tokens = torch.full_like(rows, model.config.decoder_start_token_id)
    for step in range(max_new_tokens):
        if encoder_decoder:
            inputs = dict(
                decoder_input_ids=tokens[:, None], encoder_outputs=BaseModelOutput(states), attention_mask=mask
            )
        elif step:
            mask = F.pad(mask, (0, 1), value=1)
            inputs = dict(input_ids=tokens[:, None], position_ids=mask.sum(1, keepdim=True) - 1, attention_mask=mask)
        if encoder_decoder or step:
            output = model(**inputs, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1], output.past_key_values
        # In bfloat16 `max` takes a quarter of the time of `argmax`, for the same places.
        tokens = logits.max(-1).indices if draws is None else _draw(logits / temperature, draws[rows, step])
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            written[row].append(token)
        unfinished &= torch.isin(tokens, eos, invert=True)
        if not unfinished.any():
            break
        if 2 * unfinished.sum() <= len(rows):
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
            rows, tokens, mask, states, unfinished = (
                each[unfinished] for each in (rows, tokens, mask, states, unfinished)
            )
    return written


def _draw(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens (rows,) of softmax(logits), by inversion of its cumulative sum at `draws` (rows,), uniform on [0, 1)."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    threshold = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
