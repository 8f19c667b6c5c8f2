"""The checks of the exercises: a right answer passes, and every plausible wrong one fails with its own message.

The wrong answers of an exercise stand under a pattern of the message that is due.
"""

import copy
import functools
import re
from collections import Counter

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import broken_copy, make_tokenizer

from utils import batch, exercises
from utils.exercises import (
    check_attention,
    check_before_and_after,
    check_cheapest,
    check_collate,
    check_fitting,
    check_gain,
    check_ids_at_test,
    check_neighbours,
    check_next_token_loss,
    check_parameter_count,
    check_rotary,
    check_rouge_l,
    check_shots,
    check_top_p,
)
from utils.lab import ExerciseError
from utils.metrics import bootstrap_interval, rouge
from utils.prompts import IGNORED, encode, encode_example, summary_prompt

NEVER = float("-inf")


def solution(week, name):
    """What the exercise cell that defines `name` defines, from the committed notebook."""
    cells = nbformat.read(batch.notebook(week), as_version=4).cells
    (source,) = [
        c.source
        for c in cells
        if "nbgrader" in c.metadata and re.search(rf"(def|class) {name}\(", c.source) and "SOLUTION" in c.source
    ]
    namespace = {"copy": copy, "encode": encode, "summary_prompt": summary_prompt, "torch": torch, "rouge": rouge}
    namespace |= {"bootstrap_interval": bootstrap_interval, "IGNORED": IGNORED}
    exec(source, namespace)  # noqa: S102 our own notebook
    return namespace[name]


@pytest.mark.parametrize("week", batch.WEEKS)
def test_every_exercise_has_its_metadata_and_a_check_after_it(week):
    cells = [c for c in nbformat.read(batch.notebook(week), as_version=4).cells if "nbgrader" in c.metadata]
    ids = [c.metadata.nbgrader.grade_id for c in cells]
    assert len(set(ids)) == len(ids)
    for exercise, check in zip(cells[::2], cells[1::2], strict=True):
        assert exercise.metadata.nbgrader.solution
        assert not exercise.metadata.nbgrader.grade
        assert "### BEGIN SOLUTION" in exercise.source
        assert "### END SOLUTION" in exercise.source
        assert check.metadata.nbgrader.grade
        assert not check.metadata.nbgrader.solution
        assert "SOLUTION" not in check.source


def not_written(*_):
    raise NotImplementedError


# --- week 1: cosine and nearest neighbour ------------------------------------------------------------------------


def cosine(a, b):
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


def nearest(vectors):
    return cosine(vectors, vectors).fill_diagonal_(-2).argmax(-1)


def in_place_cosine(a, b):
    a /= a.norm(dim=-1, keepdim=True)
    return cosine(a, b)


WRONG_NEIGHBOURS = {
    r"shape \(7, 5\): it must be \(5, 7\)": (lambda a, b: cosine(a, b).T, nearest),
    "changes a tensor it was given": (in_place_cosine, nearest),
    "length of a and of b: divide by both lengths": (lambda a, b: a @ b.T, nearest),
    "with the length of b: divide by both": (lambda a, b: (a / a.norm(dim=-1, keepdim=True)) @ b.T, nearest),
    "along the last dimension": (lambda a, b: (a / a.norm()) @ (b / b.norm()).T, nearest),
    "differ from torch's": (lambda a, b: cosine(a, b).abs(), nearest),
    "one whole number for each row": (cosine, lambda v: cosine(v, v).fill_diagonal_(-2).max(-1).values),
    "its own nearest neighbour": (cosine, lambda v: cosine(v, v).argmax(-1)),
    "the least similar": (cosine, lambda v: cosine(v, v).argmin(-1)),
    "largest dot product": (cosine, lambda v: (v @ v.T).fill_diagonal_(-99).argmax(-1)),
    "smallest distance": (cosine, lambda v: torch.cdist(v, v).fill_diagonal_(99).argmin(-1)),
    "less than -1, not with 0": (cosine, lambda v: cosine(v, v).fill_diagonal_(0).argmax(-1)),
}


# --- week 1: attention, rotary positions, the number of parameters -----------------------------------------------


def scores_of(query, key):
    return query @ key.transpose(-2, -1)


def masked(scores, mask):
    return scores.masked_fill(~mask, NEVER)


def attention(query, key, value, mask):
    return masked(scores_of(query, key) / query.shape[-1] ** 0.5, mask).softmax(-1) @ value


def scales_in_place(query, key, value, mask):
    query /= query.shape[-1] ** 0.5
    return masked(scores_of(query, key), mask).softmax(-1) @ value


