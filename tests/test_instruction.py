"""The mixture of tasks and the scoring of options: against a pool counted by hand and against one pass over the whole text.

Each check takes the module, so that the same check runs on the real one and on copies with one piece broken.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import broken_copy

import utils.instruction as instruction
from utils.data import load_tasks
from utils.lab import LabError
from utils.models import load_model
from utils.prompts import IGNORED, encode, encode_example

TASKS = load_tasks()
SIX = [TASKS[name] for name in ("summary", "sentiment", "arithmetic", "intent", "next_turn", "who_said_it")]


def items(module):
    """Prompts of several lengths, with one to three options of one to three tokens."""
    texts = {
        "the cat sat on the mat and the dog ran to the river": ("red", "big dog", "a small house"),
        "a dog ran": ("house", "river"),
        "the big red cat asks the small blue dog": ("person1", "person2", "the cat tells"),
        "the cat wants a house": ("summary",),
    }
    return [
        module.Item("task", str(n), [{"role": "user", "content": text}], options[-1], options)
        for n, (text, options) in enumerate(texts.items())
    ]


# --- checks ------------------------------------------------------------------------------------------------------


def check_clusters(module):
    found = module.clusters(TASKS)
    assert list(found) == sorted(found)
    assert sum(map(len, found.values())) == len(TASKS)
    assert [task.name for task in found["conversation"]] == ["intent", "next_turn", "who_said_it"]


def check_shortest(module):
    task = TASKS["sentiment"]
    length = {row["id"]: sum(len(row[name]) for name in task.fields) for row in task.rows}
    found = module.shortest(task, 0.25).rows
    kept = [row["id"] for row in found if row["split"] == "train"]
    left = [row["id"] for row in task.rows if row["split"] == "train" and row["id"] not in kept]
    assert (len(kept), len(left)) == (15, 45)
    assert max(length[name] for name in kept) <= min(length[name] for name in left)
    assert [row["id"] for row in found] == [row["id"] for row in task.rows if row["id"] not in left]
    assert len(module.shortest(task, 1.0).rows) == len(task.rows)
    assert sum(row["split"] == "train" for row in module.shortest(task, 0.0).rows) == 1


def check_rates(module):
    sizes = [2, 3, 40, 200]
    for cap in (1, 3, 25, 40, 1000, float("inf")):
        pool = Counter(task for task, size in enumerate(sizes) for k in range(size) if k < cap)
        counted = [pool[task] / pool.total() for task in range(4)]
        np.testing.assert_allclose(module.mixing_rates(sizes, cap), counted, rtol=1e-12)


def check_counts(module):
    generator = np.random.default_rng(0)
    for _ in range(100):
        rates = generator.dirichlet(np.ones(generator.integers(1, 8)))
        total = int(generator.integers(1, 60))
        counts = module.shares_to_counts(rates, total)
        assert sum(counts) == total
        assert np.abs(np.array(counts) - rates * total).max() < 1
    assert module.shares_to_counts([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert module.shares_to_counts([0.56, 0.3, 0.14], 10) == [6, 3, 1]


def check_mixture(module):
    drawn = module.mixture(SIX, 48, templates=range(4), seed=3)
    assert Counter(item.task for item in drawn) == {task.name: 8 for task in SIX}
    asked = defaultdict(Counter)
    for item in drawn:
        task = TASKS[item.task]
        row = next(row for row in task.rows if row["id"] == item.row)
        assert row["split"] == "train"
        assert item.answer == row["answer"]
        assert item.options == tuple(row.get("options") or ())
        places = {name: row[name] for name in task.fields} | {"options": "\n".join(f"- {o}" for o in item.options)}
        asked[item.task][[t.format(**places) for t in task.templates].index(item.prompt[0]["content"])] += 1
    assert all(counts == dict.fromkeys(range(4), 2) for counts in asked.values())
    assert len({(item.task, item.row) for item in drawn}) == 48
    follows = sum(a.task == b.task for a, b in itertools.pairwise(drawn))
    assert follows < 20  # mixed: one task after another would be 42
    assert drawn == module.mixture(SIX, 48, templates=range(4), seed=3)
    assert drawn != module.mixture(SIX, 48, templates=range(4), seed=4)


def check_repeats(module):
    drawn = module.mixture([TASKS["sentiment"]], 130, templates=(0, 5), cap=10)
    rows = Counter(item.row for item in drawn)
    assert len(rows) == 60
    assert set(rows.values()) == {2, 3}


def check_reasoning(module):
    drawn = module.mixture([TASKS["arithmetic"], TASKS["entailment"]], 6, templates=(0, 1), reasoning=True)
    rows = {row["id"]: row for task in TASKS.values() for row in task.rows}
    for item in drawn:
        assert rows[item.row]["reasoning"] in item.answer
        assert module.final_answer(item.answer) == rows[item.row]["answer"].lower()
    with pytest.raises(LabError, match="0 reasoning wordings"):
        module.mixture([TASKS["topic"]], 6, templates=(0, 1), reasoning=True)


def check_scores(module, model, tokenizer):
    """Each option against one plain pass over prompt and option, without cache, padding or batch."""
    asked = items(module)
    model.train()
    found = module.option_scores(model, tokenizer, asked, batch_size=3)
    assert model.training
    model.eval()
    for item, row in zip(asked, found, strict=True):
        assert row.shape == (len(item.options),)
        for option, score in zip(item.options, row, strict=True):
            encoder_decoder = model.config.is_encoder_decoder
            example = encode_example(tokenizer, item.prompt, option, encoder_decoder=encoder_decoder)
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            with torch.no_grad():
                out = model(input_ids=ids, labels=labels if encoder_decoder else None)
            logits = out.logits if encoder_decoder else out.logits[:, :-1]
            wanted = labels if encoder_decoder else labels[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits[0], wanted[0], ignore_index=IGNORED, reduction="sum")
            assert score == pytest.approx(-float(loss), abs=1e-4)


def check_right(module):
    asked = items(module)[:3]
    scores = [np.array([-3.0, -2.0, -1.0]), np.array([-1.0, -2.0]), np.array([-9.0, -9.5, -8.0])]
    assert module.choices_right(asked, scores).tolist() == [1.0, 0.0, 1.0]
    assert module.chance(asked) == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


def check_final_answer(module):
    for text, answer in {
        "The notebooks cost 12 euros. So the answer is 21.": "21",
        "So the answer is 20:05": "20:05",
        "THE ANSWER IS: 3.5. Anything else?": "3.5",
        "The answer is no. Wait: the answer is Cannot be  told.\nQuestion: is it?": "cannot be told",
        "21": "21",
        " 21.\n": "21",
        "It is 21 euros. That is all.": "it is 21 euros. that is all",
        "": "",
    }.items():
        assert module.final_answer(text) == answer


CHECKS = [
    check_clusters,
    check_shortest,
    check_rates,
    check_counts,
    check_mixture,
    check_repeats,
    check_reasoning,
    check_right,
    check_final_answer,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_instruction(check):
    check(instruction)


def test_option_scores_are_those_of_one_pass(tiny):
    check_scores(instruction, *tiny)


def test_nothing_asked_is_nothing_scored(tiny):
    assert instruction.option_scores(*tiny, []) == []


def test_under_peft_and_with_a_zero_adapter_scores_stay(tiny):
    from peft import get_peft_model

    from utils.training import lora_config

    model, tokenizer = tiny
    before = instruction.option_scores(model, tokenizer, items(instruction))
    wrapped = get_peft_model(model, lora_config(model, r=2))
    after = instruction.option_scores(wrapped, tokenizer, items(instruction))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_encoded_items_learn_the_answer_alone(tiny):
    model, tokenizer = tiny
    asked = items(instruction)
    encoded = instruction.encode_items(tokenizer, asked, encoder_decoder=model.config.is_encoder_decoder)
    for item, example in zip(asked, encoded, strict=True):
        learned = [label for label in example["labels"] if label != IGNORED]
        assert learned == [*tokenizer(item.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert example["input_ids"][: len(encode(tokenizer, item.prompt))] == encode(tokenizer, item.prompt)


def test_what_cannot_be_mixed_or_scored_is_said(tiny):
    model, tokenizer = tiny
    for sizes, cap in (([], 5), ([3, 0], 5), ([3, 4], 0), ([3], float("nan"))):
        with pytest.raises(LabError, match="every task needs at least one example"):
            instruction.mixing_rates(sizes, cap)
    tests_only = instruction.InstructionTask(
        "x", "y", ("dialogue",), ("{dialogue}",), (), TASKS["summary"].rows.select(range(60, 80))
    )
    assert set(tests_only.rows["split"]) == {"test"}
    with pytest.raises(LabError, match="can only be tested on"):
        instruction.mixture([tests_only], 4, templates=(0,))
    free = instruction.wording(TASKS["summary"], TASKS["summary"].rows[0], 0)
    with pytest.raises(LabError, match="no options to choose among"):
        instruction.option_scores(model, tokenizer, [free])
    with pytest.raises(LabError, match="numbered from 0"):
        instruction.mixture(SIX, 48, templates=(6,))


# --- mutations ---------------------------------------------------------------------------------------------------

MUTATIONS = [
    ("if tasks[key].cluster == name", "if tasks[key].cluster >= name", check_clusters),
    ("np.minimum(", "np.maximum(", check_rates),
    ("return counted / counted.sum()", "return counted / sum(sizes)", check_rates),
    ("np.argsort(counts - exact", "np.argsort(exact - counts", check_counts),
    ("[: total - counts.sum()]", "[: total - counts.sum() - 1]", check_counts),
    ('row["split"] == "train"', 'row["split"] == "test"', check_mixture),
    ("templates[k % len(templates)]", "templates[0]", check_mixture),
    ("np.random.default_rng(seed)", "np.random.default_rng(0)", check_mixture),
    ("return [items[i] for i in generator.permutation(total)]", "return items", check_mixture),
    ("by_length[max(1,", "by_length[::-1][max(1,", check_shortest),
    ('if split == "train"]', "]", check_shortest),
    ("max(1, round(share * len(train)))", "round(share * len(train))", check_shortest),
    ("order[k % len(pool)]", "order[generator.integers(len(pool))]", check_repeats),
    ("template, reasoning=reasoning)\n    return", "template)\n    return", check_reasoning),
    ("np.argmax(row)", "np.argmin(row)", check_right),
    ("1 / len(item.options)", "1 / 2", check_right),
    ("found[-1]", "found[0]", check_final_answer),
    ("flags=re.IGNORECASE", "flags=0", check_final_answer),
    (r"\.(?=\s|$)|\n", r"\.|\n", check_final_answer),
    ("last.lower()", "last", check_final_answer),
]
SCORING = [
    ("add_special_tokens=False).input_ids, tokenizer.eos_token_id]", "add_special_tokens=False).input_ids]", "llama"),
    ("read.index[torch.tensor(owner", "read.index[0 * torch.tensor(owner", "llama"),
    ("read.mask.sum(1)[rows, None] +", "0 * read.mask.sum(1)[rows, None] +", "llama"),
    ("attention_mask=torch.cat([read.mask[rows], option_mask], 1)", "attention_mask=None", "gpt2"),
    ("select_rows(read.cache, rows)", "select_rows(read.cache, rows.flip(0))", "llama"),
    ("by_length[part]", "by_length[:len(by_length[part])]", "llama"),
    ("prompts[row][-1], *option[:-1]", "prompts[0][-1], *option[:-1]", "gpt2"),
    ("attention_mask=mask[rows], labels=labels", "attention_mask=None, labels=labels", "t5"),
    ("last_hidden_state=hidden[rows]", "last_hidden_state=hidden[rows.flip(0)]", "t5"),
    ("- row.logsumexp(1)", "", "llama"),
    ("row = row[: len(option)]", "row = row[-len(option) :]", "t5"),
    ("scores[i] = np.array", "scores[place] = np.array", "llama"),
    ("model.train(was_training)", "pass", "llama"),
]


@pytest.mark.parametrize(("search", "replacement", "check"), MUTATIONS)
def test_a_broken_copy_is_caught(search, replacement, check):
    with pytest.raises((AssertionError, LabError, IndexError, KeyError, ValueError, pytest.fail.Exception)):
        check(broken_copy(instruction, search, replacement))


@pytest.mark.parametrize(("search", "replacement", "kind"), SCORING)
def test_broken_scoring_is_caught(search, replacement, kind, tiny_folders):
    model, tokenizer = load_model(tiny_folders[kind], dtype=torch.float32, device="cpu")
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        check_scores(broken_copy(instruction, search, replacement), model, tokenizer)


def test_every_check_catches_a_mutation():
    assert {check for _, _, check in MUTATIONS} == set(CHECKS)
