"""Objectives against transformers' own, spans against the T5 paper, likelihoods against unbatched ones, and mutations.

Each check takes the module, so that the same check runs on the real one and on copies with one line broken: a break that no
check notices would be one that a learner's numbers would not show either.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import broken_copy
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
)

import utils.pretraining as pretraining
from utils.data import load_dialogues
from utils.lab import LabError
from utils.models import DECODER, ENCODER, ENCODER_DECODER, load_model
from utils.prompts import IGNORED
from utils.small_english import sentences

FAMILIES = (ENCODER, DECODER, ENCODER_DECODER)
DIALOGUES = [row["dialogue"] for row in load_dialogues(split="validation")][:12]
TEXTS = [str(made) for made in sentences(200)]


@pytest.fixture(scope="session")
def tokenizer():
    return pretraining.train_tokenizer([*DIALOGUES, *TEXTS], 600)


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


def fill_spans(inputs, targets, sentinels):
    """The text that `cut_spans` took apart: each sentinel of `inputs` replaced by what follows it in `targets`."""
    names, spans, current = set(sentinels), {}, []
    for token in targets:
        if token in names:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [piece for token in inputs for piece in (spans.get(token, []) if token in names else [token])]


def check_spans_rebuild(module, tokenizer, models):
    """Inputs plus targets give the text back; nothing that is hidden stands in the inputs."""
    sentinels = tokenizer.convert_tokens_to_ids(module.SENTINELS)
    for length, seed in itertools.product((2, 3, 7, 40, 128), range(4)):
        ids = torch.arange(1000, 1000 + length).repeat(2, 1)  # every token once: a lost or moved one is seen
        inputs, targets = module.corrupt_spans(
            ids, sentinels=sentinels, eos_id=tokenizer.eos_token_id, generator=seeded(seed)
        )
        for row, source, target in zip(ids.tolist(), inputs.tolist(), targets.tolist(), strict=True):
            rebuilt = fill_spans(source, target[:-1], sentinels)
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
    """15 % of the tokens in spans of 3 on average; all ways to lay them out behind a visible token equally likely."""
    hidden = module.draw_spans(200, generator=seeded())
    starts = hidden & ~torch.cat([torch.tensor([False]), hidden[:-1]])
    assert (int(hidden.sum()), int(starts.sum())) == (30, 10)
    generator = seeded()
    seen = Counter(
        tuple(module.draw_spans(8, share=0.5, mean_span=2.0, generator=generator).tolist()) for _ in range(1800)
    )
    # 4 hidden in 2 spans, and 4 visible in 2 gaps and perhaps an end: 3 x (3 + 3) layouts, 100 times each expected,
    # standard deviation 10
    assert len(seen) == 18
    assert max(abs(count - 100) for count in seen.values()) < 50
    assert not any(layout[0] for layout in seen), "the first token is hidden"
    assert {layout[-1] for layout in seen} == {True, False}, "the last token is always hidden, or never"


def check_span_numbers(module, tokenizer, models):
    """Any length and share: exactly so many hidden, at least one of each kind, the first never."""
    generator, ends = seeded(), Counter()
    for length, share, mean_span in itertools.product(
        (2, 3, 5, 9, 12, 31), (0.01, 0.15, 0.3, 0.6, 0.99), (1.0, 2.0, 3.0)
    ):
        asked = min(max(round(length * share), 1), length - 1)
        for _ in range(6):
            hidden = module.draw_spans(length, share=share, mean_span=mean_span, generator=generator)
            assert hidden.shape == (length,)
            assert hidden.dtype == torch.bool
            assert int(hidden.sum()) == asked, (
                f"length={length}, share={share}: {int(hidden.sum())} hidden, not {asked}"
            )
            assert not hidden[0], "the first token is hidden"
            ends[bool(hidden[-1])] += 1
    assert ends[False] > 50, "the last token is (nearly) always hidden"


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


def check_objective_hides_as_much_as_asked(module, tokenizer, models):
    """`share` and `mean_span` reach both objectives that hide something; special tokens are not asked about."""
    ids = random_ids(tokenizer, 20, 40)
    for share in (0.15, 0.6):
        _, labels = module.objective(ENCODER, tokenizer, share=share)(ids, seeded())
        assert float((labels != IGNORED).float().mean()) == pytest.approx(share, abs=0.09)  # five standard errors
    ids[:, ::2] = tokenizer.eos_token_id
    inputs, labels = module.objective(ENCODER, tokenizer, share=0.6)(ids, seeded())
    assert (labels[:, ::2] == IGNORED).all()
    assert (inputs["input_ids"][:, ::2] == tokenizer.eos_token_id).all()
    for share, mean_span, hidden, spans in ((0.3, 2.0, 12, 6), (0.3, 3.0, 12, 4), (0.5, 2.0, 20, 10)):
        make = module.objective(ENCODER_DECODER, tokenizer, share=share, mean_span=mean_span)
        inputs, targets = make(ids, seeded())
        assert inputs["input_ids"].shape == (20, 40 - hidden + spans)
        assert targets.shape == inputs["decoder_input_ids"].shape == (20, hidden + spans + 2)


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


def refusal(module, tokenizer, text, place):
    """The message of the error that `hide_word` raises, empty where it raises none."""
    try:
        module.hide_word(tokenizer, text, place)
    except LabError as error:
        return str(error)
    return ""


def check_hiding_a_word(module, tokenizer, models):
    """What is left, the word and what is right of it are the text; a word of several tokens is refused."""
    text = "Tom ate one  big red apple, two eggs and many old cakes yesterday! Yesterday Mira sold a hat."
    words, hidden = text.split(), 0
    for place, word in enumerate(words):
        bare = word.rstrip(".,!?")
        pieces = tokenizer((" " if place else "") + bare).input_ids
        if len(pieces) > 1:
            assert f"'{bare}' is {len(pieces)} tokens" in refusal(module, tokenizer, text, place)
            continue
        item = module.hide_word(tokenizer, text, place)
        hidden += 1
        assert tokenizer.decode([item.word]).strip() == bare
        assert tokenizer.decode([*item.left, item.word, *item.right]) == " ".join(words)
        assert tokenizer.decode(item.left) == " ".join(words[:place])
    assert hidden > 8
    assert "hide a word that is one" in refusal(module, tokenizer, "Tom sold a contrabassoon.", 3)


def check_hidden_words(module, tokenizer, models):
    """Each family's distribution at the hidden place, from what it may see."""
    hidden = []
    for text in TEXTS:
        words = text.split()
        place = next(
            (i for i, word in enumerate(words) if i and word in ("a", "his", "her", "two", "in", "will")), None
        )
        if place:
            hidden.append(module.hide_word(tokenizer, text, place))
    assert len(hidden) > 20
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
    """Labels stand on the last token of each word and say where a sentence ended; no full stop gives it away."""
    row = module.boundary_row(
        tokenizer, "The shop, he said, was shut. Why? Unbelievable. Mira ate 3.5 pears. It rained."
    )
    assert len(row["input_ids"]) == len(row["labels"])
    text = "The shop, he said, was shut Why? Unbelievable Mira ate 3.5 pears It rained"
    assert tokenizer.decode(row["input_ids"]) == text
    assert row["input_ids"] == tokenizer(text).input_ids
    labels = [label for label in row["labels"] if label != IGNORED]
    assert labels == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0], "one for each word but the last"
    places = [i for i, label in enumerate(row["labels"]) if label == 1]
    ends = [tokenizer.decode(row["input_ids"][: i + 1]).split()[-1] for i in places]
    assert ends == ["shut", "Unbelievable", "pears"]