WRONG_ATTENTION = {
    "not scaled": lambda q, k, v, mask: masked(scores_of(q, k), mask).softmax(-1) @ v,
    "divide by its square root": lambda q, k, v, mask: masked(scores_of(q, k) / q.shape[-1], mask).softmax(-1) @ v,
    "multiplied by the square root": lambda q, k, v, mask: masked(scores_of(q, k) * q.shape[-1] ** 0.5, mask).softmax(-1) @ v,
    "runs over the queries": lambda q, k, v, mask: masked(scores_of(q, k) / q.shape[-1] ** 0.5, mask).softmax(-2) @ v,
    "softmax is missing": lambda q, k, v, mask: (scores_of(q, k) / q.shape[-1] ** 0.5) * mask @ v,
    "Query and key are swapped": lambda q, k, v, mask: attention(k, q, v, mask),
    r"lets position 0 see position 1\.": lambda q, k, v, mask: attention(q, k, v, torch.ones_like(mask)),
    "transposed or turned round": lambda q, k, v, mask: attention(q, k, v, mask.mT if mask.shape[0] == mask.shape[1] else mask),
    "lets position 0 see position 2": lambda q, k, v, mask: attention(q, k, v, mask | mask.roll(2, 1)),
    "not the weights after it": lambda q, k, v, mask: ((scores_of(q, k) / q.shape[-1] ** 0.5).softmax(-1) * mask) @ v,
    "differs from torch's": lambda q, k, v, mask: attention(q, k, v, mask).flip(-1) if v.shape[-1] == 5 else attention(q, k, v, mask),
    r"it must be \(1, 2, 4, 5\)": lambda q, k, v, mask: attention(q, k, torch.eye(k.shape[-2]).expand(1, 2, -1, -1), mask),
    "stops with RuntimeError": lambda q, k, v, mask: q @ k @ v,
    "returns a NoneType": lambda q, k, v, mask: None,
    "are not numbers": lambda q, k, v, mask: torch.full_like(v, float("nan")) if not mask.all() else attention(q, k, v, mask),
    "changes a tensor it was given": scales_in_place,
}  # fmt: skip


def turn(x, positions, speeds, rotate):
    angles = torch.outer(positions.float(), speeds)
    return x * angles.cos().repeat(1, 2) + rotate(x) * angles.sin().repeat(1, 2)


