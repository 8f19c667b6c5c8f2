"""Checks of the exercises: each says what is wrong with an answer, from an oracle that is not the reference solution.

A check calls the learner's function, raises `ExerciseError` with the first thing that is wrong, in the order in which one
would mend it, and returns a sentence that begins with "Right". The oracle is torch, transformers or a paper's own
example. Where answers are wrong in a known way, that way is computed too, so that the message can name it.

Ordered as the labs are: week 1, section by section.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TopPLogitsWarper

from utils.architectures import bidirectional_mask, causal_mask
from utils.lab import ExerciseError, one_line
from utils.prompts import IGNORED, summary_prompt
from utils.scaling import CHINCHILLA, REPLICATION, ScalingLaw

Shot = tuple[str, str]
Span = tuple[int, int]

# --- what the checks share ---------------------------------------------------------------------------------------


def require(right: bool | Tensor, otherwise: str) -> None:
    """Raise `ExerciseError` with the message `otherwise` unless `right`."""
    if not right:
        raise ExerciseError(otherwise)


def call(answer: Callable, *arguments: Any, shape: Sequence[int] | None = None) -> Any:
    """What the learner's function returns, a tensor of `shape` where one is given; its arguments must stay as they were."""
    name = getattr(answer, "__name__", "your function")
    copies = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    try:
        result = answer(*copies)
    except NotImplementedError:
        raise ExerciseError(f"{name} is not written yet.") from None
    except Exception as error:  # whatever a learner's code may do
        raise ExerciseError(f"{name} stops with {type(error).__name__}: {one_line(error).rstrip('.')}.") from error
    for before, after in zip(arguments, copies, strict=True):
        require(
            not isinstance(before, Tensor) or torch.equal(before, after),
            f"{name} changes a tensor it was given: make a new one, with `x / y` and `masked_fill`, not `x /= y` and `masked_fill_`.",
        )
    if shape is not None:
        require(isinstance(result, Tensor), f"{name} returns a {type(result).__name__}: return a tensor.")
        require(
            result.shape == tuple(shape),
            f"{name} returns a tensor of shape {tuple(result.shape)}: it must be {tuple(shape) or 'one number, ()'}.",
        )
    return result


def name_the_flaw(result: Tensor, expected: Tensor, flaws: dict[str, Tensor], otherwise: str) -> None:
    """Unless `result` is `expected`, raise the message of the known flaw that gives this result, or `otherwise`."""
    if torch.allclose(result, expected, atol=1e-4):
        return
    for message, wrong in flaws.items():
        require(wrong.shape != result.shape or not torch.allclose(result, wrong, atol=1e-4), message)
    raise ExerciseError(f"{otherwise} by up to {(result - expected).abs().max():.3g}.")


# --- week 1: tokens and vectors ----------------------------------------------------------------------------------