def check_grouping(module, tokenizer, models):
    """Every text is in exactly one group, in the order it came, among texts of its length: no padding."""
    texts = [*TEXTS, *TEXTS[:5], *DIALOGUES[:2], "Tom"]
    groups = module.group_by_length(tokenizer, texts)
    assert list(groups) == sorted(groups)
    expected = {}
    for text in texts:
        ids = tokenizer(text).input_ids
        expected.setdefault(len(ids), []).append(ids)
    assert {length: rows.tolist() for length, rows in groups.items()} == expected
    for length, rows in groups.items():
        assert rows.dtype == torch.int64
        assert rows.shape[1] == length
        assert not (rows == tokenizer.pad_token_id).any()
    assert sorted(tokenizer.decode(row) for rows in groups.values() for row in rows) == sorted(texts)


def check_drawing_from_groups(module, tokenizer, models):
    """Lengths in proportion to their tokens, texts of a length alike, and never more tokens than asked."""
    groups = {
        4: torch.arange(120).view(30, 4),
        10: torch.arange(200, 260).view(6, 10),
        60: torch.arange(300, 420).view(2, 60),
    }
    draw = module.draw_groups(groups, 45, lambda rows, generator: ({"input_ids": rows}, rows))
    generator, lengths, firsts = seeded(), Counter(), Counter()
    for _ in range(3000):
        inputs, rows = draw(generator)
        length = rows.shape[1]
        assert inputs["input_ids"] is rows
        assert len(rows) == {4: 11, 10: 4, 60: 1}[length], "as many rows as 45 tokens allow, and at least one"
        assert all(any(torch.equal(row, own) for own in groups[length]) for row in rows[:1])
        lengths[length] += 1
        firsts.update(rows[:, 0].tolist())
    # 120, 60 and 120 of 300 tokens: 1200, 600 and 1200 draws, standard deviations 27, 22 and 27
    assert [lengths[n] for n in (4, 10, 60)] == pytest.approx([1200, 600, 1200], abs=135)
    for length, rows in groups.items():
        counts = torch.tensor([firsts[int(row[0])] for row in rows], dtype=torch.float)
        assert (counts / counts.mean() - 1).abs().max() < 0.3, f"not every text of length {length} is as likely"