def speeds(x, exponent=2.0):
    return 10_000.0 ** -(exponent * torch.arange(x.shape[-1] // 2) / x.shape[-1])


def half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotary(x, positions):
    return turn(x, positions, speeds(x), half)


def neighbour_pairs(x, positions):
    angles = torch.outer(positions.float(), speeds(x)).repeat_interleave(2, -1)
    rotated = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * angles.cos() + rotated * angles.sin()


WRONG_ROTARY = {
    "turns backwards": lambda x, p: turn(x, p, speeds(x), lambda y: -half(y)),
    "pairs neighbours": neighbour_pairs,
    "minus sign is missing": lambda x, p: turn(x, p, speeds(x), lambda y: y.roll(y.shape[-1] // 2, -1)),
    "too slowly": lambda x, p: turn(x, p, speeds(x, 1.0), half),
    "halves come back in the wrong order": lambda x, p: rotary(x, p).roll(x.shape[-1] // 2, -1),
    "same speed": lambda x, p: turn(x, p, speeds(x, 0.0), half),
    "Position 0 is changed": lambda x, p: rotary(x, p + 1),
    "their lengths change": lambda x, p: turn(x, p, speeds(x), lambda y: y),
    "^Your vectors differ from transformers' by": lambda x, p: rotary(x, 2 * p),
    r"must be \(1, 2, 4, 16\)": lambda x, p: rotary(x, p)[0],
}


def count(c, *, tables=None, gated=3, kv=None, output=1, block_norms=2, last_norm=1, layers=None, head=None):
    heads, kv = c.num_attention_heads, c.num_key_value_heads if kv is None else kv
    head, layers = c.head_dim if head is None else head, c.num_hidden_layers if layers is None else layers
    attention = c.hidden_size * head * ((1 + output) * heads + 2 * kv)
    layer = attention + gated * c.hidden_size * c.intermediate_size + block_norms * c.hidden_size
    tables = (2 - bool(c.tie_word_embeddings)) if tables is None else tables
    return tables * c.vocab_size * c.hidden_size + layers * layer + last_norm * c.hidden_size


WRONG_COUNTS = {
    r"second table \(the output layer\) is missing": lambda c: count(c, tables=1),
    "both tables": lambda c: count(c, tables=0),
    "tied embeddings are one table": lambda c: count(c, tables=2),
    "yours has two": lambda c: count(c, gated=2),
    r"gate, up, down.*yours has one\.": lambda c: count(c, gated=1),
    "num_key_value_heads heads, not": lambda c: count(c, kv=c.num_attention_heads),
    "output matrix is missing": lambda c: count(c, output=0),
    "two a layer and one at the end": lambda c: count(c, block_norms=0, last_norm=0),
    "norm at the end is missing": lambda c: count(c, last_norm=0),
    "a layer has two norms": lambda c: count(c, block_norms=1),
    "a layer's norms are missing": lambda c: count(c, block_norms=0),
    "only one layer": lambda c: count(c, layers=1),
    "need not be width / heads": lambda c: count(c, head=c.hidden_size // c.num_attention_heads),
    "one part at a time": lambda c: count(c) + 1,
    "a NoneType came": lambda c: None,
}


# --- week 1: shots -----------------------------------------------------------------------------------------------


def of(rows):
    return [(row["dialogue"], row["summary"]) for row in rows]


def own_only(train, test):
    seen = {row["dialogue"] for row in test}
    return [row for row in train if row["dialogue"] not in seen]


def shots(train, test, k):
    return of(own_only(train, test)[:k])


def summaries_exchanged(train, test, k):
    picked = shots(train, test, k)
    return [(picked[i][0], picked[i - 1][1]) for i in range(k)]


def moody_shots():
    calls = []

    def answer(train, test, k):
        calls.append(1)
        return of(own_only(train, test))[len(calls) % 2 :][:k]

    return answer


WRONG_SHOTS = {
    "stands in the test split": lambda train, test, k: of(test[::-1][:k]),
    "in the test split as well": lambda train, test, k: of(sorted(train, key=lambda row: len(row["dialogue"]))[:k]),
    "list of pairs": lambda train, test, k: own_only(train, test)[:k],
    "Three examples were asked for, 2 came": lambda train, test, k: shots(train, test, k - 1),
    "not its own summary": summaries_exchanged,
    "comes twice": lambda train, test, k: shots(train, test, 1) * k,
    "Two calls gave different examples": moody_shots(),
    "stops with KeyError: 'text'": lambda train, test, k: [row["text"] for row in train],
}


# --- week 1: how many fit ----------------------------------------------------------------------------------------


def largest(fits, shots):
    return max((k for k in range(len(shots) + 1) if fits(k)), default=0)


def length(tokenizer, dialogue, shots, k):
    return len(encode(tokenizer, summary_prompt(dialogue, shots[:k])))


def fitting(t, dialogue, shots, context, new):
    return largest(lambda k: length(t, dialogue, shots, k) + new <= context, shots)


WRONG_FITS = {
    "the answer of up to 40 tokens does not": lambda t, d, s, c, n: largest(lambda k: length(t, d, s, k) <= c, s),
    "fills the context exactly is allowed": lambda t, d, s, c, n: largest(lambda k: length(t, d, s, k) + n < c, s),
    "your answer is the same": lambda t, d, s, c, n: len(s),
    "count tokens": (
        lambda t, d, s, c, n: largest(lambda k: sum(len(a + b) for a, b in s[:k]) + len(d) + n <= c, s)
    ),
    "special tokens of the chat format": (
        lambda t, d, s, c, n: largest(lambda k: sum(len(t(a + b).input_ids) for a, b in s[:k]) + len(t(d).input_ids) + n <= c, s)
    ),
    "a list came": lambda t, d, s, c, n: s[: fitting(t, d, s, c, n)],
    "no more than there are": lambda t, d, s, c, n: fitting(t, d, s, c, n) if c < 9 * length(t, d, s, 6) else len(s) + 1,
}  # fmt: skip


# --- week 1: top-p -----------------------------------------------------------------------------------------------


def wrong_top_p(
    *, crossing=True, first=True, extra=False, softmax=True, scatter=True, fill=NEVER, inplace=False, dim=-1
):
    """A top-p with the usual mistakes to switch on."""

    def answer(logits, p):
        values, order = logits.sort(dim=-1, descending=True)
        probabilities = values.softmax(-1) if softmax else values
        mass = probabilities.cumsum(dim)
        remove = mass - probabilities >= p if crossing else mass > p
        if extra:
            remove = torch.cat([torch.zeros_like(remove[:, :1]), remove[:, :-1]], 1)
        if not first:
            remove[:, 0] = mass[:, 0] > p
        elif not crossing:
            remove[:, 0] = False
        mask = torch.zeros_like(remove).scatter(1, order, remove) if scatter else remove
        return logits.masked_fill_(mask, fill) if inplace else logits.masked_fill(mask, fill)

    return answer


top_p = wrong_top_p()  # the textbook's way: from the likeliest down, keep while what came before holds less than p


def ascending_top_p(logits, p):
    ranked, order = logits.sort(dim=-1)
    remove = ranked.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -1] = False
    return logits.masked_fill(remove.scatter(1, order, remove), NEVER)


WRONG_TOP_P = {
    "changes a tensor it was given": wrong_top_p(inplace=True),
    "must have the logit -inf": wrong_top_p(fill=0.0),
    "Adding 3 to every logit": wrong_top_p(softmax=False),
    "back from the sorted order": wrong_top_p(scatter=False),
    "keep that token and no other": wrong_top_p(crossing=False, first=False),
    "the token that crosses p belongs": wrong_top_p(crossing=False),
    "stop at the token that crosses": lambda logits, p: wrong_top_p(extra=logits.shape[1] > 3)(logits, p),
    "depends on the other rows": lambda logits, p: logits.masked_fill(top_p(logits[:1], p).isinf(), NEVER),
    r"shape \(5,\): it must be \(1, 5\)": lambda logits, p: top_p(logits, p)[0],
    "every token that has a probability stays": lambda logits, p: top_p(logits, min(p, 0.96) - 0.02),
    "transformers keeps another set": lambda logits, p: top_p(logits, p if p > 0.2 else 0.3),
}


def test_no_case_of_the_check_of_top_p_lies_where_rounding_decides():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    mass = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    assert all((mass - p).abs().min() > 1e-6 for p in (0.1, 0.35, 0.6, 0.95))


# --- week 1: the loss of the next token --------------------------------------------------------------------------


def shifted_loss(logits, ids, pad, *, learn_padding=False):
    labels = ids[:, 1:] if learn_padding else ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


def by_hand_loss(logits, ids, pad):
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return -logprobs[ids[:, 1:] != pad].mean()


def loss_at(inputs, labels, **more):
    """A loss of the places `inputs` with the tokens `labels`, both slices of the length."""
    return lambda logits, ids, pad: F.cross_entropy(
        logits[:, inputs].flatten(0, 1), ids[:, labels].flatten(), ignore_index=pad, **more
    )


def writes_into_ids(logits, ids, pad):
    labels = ids[:, 1:]
    labels[labels == pad] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


def leaves_out_read_padding(logits, ids, pad):
    keep = ids[:, :-1] != pad
    return F.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep])


def unlike_with_padding(logits, ids, pad):
    return shifted_loss(logits, ids, pad) * (2 if (ids == pad).any() else 1)


ALL, BUT_LAST, BUT_FIRST = slice(None), slice(None, -1), slice(1, None)
WRONG_LOSSES = {
    "its own token": loss_at(ALL, ALL),
    "the shift goes the other way": loss_at(BUT_FIRST, BUT_LAST),
    "shifted twice": loss_at(slice(None, -2), slice(2, None)),
    "take the mean": loss_at(BUT_LAST, BUT_FIRST, reduction="sum"),
    "sign is missing": lambda logits, ids, pad: -shifted_loss(logits, ids, pad),
    "softmax is taken twice": lambda logits, ids, pad: shifted_loss(logits.softmax(-1), ids, pad),
    "Without padding your loss differs": lambda logits, ids, pad: shifted_loss(logits / 2, ids, pad),
    r"shape \(18,\): it must be one number": loss_at(BUT_LAST, BUT_FIRST, reduction="none"),
    "returns a float": lambda logits, ids, pad: shifted_loss(logits, ids, pad).item(),
    "changes a tensor it was given": writes_into_ids,
    "Padding is learned too": functools.partial(shifted_loss, learn_padding=True),
    "counted in the mean": lambda logits, ids, pad: loss_at(BUT_LAST, BUT_FIRST, reduction="none")(logits, ids, pad).mean(),
    "whose label is padding, not those that read it": leaves_out_read_padding,
    "With padding your loss differs": unlike_with_padding,
}  # fmt: skip


# --- week 1: the cheapest model ----------------------------------------------------------------------------------


def cheapest(law, loss, served, *, training=6, serving=2):
    """By a grid over sizes, as a learner may do it."""
    n = np.geomspace(1e8, 1e12, 20_000)
    left = loss - law.E - law.A / n**law.alpha
    n, left = n[left > 0], left[left > 0]
    d = (law.B / left) ** (1 / law.beta)
    best = (training * n * d + serving * n * served).argmin()
    return n[best], d[best]


def fixed_law():
    from utils.scaling import REPLICATION

    return lambda law, loss, served: cheapest(REPLICATION, loss, served)


WRONG_CHEAPEST = {
    "Return two numbers": lambda law, loss, served: cheapest(law, loss, served)[0],
    "must be positive and finite": lambda law, loss, served: (cheapest(law, loss, served)[0], np.inf),
    "yours are swapped": lambda law, loss, served: cheapest(law, loss, served)[::-1],
    "find the tokens that reach it": lambda law, loss, served: law.compute_optimal(1e24),
    "With nobody served only training counts": lambda law, loss, served: cheapest(law, loss, served + 1e13),
    "Serving makes no difference": lambda law, loss, served: cheapest(law, loss, 0),
    "a forward pass only": functools.partial(cheapest, serving=6),
    "charge 2 N for each of them": functools.partial(cheapest, serving=20),
    "does not follow the `law`": fixed_law(),
}


# --- week 2: ROUGE-L ---------------------------------------------------------------------------------------------


def common_table(a, b):
    """Length of the longest common subsequence, with a table."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[-1]))
    return row[-1]


def common_slow(a, b):
    """The same by trying everything."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common_slow(a[1:], b[1:])
    return max(common_slow(a[1:], b), common_slow(a, b[1:]))


def common_remembered(a, b):
    @functools.cache
    def length(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def f1_of(p, r):
    return 2 * p * r / (p + r) if p + r else 0.0


def l_from(common, *, f=f1_of, swap=False, guard=True):
    def answer(prediction, reference):
        n = common(prediction, reference)
        if guard and not n:
            return 0, 0, 0
        p, r = n / len(prediction), n / len(reference)
        return (r, p, f(p, r)) if swap else (p, r, f(p, r))

    return answer


def longest_run(a, b):
    return max((k for i in range(len(a)) for j in range(len(b)) for k in range(1, 9) if a[i : i + k] == b[j : j + k] and len(a[i : i + k]) == k), default=0)  # fmt: skip


def first_found(a, b):
    found, at = 0, 0
    for word in a:
        if word in b[at:]:
            found, at = found + 1, b.index(word, at) + 1
    return found


def pops_words(prediction, reference):
    result = l_from(common_table)(prediction, reference)
    prediction.pop()
    return result


WRONG_ROUGE_L = {
    "You count shared words in any order": l_from(lambda a, b: (Counter(a) & Counter(b)).total()),
    "different shared words": l_from(lambda a, b: len(set(a) & set(b)) if a != b else len(a)),
    "longest run of neighbours": l_from(longest_run),
    "each word where it is first found": l_from(first_found),
    "word of the reference where it is first found": l_from(lambda a, b: first_found(b, a)),
    "Precision and recall are swapped": l_from(common_table, swap=True),
    "no plain mean": l_from(common_table, f=lambda p, r: (p + r) / 2),
    "make an F1 of": l_from(common_table, f=lambda p, r: (p * r) ** 0.5),
    "F1 is 1 too; yours is 0.5": l_from(common_table, f=lambda p, r: p * r / (p + r)),
    "A text and itself have precision": l_from(lambda a, b: common_table(a[1:], b)),
    "you divide by zero": l_from(common_table, f=lambda p, r: 2 * p * r / (p + r), guard=False),
    "share nothing, so all three": lambda a, b: l_from(common_table)(a, b) if set(a) & set(b) else (0, 0, 1),
    "Return three numbers": lambda a, b: common_table(a, b),
    "changes the lists": pops_words,
    "more than 50,000 comparisons": l_from(common_slow),
    "The longest common subsequence of": l_from(lambda a, b: 1 if len(a) == 11 else common_table(a, b)),
    "P, R and F1 are": l_from(lambda a, b: common_table(a, b) + ("a" in a and "c" in b)),
}


# --- week 2: the flaws -------------------------------------------------------------------------------------------


def grouped(rows, before, after):
    groups = {}
    for row, b, a in zip(rows, before, after, strict=True):
        groups.setdefault(row["dialogue"], (b, a, []))[2].append(row["summary"])
    return groups.values()


def gains(rows, before, after, *, score=rouge):
    old, new, references = zip(*grouped(rows, before, after), strict=True)
    return score(new, references) - score(old, references)


def gain(rows, before, after):
    values = gains(rows, before, after)
    return values.mean(), bootstrap_interval(values)


def with_interval(values_of):
    def answer(rows, before, after):
        values = np.asarray(values_of(rows, before, after))
        return values.mean(), bootstrap_interval(values)

    return answer


def by_row(rows, before, after):
    references = [row["summary"] for row in rows]
    return rouge(after, references) - rouge(before, references)


def each_reference(combine):
    def values(rows, before, after):
        return [
            combine(rouge([a] * len(refs), refs) - rouge([b] * len(refs), refs))
            for b, a, refs in grouped(rows, before, after)
        ]

    return with_interval(values)


def best_of_each_row(rows, before, after):
    references = {}
    for row in rows:
        references.setdefault(row["dialogue"], []).append(row["summary"])
    several = [references[row["dialogue"]] for row in rows]
    return rouge(after, several) - rouge(before, several)


def neighbours_only(rows, before, after):
    """Groups rows that stand together, as itertools.groupby does."""
    kept = [i for i, row in enumerate(rows) if not i or row["dialogue"] != rows[i - 1]["dialogue"]]
    return by_row([rows[i] for i in kept], [before[i] for i in kept], [after[i] for i in kept])


def unpaired(rows, before, after):
    old, new, references = zip(*grouped(rows, before, after), strict=True)
    low, high = bootstrap_interval(rouge(new, references))
    start, end = bootstrap_interval(rouge(old, references))
    return gain(rows, before, after)[0], (low - end, high - start)


WRONG_GAINS = {
    "Still one value a row": with_interval(by_row),
    "still ten values": with_interval(best_of_each_row),
    "drop the others": each_reference(lambda values: values[0]),
    "average over the references": each_reference(np.mean),
    "largest gain": each_reference(np.max),
    "sign is turned": lambda rows, before, after: gain(rows, after, before),
    "as narrow as if there were more": lambda rows, b, a: (gain(rows, b, a)[0], bootstrap_interval(best_of_each_row(rows, b, a) + 0.035)),
    "wider than these four differences allow": unpaired,
    "Return the mean and a pair": lambda rows, b, a: gain(rows, b, a)[0],
    "lies outside": lambda rows, b, a: (gain(rows, b, a)[0], (0.2, 0.3)),
    "The four dialogues gain": lambda rows, b, a: (gain(rows, b, a)[0] + 0.01, gain(rows, b, a)[1]),
    "All 256 resamples": lambda rows, b, a: (gain(rows, b, a)[0], tuple(x + 0.06 for x in gain(rows, b, a)[1])),
}  # fmt: skip


def test_rows_that_stand_apart_are_not_taken_for_dialogues():
    with pytest.raises(ExerciseError, match="Still one value a row"):
        check_gain(with_interval(neighbours_only))


def collate(examples, pad_id, *, label=-100, mask_from_ids=False, labels_from_ids=False, mask=0, inputs=None):
    longest = max(len(e["input_ids"]) for e in examples)
    missing = [longest - len(e["input_ids"]) for e in examples]
    fill = pad_id if inputs is None else inputs
    ids = torch.tensor([e["input_ids"] + [fill] * n for e, n in zip(examples, missing, strict=True)])
    padded = [[e["labels"], [pad_id if label is None else label] * n] for e, n in zip(examples, missing, strict=True)]
    labels = torch.tensor([own + more for own, more in padded])
    masks = torch.tensor([[1] * len(e["input_ids"]) + [mask] * n for e, n in zip(examples, missing, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != pad_id).long() if mask_from_ids else masks,
        "labels": labels.masked_fill(ids == pad_id, -100) if labels_from_ids else labels,
    }


def collate_with_pad_sequence(examples, pad_id):
    def pad(key, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(e[key]) for e in examples], True, value)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e["labels"])) for e in examples], True)
    return {"input_ids": pad("input_ids", pad_id), "attention_mask": mask, "labels": pad("labels", -100)}


