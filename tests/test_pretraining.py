"""Objectives against transformers' own, spans against the T5 paper, likelihoods against unbatched ones, and mutations.

Each check takes the module, so that the same check runs on the real one and on copies with one line broken: a break that no
check notices would be one that a learner's numbers would not show either.
"""

import importlib.util
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorForLanguageModeling

import utils.pretraining as pretraining
from utils.data import load_dialogues
from utils.lab import LabError
from utils.models import DECODER, ENCODER, ENCODER_DECODER, load_model
from utils.prompts import IGNORED

FAMILIES = (ENCODER, DECODER, ENCODER_DECODER)
TEXTS = [row["dialogue"] for row in load_dialogues(split="validation")][:12]


@pytest.fixture(scope="session")
def tokenizer():
    return pretraining.train_tokenizer(TEXTS, 420)


@pytest.fixture(scope="session")
def small_models(tokenizer):
    """A model of each family with two layers of width 64, its weights made larger so that what it sees matters."""
    models = {}
    for family in FAMILIES:
        model = pretraining.make_model(family, tokenizer, width=64, layers=2, seed=1).eval()
        if family != ENCODER_DECODER:
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.data.mul_(6)
        models[family] = model
    return models


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Equalities to 1e-3 are of the arithmetic, not of bfloat16."""
    monkeypatch.setattr(pretraining, "choose_dtype", lambda device: torch.float32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(tokenizer, *shape, seed=0):
    return torch.randint(40, len(tokenizer), shape, generator=seeded(seed))


def additive(visible):
    """A mask of true and false as what is added to attention scores."""
    return torch.zeros(visible.shape).masked_fill(~visible, -1e9)


# --- checks: each takes the module and raises AssertionError where it is wrong -----------------------------------


def check_masking_statistics(module, tokenizer, models):
    """Shares of chosen, masked, random and kept tokens are those of transformers' collator."""
    ids = random_ids(tokenizer, 64, 1024)

    def shares(inputs, labels):
        chosen = labels != IGNORED
        masked, kept = inputs[chosen] == tokenizer.mask_token_id, inputs[chosen] == ids[chosen]
        return [float(x.float().mean()) for x in (chosen, masked, kept, ~masked & ~kept)]

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    theirs = shares(*collator.torch_mask_tokens(ids.clone(), torch.zeros_like(ids, dtype=torch.bool)))
    ours = shares(
        *module.mask_tokens(ids, mask_id=tokenizer.mask_token_id, vocabulary=len(tokenizer), generator=seeded())
    )
    # Five standard errors: about 65,000 tokens, of which about 9,800 are chosen
    assert ours == pytest.approx(theirs, abs=0.02)
    assert ours[0] == pytest.approx(theirs[0], abs=0.007)


def check_mask_labels(module, tokenizer, models):
    """Labels are the hidden tokens, everything else is left alone, special tokens are never chosen."""
    ids = random_ids(tokenizer, 8, 128)
    ids[:, ::7] = tokenizer.eos_token_id
    before = ids.clone()
    inputs, labels = module.mask_tokens(
        ids,
        mask_id=tokenizer.mask_token_id,
        vocabulary=len(tokenizer),
        never=tokenizer.all_special_ids,
        share=0.5,
        generator=seeded(),
    )
    chosen = labels != IGNORED
    assert torch.equal(ids, before), "mask_tokens changed the ids it was given"
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[:, ::7].any()
    assert (inputs[chosen] != ids[chosen]).any()


def check_next_token(module, tokenizer, models):
    """The loss with these labels is the loss that transformers' decoder gives itself."""
    ids = random_ids(tokenizer, 3, 20)
    inputs, labels = module.next_token(ids)
    assert labels.shape == ids.shape
    with torch.no_grad():
        logits = module.labelled_logits(models[DECODER], {"input_ids": inputs}, labels)
        theirs = models[DECODER](input_ids=ids, labels=ids).loss
    assert F.cross_entropy(logits, labels[labels != IGNORED]).item() == pytest.approx(theirs.item(), abs=1e-5)