def check_text_losses(module, tokenizer, models):
    """A decoder's are those transformers computes for each text alone; in the order of the groups; the same by one seed."""
    groups = module.group_by_length(tokenizer, TEXTS[:30])
    ours = module.text_losses(models[DECODER], module.objective(DECODER, tokenizer), groups, batch_size=4)
    with torch.no_grad():
        theirs = [
            models[DECODER](input_ids=row[None], labels=row[None]).loss for rows in groups.values() for row in rows
        ]
    assert ours.shape == (30,)
    assert torch.allclose(ours, torch.stack(theirs), atol=1e-4)
    for family in (ENCODER, ENCODER_DECODER):
        make = module.objective(family, tokenizer, share=0.4)
        first, again, other = (module.text_losses(models[family], make, groups, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again), family
        assert not torch.equal(first, other), family
        assert first.isfinite().all(), family
    little = module.text_losses(models[ENCODER], module.objective(ENCODER, tokenizer, share=0.05), groups)
    assert 0 < len(little) < 30, "texts in which nothing is hidden have no loss"
    assert (little > 0).all()


def check_heads(module, tokenizer, models):
    """A classifier on the same body to the bit, or on a new one; one seed gives one classifier; the model is left alone."""
    for family, auto in itertools.product(
        (ENCODER, DECODER), (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    ):
        model = models[family]
        body = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
        kept, again, other = (module.with_head(auto, model, 5, seed=seed) for seed in (3, 3, 4))
        new, new_again = (module.with_head(auto, model, 5, keep=False, seed=3) for _ in range(2))
        assert model.config.num_labels != 5
        assert kept.config.num_labels == 5
        assert not any(m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout)), "one family's head has dropout"
        assert kept(input_ids=torch.tensor([[50, 60, 70]])).logits.shape[-1] == 5
        for name, tensor in kept.base_model.state_dict().items():
            assert torch.equal(tensor, body[name]), f"{family}: {name} is not the model's"
            if tensor.dim() == 2:
                assert not torch.equal(new.base_model.state_dict()[name], tensor), f"{family}: {name} is the model's"
        for one, two in ((kept, again), (new, new_again)):
            assert one.state_dict().keys() == two.state_dict().keys()
            assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in two.state_dict().items()), family
        prefix = kept.base_model_prefix + "."
        heads = [name for name, p in kept.named_parameters() if not name.startswith(prefix) and p.dim() == 2]
        assert heads
        for name in heads:
            assert not torch.equal(kept.state_dict()[name], other.state_dict()[name]), (
                f"{family}: another seed, the same {name}"
            )
            assert torch.equal(kept.state_dict()[name], new.state_dict()[name]), f"{family}: keep changes {name}"
        with torch.no_grad():
            for parameter in kept.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(tensor, body[name]) for name, tensor in model.base_model.state_dict().items())


