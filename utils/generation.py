"""Batched generation for decoder-only and encoder-decoder models, and an attention function that decodes fast on a CPU.

Left out of what `transformers` offers: beams shared over devices, assisted decoding, streaming. `generate` sorts the
prompts by length so that a batch holds little padding, reads what all prompts begin with (the worked examples) once,
and returns the completions in the order of the prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.lab import progress
from utils.prompts import encode

FAST_DECODE = "sdpa_fast_decode"


def fast_decode_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs
):
    """`sdpa`, but one query over a grouped-query cache is two plain matrix products.

    query (batch, heads, 1, head_dim) against key and value (batch, kv_heads, length, head_dim): the query heads that
    share a key-value head become rows of one matrix, so nothing is repeated in memory. On a CPU this decodes
    about twice as fast as `scaled_dot_product_attention`.
    """
    if query.shape[2] > 1 or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    scores = query.view(batch, kv_heads, heads // kv_heads, head_dim) @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]  # (batch, 1, 1, length)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(batch, heads, 1, head_dim).transpose(1, 2), None


AttentionInterface.register(FAST_DECODE, fast_decode_attention)
AttentionMaskInterface.register(FAST_DECODE, sdpa_mask)


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
    # Beams reorder a cache of their own.
    reads_ahead = not model.config.is_encoder_decoder and (config.num_beams or 1) == 1
    shared = _shared_prefix(model, encoded) if reads_ahead else []
    try:
        prefix = _read(model, torch.tensor([shared]).to(model.device)) if shared else None
        with progress(total=len(encoded), description=description, disable=not show_progress) as bar:
            for first_row in range(0, len(by_length), batch_size):
                rows = by_length[first_row : first_row + batch_size]
                pad = pad_right if model.config.is_encoder_decoder else pad_left
                rest = [encoded[i][len(shared) :] for i in rows]
                input_ids, attention_mask = pad(rest, tokenizer.pad_token_id, model.device)
                extra = {}
                if shared:  # the padding stands between what is shared and the rest; positions do not count it
                    cache = copy.deepcopy(prefix)
                    cache.batch_repeat_interleave(len(rows))
                    extra["past_key_values"] = cache
                    start = torch.tensor(shared, device=model.device).expand(len(rows), -1)
                    input_ids = torch.cat([start, input_ids], 1)
                    attention_mask = torch.cat([torch.ones_like(start), attention_mask], 1)
                if each > 1 and reads_ahead:
                    cache = _read(model, input_ids[:, :-1], attention_mask[:, :-1], extra.get("past_key_values"))
                    cache.batch_repeat_interleave(each)
                    extra["past_key_values"] = cache
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


def _shared_prefix(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that all prompts begin with, where reading them once saves something; every prompt keeps one of its own."""
    learned_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if learned_prompt or len(prompts) < 2:
        return []
    shortest = min(map(len, prompts))
    differ = (i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    length = min(next(differ, shortest), shortest - 1)
    return list(prompts[0][:length]) if length >= 16 else []


def _read(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DynamicCache | None = None
) -> DynamicCache:
    """Keys and values of `input_ids` (batch, length), of which `cache` may hold the beginning already."""
    cache = DynamicCache(config=base_model(model).config) if cache is None else cache
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    known = cache.get_seq_length()
    if input_ids.shape[1] > known:
        model(
            input_ids=input_ids[:, known:],
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, known:],
            past_key_values=cache,
            logits_to_keep=1,
        )
    return cache