def pads_in_place(examples, pad_id):
    batch = collate(examples, pad_id)
    for example in examples:
        example["labels"] += [-100]
    return batch


def on_the_left(examples, pad_id, names=("input_ids", "labels")):
    batch = collate(examples, pad_id)
    for name in names:
        for i, example in enumerate(examples):
            batch[name][i] = batch[name][i].roll(8 - len(example["labels"]))
    return batch


def all_learned(examples, pad_id):
    batch = collate(examples, pad_id)
    return batch | {"labels": torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)}


def other_labels(examples, pad_id):
    batch = collate(examples, pad_id)
    batch["labels"][0, 4] = 7
    return batch


def reversed_mask(examples, pad_id):
    batch = collate(examples, pad_id)
    batch["attention_mask"][0, 6] = 1
    return batch


WRONG_COLLATES = {
    "labels are still padded with 2: 6 of the 16": functools.partial(collate, label=None),
    "padded with 0, which cross-entropy takes": functools.partial(collate, label=0),
    "lost the label of their last token": functools.partial(collate, labels_from_ids=True),
    "hides real tokens": functools.partial(collate, mask_from_ids=True),
    "mask is 1 on padding too": functools.partial(collate, mask=1),
    "attention mask must be 1 on the tokens": reversed_mask,
    "looks every input up": functools.partial(collate, inputs=-100),
    "changes the examples": pads_in_place,
    "You pad on the left": on_the_left,
    "padded on the left, the inputs": functools.partial(on_the_left, names=("labels",)),
    "not their own any more": other_labels,
    "prompts are learned now": all_learned,
    "own tokens with padding after them": functools.partial(collate, inputs=5),
    r"shape \(3, 8\).*list came": lambda examples, pad: {k: v.tolist() for k, v in collate(examples, pad).items()},
    "dictionary with input_ids": lambda examples, pad: collate(examples, pad)["labels"],
}