def check_predictions(module, tokenizer, models):
    """A pair for each label, in the order of the rows, whatever the lengths and batches; guesses as without a batch."""
    draw, vocabulary = random.Random(0), len(tokenizer)
    for family, whole in itertools.product((ENCODER, DECODER), (True, False)):
        auto = AutoModelForSequenceClassification if whole else AutoModelForTokenClassification
        model = pretraining.with_head(auto, models[family], 5).eval()
        rows = []
        for _ in range(9):
            ids = [draw.randrange(40, vocabulary) for _ in range(draw.randint(2, 9))]
            labels = [draw.choice([IGNORED, 0, 1, 2, 3, 4]) for _ in ids]
            rows.append({"input_ids": ids, "labels": draw.randrange(5) if whole else labels})
        if not whole:
            rows[4]["labels"] = [IGNORED] * len(rows[4]["input_ids"])  # nothing is asked, and the next keep their place
        results = module.predictions(model, rows, tokenizer, batch_size=4)
        guesses = set()
        for row, pairs in zip(rows, results, strict=True):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
            if whole:
                expected = [(best, row["labels"])]
            else:
                expected = [(b, label) for b, label in zip(best, row["labels"], strict=True) if label != IGNORED]
            assert pairs == expected, family
            guesses |= {guess for guess, _ in pairs}
        assert len(guesses) > 1, "the model answers the same everywhere: this shows nothing"


def check_the_loop(module, tokenizer, models):
    """Four steps end at the weights that torch's own pieces, put together by hand, end at."""
    torch.manual_seed(0)
    ids = random_ids(tokenizer, 8, 24)
    make = module.objective(DECODER, tokenizer)
    ours = pretraining.make_model(DECODER, tokenizer, width=32, layers=2)
    theirs = pretraining.make_model(DECODER, tokenizer, width=32, layers=2)
    batches = []

    def draw(generator):
        batches.append(make(ids[len(batches) * 2 : len(batches) * 2 + 2], generator))
        return batches[-1]

    losses = module.train_model(ours, draw, steps=4, learning_rate=0.01, warmup_share=0.5)
    optimizer = torch.optim.Adafactor(theirs.parameters(), foreach=False)
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
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=1e-5), name
    assert not ours.training


def check_learning(module, tokenizer, models):
    """Each family learns to count, and learns the same twice by one seed and not by another."""
    rows = (torch.arange(24)[:, None] + torch.arange(12)) % 24 + 300
    for family in FAMILIES:
        draw = module.draw_groups({12: rows}, 192, module.objective(family, tokenizer, share=0.3, mean_span=2.0))

        def losses(steps, seed=0, family=family, draw=draw):
            model = pretraining.make_model(family, tokenizer, width=64, layers=2)
            return module.train_model(model, draw, steps=steps, seed=seed)

        course = losses(50)
        assert len(course) == 50
        assert sum(course[-5:]) < 0.6 * sum(course[:5]), f"{family}: {course[0]:.2f} to {course[-1]:.2f} nats"
        assert losses(4) == losses(4), family
        if family != DECODER:  # hides by the seed
            assert losses(4) != losses(4, seed=1), family


