"""Pre-training from scratch: three objectives for three families, one loop, and likelihoods to compare the results with.

An objective turns a block of tokens into inputs and labels; the loop does not know which one it runs. Left out of what
large runs do: several devices, gradient accumulation, checkpoints, and any filtering of the text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.architectures import prefix_mask
from utils.generation import pad_right
from utils.lab import LabError, progress
from utils.models import DECODER, ENCODER, ENCODER_DECODER, architecture, choose_dtype
from utils.prompts import IGNORED

PAD, EOS, MASK = "<pad>", "</s>", "<mask>"
SENTINELS = [f"<extra_id_{i}>" for i in range(32)]
SPEAKERS = ["#Person1#", "#Person2#"]

Batch = tuple[dict[str, Tensor], Tensor]  # what a model is given, and the labels


# --- text and tokens -------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocabulary: int = 3000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` entries, learned from `texts`.

    Sennrich et al. 2016, arXiv:1508.07909. It has a pad, an end, a mask and 32 sentinel tokens, and adds none of them by
    itself. The names of the two speakers are one token each.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, EOS, MASK, *SENTINELS]
    least = len(alphabet) + len(special) + len(SPEAKERS)
    if vocabulary <= least:
        raise LabError(f"vocabulary={vocabulary} is too small: bytes and special tokens take {least} entries.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPEAKERS), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain = [re.sub("|".join(SPEAKERS), "", text) for text in texts]
    bpe.train_from_iterator(plain, trainer)
    bpe.add_tokens([AddedToken(name, normalized=False) for name in SPEAKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        additional_special_tokens=SENTINELS,
        clean_up_tokenization_spaces=False,
    )


def group_by_length(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[int, Tensor]:
    """The texts as token ids, those of one length together: length to (texts, length) int64. So no batch needs padding."""
    if not texts:
        raise LabError("`texts` is empty: give at least one.")
    groups: dict[int, list[list[int]]] = {}
    for ids in tokenizer(list(texts)).input_ids:
        groups.setdefault(len(ids), []).append(ids)
    return {length: torch.tensor(groups[length]) for length in sorted(groups)}


# --- objectives ------------------------------------------------------------------------------------------------------


def mask_tokens(
    ids: Tensor,
    *,
    mask_id: int,
    vocabulary: int,
    never: Sequence[int] = (),
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's objective: hide a `share` of the tokens; return (inputs, labels), both like `ids` (batch, length) int64.

    Of the chosen tokens 80 % become `mask_id`, 10 % a random token and 10 % stay as they are; labels are `IGNORED` where
    nothing was chosen. Tokens in `never` are not chosen. Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """
    _check_share(share)
    chosen = torch.rand(ids.shape, generator=generator) < share
    chosen &= ~torch.isin(ids, torch.tensor(list(never), dtype=ids.dtype))
    labels = torch.where(chosen, ids, IGNORED)
    dice = torch.rand(ids.shape, generator=generator)
    inputs = torch.where(chosen & (dice < 0.8), mask_id, ids)
    other = torch.randint(vocabulary, ids.shape, generator=generator)
    return torch.where(chosen & (dice >= 0.9), other, inputs), labels