def ids_at_test(tokenizer, dialogue):
    return encode(tokenizer, summary_prompt(dialogue))


def from_training(tokenizer, dialogue):
    example = encode_example(tokenizer, summary_prompt(dialogue), "A.")
    return [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]


def as_plain_text(tokenizer, dialogue):
    return tokenizer(summary_prompt(dialogue)[0]["content"] + "\n\nsummary :", add_special_tokens=False).input_ids


WRONG_IDS = {
    "no special token at all": as_plain_text,
    r"training reads on: '<s> ?summary ?:'": lambda t, d: t.apply_chat_template(summary_prompt(d), return_dict=True).input_ids,
    "The answer is in your prompt": lambda t, d: encode_example(t, summary_prompt(d), "the cat sat on the mat")["input_ids"],
    "goes on with 'the'": lambda t, d: [*ids_at_test(t, d), *t("the", add_special_tokens=False).input_ids],
    "writes its own": lambda t, d: [t.bos_token_id, *ids_at_test(t, d)],
    "From token": lambda t, d: encode(t, summary_prompt(d, template="question")),
    "list of token ids": lambda t, d: torch.tensor(ids_at_test(t, d)),
}  # fmt: skip
WRONG_PLAIN_IDS = {
    "training reads on": lambda t, d: encode(t, summary_prompt(d))[:-1],
    "The answer is in your prompt": lambda t, d: encode_example(t, summary_prompt(d), "the cat sat on the mat")[
        "input_ids"
    ],
    "goes on with 'the'": lambda t, d: [*ids_at_test(t, d), *t("the", add_special_tokens=False).input_ids],
    "From token": lambda t, d: encode(t, summary_prompt(d, template="question")),
    "list of token ids": lambda t, d: summary_prompt(d)[0]["content"],
}