def check_drawing(module, tokenizer, models):
    """Every row once before any comes again."""
    draw = module.draw_rows([{"input_ids": [i], "labels": i} for i in range(10)], 4, tokenizer, ENCODER)
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
    ("use_cache=False).last_hidden_state[keep]", "use_cache=False).last_hidden_state.roll(1, 1)[keep]", "check_next_token"),
    ("names[span], ids)[~hidden | starts]", "names[span], ids)[~hidden]", "check_spans_rebuild"),
    ("names[span], ids)[~hidden | starts]", "names[span], ids)", "check_spans_rebuild"),
    ("names[k : k + 1], ids[hidden", "names[0:1], ids[hidden", "check_spans_rebuild"),
    ("names[k : k + 1], ids[hidden", "names[k : k + 1], ids[~hidden", "check_spans_as_in_the_paper"),
    ("[sentinels[n_spans], eos_id]", "[eos_id]", "check_spans_as_in_the_paper"),
    ("torch.tensor([False, True]).repeat(n_spans)", "torch.tensor([True, False]).repeat(n_spans)", "check_span_numbers"),
    ("torch.zeros(int(last) - 1, dtype", "torch.ones(int(last) - 1, dtype", "check_span_numbers"),
    ("min(max(round(length * share), 1), length - 1)", "min(max(round(length * share), 1), length - 2)", "check_span_numbers"),
    ("round(n_hidden / mean_span)", "round(n_hidden)", "check_span_statistics"),
    ("divide(length - n_hidden + 1, n_spans + 1)", "(*divide(length - n_hidden, n_spans), torch.tensor(1))",
     "check_span_statistics"),
    ("torch.randperm(items - 1, generator=generator)[: parts - 1] + 1).sort()",
     "torch.arange(items - 1)[: parts - 1] + 1).sort()", "check_span_statistics"),
    ("targets[:, :-1]], 1)\n    return shifted", "targets[:, 1:]], 1)\n    return shifted", "check_shift_right"),
    ("shifted.masked_fill(shifted == IGNORED, pad_id)", "shifted", "check_shift_right"),
    ("last_hidden_state[keep]))", "last_hidden_state[:, :-1][keep[:, 1:]]))", "check_losses"),
    ("never=tokenizer.all_special_ids,\n            share=share,", "never=tokenizer.all_special_ids,",
     "check_objective_hides_as_much_as_asked"),
    ("never=tokenizer.all_special_ids,\n", "\n", "check_objective_hides_as_much_as_asked"),
    ("share=share,\n            mean_span=mean_span,", "mean_span=mean_span,", "check_objective_hides_as_much_as_asked"),
    ("share=share,\n            mean_span=mean_span,", "share=share,", "check_objective_hides_as_much_as_asked"),
    ("masked_fill(~visible, torch.finfo", "masked_fill(visible, torch.finfo", "check_pair_rows"),
    ("input_ids.shape[1])[:, None]", "input_ids.shape[1])[:1, None]", "check_pair_rows"),
    ("[IGNORED] * (len(prefix) - 1) + target_ids", "[*source_ids] + target_ids", "check_pair_rows"),
    ("\"prefix\": len(texts[i]),", "\"prefix\": 0,", "check_pair_rows"),
    ("ids = [*whole[:i], tokenizer.mask_token_id, *whole[i + 1 :]]", "ids = whole", "check_endings"),
    ("[IGNORED] * (len(context) - 1) + ending", "[IGNORED] * len(context) + ending[1:]", "check_endings"),
    ("totals[owners[i]] += value", "totals[owners[i]] = value", "check_endings"),
    ("        labels[labels == sentinel] = IGNORED\n        for", "        for", "check_endings"),
    ("(\" \" if before else \"\") + bare", "bare", "check_hiding_a_word"),
    ("words[place][len(bare) :], *words", "*words", "check_hiding_a_word"),
    ("*words[place + 1 :]])", "*words[place:]])", "check_hiding_a_word"),
    ("if len(word) != 1:", "if not word:", "check_hiding_a_word"),
    ("ids = [*item.left, tokenizer.mask_token_id, *item.right]", "ids = [*item.left, item.word, *item.right]",
     "check_hidden_words"),
    ("ids, labels = [*item.left, sentinel, *item.right]", "ids, labels = [*item.left, sentinel]", "check_hidden_words"),
    ("[IGNORED] * (len(ids) - 1) + [int(word.endswith(\".\"))]", "[int(word.endswith(\".\"))] + [IGNORED] * (len(ids) - 1)",
     "check_boundaries"),
    ("word.rstrip(\".\")).input_ids", "word).input_ids", "check_boundaries"),
    ("(\" \" if input_ids else \"\") + word", "word", "check_boundaries"),
    ("    labels[-1] = IGNORED\n", "", "check_boundaries"),
    (".append(ids)\n    return {", ".insert(0, ids)\n    return {", "check_grouping"),
    ("setdefault(len(ids), [])", "setdefault(len(ids) // 99, [])", "check_grouping"),
    ("for length in sorted(groups)", "for length in groups", "check_grouping"),
    ("float(rows.numel())", "float(len(rows))", "check_drawing_from_groups"),
    ("max(1, tokens // rows.shape[1])", "tokens // rows.shape[1]", "check_drawing_from_groups"),
    ("max(1, tokens // rows.shape[1])", "1 + tokens // rows.shape[1]", "check_drawing_from_groups"),
    ("torch.randint(len(rows), (number,)", "torch.randint((len(rows) + 1) // 2, (number,)", "check_drawing_from_groups"),
    (".sum(1) / number)[number > 0]", ".sum(1) / labels.shape[1])[number > 0]", "check_text_losses"),
    (".sum(1) / number)[number > 0]", ".sum(1) / number.clamp(min=1))", "check_text_losses"),
    ("losses.append((-label_logprobs", "losses.append((label_logprobs", "check_text_losses"),
    ("torch.Generator().manual_seed(seed), []", "torch.Generator().manual_seed(0), []", "check_text_losses"),
    ("    if keep:\n", "    if not keep:\n", "check_heads"),
    ("    if keep:\n", "    if True:\n", "check_heads"),
    ("    torch.manual_seed(seed)\n    config =", "    config =", "check_heads"),
    ("config = copy.deepcopy(model.config)", "config = model.config", "check_heads"),
    ("model.base_model.state_dict())", "model.base_model.state_dict(), assign=True)", "check_heads"),
    ("config.num_labels, config.classifier_dropout = num_labels, 0.0", "config.classifier_dropout = 0.0", "check_heads"),
    ("config.classifier_dropout = num_labels, 0.0", "config.classifier_dropout = num_labels, 0.1", "check_heads"),
    ("(next(guesses), label) for label in row if label != IGNORED", "(next(guesses), label) for label in row",
     "check_predictions"),
    ("(next(guesses), label) for", "(label, next(guesses)) for", "check_predictions"),
    ("labelled_logits(model, inputs, labels).argmax(-1).tolist())", "labelled_logits(model, inputs, labels).argmin(-1).tolist())",
     "check_predictions"),
    ("(step + 1) / warmup", "1.0", "check_the_loop"),
    ("(steps - step) / max(1, steps - warmup)", "1.0", "check_the_loop"),
    ("        optimizer.zero_grad()\n", "", "check_the_loop"),
    ("torch.optim.Adafactor(", "torch.optim.Adam(", "check_the_loop"),
    ("        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", "", "check_the_loop"),
    ("        loss.backward()\n", "", "check_learning"),
    ("    generator = torch.Generator().manual_seed(seed)\n    optimizer", "    generator = torch.Generator()\n    generator.seed()\n    optimizer",
     "check_learning"),
    ("order.pop(0)] for _", "order[0]] for _", "check_drawing"),
    ("labelled_logits(model, inputs, labels).float().sum().backward()", "labelled_logits(model, inputs, labels)",
     "check_flops"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("search", "replacement", "check"), MUTATIONS, ids=[f"{m[2][6:]}-{i}" for i, m in enumerate(MUTATIONS)]
)
def test_a_broken_line_is_noticed(search, replacement, check, tokenizer, small_models):
    module = broken_copy(pretraining, search, replacement)
    module.choose_dtype = pretraining.choose_dtype
    with pytest.raises(Exception):  # noqa: B017, PT011 - broken code may fail in any way
        CHECKS[check](module, tokenizer, small_models)