def check_spans_rebuild(module, tokenizer, models):
    """Inputs plus targets give the text back; nothing that is hidden stands in the inputs."""
    sentinels = tokenizer.convert_tokens_to_ids(module.SENTINELS)
    for length, seed in itertools.product((2, 3, 7, 40, 128), range(4)):
        ids = torch.arange(1000, 1000 + length).repeat(2, 1)  # every token once: a lost or moved one is seen
        inputs, targets = module.corrupt_spans(
            ids, sentinels=sentinels, eos_id=tokenizer.eos_token_id, generator=seeded(seed)
        )
        for row, source, target in zip(ids.tolist(), inputs.tolist(), targets.tolist(), strict=True):
            rebuilt = module.fill_spans(source, target[:-1], sentinels=sentinels)
            assert rebuilt == row, f"length {length}: {rebuilt} is not the text"
            assert target[-1] == tokenizer.eos_token_id
            names = [token for token in target if token in sentinels]
            assert names == sentinels[: len(names)], "sentinels in the targets are not in order"
            assert [token for token in source if token in sentinels] == names[:-1], "the last sentinel only closes"
            assert not set(source) & set(target) - set(sentinels)


def check_spans_as_in_the_paper(module, tokenizer, models):
    """Figure 2 of Raffel et al. 2020, word for word."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    ids, x, y, z, eos = torch.arange(len(words)), 100, 101, 102, 1000
    hidden = torch.tensor([word in ("for", "inviting", "last") for word in words])
    names = {x: "<X>", y: "<Y>", z: "<Z>", eos: "</s>"}
    inputs, targets = module.cut_spans(ids, hidden, sentinels=[x, y, z, 103], eos_id=eos)

    def text(row):
        return " ".join(names.get(i) or words[i] for i in row.tolist())

    assert text(inputs) == "Thank you <X> me to your party <Y> week ."
    assert text(targets) == "<X> for inviting <Y> last <Z> </s>"


def check_span_statistics(module, tokenizer, models):
    """15 % of the tokens in spans of 3 on average; all ways to lay them out equally likely (T5's own scheme)."""
    hidden = module.draw_spans(200, generator=seeded())
    starts = hidden & ~torch.cat([torch.tensor([False]), hidden[:-1]])
    assert (int(hidden.sum()), int(starts.sum())) == (30, 10)
    generator = seeded()
    seen = Counter(
        tuple(module.draw_spans(8, share=0.5, mean_span=2.0, generator=generator).tolist()) for _ in range(1800)
    )
    # 4 hidden in 2 spans and 4 visible in 2 gaps: 3 x 3 layouts, 200 times each expected, standard deviation 13
    assert len(seen) == 9
    assert max(abs(count - 200) for count in seen.values()) < 65
    assert not any(layout[0] for layout in seen), "the first token is hidden"


def check_shift_right(module, tokenizer, models):
    """As T5's own."""
    labels = random_ids(tokenizer, 2, 9)
    labels[1, 6:] = IGNORED
    assert torch.equal(module.shift_right(labels, 0, 0), models[ENCODER_DECODER]._shift_right(labels))


def check_losses(module, tokenizer, models):
    """Masked and span losses through `labelled_logits` are those transformers computes from labels."""
    ids = random_ids(tokenizer, 4, 48)
    for family in (ENCODER, ENCODER_DECODER):
        inputs, labels = module.objective(family, tokenizer)(ids, seeded(3))
        given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        with torch.no_grad():
            theirs = models[family](**given, labels=labels).loss.item()
            ours = F.cross_entropy(
                module.labelled_logits(models[family], inputs, labels), labels[labels != IGNORED]
            ).item()
        assert ours == pytest.approx(theirs, abs=1e-4), family


def check_prefix_mask(module, tokenizer, models):
    """A prefix sees all of itself, nothing else sees the future, and no prefix is transformers' causal mask."""
    prefix = torch.tensor([3, 0, 2])
    mask = module.prefix_mask(prefix, 6)
    for b, i, j in itertools.product(range(3), range(6), range(6)):
        assert bool(mask[b, 0, i, j]) == (j <= i or j < int(prefix[b])), f"row {i} and column {j} of sequence {b}"
    model, ids = models[DECODER], random_ids(tokenizer, 1, 6)
    with torch.no_grad():
        causal = model(input_ids=ids).logits
        masked = model(input_ids=ids, attention_mask=additive(module.prefix_mask(torch.tensor([0]), 6))).logits
        other = ids.clone()
        other[0, 2] = ids[0, 2] - 1
        seen = additive(module.prefix_mask(torch.tensor([3]), 6))
        change = model(input_ids=ids, attention_mask=seen).logits - model(input_ids=other, attention_mask=seen).logits
    assert torch.allclose(causal, masked, atol=1e-4)
    assert change[0, 0].abs().max() > 1e-4, "the first token does not see the end of its prefix"


def check_endings(module, tokenizer, models):
    """Batched scores are the unbatched sums of log-probabilities; the encoder's hides one token at a time."""
    draw = random.Random(0)
    ids = random_ids(tokenizer, 400).tolist()
    pairs = [
        (ids[i * 30 : i * 30 + draw.randint(2, 12)], ids[i * 30 + 15 : i * 30 + 16 + draw.randint(0, 6)])
        for i in range(5)
    ]
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for family in FAMILIES:
        model = models[family]
        ours = module.ending_logprobs(model, tokenizer, pairs, batch_size=3)
        for (context, ending), total in zip(pairs, ours, strict=True):
            with torch.no_grad():
                if family == DECODER:
                    labels = torch.tensor([[IGNORED] * len(context) + ending])
                    expected = -model(input_ids=torch.tensor([context + ending]), labels=labels).loss * len(ending)
                elif family == ENCODER_DECODER:
                    start = torch.tensor([[0, sentinel, *ending[:-1]]])
                    logits = model(input_ids=torch.tensor([[*context, sentinel]]), decoder_input_ids=start).logits
                    expected = -F.cross_entropy(logits[0, 1:], torch.tensor(ending), reduction="sum")
                else:
                    expected = torch.tensor(0.0)
                    for i, token in enumerate(ending):
                        whole = torch.tensor([context + ending])
                        whole[0, len(context) + i] = tokenizer.mask_token_id
                        expected += model(input_ids=whole).logits[0, len(context) + i].log_softmax(-1)[token]
            assert total == pytest.approx(float(expected), abs=1e-3), family


def check_hidden_words(module, tokenizer, models):
    """Each family's distribution at the hidden place, from what it may see."""
    hidden = module.hide_words(tokenizer, [line for text in TEXTS[:6] for line in text.split("\n")])
    assert len(hidden) > 10
    for item in hidden:
        assert len(item.left) >= 3
        assert tokenizer.decode([item.word]).strip().isalpha()
    item = hidden[0]
    mask, sentinel = tokenizer.mask_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")
    with torch.no_grad():
        expected = {
            ENCODER: models[ENCODER](input_ids=torch.tensor([[*item.left, mask, *item.right]])).logits[
                0, len(item.left)
            ],
            DECODER: models[DECODER](input_ids=torch.tensor([item.left])).logits[0, -1],
            ENCODER_DECODER: models[ENCODER_DECODER](
                input_ids=torch.tensor([[*item.left, sentinel, *item.right]]),
                decoder_input_ids=torch.tensor([[0, sentinel]]),
            ).logits[0, -1],
        }
    for family in FAMILIES:
        ours = module.word_logprobs(models[family], tokenizer, hidden, batch_size=7)
        assert ours.shape == (len(hidden), len(tokenizer))
        assert torch.allclose(ours[0], expected[family].log_softmax(-1), atol=1e-3), family


def check_pair_rows(module, tokenizer, models):
    """A decoder learns the target and nothing of the source, and writes as an unbatched loop with its mask would."""
    source, target = "the dog saw the boat", "mira navu grasi"
    row = module.pair_row(DECODER, tokenizer, source, target)
    labels = [token for token in row["labels"] if token != IGNORED]
    assert labels == [*tokenizer(target).input_ids, tokenizer.eos_token_id]
    first = row["labels"].index(labels[0])
    assert first == row["prefix"] - 1, "the last token of the prefix predicts the first of the target"
    assert row["input_ids"][row["prefix"] :] == labels[:-1]
    assert module.pair_row(ENCODER_DECODER, tokenizer, source, target)["labels"] == labels
    texts = module.write_after_prefix(models[DECODER], tokenizer, [source, "the old child"], max_new_tokens=4)
    for text, start in zip(texts, [source, "the old child"], strict=True):
        ids = [*tokenizer(start).input_ids, tokenizer.eos_token_id]
        prefix, written = len(ids), []
        while len(written) < 4 and tokenizer.eos_token_id not in written:
            n = len(ids)
            visible = torch.ones(n, n).tril().bool()
            visible[:, :prefix] = True
            with torch.no_grad():
                mask = additive(visible[None, None])
                logits = models[DECODER](input_ids=torch.tensor([ids]), attention_mask=mask).logits
            written.append(int(logits[0, -1].argmax()))
            ids.append(written[-1])
        assert text == tokenizer.decode(written, skip_special_tokens=True).strip()


def check_boundaries(module, tokenizer, models):
    """Labels stand on the last token of each word and say where a sentence ended; the text does not give it away."""
    text = 'The shop, he said, was "shut." Why? Nobody knew! It rained.'
    row = module.boundary_row(tokenizer, text)
    assert len(row["input_ids"]) == len(row["labels"])
    bare = tokenizer.decode(row["input_ids"]).split()
    assert bare == ["the", "shop,", "he", "said,", "was", '"shut', "why", "nobody", "knew", "it", "rained"]
    labels = [label for label in row["labels"] if label != IGNORED]
    assert labels == [0, 0, 0, 0, 0, 1, 1, 0, 1, 0], "one for each word but the last"
    places = [i for i, label in enumerate(row["labels"]) if label == 1]
    assert [tokenizer.decode(row["input_ids"][: i + 1]).split()[-1] for i in places] == ['"shut', "why", "knew"]


def check_constructed_language(module, tokenizer, models):
    """Order, agreement and plural by a parser written apart from the grammar; held-out combinations in one part only."""
    train, test = module.constructed_pairs(1500), module.constructed_pairs(150, held_out=True)
    nouns = {own: english for english, own in module.NOUNS.items()}
    adjectives = {own: english for english, own in module.ADJECTIVES.items()}
    verbs = {own: english for english, own in module.VERBS.items()}
    combinations = []
    for pairs in (train, test):
        seen = set()
        for english, own in pairs:
            verb, *rest = own.split()
            phrases = []
            for word in rest:
                if word in adjectives:
                    phrases[-1][1] = adjectives[word]
                else:
                    many = word not in nouns
                    phrases.append([nouns[word[:-1] if many else word], None, many])
            (thing, thing_adjective, thing_many), (subject, adjective, many) = phrases
            assert verb[-1] == ("u" if many else "a"), f"{own}: the verb does not agree with its subject"
            words = []
            for noun, adjective_of, several in ((subject, adjective, many), (thing, thing_adjective, thing_many)):
                plural = ("children" if noun == "child" else noun + "s") if several else noun
                words.append(" ".join(filter(None, ["the", adjective_of, plural])))
            assert english == f"{words[0]} {verbs[verb[:-1]]} {words[1]}"
            seen.add((verbs[verb[:-1]], thing))
        combinations.append(seen)
    assert not combinations[0] & combinations[1], "a held-out combination is in the training part"
    assert {v for v, _ in combinations[1]} <= {v for v, _ in combinations[0]}
    assert {n for _, n in combinations[1]} <= {n for _, n in combinations[0]}
    assert len({english for english, _ in train}) == 1500


def check_the_loop(module, tokenizer, models):
    """Three steps end at the weights that torch's own pieces, put together by hand, end at."""
    torch.manual_seed(0)
    ids = random_ids(tokenizer, 8, 24)
    make = module.objective(DECODER, tokenizer)
    ours = pretraining.make_model(DECODER, tokenizer, width=32, layers=1)
    theirs = pretraining.make_model(DECODER, tokenizer, width=32, layers=1)
    batches = []

    def draw(generator):
        batches.append(make(ids[len(batches) * 2 : len(batches) * 2 + 2], generator))
        return batches[-1]

    losses = module.train_model(ours, draw, steps=4, learning_rate=0.01, warmup_share=0.5)
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    expected = []
    for (inputs, labels), rate in zip(batches, [0.005, 0.01, 0.01, 0.005], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits = theirs(input_ids=inputs["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0]
    assert not ours.training


def check_drawing(module, tokenizer, models):
    """Every row once before any comes again."""
    draw = module.draw_from(torch.arange(10)[:, None], 4, lambda rows, _: ({"input_ids": rows}, rows))
    generator = seeded()
    drawn = [int(i) for _ in range(5) for i in draw(generator)[1]]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def check_flops(module, tokenizer, models):
    """A decoder's step by hand: two operations a weight and token forward, twice that backward, and attention."""
    ids = random_ids(tokenizer, 2, 32)
    model, (inputs, labels) = models[DECODER], module.next_token(ids)
    matrices = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
    tokens, length, width = ids.numel(), ids.shape[1], model.config.hidden_size
    forward = 2 * tokens * matrices + 2 * (tokens - 2) * width * len(tokenizer)
    forward += 2 * 2 * tokens * length * width * model.config.num_hidden_layers  # scores, and values
    assert module.training_flops(model, ({"input_ids": inputs}, labels)) == pytest.approx(3 * forward, rel=0.02)
    assert all(p.grad is None for p in model.parameters())


def check_packing(module, tokenizer, models):
    """The blocks are the texts, each closed by EOS, and nothing is lost but the last rest."""
    blocks = module.pack(tokenizer, TEXTS, 16)
    text = tokenizer.decode(blocks.flatten().tolist())
    assert "</s>".join(TEXTS).startswith(text.removesuffix("</s>"))
    assert blocks.shape[1] == 16
    assert text.count("</s>") >= len(TEXTS) - 1


CHECKS = {name: function for name, function in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, tokenizer, small_models):
    CHECKS[name](pretraining, tokenizer, small_models)


# --- mutations: one line broken, and the check that must notice ---------------------------------------------------

MUTATIONS = [
    ("chosen & (dice < 0.8), mask_id", "chosen, mask_id", "check_masking_statistics"),
    ("dice >= 0.9", "dice >= 0.8", "check_masking_statistics"),
    ("torch.rand(ids.shape, generator=generator) < share", "torch.rand(ids.shape, generator=generator) < share * 0.9",
     "check_masking_statistics"),
    ("labels = torch.where(chosen, ids, IGNORED)", "labels = torch.where(~chosen, ids, IGNORED)", "check_mask_labels"),
    ("labels = torch.where(chosen, ids, IGNORED)", "labels = ids.clone()", "check_mask_labels"),
    ("chosen &= ~torch.isin(", "chosen &= torch.isin(", "check_mask_labels"),
    ("torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)", "ids.clone()", "check_next_token"),
    ("torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], 1)",
     "torch.cat([torch.full_like(ids[:, :1], IGNORED), ids[:, :-1]], 1)", "check_next_token"),
    ("names[span], ids)[~hidden | starts]", "names[span], ids)[~hidden]", "check_spans_rebuild"),
    ("names[span], ids)[~hidden | starts]", "names[span], ids)", "check_spans_rebuild"),
    ("names[k : k + 1], ids[hidden", "names[0:1], ids[hidden", "check_spans_rebuild"),
    ("names[k : k + 1], ids[hidden", "names[k : k + 1], ids[~hidden", "check_spans_as_in_the_paper"),
    ("[sentinels[n_spans], eos_id]", "[eos_id]", "check_spans_as_in_the_paper"),
    ("repeat_interleave(torch.tensor([False, True])", "repeat_interleave(torch.tensor([True, False])",
     "check_span_statistics"),
    ("round(n_hidden / mean_span)", "round(n_hidden)", "check_span_statistics"),
    ("torch.randperm(items - 1, generator=generator)[: n_spans - 1] + 1).sort()",
     "torch.arange(items - 1)[: n_spans - 1] + 1).sort()", "check_span_statistics"),
    ("targets[:, :-1]], 1)\n    return shifted", "targets[:, 1:]], 1)\n    return shifted", "check_shift_right"),
    ("shifted.masked_fill(shifted == IGNORED, pad_id)", "shifted", "check_shift_right"),
    ("last_hidden_state[keep]))", "last_hidden_state[:, :-1][keep[:, 1:]]))", "check_losses"),
    ("place[None, :] <= place[:, None]", "place[None, :] >= place[:, None]", "check_prefix_mask"),
    ("place[None, :] <= place[:, None]", "place[None, :] < place[:, None]", "check_prefix_mask"),
    ("masked_fill(~visible, torch.finfo", "masked_fill(visible, torch.finfo", "check_pair_rows"),
    ("(place < prefix[:, None])[:, None, :]", "(place < prefix[:, None])[:, :, None]", "check_prefix_mask"),
    ("ids = [*whole[:i], tokenizer.mask_token_id, *whole[i + 1 :]]", "ids = whole", "check_endings"),
    ("[IGNORED] * (len(context) - 1) + ending", "[IGNORED] * len(context) + ending[1:]", "check_endings"),
    ("totals[owners[i]] += value", "totals[owners[i]] = value", "check_endings"),
    ("        labels[labels == sentinel] = IGNORED\n        for", "        for", "check_endings"),
    ("ids = [*item.left, tokenizer.mask_token_id, *item.right]", "ids = [*item.left, item.word, *item.right]",
     "check_hidden_words"),
    ("ids, labels = [*item.left, sentinel, *item.right]", "ids, labels = [*item.left, sentinel]", "check_hidden_words"),
    ("[IGNORED] * (len(prefix) - 1) + target_ids", "[*source_ids] + target_ids", "check_pair_rows"),
    ("            \"prefix\": len(texts[i]),\n        ", "                \"prefix\": 0,\n            ", "check_pair_rows"),
    ("[IGNORED] * (len(ids) - 1) + [int(ends)]", "[int(ends)] + [IGNORED] * (len(ids) - 1)", "check_boundaries"),
    ("tokenizer(\" \" + bare.lower())", "tokenizer(\" \" + bare)", "check_boundaries"),
    ("tokenizer(\" \" + bare.lower())", "tokenizer(\" \" + word.lower())", "check_boundaries"),
    ("(\"u\" if many else \"a\")", "(\"a\" if many else \"u\")", "check_constructed_language"),
    ("{own_object} {own_subject}\"", "{own_subject} {own_object}\"", "check_constructed_language"),
    ("% 6 == 0) != held_out", "% 6 == 0) != False", "check_constructed_language"),
    ("(step + 1) / warmup", "1.0", "check_the_loop"),
    ("        optimizer.zero_grad()\n", "", "check_the_loop"),
    ("order.pop(0) for _", "order[0] for _", "check_drawing"),
    ("labelled_logits(model, inputs, labels).float().sum().backward()", "labelled_logits(model, inputs, labels)",
     "check_flops"),
    ("for token in [*ids, tokenizer.eos_token_id]", "for token in ids", "check_packing"),
]  # fmt: skip


def broken_copy(search: str, replacement: str):
    """The module with one piece of its source replaced, as a fresh module object."""
    source = Path(pretraining.__file__).read_text(encoding="utf-8")
    assert source.count(search) == 1, f"{search!r} stands {source.count(search)} times in the source, not once"
    spec = importlib.util.spec_from_loader("broken_pretraining", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = pretraining.__file__
    sys.modules["broken_pretraining"] = module  # dataclasses look their module up
    exec(compile(source.replace(search, replacement), "broken_pretraining.py", "exec"), module.__dict__)  # noqa: S102  our own source
    module.choose_dtype = pretraining.choose_dtype
    return module


@pytest.mark.parametrize(
    ("search", "replacement", "check"), MUTATIONS, ids=[f"{m[2][6:]}-{i}" for i, m in enumerate(MUTATIONS)]
)
def test_a_broken_line_is_noticed(search, replacement, check, tokenizer, small_models):
    module = broken_copy(search, replacement)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError, KeyError, LabError)):
        CHECKS[check](module, tokenizer, small_models)


# --- the rest ------------------------------------------------------------------------------------------------------


def test_the_three_models_are_of_equal_size():
    tokenizer = pretraining.train_tokenizer(TEXTS, 420)
    sizes = [pretraining.make_model(family, tokenizer).num_parameters() for family in FAMILIES]
    assert max(sizes) < 1.03 * min(sizes)


def test_the_tokenizer_gives_every_text_back_and_keeps_names_whole(tokenizer):
    text = "#Person1#: Ünlü — 3,50 €?\n#Person2#: No."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert {"#Person1#", "#Person2#"} <= {tokenizer.decode([i]) for i in ids}
    assert len(tokenizer) == 420
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id}) == 3


@pytest.mark.parametrize("family", [DECODER, ENCODER_DECODER])
def test_a_saved_model_loads_as_any_other(family, tokenizer, small_models, tmp_path):
    small_models[family].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, again = load_model(tmp_path, dtype=torch.float32, device="cpu")
    ids = torch.tensor([again("#Person1#: Good morning.").input_ids])
    assert ids.tolist() == [tokenizer("#Person1#: Good morning.").input_ids]
    given = {"decoder_input_ids": ids} if family == ENCODER_DECODER else {}
    with torch.no_grad():
        assert torch.allclose(
            model(input_ids=ids, **given).logits, small_models[family](input_ids=ids, **given).logits, atol=1e-3
        )


def test_read_corpus_holds_out_whole_files(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f" text {i}\n", encoding="utf-8")
    train, held_out = pretraining.read_corpus(tmp_path, every=5)
    assert held_out == ["text 4", "text 9"]
    assert len(train) == 10
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: pretraining.read_corpus("/nowhere"), "every=10"),
        (lambda t: pretraining.train_tokenizer(TEXTS, 100), "vocabulary=100"),
        (lambda t: pretraining.pack(t, ["a"], 100), "length=100"),
        (lambda t: pretraining.mask_tokens(torch.ones(1, 4, dtype=torch.long), mask_id=1, vocabulary=5, share=1.5), "share=1.5"),
        (lambda t: pretraining.draw_spans(1), "length=1"),
        (lambda t: pretraining.draw_spans(10, share=0), "share=0"),
        (lambda t: pretraining.cut_spans(torch.arange(4), torch.tensor([0, 1, 0, 1]).bool(), sentinels=[7, 8], eos_id=1), "2 spans need 3"),
        (lambda t: pretraining.make_model("recurrent", t), "'recurrent'"),
        (lambda t: pretraining.objective("recurrent", t), "'recurrent'"),
        (lambda t: pretraining.constructed_pairs(10**6), "number=1000000"),
    ],
)  # fmt: skip
def test_errors_say_what_came_and_what_to_do(call, message, tokenizer):
    with pytest.raises(LabError, match=message):
        call(tokenizer)