def before_and_after(model, train, score):
    before = score(model)
    return before, score(train(copy.deepcopy(model)))


def copy_kept(model, train, score):
    own = copy.deepcopy(model)
    trained = train(own)
    return score(model), score(trained)


def shallow(model, train, score):
    tuned = train(copy.copy(model))
    return score(model), score(tuned)


def restored(model, train, score, *, clone):
    """Keeps the weights and puts them back."""
    kept = {name: value.clone() if clone else value for name, value in model.state_dict().items()}
    before = score(model)
    after = score(train(model))
    model.load_state_dict(kept, strict=False)
    return before, after


WRONG_BEFORES = {
    "Both scores are those of the trained model.*in place": lambda m, train, score: (score(train(m)), score(m)),
    "Both scores are those of the trained model.*adapter": lambda m, train, score: (
        (score(m), score(train(copy.deepcopy(m)))) if not adapter_trained(train) else (score(train(m)), score(m))
    ),
    "of the model before training": lambda m, train, score: (score(m), [train(copy.deepcopy(m)), score(m)][1]),
    "swapped": lambda m, train, score: before_and_after(m, train, score)[::-1],
    "`copy.copy` and `state_dict` share": functools.partial(restored, clone=False),
    "still carries it": functools.partial(restored, clone=True),
    "never called": lambda m, train, score: (score(m), score(m)),
    "called 2 times": lambda m, train, score: (score(m), score(train(train(copy.deepcopy(m))))),
    "Return two numbers": lambda m, train, score: score(train(copy.deepcopy(m))) - score(m),
    "the scores are 2 and 8": lambda m, train, score: (score(m), score(train(copy.deepcopy(m))) + 1),
}