def check_neighbours(cosine: Callable[[Tensor, Tensor], Tensor], nearest: Callable[[Tensor], Tensor]) -> str:
    """Hold `cosine(a (n, d), b (m, d)) -> (n, m)` and `nearest(vectors (n, d)) -> (n,)` to torch's `cosine_similarity`."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)
    mine = call(cosine, a, b, shape=(5, 7))
    longer = {"a": (10 * a, b), "b": (a, 10 * b)}
    felt = [name for name, pair in longer.items() if not torch.allclose(call(cosine, *pair), mine, atol=1e-5)]
    require(
        not felt,
        f"Ten times as long a vector points the same way, yet your similarity changes with the length of {' and of '.join(felt)}: divide by both lengths, each the square root of a sum of squares.",
    )
    itself = call(cosine, a, a, shape=(5, 5)).diagonal()
    require(
        torch.allclose(itself, torch.ones(5), atol=1e-5),
        f"A vector and itself have similarity 1, yours is {float(itself[0]):.3f}: is the length the square root of the sum "
        "of squares, along the last dimension?",
    )
    theirs = F.cosine_similarity(a[:, None], b[None], dim=-1)
    require(torch.allclose(mine, theirs, atol=1e-5), "Your similarities differ from torch's cosine_similarity.")

    # Long vectors and short ones in two directions: length must not decide who is near.
    vectors = torch.tensor([[1.0, 0.1], [9.0, 0.0], [0.9, 1.0], [0.1, 1.0], [0.0, 7.0]])
    found = call(nearest, vectors)
    require(
        isinstance(found, Tensor) and found.shape == (5,) and not found.is_floating_point(),
        "nearest returns one whole number for each row, the index of its neighbour: (n,) int64.",
    )
    require(
        not (found == torch.arange(5)).any(),
        "A row is its own nearest neighbour: fill the diagonal with something smaller than any similarity.",
    )
    similarity = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    require(not torch.equal(found, similarity.argmin(-1)), "You return the least similar row: take the largest cosine.")
    products, distances = vectors @ vectors.T, torch.cdist(vectors, vectors)
    for others, what in (
        (products.fill_diagonal_(float("-inf")).argmax(-1), "the largest dot product, where long vectors win"),
        (distances.fill_diagonal_(float("inf")).argmin(-1), "the smallest distance, where short vectors win"),
    ):
        require(not torch.equal(found, others), f"You take {what}: compare directions alone, by the cosine.")
    right = similarity.fill_diagonal_(-2).argmax(-1)
    require(torch.equal(found, right), f"The neighbours by cosine are {right.tolist()}, yours are {found.tolist()}.")
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.4]])
    require(
        call(nearest, opposite)[0] == 2,
        "Where all others point away the nearest has a negative cosine: fill the diagonal with less than -1, not with 0.",
    )
    return "Right: cosine_similarity and nearest agree with torch."


# --- week 1: architectures ---------------------------------------------------------------------------------------


def check_attention(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Hold `answer(query, key, value, mask)` to torch's `scaled_dot_product_attention`."""
    generator = torch.Generator().manual_seed(0)
    n, d = 4, 16
    query, key = (torch.randn(1, 2, n, d, generator=generator) for _ in range(2))
    one_hot = torch.eye(n).expand(1, 2, n, n)  # collecting one-hot values shows the weights themselves

    # 1. With everything in sight: the softmax and the scale.
    weights = call(answer, query, key, one_hot, bidirectional_mask(n), shape=one_hot.shape)
    products = query @ key.transpose(-2, -1)
    scores = products / d**0.5
    flaws = {
        "The scores are not scaled: divide them by the square root of the head's size before the softmax.": products.softmax(-1),
        "The scores are divided by the head's size: divide by its square root.": (products / d).softmax(-1),
        "The scores are multiplied by the square root of the head's size: divide by it.": (products * d**0.5).softmax(-1),
        "The softmax runs over the queries: it belongs on the last dimension, so that each query's weights sum to 1.": scores.softmax(-2),
        "The softmax is missing: the weights are the scores themselves.": scores,
        "Query and key are swapped: rows belong to the queries.": scores.transpose(-2, -1).softmax(-1),
    }  # fmt: skip
    expected = F.scaled_dot_product_attention(query, key, one_hot)
    name_the_flaw(weights, expected, flaws, "With nothing masked your weights differ from torch's")

    # 2. With a causal mask: who sees whom.
    mask = causal_mask(n)
    weights = call(answer, query, key, one_hot, mask, shape=one_hot.shape)[0, 0]
    require(
        not weights.isnan().any(),
        "With a causal mask your weights are not numbers: put minus infinity where the mask is false, nowhere else.",
    )
    leaks, blind = (weights.abs() > 1e-6) & ~mask, (weights.abs() <= 1e-6) & mask
    if leaks.any():
        row, column = leaks.nonzero()[0].tolist()
        also = " and hides what it may see: it is transposed or turned round" if blind.any() else ""
        raise ExerciseError(f"Your mask lets position {row} see position {column}{also}.")
    sums = weights.sum(-1)
    row = int((sums - 1).abs().argmax())
    require(
        (sums[row] - 1).abs() <= 1e-4,
        f"With a causal mask the weights of position {row} sum to {sums[row]:.2f}, not 1: mask the scores before the softmax, not the weights after it.",
    )

    # 3. With values of another length and size: what is collected.
    key, value = (torch.randn(1, 2, n + 3, size, generator=generator) for size in (d, 5))
    mask = torch.rand(n, n + 3, generator=generator) < 0.6
    mask[:, 0] = True
    output = call(answer, query, key, value, mask, shape=(1, 2, n, 5))
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    name_the_flaw(output, expected, {}, "With seven keys your output differs from torch's")
    return "Right: scale, softmax, mask and values agree with torch's scaled_dot_product_attention."


