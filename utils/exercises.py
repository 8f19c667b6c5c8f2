"""Checks of the exercises: each says what is wrong with an answer, from an oracle that is not the reference solution.

A check calls the learner's function, raises `ExerciseError` with the first thing that is wrong, in the order in which one
would mend it, and returns a sentence that begins with "Right". The oracle is torch, transformers or a paper's own
example. Where answers are wrong in a known way, that way is computed too, so that the message can name it.

Ordered as the labs are: week by week, section by section.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TopPLogitsWarper

from utils.architectures import bidirectional_mask, causal_mask
from utils.lab import ExerciseError, one_line
from utils.prompts import IGNORED, encode_example, summary_prompt
from utils.scaling import CHINCHILLA, REPLICATION, ScalingLaw

Shot = tuple[str, str]

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
    except ExerciseError:  # from what the check handed over
        raise
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


# --- week 2: ROUGE-L ---------------------------------------------------------------------------------------------


class _CountedWord(str):
    """A word that counts how often it is compared, over all words, and refuses to go on for ever."""

    compared, allowed = 0, 50_000
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        _CountedWord.compared += 1
        if _CountedWord.compared > _CountedWord.allowed:
            raise TimeoutError
        return str.__eq__(self, other)


def check_rouge_l(answer: Callable[[list[str], list[str]], tuple[float, float, float]]) -> str:
    """Hold `answer(prediction, reference) -> (precision, recall, f1)` to a search through all subsequences."""

    def ask(prediction: list[str], reference: list[str]) -> tuple[float, float, float]:
        ours, theirs = list(prediction), list(reference)
        try:
            result = call(answer, ours, theirs)
        except ExerciseError as error:
            require(
                not isinstance(error.__cause__, ZeroDivisionError),
                f"With {len(prediction)} and {len(reference)} words and {longest(prediction, reference)} in common you divide by zero: a share of nothing counts as 0.",
            )
            raise
        require((ours, theirs) == (prediction, reference), "Your function changes the lists it was given: copy them.")
        try:
            precision, recall, f1 = map(float, result)
        except (TypeError, ValueError):
            raise ExerciseError(f"Return three numbers: precision, recall, F1. {result!r} came.") from None
        return precision, recall, f1

    def longest(a: list[str], b: list[str]) -> int:
        """Try every subsequence of `a`, the longest first: slow, and beyond doubt."""
        for size in range(min(len(a), len(b)), 0, -1):
            for words in itertools.combinations(a, size):
                rest = iter(b)
                if all(word in rest for word in words):  # `in` reads on from the last word found
                    return size
        return 0

    def near(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))

    def shares(common: int, prediction: list[str], reference: list[str]) -> tuple[float, float, float]:
        if not common:
            return 0.0, 0.0, 0.0
        precision, recall = common / len(prediction), common / len(reference)
        return precision, recall, 2 * precision * recall / (precision + recall)

    def greedy(a: list[str], b: list[str]) -> int:
        found, at = 0, 0
        for word in a:
            if word in b[at:]:
                found, at = found + 1, b.index(word, at) + 1
        return found

    # 1. A text and itself: nothing can be missing.
    words = ["Tomas", "waters", "the", "beans"]
    precision, recall, f1 = ask(words, words)
    require(
        near((precision, recall), (1, 1)),
        f"A text and itself have precision and recall 1; yours {precision:.3g} and {recall:.3g}.",
    )
    require(near((f1,), (1,)), f"With precision and recall 1 F1 is 1 too; yours is {f1:.3g}: 2 P R / (P + R).")

    # 2. What is counted: every other way of counting gives another number here.
    reference = ["the", "dog", "saw", "the", "cat", "in", "the", "garden", "today"]
    prediction = ["in", "the", "dog", "garden", "the", "black", "cat", "today", "a", "again", "saw"]
    result, common = ask(prediction, reference), longest(prediction, reference)
    runs = [
        size
        for i, j in itertools.product(range(len(prediction)), range(len(reference)))
        for size in range(1, min(len(prediction) - i, len(reference) - j) + 1)
        if prediction[i : i + size] == reference[j : j + size]
    ]
    ways = {
        (Counter(prediction) & Counter(reference)).total(): "You count shared words in any order, which is ROUGE-1: a common subsequence keeps the order of both texts.",
        len(set(prediction) & set(reference)): "You count different shared words: order matters, and a word that stands twice may match twice.",
        max(runs): "You take the longest run of neighbours: the words of a subsequence may have others between them.",
        greedy(prediction, reference): "You take each word where it is first found: that can jump over the rest of the text. Try both ways, with the word and without it.",
        greedy(reference, prediction): "You take each word of the reference where it is first found: that can jump over the rest of the text. Try both ways, with the word and without it.",
    }  # fmt: skip
    precision, recall, expected = shares(common, prediction, reference)
    require(not near(result[:2], (recall, precision)), "Precision and recall are swapped: precision divides by the length of the prediction, recall by that of the reference.")  # fmt: skip
    for count, message in ways.items():
        require(not near(result[:2], shares(count, prediction, reference)[:2]), message)
    require(
        near(result[:2], (precision, recall)),
        f"The longest common subsequence of {' '.join(prediction)!r} and {' '.join(reference)!r} has {common} words: precision "
        f"{precision:.3f} and recall {recall:.3f}; yours are {result[0]:.3f} and {result[1]:.3f}.",
    )
    require(not near(result[2:], ((precision + recall) / 2,)), "F1 is no plain mean: it is 2 P R / (P + R), which stays low when one of the two is.")  # fmt: skip
    require(near(result[2:], (expected,)), f"Precision {precision:.3f} and recall {recall:.3f} make an F1 of {expected:.3f}; yours is {result[2]:.3f}: 2 P R / (P + R).")  # fmt: skip

    # 3. Nothing in common, and nothing at all.
    for pair in ((["yes"], ["no", "not", "now"]), ([], ["yes"]), (["yes"], []), ([], [])):
        require(near(ask(*pair), (0, 0, 0)), f"{pair[0]} and {pair[1]} share nothing, so all three are 0.")

    # 4. Many short texts from few words, where subsequences overlap in every way.
    draw = random.Random(0)
    for _ in range(60):
        a, b = ([draw.choice("abc") for _ in range(draw.randint(1, 8))] for _ in range(2))
        got, right = ask(a, b), shares(longest(a, b), a, b)
        require(near(got, right), f"For {' '.join(a)!r} and {' '.join(b)!r} P, R and F1 are {right[0]:.3f}, {right[1]:.3f}, {right[2]:.3f}; yours {got[0]:.3f}, {got[1]:.3f}, {got[2]:.3f}.")  # fmt: skip

    # 5. Long ones: with a table 40 x 40 comparisons are enough; without one there are more than anybody can wait for.
    _CountedWord.compared = 0
    a, b = ([_CountedWord(f"{letter}{i}") for i in range(40)] for letter in "ab")
    try:
        call(answer, a, b)
    except ExerciseError as error:
        require(
            not isinstance(error.__cause__, TimeoutError | RecursionError),
            f"Two texts of 40 words take you more than {_CountedWord.allowed:,} comparisons: keep the length for each pair of beginnings in a table instead of finding it again.",
        )
        raise
    return "Right: the longest common subsequence, its two shares and F1 agree with a search through all subsequences."


# --- week 2: find the flaw ---------------------------------------------------------------------------------------


def check_gain(
    answer: Callable[[list[dict], list[str], list[str]], tuple[float, tuple[float, float]]],
) -> str:
    """Hold `answer(rows, before, after) -> (mean, (low, high))` to all 256 resamples of four dialogues with known scores."""
    # before and after: how many of a reference's ten words each text has, so ROUGE-1 is a tenth of it. Three references, or one.
    made = [((4, 2, 1), (1, 6, 2)), ((1, 0, 1), (1, 2, 0)), ((7, 1, 2), (6, 1, 2)), ((3,), (6,))]

    def text(d: int, shared: Sequence[int]) -> str:
        words = [f"d{d}r{r}w{w}" for r, count in enumerate(shared) for w in range(count)]
        return " ".join(words + ["filler"] * (10 - len(words)))

    table = [
        ({"dialogue": f"dialogue {d}", "summary": " ".join(f"d{d}r{r}w{w}" for w in range(10))}, text(d, old), text(d, new))
        for d, (old, new) in enumerate(made)
        for r in range(len(old))
    ]  # fmt: skip
    order = [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]  # the rows of a dialogue need not stand together
    rows, before, after = zip(*(table[i] for i in order), strict=True)
    result = call(answer, [dict(row) for row in rows], list(before), list(after))
    try:
        mean, (low, high) = result
        mean, low, high = float(mean), float(low), float(high)
    except (TypeError, ValueError):
        raise ExerciseError(f"Return the mean and a pair (low, high); {result!r} came.") from None

    best = [(max(new) - max(old)) / 10 for old, new in made]
    single = [(n - o) / 10 for old, new in made for o, n in zip(old, new, strict=True)]
    first = [(new[0] - old[0]) / 10 for old, new in made]
    averaged = [(sum(new) - sum(old)) / len(old) / 10 for old, new in made]
    repeated = [value for value, (old, _) in zip(best, made, strict=True) for _ in old]
    kindest = [max(n - o for o, n in zip(old, new, strict=True)) / 10 for old, new in made]

    def is_mean(values: list[float]) -> bool:
        return abs(mean - sum(values) / len(values)) < 1e-6

    require(not is_mean([-value for value in best]), "The sign is turned round: a gain is after minus before.")
    require(not is_mean(single), "Still one value a row: these ten rows are four dialogues, and three of them count three times. Give each dialogue one value.")  # fmt: skip
    require(not is_mean(repeated), "Each row now has its best reference, but there are still ten values: keep one a dialogue.")  # fmt: skip
    require(not is_mean(first), "You keep the first reference of each dialogue and drop the others: `rouge` takes a list of references, and the best counts.")  # fmt: skip
    require(not is_mean(averaged), "You average over the references of a dialogue: in this course the best one counts, before and after alike. Give `rouge` the list of them.")  # fmt: skip
    require(not is_mean(kindest), "You take the reference with the largest gain: each text has its own best reference, chosen before anything is subtracted.")  # fmt: skip
    require(is_mean(best), f"The four dialogues gain {', '.join(f'{value:+.1f}' for value in best)}, on average {sum(best) / 4:+.3f}; yours is {mean:+.3f}.")  # fmt: skip

    def percentiles(values: list[float], size: int = 4) -> tuple[float, float]:
        means = sorted(sum(draw) / size for draw in itertools.product(values, repeat=size))
        return means[round(0.025 * len(means))], means[round(0.975 * len(means)) - 1]

    def near(interval: tuple[float, float], tolerance: float = 0.03) -> bool:
        return abs(low - interval[0]) < tolerance and abs(high - interval[1]) < tolerance

    right = percentiles(best)
    require(low <= mean <= high, f"The mean {mean:+.3f} lies outside your interval {low:+.3f} to {high:+.3f}.")
    require(
        near(right) or not high - low < 0.8 * (right[1] - right[0]),
        f"Your mean is one of four dialogues, but your interval ({low:+.3f} to {high:+.3f}) is as narrow as if there were more: draw from four values, not from ten.",
    )
    require(
        near(right) or not high - low > 1.25 * (right[1] - right[0]),
        f"Your interval ({low:+.3f} to {high:+.3f}) is wider than these four differences allow: subtract dialogue by dialogue first, then draw.",
    )
    require(near(right), f"All 256 resamples of the four gains give {right[0]:+.3f} to {right[1]:+.3f}; yours is {low:+.3f} to {high:+.3f}.")  # fmt: skip
    return "Right: one value a dialogue, each text against its best reference, and an interval over four dialogues."


def check_collate(answer: Callable[[list[dict[str, list[int]]], int], dict[str, Tensor]]) -> str:
    """Hold `answer(examples, pad_id)` to torch's `pad_sequence`, with padding that has the id of the end-of-text token."""
    end = 2
    examples = [
        {"input_ids": [1, 7, 8, 9, 5, end], "labels": [IGNORED, IGNORED, IGNORED, 9, 5, end]},
        {"input_ids": [1, 7, 6, end], "labels": [IGNORED, IGNORED, 6, end]},
        {"input_ids": [1, end, 4, 4, 3, 3, 8, end], "labels": [IGNORED, IGNORED, IGNORED, 4, 3, 3, 8, end]},
    ]
    given = copy.deepcopy(examples)
    batch = call(answer, given, end)
    require(given == examples, "Your function changes the examples it was given: in the next epoch they would be padded once more.")  # fmt: skip
    require(
        isinstance(batch, dict) and {"input_ids", "attention_mask", "labels"} <= set(batch),
        "Return a dictionary with input_ids, attention_mask and labels.",
    )
    names = ("input_ids", "attention_mask", "labels")
    for name in names:
        value = batch[name]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        require(shape == (3, 8), f"{name} must be a tensor of shape (3, 8), as long as the longest example; {shape} came.")  # fmt: skip
    input_ids, mask, labels = (batch[name].long() for name in names)

    def padded(key: str, value: int) -> Tensor:
        return pad_sequence([torch.tensor(example[key]) for example in examples], True, value)

    real = padded("input_ids", -1) >= 0
    require((input_ids >= 0).all(), f"input_ids hold {IGNORED}: that is a label. The model looks every input up in its table of tokens, so inputs are padded with a token.")  # fmt: skip
    require(not torch.equal(input_ids[1], torch.tensor([end] * 4 + [1, 7, 6, end])), "You pad on the left: the code that you were given pads on the right, and so does training.")  # fmt: skip
    require(torch.equal(input_ids, padded("input_ids", end)), "input_ids are not the examples' own tokens with padding after them.")  # fmt: skip
    moved = torch.equal(labels[1], torch.tensor([IGNORED] * 4 + examples[1]["labels"]))
    require(not moved, "The labels are padded on the left, the inputs on the right: no label stands at its own token.")
    if not torch.equal(labels[real], padded("labels", 0)[real]):
        kept = labels[real & (padded("labels", 0) == end)]
        require((kept == end).all(), "The answers have lost the label of their last token: end-of-text has the same id as padding, and `== pad_id` finds both. Go by length, not by id.")  # fmt: skip
        prompts = labels[real & (padded("labels", 0) == IGNORED)]
        require((prompts == IGNORED).all(), "The prompts are learned now: take the examples' own labels and pad those.")
        raise ExerciseError("The labels of the examples are not their own any more: copy them, and pad the copies.")
    filling = labels[~real]
    require(
        not (filling == end).any(),
        f"The labels are still padded with {end}: {int((filling == end).sum())} of the {int((labels != IGNORED).sum())} labels in this batch ask for padding. {IGNORED} is what cross-entropy leaves out.",
    )
    require(
        (filling == IGNORED).all(),
        f"The labels are padded with {int(filling[(filling != IGNORED).int().argmax()])}, which cross-entropy takes for a token: only {IGNORED} is left out.",
    )
    require(not mask.all(), "The attention mask is 1 on padding too: the mask says which tokens are there to be read.")
    require(
        mask[real].all(),
        "The attention mask hides real tokens: an end-of-text token has the same id as padding, and `!= pad_id` finds both. Go by length, not by id.",
    )
    require(torch.equal(mask.bool(), real), "The attention mask must be 1 on the tokens of the examples and 0 on padding.")  # fmt: skip
    return "Right: padding is neither read nor learned, and the end of each answer still is."