def adapter_trained(train):
    return train.__name__ == "with_adapter"


def test_a_shallow_copy_is_no_copy():
    with pytest.raises(ExerciseError, match="Both scores are those of the trained model"):
        check_before_and_after(shallow)


# --- all of them -------------------------------------------------------------------------------------------------

TOKENIZERS = {"chat": make_tokenizer(pad_is_eos=True, chat=True), "plain": make_tokenizer(pad_is_eos=True, chat=False)}


def check_both_neighbours(answer):
    return check_neighbours(*answer)


def fitting_of(kind):
    return functools.partial(check_fitting, tokenizer=TOKENIZERS[kind])


def ids_of(kind):
    return functools.partial(check_ids_at_test, tokenizer=TOKENIZERS[kind])


def own(*names, week="week1"):
    """The solution of the committed notebook, read when the test runs."""
    return lambda: solution(week, names[0]) if len(names) == 1 else tuple(solution(week, name) for name in names)


EXERCISES = {  # name: its check, right answers, wrong answers
    "neighbours": (check_both_neighbours, {"torch": lambda: (cosine, nearest), "own": own("cosine_similarity", "nearest")}, WRONG_NEIGHBOURS),
    "attention": (check_attention, {"by hand": lambda: attention}, WRONG_ATTENTION),
    "rotary": (check_rotary, {"by hand": lambda: rotary}, WRONG_ROTARY),
    "parameter count": (check_parameter_count, {"by hand": lambda: count}, WRONG_COUNTS),
    "shots": (check_shots, {"in order": lambda: shots, "own": own("choose_shots")}, WRONG_SHOTS),
    "fitting, chat": (fitting_of("chat"), {"by search": lambda: fitting, "own": own("shots_that_fit")}, WRONG_FITS),
    "fitting, plain": (fitting_of("plain"), {"by search": lambda: fitting, "own": own("shots_that_fit")}, WRONG_FITS),
    "top-p": (check_top_p, {"descending": lambda: top_p, "ascending": lambda: ascending_top_p, "own": own("top_p")}, WRONG_TOP_P),
    "next-token loss": (check_next_token_loss, {"cross_entropy": lambda: shifted_loss, "by hand": lambda: by_hand_loss}, WRONG_LOSSES),
    "cheapest": (check_cheapest, {"grid": lambda: cheapest}, WRONG_CHEAPEST),
    "rouge-l": (check_rouge_l, {"table": lambda: l_from(common_table), "remembered": lambda: l_from(common_remembered), "own": own("rouge_l", week="week2")}, WRONG_ROUGE_L),
    "flaw, rows": (check_gain, {"grouped": lambda: gain, "own": own("gain", week="week2")}, WRONG_GAINS),
    "flaw, padding": (check_collate, {"lists": lambda: collate, "pad_sequence": lambda: collate_with_pad_sequence, "own": own("collate", week="week2")}, WRONG_COLLATES),
    "flaw, prompts, chat": (ids_of("chat"), {"encode": lambda: ids_at_test, "training": lambda: from_training, "own": own("ids_at_test", week="week2")}, WRONG_IDS),
    "flaw, prompts, plain": (ids_of("plain"), {"encode": lambda: ids_at_test, "training": lambda: from_training, "own": own("ids_at_test", week="week2")}, WRONG_PLAIN_IDS),
    "flaw, in place": (check_before_and_after, {"copy": lambda: before_and_after, "kept": lambda: copy_kept, "own": own("before_and_after", week="week2")}, WRONG_BEFORES),
}  # fmt: skip