def check_rotary(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Hold `answer(x, positions)` to transformers' `apply_rotary_pos_emb`, with the angles of its LLaMA."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    d, positions = 16, torch.tensor([0, 1, 2, 50])
    x = torch.randn(1, 2, len(positions), d, generator=torch.Generator().manual_seed(0))
    config = LlamaConfig(hidden_size=d, num_attention_heads=1, num_key_value_heads=1)

    def turned(where: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, where[None]))[0]

    def turned_by(angles: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    result = call(answer, x, positions, shape=x.shape)
    place, (first, second) = positions.float()[:, None], x.chunk(2, -1)
    angles = place * 10_000.0 ** -(torch.arange(0, d, 2) / d)
    slow = place * 10_000.0 ** -(torch.arange(d // 2) / d)
    flaws = {
        "It turns backwards: the half with the minus sign is the second one, moved to the front (-second, first).": turned(-positions),
        "It pairs neighbours (0, 1), (2, 3): these weights pair number i with number i + d/2.": torch.stack(turned_by(angles, x[..., 0::2], x[..., 1::2]), -1).flatten(-2),
        "The minus sign is missing: a quarter turn takes (a, b) to (-b, a).": x * angles.cos().repeat(1, 2) + torch.cat([second, first], -1) * angles.sin().repeat(1, 2),
        "The halves come back in the wrong order: put the turned first half in front.": torch.cat(turned(positions).chunk(2, -1)[::-1], -1),
        "The angles fall too slowly from pair to pair: the exponent is 2i/d for pair i, not i/d.": torch.cat(turned_by(slow, first, second), -1),
        "All pairs turn at the same speed: pair i turns by base ** (-2i/d) a position.": torch.cat(turned_by(place, first, second), -1),
    }  # fmt: skip
    otherwise = "Your vectors differ from transformers'"
    if not torch.allclose(result[:, :, 0], x[:, :, 0], atol=1e-5):
        otherwise = f"Position 0 is changed, where the angle is 0 and nothing may turn. {otherwise}"
    elif not torch.allclose(result.norm(dim=-1), x.norm(dim=-1), rtol=1e-4):
        otherwise += " and their lengths change, which no turn does;"
    name_the_flaw(result, turned(positions), flaws, otherwise)
    return "Right: pairs, direction and speeds agree with transformers' rotary positions."


def check_parameter_count(answer: Callable[[LlamaConfig], int]) -> str:
    """Hold `answer(config)` to the number of parameters of transformers' `LlamaForCausalLM`."""
    sizes = dict(hidden_size=60, intermediate_size=154, num_hidden_layers=3, num_attention_heads=6, vocab_size=211)
    for what, more in {
        "plain": dict(num_key_value_heads=6),
        "with grouped queries": dict(num_key_value_heads=2),
        "with tied embeddings": dict(num_key_value_heads=2, tie_word_embeddings=True),
        "with heads of another size": dict(num_key_value_heads=2, head_dim=14),
    }.items():
        config = LlamaConfig(**sizes, **more)
        with torch.device("meta"):
            truth = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
        width, layers, head = config.hidden_size, config.num_hidden_layers, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        table, inner = config.vocab_size * width, width * config.intermediate_size
        flaws = {
            "the second table (the output layer) is missing": -table,
            "both tables of vocabulary times width are missing": -2 * table,
            "tied embeddings are one table, and yours counts two": table,
            "SwiGLU has three matrices (gate, up, down), and yours has two": -layers * inner,
            "SwiGLU has three matrices (gate, up, down), and yours has one": -2 * layers * inner,
            "keys and values have num_key_value_heads heads, not num_attention_heads": 2 * layers * width * (heads - kv_heads) * head,
            "attention's output matrix is missing": -layers * width * heads * head,
            "the norms (two a layer and one at the end) are missing": -(2 * layers + 1) * width,
            "the norm at the end is missing": -width,
            "a layer has two norms, and yours has one": -layers * width,
            "a layer's norms are missing": -2 * layers * width,
            "only one layer is counted": -(layers - 1) * (truth - (2 - bool(config.tie_word_embeddings)) * table - width) // layers,
            "a head has config.head_dim numbers, which need not be width / heads": 2 * layers * width * (heads + kv_heads) * (width // heads - head),
        }  # fmt: skip
        count = call(answer, config)
        require(isinstance(count, int | float), f"A number is expected, a {type(count).__name__} came.")
        known = [flaw for flaw, size in flaws.items() if size and count - truth == size]
        require(
            count == truth,
            f"A LLaMA {what}: yours has {count:,} parameters, transformers' {truth:,}"
            + (f": {known[0]}." if known else f", {count - truth:+,}: count one part at a time."),
        )
    return "Right: the count agrees with transformers' for plain, grouped, tied and odd-sized heads."


# --- week 1: prompting -------------------------------------------------------------------------------------------


def check_shots(answer: Callable[[list[dict], list[dict], int], list[Shot]]) -> str:
    """Hold the pairs (dialogue, summary) of `answer(train, test, k)` to the rows they were picked from."""
    train = [{"dialogue": f"#Person1#: train {i} " + "word " * i, "summary": f"Summary {i}."} for i in (3, 1, 4, 2)]
    train.append({"dialogue": "#Person1#: test 0", "summary": "The answer."})  # a test dialogue that has slipped in
    test = [{"dialogue": f"#Person1#: test {i}", "summary": "The answer."} for i in range(3)]

    def pick() -> list[Shot]:
        return call(answer, [dict(row) for row in train], [dict(row) for row in test], 3)

    picked = pick()
    require(
        isinstance(picked, list) and all(isinstance(shot, tuple) and len(shot) == 2 for shot in picked),
        "A list of pairs (dialogue, summary) is expected: `summary_prompt` takes its shots so.",
    )
    require(len(picked) == 3, f"Three examples were asked for, {len(picked)} came.")
    known = {row["dialogue"]: row["summary"] for row in train}
    asked = {row["dialogue"] for row in test}
    for dialogue, summary in picked:
        require(
            dialogue not in asked or dialogue in known,
            f"The example {dialogue!r} stands in the test split: the model is shown an answer it is about to be asked for.",
        )
        require(
            dialogue not in asked,
            f"The example {dialogue!r} is in the training split, but in the test split as well: compare with the test dialogues too.",
        )
        require(
            known.get(dialogue) == summary,
            f"The example {dialogue!r} has {summary!r} beside it, which is not its own summary.",
        )
    require(
        len({dialogue for dialogue, _ in picked}) == 3,
        "One example comes twice: a second copy tells the model nothing new.",
    )
    require(picked == pick(), "Two calls gave different examples: two runs would not be comparable.")
    return "Right: the examples come from training alone, each with its own summary, the same ones every time."


def check_fitting(
    answer: Callable[[PreTrainedTokenizerBase, str, Sequence[Shot], int, int], int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Hold `answer(tokenizer, dialogue, shots, context, max_new_tokens)` to the tokens that transformers counts in the finished prompts."""
    dialogue, shots = "#Person1#: Is it open?\n#Person2#: From nine.", [("#Person1#: Yes.", "A yes.")] * 6

    def tokens(messages: list[dict[str, str]]) -> int:
        if tokenizer.chat_template:
            return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids)
        return len(tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)

    lengths = [tokens(summary_prompt(dialogue, shots[:k])) for k in range(len(shots) + 1)]

    def fit(context: int, max_new_tokens: int) -> int:
        got = call(answer, tokenizer, dialogue, shots, context, max_new_tokens)
        require(isinstance(got, int), f"Return how many examples fit, a whole number: a {type(got).__name__} came.")
        return got

    require(
        len({fit(length, 0) for length in lengths}) > 1,
        f"Whether the context has {lengths[0]} or {lengths[-1]} tokens, your answer is the same: compare the length of the prompt with it.",
    )
    for room in (0, 40):
        for k, length in enumerate(lengths):
            got = fit(length + room, room)
            require(
                not room or got <= k,
                f"With a context of {length + room} tokens you take {got} of the examples. That fits, but the answer of up to {room} tokens does not any more.",
            )
            require(
                got <= k,
                f"A prompt with {got} of the examples has {lengths[max(0, min(got, len(shots)))]} tokens, more than the context of {length}. "
                "Are the special tokens of the chat format and the instruction counted?",
            )
            require(
                got == k or fit(length + room + 1, room) < k,
                f"You take {got} of the examples where {k} fit: a prompt that fills the context exactly is allowed.",
            )
            require(
                got == k,
                f"You take {got} of the examples where {k} fit: count tokens, and those of the whole prompt once.",
            )
    require(
        fit(lengths[-1] * 9, 0) == len(shots),
        "With room to spare all examples are to be taken, and no more than there are.",
    )
    return "Right: prompt and answer fit together, and no example is left out that would have fitted."


# --- week 1: generation settings ---------------------------------------------------------------------------------


def check_top_p(answer: Callable[[Tensor, float], Tensor]) -> str:
    """Hold `answer(logits, p)` to transformers' `TopPLogitsWarper`, where no case is so close to `p` that rounding decides."""

    def kept(logits: Tensor, p: float) -> list[int]:
        return torch.isfinite(call(answer, logits, p, shape=logits.shape)[0]).nonzero()[:, 0].tolist()

    row = torch.tensor([[0.10, 0.45, 0.05, 0.30, 0.10]]).log()
    result = call(answer, row, 0.7, shape=row.shape)
    changed = result[result != row]
    require(
        (changed == float("-inf")).all(),
        f"A removed token must have the logit -inf, and a kept one its old logit; yours has {changed.tolist()[:3]}.",
    )
    mine, likeliest = kept(row, 0.7), [1, 3]  # 0.45 and 0.30
    require(
        kept(row + 3, 0.7) == mine,
        "Adding 3 to every logit changes which tokens you keep: sum probabilities (softmax), not logits.",
    )
    require(
        len(mine) != len(likeliest) or mine == likeliest,
        f"You keep tokens {mine}, the likeliest are {likeliest}: bring the mask back from the sorted order.",
    )
    require(
        kept(torch.tensor([[0.9, 0.05, 0.05]]).log(), 0.5) == [0],
        "One token holds 0.9 and p is 0.5: keep that token and no other. An empty set cannot be drawn from.",
    )
    mass = float(row.exp()[0, mine].sum())
    require(
        mass > 0.7,
        f"With p = 0.7 you keep tokens that hold {mass:.2f}: the token that crosses p belongs to the set.",
    )
    require(
        mine == likeliest,
        f"With p = 0.7 you keep {len(mine)} tokens, but 2 hold 0.75 already: stop at the token that crosses p.",
    )
    require(len(kept(row, 1.0)) == 5, "With p = 1 every token that has a probability stays; you remove some.")
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    together = call(answer, logits, 0.6, shape=logits.shape)
    alone = torch.cat([call(answer, logits[i : i + 1], 0.6, shape=(1, 50)) for i in range(len(logits))])
    require(torch.equal(together, alone), "A row's result depends on the other rows: sum along the last dimension.")
    for p in (0.1, 0.35, 0.6, 0.95):
        wrong = int((call(answer, logits, p) != TopPLogitsWarper(p)(None, logits)).any(-1).sum())
        require(not wrong, f"With p = {p} transformers keeps another set in {wrong} of {len(logits)} random rows.")
    return "Right: on 64 random rows top_p keeps what transformers keeps, for four values of p."


# --- week 1: pre-training ----------------------------------------------------------------------------------------


def check_hide_spans(answer: Callable[[list[str], list[Span]], tuple[str, str]]) -> str:
    """Hold `answer(words, spans)` to the T5 paper's own example, then to what every answer must do: lose nothing."""

    def hide(words: list[str], spans: list[Span]) -> tuple[str, str]:
        result = call(answer, list(words), list(spans))
        require(
            isinstance(result, tuple) and len(result) == 2 and all(isinstance(text, str) for text in result),
            f"Return two strings, the input and the target; {result!r} came.",
        )
        return result

    def plain(text: str) -> list[str]:
        return re.sub(sentinel, " ", text).split()

    sentinel = r"<[^ <>]+>"
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    hidden = ("for", "inviting", "last")
    source, target = hide(words, [(2, 4), (8, 9)])
    for word in words:
        require(
            word not in hidden or word not in plain(source),
            f"Your input still holds {word!r}, which was to be hidden: the model could copy it.",
        )
        require(
            word in hidden or word in plain(source),
            f"Your input has lost {word!r}, which was to stay: the end of a span is not part of it.",
        )
    sentinels = re.findall(sentinel, source)
    require(
        len(sentinels) >= 2,
        f"In your input {source!r} not every hidden span has left a sentinel: nothing says where a word is missing.",
    )
    require(
        len(sentinels) == 2,
        f"Your input {source!r} has {len(sentinels)} sentinels for 2 spans: one a span, not one a word.",
    )
    require(
        len(set(sentinels)) == 2,
        f"Both spans have the same sentinel {sentinels[0]}: the target could not say which of them it is filling. Take <Y> for the second.",
    )
    require(
        source == "Thank you <X> me to your party <Y> week",
        f"Your input is {source!r}; the T5 paper has 'Thank you <X> me to your party <Y> week'.",
    )
    for word in words:
        require(
            word in hidden or word not in plain(target),
            f"Your target {target!r} holds {word!r}, which was not hidden: what can be seen is not asked for.",
        )
    require(
        "<X>" in target and "<Y>" in target,
        f"In your target {target!r} a span has lost its sentinel: nobody could tell where it belongs.",
    )
    require(
        target.endswith("<Z>"),
        f"Your target {target!r} is not closed: one more sentinel says that nothing follows.",
    )
    require(
        target == "<X> for inviting <Y> last <Z>",
        f"Your target is {target!r}; the T5 paper has '<X> for inviting <Y> last <Z>': each sentinel stands before its span.",
    )
    words = list("abcdefgh")
    for spans in ([(0, 1)], [(7, 8)], [(1, 2), (3, 6)], [(0, 2), (5, 8)]):
        rebuilt, target = hide(words, spans)
        for name, text in re.findall(rf"({sentinel})([^<]*)", target):
            rebuilt = rebuilt.replace(name, text.strip())
        require(
            rebuilt.split() == words,
            f"With the spans {spans} of {' '.join(words)!r}, input and target together give back {rebuilt!r}: something is lost or moved.",
        )
    return "Right: input and target are those of the T5 paper, and together they always give the text back."


def check_next_token_loss(answer: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Hold `answer(logits (batch, n, vocabulary), ids (batch, n), pad_id)` to transformers' `ForCausalLMLoss`."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(0)
    logits, pad = torch.randn(3, 7, 11, generator=generator) * 2, 0
    ids = torch.randint(1, 11, (3, 7), generator=generator)

    def logprobs_of(places: slice, tokens: Tensor) -> Tensor:
        return logits.log_softmax(-1)[:, places].gather(2, tokens[..., None])[..., 0]

    # 1. Without padding: the shift, the sign and the mean.
    loss, expected = call(answer, logits, ids, pad, shape=()), ForCausalLMLoss(logits, ids, 11)
    flaws = {
        "Each place is asked for its own token, which it has just read: predict the next one.": -logprobs_of(slice(None), ids).mean(),
        "Each place is asked for the token before it: the shift goes the other way.": -logprobs_of(slice(1, None), ids[:, :-1]).mean(),
        "The labels are shifted twice: place i is asked for token i + 2.": -logprobs_of(slice(None, -2), ids[:, 2:]).mean(),
        "This is the sum over the tokens: take the mean, so that the loss does not grow with the length.": expected * ids[:, 1:].numel(),
        "The sign is missing: a loss is minus the log-probability.": -expected,
        "The softmax is taken twice: `cross_entropy` wants logits.": F.cross_entropy(logits[:, :-1].softmax(-1).flatten(0, 1), ids[:, 1:].flatten()),
    }  # fmt: skip
    name_the_flaw(loss, expected, flaws, "Without padding your loss differs from transformers'")

    # 2. With padding at the end of two rows: what the mean runs over.
    ids[0, 3:], ids[1, 6:] = pad, pad
    loss = call(answer, logits, ids, pad, shape=())
    expected = ForCausalLMLoss(logits, ids.masked_fill(ids == pad, IGNORED), 11)
    real = ids[:, 1:] != pad
    flaws = {
        "Padding is learned too: the model would be rewarded for predicting it. Leave it out of the mean.": ForCausalLMLoss(logits, ids, 11),
        "Padding adds nothing to the sum, but is counted in the mean: divide by the number of real labels.": expected * real.float().mean(),
        "The first padding after a text is learned: leave out the places whose label is padding, not those that read it.": -logprobs_of(slice(None, -1), ids[:, 1:])[ids[:, :-1] != pad].mean(),
    }  # fmt: skip
    name_the_flaw(loss, expected, flaws, "With padding your loss differs from transformers'")
    return "Right: shift, mean and padding agree with transformers' own loss."


# --- week 1: scaling laws ----------------------------------------------------------------------------------------


def check_cheapest(answer: Callable[[ScalingLaw, float, float], tuple[float, float]]) -> str:
    """Hold `answer(law, loss, served)` to torch's L-BFGS on the logarithm of the cost: no grid, no formula of the optimum."""
    loss, served = 2.3, 1e13

    def ask(law: ScalingLaw, served: float) -> tuple[float, float]:
        result = call(answer, law, loss, served)
        try:
            n, d = map(float, result)
        except (TypeError, ValueError):
            raise ExerciseError(f"Return two numbers, parameters and tokens; {result!r} came.") from None
        require(
            0 < min(n, d) <= max(n, d) < math.inf,
            f"{n:.3g} parameters and {d:.3g} tokens: both must be positive and finite.",
        )
        return n, d

    def oracle(law: ScalingLaw, serve_price: float, served: float) -> float:
        """Parameters that reach `loss` for the least 6 N D + `serve_price` N `served`."""
        # The loss above its floor is split between the two terms; any split reaches it, so nothing has to be forbidden.
        split, gap = torch.zeros((), dtype=torch.float64, requires_grad=True), math.log(loss - law.E)
        optimizer = torch.optim.LBFGS([split], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def log_parameters() -> Tensor:
            return (math.log(law.A) - gap - F.logsigmoid(split)) / law.alpha

        def closure() -> Tensor:
            optimizer.zero_grad()
            tokens = torch.exp((math.log(law.B) - gap - F.logsigmoid(-split)) / law.beta)
            log_cost = log_parameters() + torch.log(6 * tokens + serve_price * served)
            log_cost.backward()
            return log_cost

        optimizer.step(closure)
        return math.exp(log_parameters().item())

    def near(value: float, other: float, tolerance: float = 0.02) -> bool:
        return abs(value / other - 1) < tolerance

    n, d = ask(REPLICATION, served)
    reached, swapped = float(REPLICATION.loss(n, d)), float(REPLICATION.loss(d, n))
    require(
        near(reached, loss, 1e-3) or not near(swapped, loss, 1e-3),
        "Parameters come first, then tokens: yours are swapped.",
    )
    require(
        near(reached, loss, 1e-3),
        f"A model of {n:.3g} parameters on {d:.3g} tokens has loss {reached:.3f}, not {loss}: find the tokens that reach it.",
    )
    alone, training_only = ask(REPLICATION, 0)[0], oracle(REPLICATION, 2, 0)
    require(
        near(alone, training_only),
        f"With nobody served only training counts, 6 N D: {training_only:.3g} parameters are cheapest, yours has {alone:.3g}.",
    )
    right = oracle(REPLICATION, 2, served)
    require(
        near(n, right) or not near(n, training_only),
        "Serving makes no difference to your answer: add the cost of the served tokens.",
    )
    require(
        near(n, right) or not near(n, oracle(REPLICATION, 6, served)),
        "A served token needs a forward pass only, 2 N operations; yours pays 6 N, with a backward pass.",
    )
    require(
        near(n, right),
        f"With {served:.0e} tokens served {right:.3g} parameters are cheapest, yours has {n:.3g}: charge 2 N for each of them, and search in steps of 1 % or less.",
    )
    require(
        near(ask(CHINCHILLA, served)[0], oracle(CHINCHILLA, 2, served)),
        "Your answer does not follow the `law` that it is given.",
    )
    return f"Right: {training_only / 1e9:.1f} billion parameters if nobody is served, {right / 1e9:.1f} billion for {served:.0e} tokens."