def check_ids_at_test(
    answer: Callable[[PreTrainedTokenizerBase, str], list[int]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Hold `answer(tokenizer, dialogue)` to what stands before the first label in a training example of that dialogue."""
    dialogues = ["#Person1#: Is it open?\n#Person2#: From nine.", "#Person1#: The big house?\n#Person2#: The red one."]
    for dialogue in dialogues:
        example = encode_example(tokenizer, summary_prompt(dialogue), "the cat sat on the mat")
        expected = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == IGNORED]  # fmt: skip
        got = call(answer, tokenizer, dialogue)
        require(
            isinstance(got, list) and all(isinstance(token, int) for token in got),
            f"Return a list of token ids, as encode gives it; a {type(got).__name__} came.",
        )
        answered = example["input_ids"][len(expected) :]
        require(got != example["input_ids"] and got[-len(answered) :] != answered, "The answer is in your prompt: the model has to find it.")  # fmt: skip
        same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))  # fmt: skip
        if got == expected:
            continue
        specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        mine, theirs = (sum(token in specials for token in ids) for ids in (got, expected))
        require(
            not (tokenizer.chat_template and not mine),
            f"Training examples are in the chat format and begin {tokenizer.decode(expected[:2])!r}; your prompt has no special token at all: `encode` puts chat messages into the format.",
        )
        require(
            same != len(got),
            f"Your prompt is right as far as it goes, but training reads on: {tokenizer.decode(expected[same:])!r} stands before the answer.",
        )
        require(
            same != len(expected),
            f"Your prompt is right and then goes on with {tokenizer.decode(got[same:])!r}: in training the answer begins there.",
        )
        require(
            mine <= theirs,
            f"Your prompt has {mine} special tokens, training has {theirs}: the chat template writes its own, so the tokenizer must not add any.",
        )
        window = slice(max(0, same - 1), same + 6)
        raise ExerciseError(
            f"From token {same} on your prompt reads {tokenizer.decode(got[window])!r}, where training reads {tokenizer.decode(expected[window])!r}: "
            "the model is asked in words that it was not trained on."
        )
    return "Right: at test time the model reads, token for token, what stood before the answers in training."


def check_before_and_after(
    answer: Callable[[nn.Module, Callable[[nn.Module], nn.Module], Callable[[nn.Module], float]], tuple[float, float]],
) -> str:
    """Hold `answer(model, train, score) -> (before, after)` to a model whose scores are known, trained in place and with PEFT."""
    from peft import LoraConfig, get_peft_model

    calls: list[str] = []

    def fresh() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
            model[1].weight.fill_(1.0)
        return model

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(torch.ones(1, 2)))

    def in_place(model: nn.Module) -> nn.Module:
        calls.append("train")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        return model

    def with_adapter(model: nn.Module) -> nn.Module:
        calls.append("train")
        tuned = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.fill_(1.0)
        return tuned

    for train, how, after in ((in_place, "changes every weight in place", 8.0), (with_adapter, "puts a LoRA adapter into the model", 4.0)):  # fmt: skip
        model = fresh()
        weights, parts = copy.deepcopy(model.state_dict()), len(list(model.modules()))
        calls.clear()
        result = call(answer, model, train, score)
        try:
            mine = tuple(map(float, result))
        except (TypeError, ValueError):
            mine = ()
        require(len(mine) == 2, f"Return two numbers, the score before and the score after; {result!r} came.")
        require(calls, "`train` is never called.")
        require(len(calls) == 1, f"`train` is called {len(calls)} times: once is enough, and it is what costs.")
        require(mine != (after, 2.0), "The two scores are swapped: before comes first.")
        require(
            mine != (after, after),
            f"Both scores are those of the trained model. `train` {how}, so afterwards the name `model` stands for the trained one too: measure before you train, or train a copy that shares nothing.",
        )
        require(mine != (2.0, 2.0), "Both scores are those of the model before training: the trained one is what `train` returns.")  # fmt: skip
        require(mine == (2.0, after), f"Where `train` {how} the scores are 2 and {after:g}; yours are {mine[0]:g} and {mine[1]:g}.")  # fmt: skip
        require(
            len(list(model.modules())) == parts,
            f"Your scores are right, but `train` {how}, and afterwards the caller's model still carries it: train a copy, made with `copy.deepcopy`.",
        )
        left = model.state_dict()
        require(
            all(torch.equal(left[name], value) for name, value in weights.items()),
            f"Your scores are right, but `train` {how}, and afterwards the caller's model is the trained one: the next comparison starts from there. "
            "Train a copy, made with `copy.deepcopy` (`copy.copy` and `state_dict` share the weights instead of copying them).",
        )
    return "Right: both scores are right, and the model that was given is still the one it was, with training in place and with LoRA."


# --- week 2: instruction data ------------------------------------------------------------------------------------


def check_training_batch(
    answer: Callable[[Sequence[list[int]], Sequence[list[int]], int, int], tuple[Tensor, Tensor, Tensor]],
) -> str:
    """Hold `answer(prompts, completions, length, pad_token_id)` to what each of its three tensors must be, token by token.

    The completions end with EOS, and padding is EOS, as in the embedded model.
    """
    eos = pad = 2
    prompts = [[11, 12, 13], [21, 22, 23, 24, 25, 26, 27, 28]]
    completions = [[14, 15, eos], [31, 32, 33, eos]]
    kept = [prompts[0], prompts[1][-6:]]  # 8 + 4 tokens do not fit into 10
    returned = call(answer, prompts, completions, 10, pad)
    require(
        isinstance(returned, tuple | list) and len(returned) == 3 and all(isinstance(t, Tensor) for t in returned),
        "Return three tensors: input_ids, attention_mask, labels.",
    )
    for name, tensor in zip(("input_ids", "attention_mask", "labels"), returned, strict=True):
        require(
            tensor.shape == (2, 10) and not tensor.is_floating_point(),
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: two rows of length 10 in whole numbers are due.",
        )
    input_ids, mask, labels = (tensor.tolist() for tensor in returned)

    # 1. What is read: the completion whole, the prompt's end, padding behind.
    require(
        input_ids[1][-4:] == completions[1],
        "A text that is too long has lost part of its completion: cut the beginning of the prompt, there is nothing else to learn from.",
    )
    require(input_ids[1] != [*prompts[1][:6], *completions[1]], "The prompt has lost its end: cut its beginning.")
    require(
        input_ids[0][:6] != [pad] * 4 + prompts[0][:2], "The padding stands in front: put it behind the completion."
    )
    for row in range(2):
        right = [*kept[row], *completions[row]]
        right += [pad] * (10 - len(right))
        require(input_ids[row] == right, f"input_ids of row {row} are {input_ids[row]}, due are {right}.")

    # 2. What may be looked at.
    require(
        mask[0] != [1] * 10, "The attention mask lets the model read the padding: it is 1 where a token is, 0 behind."
    )
    require(
        mask[0] != [1] * 5 + [0] * 5,
        "The attention mask hides the EOS of the completion: padding is the same token, so count lengths, do not compare ids.",
    )
    require(mask == [[1] * 6 + [0] * 4, [1] * 10], f"The attention mask is {mask}: 1 where a token is, 0 on padding.")

    # 3. What is learned.
    require(
        any(label != IGNORED for label in labels[0]), "No token has a label: the completion is what is to be learned."
    )
    shifted = [IGNORED] * 2 + [14, 15, eos] + [IGNORED] * 5
    require(
        labels[0] != shifted,
        "Your labels stand one place to the left: the model shifts them itself, so a label has the place of its token.",
    )
    require(labels[0][:3] == [IGNORED] * 3, "The prompt has labels: give it -100.")
    require(
        labels[0][6:] == [IGNORED] * 4, "The padding has labels: it would be most of what is learned. Give it -100."
    )
    require(
        labels[0][5] == eos,
        "The EOS of the completion has no label, so the model never learns to stop: padding is the same token, count lengths instead.",
    )
    right = [
        [IGNORED] * len(k) + c + [IGNORED] * (10 - len(k) - len(c)) for k, c in zip(kept, completions, strict=True)
    ]
    require(labels == right, f"The labels are {labels}, due are {right}.")
    return "Right: the completion whole and learned to its EOS, the prompt and the padding read but not learned."


# --- week 2: LoRA ------------------------------------------------------------------------------------------------


def check_lora_linear(answer: type[nn.Module]) -> str:
    """Hold the class `answer(linear, r, alpha)` to PEFT's LoRA with the same A and B, in forward and after merging."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear as PeftLinear

    torch.manual_seed(0)
    linear, r, alpha = nn.Linear(12, 20), 4, 12
    before = copy.deepcopy(linear.state_dict())
    x = torch.randn(3, 5, 12)
    layer = call(answer, linear, r, alpha)
    require(isinstance(layer, nn.Module), "LoRALinear is no nn.Module: derive it from nn.Module.")

    # 1. What it is made of.
    for name, shape, what in (("A", (r, 12), "(r, in)"), ("B", (20, r), "(out, r)")):
        matrix = getattr(layer, name, None)
        require(
            isinstance(matrix, nn.Parameter),
            f"{name} is not an nn.Parameter: an optimizer would not find it.",
        )
        require(matrix.shape == shape, f"{name} has shape {tuple(matrix.shape)}: it must be {what}, here {shape}.")
    require(not layer.B.any(), "B does not start at zero: the first answer must be that of the layer as it was.")
    require(
        bool(layer.A.any()), "A starts at zero, as B does: then neither ever gets a gradient. Give A random numbers."
    )
    others = [name for name, weight in layer.named_parameters() if weight.requires_grad and name not in ("A", "B")]
    require(not others, f"{' and '.join(others)} would be trained too: freeze the layer with requires_grad_(False).")

    # 2. What it computes.
    plain = nn.functional.linear(x, before["weight"], before["bias"])
    require(torch.equal(_run(layer, x), plain), "With B at zero the output is not exactly that of the layer.")
    with torch.no_grad():
        layer.B.copy_(torch.randn(20, r))
    peft = PeftLinear(copy.deepcopy(linear), "default", LoraConfig(r=r, lora_alpha=alpha), r=r, lora_alpha=alpha)
    with torch.no_grad():
        peft.lora_A["default"].weight.copy_(layer.A)
        peft.lora_B["default"].weight.copy_(layer.B)
        due, result = peft(x), _run(layer, x)
    require(
        result.shape == due.shape, f"The output has shape {tuple(result.shape)}, the layer's is {tuple(due.shape)}."
    )
    correction, mine = due - plain, result.detach() - plain
    for factor, message in (
        (r / alpha, "The correction is not scaled: multiply it by alpha / r."),
        (r / alpha * r / alpha, "The scale is upside down: it is alpha / r, not r / alpha."),
        (float(r), "The correction is multiplied by alpha: by alpha / r is due."),
        (0.0, "A and B do not change the output: add B A x, scaled, to that of the layer."),
    ):
        require(not torch.allclose(mine, factor * correction, atol=1e-4), message)
    require(
        torch.allclose(result, due, atol=1e-4),
        f"With the same A and B the output differs from PEFT's by up to {(result - due).abs().max():.3g}.",
    )

    # 3. What learns.
    _run(layer, x).square().mean().backward()
    for name in ("A", "B"):
        require(
            getattr(layer, name).grad is not None,
            f"No gradient reaches {name}: compute with it itself, not with its data or a copy.",
        )

    # 4. Merging.
    require(hasattr(layer, "merged"), "There is no method merged.")
    single = call(layer.merged)
    require(isinstance(single, nn.Linear), "merged returns no nn.Linear: a merged layer has no A and B.")
    require(single is not linear, "merged returns the layer it was given: return a new one.")
    require(
        torch.equal(linear.weight, before["weight"]),
        "The weights of the layer have changed: it must stay as it was, merged makes a new one.",
    )
    require(single.bias is not None, "The merged layer has lost its bias.")
    require(
        torch.allclose(single(x), due, atol=1e-4),
        f"The merged layer differs from PEFT's by up to {(single(x) - due).abs().max():.3g}: its weight is W + alpha / r B A.",
    )
    without = call(call(answer, nn.Linear(12, 20, bias=False), r, alpha).merged)
    require(without.bias is None, "A layer without a bias has one after merging.")
    return "Right: no change at the start, and equal to PEFT's LoRA in forward and after merging."


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    try:
        return layer(x)
    except NotImplementedError:
        raise ExerciseError("forward is not written yet.") from None
    except Exception as error:  # whatever a learner's code may do
        raise ExerciseError(f"forward stops with {type(error).__name__}: {one_line(error).rstrip('.')}.") from error


# --- week 2: mixing tasks ----------------------------------------------------------------------------------------


def check_mixing_rates(answer: Callable[[Sequence[int], float, float], Sequence[float]]) -> str:
    """Hold `answer(sizes, cap, temperature)` to a pool filled and counted example by example, and to ratios of pairs."""

    def rates(sizes: Sequence[int], cap: float, temperature: float) -> Tensor:
        given = list(sizes)
        result = torch.as_tensor(call(answer, given, cap, temperature), dtype=torch.float64)
        require(given == list(sizes), "Your function changes the list of sizes it was given: make a new one.")
        require(
            result.shape == (len(sizes),),
            f"{len(sizes)} tasks need {len(sizes)} rates in one row; yours have the shape {tuple(result.shape)}.",
        )
        return result

    sizes, cap = [2, 3, 40, 200], 25
    pool = [task for task, size in enumerate(sizes) for k in range(size) if k < cap]  # what the cap lets in
    counted = torch.tensor([pool.count(task) / len(pool) for task in range(4)], dtype=torch.float64)
    all_of_it = torch.tensor([size / sum(sizes) for size in sizes], dtype=torch.float64)
    found = rates(sizes, cap, 1.0)
    require(
        not torch.allclose(found, counted * len(pool)),
        "You return numbers of examples: divide by their sum, so that the rates add up to 1.",
    )
    name_the_flaw(
        found,
        counted,
        {
            "The cap does nothing in yours: no task may count for more than `cap` examples.": all_of_it,
            "You raise small tasks to the cap: it is the most a task may count for, `min(size, cap)`.": torch.tensor(
                [max(size, cap) / sum(max(s, cap) for s in sizes) for size in sizes], dtype=torch.float64
            ),
            "You divide by the sum of the sizes before the cap, so that the rates do not add up to 1.": counted
            * len(pool)
            / sum(sizes),
            "Yours mixes all tasks equally: below the cap a task counts for as many examples as it has.": torch.full(
                (4,), 0.25, dtype=torch.float64
            ),
        },
        "At temperature 1 your rates differ from those of a pool filled by hand",
    )
    require(
        torch.allclose(rates(sizes, 1000, 1.0), all_of_it),
        "A cap that no task reaches must change nothing: with sizes below it the rates are the shares of the examples.",
    )

    warm = rates(sizes, cap, 2.0)
    require(
        not torch.allclose(warm, counted),
        "The temperature does nothing in yours: raise each rate to the power 1 / temperature, then divide by the sum.",
    )
    require(
        abs(float(warm.sum()) - 1) < 1e-6,
        f"At temperature 2 your rates add up to {float(warm.sum()):.3f}: divide by the sum after the power, not before.",
    )
    # Whatever they are divided by: at temperature T the ratio of two rates is the T-th root of the ratio without.
    ratio, root = float(warm[2] / warm[0]), (min(sizes[2], cap) / sizes[0]) ** 0.5
    require(
        abs(ratio - root**4) > 1e-4,
        "Your temperature sharpens: raise to the power 1 / temperature, so that a higher one brings the tasks closer together.",
    )
    require(
        abs(ratio - (sizes[2] / sizes[0]) ** 0.5) > 1e-4 and abs(float(warm[3] / warm[2]) - 1) < 1e-6,
        "Your temperature comes before the cap: two tasks that the cap cuts to one size must have one rate.",
    )
    require(
        abs(ratio - root) < 1e-4,
        f"At temperature 2 a task of 25 examples (after the cap) has {root:.3f} times the rate of one of 2, yours {ratio:.3f}.",
    )
    return "Right: cap, sum and temperature agree with a pool filled example by example."


# --- week 2: benchmarks ------------------------------------------------------------------------------------------


def check_calibration_error(answer: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Hold `answer(probabilities, targets, bins)` to a walk through the items one by one, and to cases worked by hand."""
    generator = torch.Generator().manual_seed(5)

    def walk(confidence: Tensor, right: Tensor, bins: int, *, signed: bool = False, weighted: bool = True) -> Tensor:
        """Fill one group after another from the least confident item on; plain sums, no array functions."""
        ranked = sorted(zip(confidence.tolist(), right.float().tolist(), strict=True))
        size, gaps = len(ranked) // bins, []
        for start in range(0, len(ranked), size):
            group = ranked[start : start + size]
            gap = sum(r for _, r in group) - sum(c for c, _ in group)
            gaps.append((gap if signed else abs(gap)) / (len(ranked) if weighted else 1))
        return torch.tensor(sum(gaps))

    # By hand: two sure ones (0.9), one of them right, and two less sure ones (0.6 and 0.8), both right.
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.8, 0.2]])
    targets = torch.tensor([0, 1, 0, 0])
    hand = call(answer, probabilities, targets, 2, shape=())
    require(hand.is_floating_point(), f"The error is a share: return a number with decimals; {hand.dtype} came.")
    right = probabilities.argmax(1) == targets
    top = probabilities.amax(1)
    name_the_flaw(
        hand,
        torch.tensor(0.35),
        {
            "Groups that are too sure and groups that are not sure enough cancel in yours: take the absolute value of each group's gap before adding.": walk(
                top, right, 2, signed=True
            ).abs(),
            "You take the probability of the right answer: confidence is that of the answer the model gives, right or wrong.": walk(
                probabilities[torch.arange(4), targets], right, 2
            ),
            "Yours compares each single item: average confidence and accuracy over a group first, then take their distance.": (
                top - right.float()
            )
            .abs()
            .mean(),
        },
        "Four items, two groups: gaps of 0.3 and 0.4, so 0.35 in all; yours is off",
    )
    # Many items in no order, three options, so that neither order nor the number of options can be taken for granted.
    probabilities = torch.softmax(2 * torch.randn(60, 3, generator=generator), dim=1)
    top, answers = probabilities.max(1)
    # Unsure ones mostly right, sure ones mostly wrong: then it matters how they are grouped.
    right = torch.rand(60, generator=generator) < torch.where(top < 0.7, 0.9, 0.4)
    targets = torch.where(right, answers, (answers + 1) % 3)
    result = call(answer, probabilities, targets, 6, shape=())
    in_given_order = sum(abs(float(top[i : i + 10].sum() - right[i : i + 10].sum())) for i in range(0, 60, 10)) / 60
    edges = torch.linspace(0, 1, 7)
    equal_width = (
        sum(
            abs(float((top[inside] - right[inside].float()).sum()))
            for inside in ((top > a) & (top <= b) for a, b in itertools.pairwise(edges))
        )
        / 60
    )
    name_the_flaw(
        result,
        walk(top, right, 6),
        {
            "Your groups follow the order of the items: sort by confidence first.": torch.tensor(in_given_order),
            "Your groups are equally wide: here, as in HELM, each holds equally many items.": torch.tensor(equal_width),
            "Yours adds up the groups: weight each by its share of the items.": walk(top, right, 6) * 6,
            "The number of groups makes no difference to yours: use `bins`.": walk(top, right, 2),
        },
        "On 60 items in 6 groups your error is off",
    )
    # All right and quite sure of it: no error.
    certain = torch.eye(3)[torch.arange(30) % 3]
    zero = call(answer, certain, torch.arange(30) % 3, 5, shape=())
    require(
        abs(float(zero)) < 1e-5,
        f"A model that is sure and always right has an error of 0; yours says {float(zero):.3g}.",
    )
    # Sizes that the bins do not divide: the groups differ by one item at most.
    probabilities, targets = probabilities[:23], targets[:23]
    top, right = probabilities.amax(1), (probabilities.argmax(1) == targets).float()
    uneven, at, ranked = 0.0, 0, sorted(zip(top.tolist(), right.tolist(), strict=True))
    for size in (6, 6, 6, 5):
        uneven += abs(sum(c - r for c, r in ranked[at : at + size])) / 23
        at += size
    result = call(answer, probabilities, targets, 4, shape=())
    require(
        abs(float(result) - uneven) < 1e-4,
        f"23 items make four groups of 6, 6, 6 and 5, with an error of {uneven:.3f}; yours is {float(result):.3f}: leave no item out, weight each group by its size, and see `torch.tensor_split`.",
    )
    return "Right: sorted, grouped, weighted by size, and no group's excess hides another's lack."