def test_every_check_catches_a_mutation():
    assert {row[2] for row in MUTATIONS} == set(CHECKS)


# --- the rest ------------------------------------------------------------------------------------------------------


def test_the_three_models_are_of_equal_size(tokenizer):
    sizes = [pretraining.make_model(family, tokenizer).num_parameters() for family in FAMILIES]
    assert max(sizes) < 1.05 * min(sizes)
    assert all(4e5 < size < 6e5 for size in sizes), "the docstring says about half a million"


def test_the_tokenizer_gives_every_text_back_and_keeps_names_whole(tokenizer):
    text = "#Person1#: Ünlü — 3,50 €?\n#Person2#: No."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert {"#Person1#", "#Person2#"} <= {tokenizer.decode([i]) for i in ids}
    assert len(tokenizer) == 600
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: pretraining.train_tokenizer(TEXTS, 100), "vocabulary=100"),
        (lambda t: pretraining.mask_tokens(torch.ones(1, 4, dtype=torch.long), mask_id=1, vocabulary=5, share=1.5), "share=1.5"),
        (lambda t: pretraining.draw_spans(1), "length=1"),
        (lambda t: pretraining.draw_spans(10, share=0), "share=0"),
        (lambda t: pretraining.draw_spans(0), "length=0"),
        (lambda t: pretraining.cut_spans(torch.arange(4), torch.tensor([0, 1, 0, 1]).bool(), sentinels=[7, 8], eos_id=1), "2 spans need 3"),
        (lambda t: pretraining.make_model("recurrent", t), "'recurrent'"),
        (lambda t: pretraining.objective("recurrent", t), "'recurrent'"),
        (lambda t: pretraining.objective(ENCODER_DECODER, t, share=1.0)(torch.ones(1, 4, dtype=torch.long), seeded()), "share=1.0"),
        (lambda t: pretraining.hide_word(t, "a contrabassoon", 1), "'contrabassoon' is"),
        (lambda t: pretraining.hide_word(t, "a cat", 2), "place=2"),
        (lambda t: pretraining.hide_word(t, "a cat", -1), "place=-1"),
        (lambda t: pretraining.make_model(DECODER, t, layers=3), "layers=3"),
        (lambda t: pretraining.group_by_length(t, []), "`texts` is empty"),
        (lambda t: pretraining.with_head(AutoModelForTokenClassification, pretraining.make_model(ENCODER_DECODER, t), 2), "two bodies"),
        (lambda t: pretraining.word_logprobs(pretraining.make_model(DECODER, t), t, [pretraining.HiddenWord([], 50, [51])]), "hide a later one"),
    ],
)  # fmt: skip
def test_errors_say_what_came_and_what_to_do(call, message, tokenizer):
    with pytest.raises(LabError, match=message):
        call(tokenizer)
