"""How the next token is picked: the filters, the draw and beam search, from scratch.

Everything is a pure function of logits (batch, vocabulary): a filter returns new logits with `-inf` where a token is
ruled out, so that filters can follow each other and one softmax at the end makes the distribution. Each gives the same
logits as the processor of transformers that it is named after, ties included (`tests/test_samplers.py`). Left out:
typical, eta and epsilon sampling, sampled beams, and in beam search a cache and batches: it reads each beam anew at
every step, which is short to write and slow to run. `utils.generation.generate` is what the labs run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.generation import base_model, generation_config
from utils.lab import LabError
from utils.prompts import encode


class SamplerError(LabError):
    """A setting or a tensor that a sampler cannot use."""


# --- filters -----------------------------------------------------------------------------------------------------


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by `value`: below 1 the distribution gets sharper, above 1 flatter, towards 0 greedy.

    `logits` (batch, vocabulary), floating point. Raises `SamplerError` unless `value` is above 0 and finite.
    """
    _check(logits)
    if not (value > 0 and isfinite(value)):
        raise SamplerError(f"temperature is {value}: give a number above 0, or decode greedily instead of 0.")
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens of each row, and whatever ties with the last of them (Fan et al. 2018, arXiv:1805.04833).

    `logits` (batch, vocabulary), floating point; a `k` above the vocabulary keeps all. Raises `SamplerError` where `k`
    is not a whole number of 1 or more.
    """
    _check(logits)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise SamplerError(f"top_k is {k!r}: give a whole number of 1 or more, or leave the filter out.")
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities sum to `p` or more (Holtzman et al. 2020, arXiv:1904.09751).

    `logits` (batch, vocabulary), floating point. The likeliest token always stays. Raises `SamplerError` unless `p` lies
    in 0 to 1.
    """
    _check(logits)
    if not 0 <= p <= 1:
        raise SamplerError(f"top_p is {p}: it is a probability, give a number from 0 to 1.")
    # From the unlikely end: a token can go while it and all below it hold no more than 1 - p. Adding the small ones
    # first also loses less to rounding than starting with the large ones.
    ascending, order = logits.sort(dim=-1)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -1] = False
    return logits.masked_fill(remove.scatter(1, order, remove), float("-inf"))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least `p` times as likely as the likeliest one (Nguyen et al. 2024, arXiv:2407.01082).

    `logits` (batch, vocabulary), floating point. Where the model is sure few tokens stay, where it is not many do.
    Raises `SamplerError` unless `p` lies in 0 to 1.
    """
    _check(logits)
    if not 0 <= p <= 1:
        raise SamplerError(f"min_p is {p}: it is a share of the largest probability, give a number from 0 to 1.")
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


def repetition_penalty(logits: Tensor, input_ids: Tensor, penalty: float) -> Tensor:
    """Make every token of `input_ids` less likely, once however often it stands there (Keskar et al. 2019, arXiv:1909.05858).

    `logits` (batch, vocabulary), floating point; `input_ids` (batch, length) int64, for a decoder-only model the prompt
    as well. A positive logit is divided by `penalty`, a negative one multiplied, so both sink where it is above 1. Raises
    `SamplerError` unless `penalty` is above 0, and where the ids do not fit the logits.
    """
    _check(logits)
    if not (penalty > 0 and isfinite(penalty)):
        raise SamplerError(f"repetition_penalty is {penalty}: give a number above 0 (1 changes nothing).")
    batch, vocabulary = logits.shape
    if input_ids.dim() != 2 or len(input_ids) != batch:
        raise SamplerError(
            f"input_ids has shape {tuple(input_ids.shape)}: give one row of ids for each of the {batch} rows of logits."
        )
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise SamplerError(
            f"input_ids has ids from {int(input_ids.min())} to {int(input_ids.max())}, the logits have {vocabulary} "
            "tokens: use ids of the same vocabulary."
        )
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, input_ids, True)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


WARPERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}  # in the order of transformers
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def processed(logits: Tensor, input_ids: Tensor, **settings) -> Tensor:
    """The logits that the next token is drawn from under `settings`, (batch, vocabulary).

    `settings` are the words of `GenerationConfig` (`do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
    `repetition_penalty`), so one dictionary serves `generate` and this function. Without `do_sample` only the penalty
    applies: greedy decoding asks for nothing but the largest logit. The order matters: temperature comes before top-p, so
    a hotter distribution keeps more tokens. Raises `SamplerError` on an unknown setting and where a filter does.
    """
    unknown = set(settings) - {"do_sample", "repetition_penalty", *WARPERS}
    if unknown:
        known = ", ".join(["do_sample", "repetition_penalty", *WARPERS])
        raise SamplerError(f"There is no setting {min(unknown)!r} here: choose from {known}.")
    if settings.get("repetition_penalty", 1.0) != 1.0:
        logits = repetition_penalty(logits, input_ids, settings["repetition_penalty"])
    if settings.get("do_sample", False):
        for name, warper in WARPERS.items():
            if settings.get(name, NEUTRAL[name]) != NEUTRAL[name]:
                logits = warper(logits, settings[name])
    return logits


# --- picking -----------------------------------------------------------------------------------------------------


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, (batch,) int64. `logits` (batch, vocabulary)."""
    _check(logits)
    return logits.argmax(-1)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row, drawn with its softmax probability, (batch,) int64. `logits` (batch, vocabulary).

    A race: each token waits an exponential time with its probability as the rate, and the first one wins, which it does
    with just that probability. (The logarithm of the race is the Gumbel-max trick; Maddison et al. 2014,
    arXiv:1411.0030.) A token of probability 0 never arrives. `torch.multinomial` does the same, with the same random
    numbers, so both draw the same token.
    """
    _check(logits)
    probabilities = logits.float().softmax(-1)
    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waiting).argmax(-1)


@dataclass(frozen=True)
class Beam:
    """One way to go on. `log_probability` is the sum over `token_ids` in nats; beams are ranked by `score`."""

    token_ids: list[int]
    log_probability: float
    score: float


@torch.no_grad()
def beam_search(
    next_logits: Callable[[Tensor], Tensor],
    input_ids: Sequence[int] | Tensor,
    *,
    num_beams: int = 4,
    max_new_tokens: int = 20,
    eos_token_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> list[Beam]:
    """Up to `num_beams` continuations of `input_ids` (length,), best first: keep the best few beginnings at every step.

    `next_logits` takes ids (beams, length) int64 and gives the logits of the next token (beams, vocabulary), as
    `next_logits_of` makes it from a model. The score is
    the log-probability divided by the number of new tokens to the power `length_penalty` (Wu et al. 2016,
    arXiv:1609.08144, in its simple form): 0 takes the likeliest text, 1 the highest mean. Stops as transformers does with
    `early_stopping=False`. One beam is greedy decoding. Raises `SamplerError` where a number is below 1 or there are no ids.
    """
    if num_beams < 1 or max_new_tokens < 1:
        raise SamplerError(f"num_beams is {num_beams}, max_new_tokens {max_new_tokens}: give 1 or more of each.")
    beams = torch.as_tensor(input_ids)[None]
    if beams.dim() != 2 or not beams.numel():
        raise SamplerError(
            f"input_ids has shape {tuple(beams.shape[1:])}: give the ids of one text, (length,), at least one."
        )
    totals = torch.zeros(1, device=beams.device)  # log-probability of each open beam
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=beams.device)
    finished: list[Beam] = []
    for length in range(1, max_new_tokens + 1):
        logits = next_logits(beams)
        _check(logits)
        vocabulary = logits.shape[-1]
        candidates = (totals[:, None] + logits.float().log_softmax(-1)).flatten()
        # With some candidates to spare: those that end must not leave fewer than num_beams open.
        best = candidates.topk(min(max(2, 1 + len(eos)) * num_beams, len(candidates)))
        possible = best.values > float("-inf")  # where next_logits rules tokens out there may be few
        values, indices = best.values[possible], best.indices[possible]
        sequences = torch.cat([beams[indices // vocabulary], (indices % vocabulary)[:, None]], 1)
        ends = torch.isin(sequences[:, -1], eos) | (length == max_new_tokens)
        for sequence, total, end in list(zip(sequences, values.tolist(), ends.tolist(), strict=True))[:num_beams]:
            if end:
                finished.append(Beam(sequence[-length:].tolist(), total, total / length**length_penalty))
        finished = sorted(finished, key=lambda beam: beam.score, reverse=True)[:num_beams]
        open_ones = (~ends).nonzero()[:num_beams, 0]
        if not len(open_ones):
            break
        beams, totals = sequences[open_ones], values[open_ones]
        # All places are taken, and the best open beam would not get one if it ended here.
        if len(finished) == num_beams and float(totals[0]) / length**length_penalty <= finished[-1].score:
            break
    return finished


# --- what transformers does, to compare --------------------------------------------------------------------------


@torch.no_grad()
def first_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], **settings
) -> tuple[Tensor, Tensor, Tensor]:
    """What `generate` of transformers draws the first token after `prompt` from: ids (1, length), logits, scores (1, vocabulary).

    `logits` are the model's own, fp32, `scores` those after the processors that transformers makes for `settings` (fields of
    `GenerationConfig`); the ids are the ones a repetition penalty counts: the prompt's, or an encoder-decoder's start.
    """
    wanted = dict(max_new_tokens=1, output_logits=True, output_scores=True, return_dict_in_generate=True)
    config = generation_config(model, tokenizer, **wanted, **settings)
    base = base_model(model)
    own_config = base.generation_config
    base.generation_config = config  # or what is unset here is filled from the model's own
    try:
        input_ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
    finally:
        base.generation_config = own_config
    return output.sequences[:, :-1], output.logits[0], output.scores[0]


def next_logits_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]
) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """What `beam_search` asks for: the function from ids (beams, length) to next-token logits, and the ids it begins with.

    An encoder-decoder reads the prompt in its encoder and begins with its start token; a decoder-only model goes on with
    the prompt.
    """
    ids = encode(tokenizer, prompt)
    if not model.config.is_encoder_decoder:
        return lambda beams: model(beams, use_cache=False, logits_to_keep=1).logits[:, -1].float(), ids
    source = torch.tensor([ids], device=model.device)
    start = generation_config(model, tokenizer).decoder_start_token_id

    def after(beams: Tensor) -> Tensor:
        return model(input_ids=source.expand(len(beams), -1), decoder_input_ids=beams).logits[:, -1].float()

    return after, [start]


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise SamplerError(
            f"logits has shape {tuple(logits.shape)} and type {logits.dtype}: give floating-point (batch, vocabulary)."
        )
    best = logits.amax(-1)
    if not torch.isfinite(best).all():
        row = int((~torch.isfinite(best)).nonzero()[0])
        raise SamplerError(
            f"Row {row} of logits has {best[row].item()} as its largest value: every row needs a finite one and no NaN."
        )