@pytest.mark.parametrize(("name", "which"), [(name, which) for name in EXERCISES for which in EXERCISES[name][1]])
def test_a_right_answer_passes(name, which):
    check, right, _ = EXERCISES[name]
    assert check(right[which]()).startswith("Right: ")


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in EXERCISES for words in EXERCISES[name][2]])
def test_a_wrong_answer_is_told_what_is_wrong(name, words):
    check, _, wrong = EXERCISES[name]
    with pytest.raises(ExerciseError, match=words):
        check(wrong[words])


@pytest.mark.parametrize("name", EXERCISES)
def test_every_flaw_has_its_own_message(name):
    check, _, wrong = EXERCISES[name]
    messages = []
    for answer in wrong.values():
        with pytest.raises(ExerciseError) as caught:
            check(answer)
        messages.append(str(caught.value))
    matched = {words: [message for message in messages if re.search(words, message)] for words in wrong}
    assert len(wrong) >= 4
    assert {words: found for words, found in matched.items() if len(found) != 1} == {}


@pytest.mark.parametrize("name", EXERCISES)
def test_an_answer_that_is_not_written_yet_is_told_so(name):
    answer = (not_written, not_written) if name == "neighbours" else not_written
    with pytest.raises(ExerciseError, match="not_written is not written yet"):
        EXERCISES[name][0](answer)


# A check with one line broken either lets a wrong answer pass or tells a right one that it is wrong.
BROKEN_CHECKS = [
    ("longest common subsequence by its first word only", "for size in range(min(len(a), len(b)), 0, -1):", "for size in range(1, 2):", "rouge-l"),
    ("oracle takes a subsequence in any order", "all(word in rest for word in words)", "all(word in b for word in words)", "rouge-l"),
    ("too few comparisons allowed", "compared, allowed = 0, 50_000", "compared, allowed = 0, 10", "rouge-l"),
    ("mean over rows passes", "require(not is_mean(single)", "require(True or not is_mean(single)", "flaw, rows"),
    ("interval over rows passes", "near(right) or not high - low < 0.8 *", "near(right) or not high - low < 0.0 *", "flaw, rows"),
    ("padding may be learned", "not (filling == end).any(),", "True,", "flaw, padding"),
    ("the end of an answer may be lost", "kept = labels[real & (padded(\"labels\", 0) == end)]", "kept = labels[:0]", "flaw, padding"),
    ("any prompt will do", "if got == expected:", "if True:", "flaw, prompts, chat"),
    ("weights may change", "all(torch.equal(left[name], value) for name, value in weights.items())", "True", "flaw, in place"),
    ("train may be called twice", "require(len(calls) == 1,", "require(True,", "flaw, in place"),
]  # fmt: skip


@pytest.mark.parametrize(("search", "replacement", "name"), [row[1:] for row in BROKEN_CHECKS], ids=[row[0] for row in BROKEN_CHECKS])  # fmt: skip
def test_a_broken_check_is_noticed(search, replacement, name):
    broken = broken_copy(exercises, search, replacement)
    original, right, wrong = EXERCISES[name]
    inner = original.func if isinstance(original, functools.partial) else original
    check = getattr(broken, inner.__name__)
    if isinstance(original, functools.partial):
        check = functools.partial(check, **original.keywords)

    def verdict_of(answer):
        try:
            return check(answer)
        except exercises.ExerciseError as error:
            return str(error)

    passes = all(verdict_of(make()).startswith("Right: ") for make in right.values())
    told = all(re.search(words, verdict_of(answer)) for words, answer in wrong.items())
    assert not (passes and told)