def next_token(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's objective: return (inputs, labels), where the label of each place is the token of the next one.

    `ids` is (batch, length) int64; the last place has no next token and is `IGNORED`. (transformers shifts inside the model: give
    its `labels=` the ids themselves, never these.)
    """
    return ids, torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)


def corrupt_spans(
    ids: Tensor,
    *,
    sentinels: Sequence[int],
    eos_id: int,
    share: float = 0.15,
    mean_span: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """T5's objective: cut spans out of each row of `ids` (batch, length); return (inputs, targets).

    In the inputs a sentinel stands for each span; the targets are the spans, each after its sentinel, closed by one more sentinel
    and EOS. Every row loses as many tokens in as many spans, so no row needs padding. Raffel et al. 2020,
    arXiv:1910.10683, figure 2 and section 3.1.4.
    """
    inputs, targets = [], []
    for row in ids:
        hidden = draw_spans(len(row), share=share, mean_span=mean_span, generator=generator)
        source, target = cut_spans(row, hidden, sentinels=sentinels, eos_id=eos_id)
        inputs.append(source)
        targets.append(target)
    return torch.stack(inputs), torch.stack(targets)


def draw_spans(
    length: int, *, share: float = 0.15, mean_span: float = 3.0, generator: torch.Generator | None = None
) -> Tensor:
    """(length,) bool, true where a token is to be hidden: `share` of them, in runs of `mean_span` on average.

    All ways to divide the hidden tokens into runs, and the visible ones into the gaps around them, are equally likely. The
    first token is never hidden. (T5's `random_spans_noise_mask` always hides the last one; rows here are so short that it would ask
    about little else.)
    """
    _check_share(share)
    n_hidden = min(max(round(length * share), 1), length - 1)
    n_spans = min(max(round(n_hidden / mean_span), 1), n_hidden, length - n_hidden)
    if length < 2:
        raise LabError(f"A row of length={length} has nothing to hide and something to see: give at least 2 tokens.")

    def divide(items: int, parts: int) -> Tensor:  # into parts of at least one
        cuts = (torch.randperm(items - 1, generator=generator)[: parts - 1] + 1).sort().values
        return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([items]))

    *gaps, last = divide(length - n_hidden + 1, n_spans + 1)
    lengths = torch.stack([torch.stack(gaps), divide(n_hidden, n_spans)], 1).flatten()  # gap, span, gap, span ...
    kinds = torch.tensor([False, True]).repeat(n_spans)
    return torch.cat([torch.repeat_interleave(kinds, lengths), torch.zeros(int(last) - 1, dtype=torch.bool)])


def cut_spans(ids: Tensor, hidden: Tensor, *, sentinels: Sequence[int], eos_id: int) -> tuple[Tensor, Tensor]:
    """One row of T5's objective: `ids` (length,) with `hidden` (length,) bool cut out; return (inputs, targets), 1-D.

    Raises `LabError` where there are more spans than sentinels to stand for them (one more is needed for the end).
    """
    starts = hidden & ~torch.cat([hidden.new_zeros(1), hidden[:-1]])
    n_spans = int(starts.sum())
    if n_spans >= len(sentinels):
        raise LabError(f"{n_spans} spans need {n_spans + 1} sentinels, there are {len(sentinels)}: hide fewer spans.")
    names = torch.tensor(list(sentinels), dtype=ids.dtype)
    span = starts.cumsum(0) - 1  # which span a hidden token belongs to
    inputs = torch.where(starts, names[span], ids)[~hidden | starts]
    pieces = [torch.cat([names[k : k + 1], ids[hidden & (span == k)]]) for k in range(n_spans)]
    end = torch.tensor([sentinels[n_spans], eos_id], dtype=ids.dtype)
    return inputs, torch.cat([*pieces, end])


def shift_right(targets: Tensor, start_id: int, pad_id: int) -> Tensor:
    """What an encoder-decoder's decoder reads while it predicts `targets` (batch, length): the same, one place later."""
    shifted = torch.cat([torch.full_like(targets[:, :1], start_id), targets[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, pad_id)


def objective(
    family: str, tokenizer: PreTrainedTokenizerBase, *, share: float = 0.15, mean_span: float = 3.0
) -> Callable[[Tensor, torch.Generator], Batch]:
    """The function that makes a batch for `family` out of blocks (batch, length) and a random generator.

    `share` of the tokens and `mean_span` are for the two objectives that hide something.
    """
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)

    def masked(ids: Tensor, generator: torch.Generator) -> Batch:
        inputs, labels = mask_tokens(
            ids,
            mask_id=tokenizer.mask_token_id,
            vocabulary=len(tokenizer),
            never=tokenizer.all_special_ids,
            share=share,
            generator=generator,
        )
        return {"input_ids": inputs}, labels

    def causal(ids: Tensor, generator: torch.Generator) -> Batch:
        inputs, labels = next_token(ids)
        return {"input_ids": inputs}, labels

    def spans(ids: Tensor, generator: torch.Generator) -> Batch:
        inputs, targets = corrupt_spans(
            ids,
            sentinels=sentinels,
            eos_id=tokenizer.eos_token_id,
            share=share,
            mean_span=mean_span,
            generator=generator,
        )
        pad = tokenizer.pad_token_id
        return {"input_ids": inputs, "decoder_input_ids": shift_right(targets, pad, pad)}, targets

    known = {ENCODER: masked, DECODER: causal, ENCODER_DECODER: spans}
    if family not in known:
        raise LabError(f"There is no family {family!r}: choose one of {', '.join(known)}.")
    return known[family]


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise LabError(f"share={share} is not between 0 and 1: it is the part of the tokens that is hidden.")


# --- models and the loop ---------------------------------------------------------------------------------------------


def make_model(
    family: str, tokenizer: PreTrainedTokenizerBase, *, width: int = 128, layers: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A model of `family` with random weights: about half a million parameters at the default size, in each family.

    ModernBERT, Llama and T5 v1.1 have the same kind of block (normalise first, gated feed-forward, heads of 32). The
    encoder-decoder has half its layers on each side and pays for cross-attention with a narrower feed-forward. No dropout: each
    text is seen a few times only.
    """
    if layers < 2 or layers % 2:
        raise LabError(f"layers={layers}: give an even number, since an encoder-decoder has half of them on each side.")
    torch.manual_seed(seed)
    heads, inner, end = width // 32, width * 8 // 3, tokenizer.eos_token_id
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=end)
    # A step is a share of a weight's size: from the usual 0.02 the first ones would be too small.
    scale = dict(initializer_range=0.05)
    size = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    if family == ENCODER:
        everything = ["full_attention"] * layers
        marks = dict(bos_token_id=end, cls_token_id=end, sep_token_id=end)
        model = ModernBertForMaskedLM(
            ModernBertConfig(layer_types=everything, classifier_pooling="mean", **size, **tokens, **marks, **scale)
        )
    elif family == DECODER:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, bos_token_id=end, **size, **tokens, **scale))
    elif family == ENCODER_DECODER:
        size = dict(d_model=width, d_kv=32, d_ff=inner - width * 2 // 3, num_layers=layers // 2, num_heads=heads)
        start = tokenizer.pad_token_id
        model = T5ForConditionalGeneration(
            T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=start, **size, **tokens)
        )
    else:
        raise LabError(f"There is no family {family!r}: choose one of {ENCODER}, {DECODER}, {ENCODER_DECODER}.")
    # On a CPU the fused attention's backward pass takes a third of a step at this length; plain products take a tenth.
    model.set_attn_implementation("eager")
    return model


def with_head(
    auto_class: type, model: PreTrainedModel, num_labels: int, *, keep: bool = True, seed: int = 0
) -> PreTrainedModel:
    """A classifier of `auto_class` (transformers' AutoModelFor...Classification) on a copy of the body of `model`.

    With `keep=False` the body gets new random weights too: the same classifier without any pre-training. Raises `LabError` for an
    encoder-decoder, whose body is two.
    """
    if architecture(model.config) == ENCODER_DECODER:
        raise LabError(f"{type(model).__name__} has two bodies: put the head on an encoder or a decoder.")
    torch.manual_seed(seed)
    config = copy.deepcopy(model.config)
    config.num_labels, config.classifier_dropout = num_labels, 0.0  # some classes have dropout here, others not
    classifier = auto_class.from_config(config, attn_implementation=model.config._attn_implementation)
    if keep:
        classifier.base_model.load_state_dict(model.base_model.state_dict())
    return classifier.to(model.device)


def labelled_logits(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Logits (n, classes) at the n places that have a label, in reading order.

    The head is applied there only: over a vocabulary it costs as much as two layers, and six in seven places of masked language
    modelling have no label.
    """
    keep = labels != IGNORED
    if isinstance(model, ModernBertForMaskedLM):
        return model.decoder(model.head(model.model(**inputs).last_hidden_state[keep]))
    if isinstance(model, LlamaForCausalLM):
        return model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state[keep])
    return model(**inputs).logits[keep]


def train_model(
    model: PreTrainedModel,
    draw: Callable[[torch.Generator], Batch],
    *,
    steps: int,
    learning_rate: float = 0.05,
    warmup_share: float = 0.1,
    seed: int = 0,
    description: str = "training",
) -> list[float]:
    """Train `model` on the batches that `draw` gives; return the loss of each step, in nats a label.

    Pre-training and fine-tuning are this same loop: a learning rate that rises and then falls in a line, autocast where the
    processor multiplies bfloat16, and Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), which T5 was trained with. Its steps are
    a share of a weight's size, and T5's weights begin at very different sizes: with AdamW, at any rate, it learns far less here.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=learning_rate, foreach=True)
    warmup = max(1, round(steps * warmup_share))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses = []
    model.train()
    for _ in (bar := progress(range(steps), description=description)):
        inputs, labels = _on_device(draw(generator), model.device)
        with mixed_precision(model.device):
            logits = labelled_logits(model, inputs, labels)
        loss = F.cross_entropy(logits.float(), labels[labels != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def draw_groups(groups: Mapping[int, Tensor], tokens: int, make_batch: Callable[[Tensor, torch.Generator], Batch]):
    """A `draw` for `train_model`: about `tokens` tokens of one random group each time (each text as likely), through `make_batch`."""
    lengths, sizes = list(groups), torch.tensor([float(rows.numel()) for rows in groups.values()])

    def draw(generator: torch.Generator) -> Batch:
        rows = groups[lengths[int(torch.multinomial(sizes, 1, generator=generator))]]
        number = max(1, tokens // rows.shape[1])
        return make_batch(rows[torch.randint(len(rows), (number,), generator=generator)], generator)

    return draw


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where `choose_dtype` says the hardware has them; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype(device) == torch.bfloat16)


def training_flops(model: PreTrainedModel, batch: Batch) -> int:
    """Floating-point operations of one training step on `batch`: every matrix product, forward and backward.

    Counted by torch, not by the rule of thumb 6 x parameters x tokens, which does not know that an encoder-decoder sends a token
    through half of its layers only.
    """
    from torch.utils.flop_counter import FlopCounterMode

    inputs, labels = _on_device(batch, model.device)
    with FlopCounterMode(display=False) as counter:
        labelled_logits(model, inputs, labels).float().sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


@torch.no_grad()
def label_logprobs(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Log-probability of each label, like `labels` (batch, length), float32, in nats; 0 where there is none."""
    inputs, labels = _on_device((inputs, labels), model.device)
    with mixed_precision(model.device):
        logits = labelled_logits(model, inputs, labels)
    keep = labels != IGNORED
    result = torch.zeros(labels.shape, device=labels.device)
    result[keep] = -F.cross_entropy(logits.float(), labels[keep], reduction="none")
    return result.cpu()


def text_losses(
    model: PreTrainedModel,
    make_batch: Callable[[Tensor, torch.Generator], Batch],
    groups: Mapping[int, Tensor],
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Mean loss of each text in nats a label, by the objective `make_batch`: (texts,) float32, in the order of the groups.

    A text in which the objective happened to ask for nothing (no token was hidden) is left out.
    """
    generator, losses = torch.Generator().manual_seed(seed), []
    for rows in (part for group in groups.values() for part in group.split(batch_size)):
        inputs, labels = make_batch(rows, generator)
        number = (labels != IGNORED).sum(1)
        losses.append((-label_logprobs(model, inputs, labels).sum(1) / number)[number > 0])
    return torch.cat(losses)


def _on_device(batch: Batch, device: torch.device) -> Batch:
    inputs, labels = batch
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)


# --- rows of unequal length ------------------------------------------------------------------------------------------


def collate(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, family: str) -> Batch:
    """One batch from rows of several lengths, padded at the end.

    A row has `input_ids` and `labels`: one label for each token, or one number for the whole row, or (encoder-decoder) the tokens to
    write. With `prefix`, the number of its tokens that all others may look at, a decoder gets `prefix_mask`.
    """
    pad, cpu = tokenizer.pad_token_id, torch.device("cpu")
    input_ids, attention_mask = pad_right([row["input_ids"] for row in rows], pad, cpu)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "prefix" in rows[0]:
        prefix = torch.tensor([row["prefix"] for row in rows])
        visible = prefix_mask(prefix, input_ids.shape[1])[:, None]  # the same for every head
        # What is added to the scores: plain attention, unlike the fused kind, would add a mask of True and False as 1 and 0.
        inputs["attention_mask"] = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    if isinstance(rows[0]["labels"], int):
        return inputs, torch.tensor([row["labels"] for row in rows])
    labels, _ = pad_right([row["labels"] for row in rows], IGNORED, cpu)
    if family == ENCODER_DECODER:
        inputs["decoder_input_ids"] = shift_right(labels, pad, pad)
    return inputs, labels


def draw_rows(rows: Sequence[dict], batch_size: int, tokenizer: PreTrainedTokenizerBase, family: str):
    """A `draw` for `train_model`: random rows, each once before any comes again."""
    order: list[int] = []

    def draw(generator: torch.Generator) -> Batch:
        while len(order) < batch_size:
            order.extend(torch.randperm(len(rows), generator=generator).tolist())
        return collate([rows[order.pop(0)] for _ in range(batch_size)], tokenizer, family)

    return draw


@torch.no_grad()
def predictions(
    model: PreTrainedModel, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32
) -> list[list[tuple[int, int]]]:
    """For each row the pairs (predicted class, label) at its labels: one for a whole row, or one a labelled token."""
    results: list[list[tuple[int, int]]] = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        inputs, labels = _on_device(collate(batch, tokenizer, architecture(model.config)), model.device)
        with mixed_precision(model.device):
            guesses = iter(labelled_logits(model, inputs, labels).argmax(-1).tolist())
        for row in labels.view(len(batch), -1).tolist():
            results.append([(next(guesses), label) for label in row if label != IGNORED])
    return results


def pair_row(family: str, tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> dict:
    """A row that teaches to write `target` after `source`: as two sequences, or for a decoder as one with a prefix."""
    source_ids = tokenizer(source).input_ids
    target_ids = [*tokenizer(target).input_ids, tokenizer.eos_token_id]
    if family == ENCODER_DECODER:
        return {"input_ids": source_ids, "labels": target_ids}
    prefix = [*source_ids, tokenizer.eos_token_id]
    return {  # the last token of the prefix predicts the first of the target
        "input_ids": prefix + target_ids[:-1],
        "labels": [IGNORED] * (len(prefix) - 1) + target_ids,
        "prefix": len(prefix),
    }


@torch.no_grad()
def write_after_prefix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], *, max_new_tokens: int = 32
) -> list[str]:
    """What a decoder trained on `pair_row` writes after each source, greedily. Every step reads all again: no cache."""
    rows = [pair_row(DECODER, tokenizer, source, "") for source in sources]
    texts = [row["input_ids"][: row["prefix"]] for row in rows]
    written: list[list[int]] = [[] for _ in texts]
    for _ in range(max_new_tokens):
        going = [i for i, ids in enumerate(written) if tokenizer.eos_token_id not in ids]
        if not going:
            break
        batch = [
            {
                "input_ids": texts[i] + written[i],
                "labels": [IGNORED] * (len(texts[i]) + len(written[i]) - 1) + [0],
                "prefix": len(texts[i]),
            }
            for i in going
        ]
        inputs, labels = _on_device(collate(batch, tokenizer, DECODER), model.device)
        with mixed_precision(model.device):
            best = labelled_logits(model, inputs, labels).argmax(-1).tolist()
        for i, token in zip(going, best, strict=True):
            written[i].append(token)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


# --- what a model expects at one place, and how likely a text is to it -------------------------------------------------


@dataclass(frozen=True)
class HiddenWord:
    """A text with one word hidden, as token ids; the word is one token."""

    left: list[int]
    word: int
    right: list[int]


def hide_word(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> HiddenWord:
    """`text` with its word number `place` (from 0, divided at spaces) hidden; punctuation after the word stays.

    Raises `LabError` where the word is not one token, or is not there.
    """
    words = text.split()
    if not 0 <= place < len(words):
        raise LabError(f"place={place} is no word of {text!r}: give 0 to {len(words) - 1}.")
    bare = words[place].rstrip(".,!?")
    before, after = " ".join(words[:place]), " ".join([words[place][len(bare) :], *words[place + 1 :]])
    word = tokenizer((" " if before else "") + bare).input_ids
    if len(word) != 1:
        raise LabError(f"{bare!r} is {len(word)} tokens: hide a word that is one.")
    return HiddenWord(tokenizer(before).input_ids, word[0], tokenizer(after).input_ids)


@torch.no_grad()
def word_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hidden: Sequence[HiddenWord], batch_size: int = 64
) -> Tensor:
    """Log-probabilities (n, vocabulary), float32, of every token at each hidden place, from all that the family can see.

    An encoder sees both sides and a mask, an encoder-decoder both sides and a sentinel, a decoder the left side alone.
    """
    family = architecture(model.config)
    sentinel = tokenizer.convert_tokens_to_ids(SENTINELS[0])
    rows = []
    for item in hidden:
        if family == ENCODER:
            ids = [*item.left, tokenizer.mask_token_id, *item.right]
            labels = [IGNORED] * len(item.left) + [item.word] + [IGNORED] * len(item.right)
        elif family == DECODER:
            if not item.left:
                raise LabError("A decoder has nothing to go by before the first word: hide a later one.")
            ids, labels = item.left, [IGNORED] * (len(item.left) - 1) + [item.word]
        else:
            ids, labels = [*item.left, sentinel, *item.right], [sentinel, item.word]
        rows.append({"input_ids": ids, "labels": labels})
    results = []
    for first in range(0, len(rows), batch_size):
        inputs, labels = collate(rows[first : first + batch_size], tokenizer, family)
        labels[labels == sentinel] = IGNORED  # the decoder has read it; nothing is asked about it
        inputs, labels = _on_device((inputs, labels), model.device)
        with mixed_precision(model.device):
            results.append(labelled_logits(model, inputs, labels).float().log_softmax(-1).cpu())
    return torch.cat(results)


def ending_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int = 64,
    description: str = "scoring",
) -> list[float]:
    """log p(ending | context) in nats, for each pair of token ids (context, ending); nothing is trained.

    A decoder and an encoder-decoder (which writes the ending in the place of a sentinel) give the likelihood itself. An encoder gives
    the pseudo-likelihood: each token of the ending is hidden in turn and predicted from all others (Salazar et al. 2020,
    arXiv:1910.14659), so it needs as many passes as the ending has tokens.
    """
    family = architecture(model.config)
    sentinel = tokenizer.convert_tokens_to_ids(SENTINELS[0])
    rows, owners = [], []
    for number, (context, ending) in enumerate(pairs):
        whole = [*context, *ending]
        if family == ENCODER:
            for i in range(len(context), len(whole)):
                ids = [*whole[:i], tokenizer.mask_token_id, *whole[i + 1 :]]
                labels = [IGNORED] * i + [whole[i]] + [IGNORED] * (len(whole) - i - 1)
                rows.append({"input_ids": ids, "labels": labels})
                owners.append(number)
            continue
        if family == DECODER:
            rows.append({"input_ids": whole[:-1], "labels": [IGNORED] * (len(context) - 1) + ending})
        else:
            rows.append({"input_ids": [*context, sentinel], "labels": [sentinel, *ending]})
        owners.append(number)
    totals = [0.0] * len(pairs)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # like lengths together: little padding
    for first in progress(range(0, len(order), batch_size), description=description):
        chosen = order[first : first + batch_size]
        inputs, labels = collate([rows[i] for i in chosen], tokenizer, family)
        labels[labels == sentinel] = IGNORED
        for i, value in zip(chosen, label_logprobs(model, inputs, labels).sum(1).tolist(), strict=True):
            totals[owners[i]] += value
    return totals


# --- labels for free ---------------------------------------------------------------------------------------------------


def boundary_row(tokenizer: PreTrainedTokenizerBase, text: str) -> dict:
    """`text` without its full stops; the label of a word's last token says whether a sentence ended there.

    1 where one did, 0 where not, `IGNORED` inside words and on the last word, which everybody can guess.
    """
    input_ids, labels = [], []
    for word in text.split():
        ids = tokenizer((" " if input_ids else "") + word.rstrip(".")).input_ids
        input_ids += ids
        labels += [IGNORED] * (len(ids) - 1) + [int(word.endswith("."))]
    labels[-1] = IGNORED
    return {"input_ids": input_ids, "labels": labels}
