"""Figures of the project's own data: `make data` checks it and prints them, `python tests/datasheet.py --write` keeps them.

`tests/test_data.py` holds the data to these functions, and `data/README.md` to what they return.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data import DATA, dialogue_id, load_dialogues, load_tasks

README = DATA / "README.md"
SPLITS = ("train", "validation", "test")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
VARIETY_WORDS = 40_000


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def spoken(dialogue: str) -> str:
    """The dialogue without the names of the speakers before each turn."""
    return re.sub(r"^#Person\d#:", "", dialogue, flags=re.MULTILINE)


def own_dialogues() -> dict[str, str]:
    """Every dialogue of the project once, by its id."""
    return {dialogue_id(row["id"], split): row["dialogue"] for split in SPLITS for row in load_dialogues(split=split)}


def benchmark(name: str) -> list[dict]:
    """The rows of `data/benchmarks/<name>.jsonl`; a pattern gives the rows of all files that fit."""
    files = sorted((DATA / "benchmarks").glob(f"{name}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def near_duplicates(texts: Sequence[tuple[str, str]]) -> list[tuple]:
    """Pairs of `(owner, text)` with different owners that share over 30 % of the word 5-grams of one of the two."""
    grams, holders = [], defaultdict(set)
    for i, (_, text) in enumerate(texts):
        listed = words(text.replace("#", " "))
        grams.append({tuple(listed[j : j + 5]) for j in range(len(listed) - 4)})
        for gram in grams[-1]:
            holders[gram].add(i)
    shared = Counter(pair for same in holders.values() for pair in combinations(sorted(same), 2))
    return [
        (texts[i], texts[j])
        for (i, j), count in shared.items()
        if texts[i][0] != texts[j][0] and count > 0.3 * min(len(grams[i]), len(grams[j]))
    ]


def variety(dialogues: Iterable[str], size: int = VARIETY_WORDS, orders: int = 20) -> tuple[float, float]:
    """Different words and different word bigrams among the first `size` spoken words, the mean over `orders` random orders."""
    dialogues, counts = list(dialogues), []
    for seed in range(orders):
        shuffled = random.Random(seed).sample(dialogues, len(dialogues))
        listed = [word for dialogue in shuffled for word in words(spoken(dialogue))][:size]
        if len(listed) < size:
            raise ValueError(f"{len(listed)} words where {size} are compared")
        counts.append((len(set(listed)), len(set(pairwise(listed)))))
    return sum(v for v, _ in counts) / orders, sum(b for _, b in counts) / orders


def longest_is_right(options: Sequence[Sequence[str]], right: Sequence[int]) -> float:
    """How often the longest option is the right one; among several of that length one is drawn."""
    hits = 0.0
    for listed, answer in zip(options, right, strict=True):
        longest = [i for i, option in enumerate(listed) if len(option) == max(map(len, listed))]
        hits += (answer in longest) / len(longest)
    return hits / len(right)


def most_common(labels: Sequence) -> float:
    """Share of the commonest label."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def choices() -> dict[str, tuple[list[Sequence[str]], list[int], list]]:
    """Every set with a choice: the options of each row, the position of the right one, and the label whose share could be guessed."""
    found = {}
    for name, task in load_tasks().items():
        if "options" in task.rows.column_names:
            rows = task.rows.to_list()
            right = [row["options"].index(row["answer"]) for row in rows]
            fixed = len({frozenset(row["options"]) for row in rows}) == 1
            found[f"tasks/{name}"] = (
                [row["options"] for row in rows],
                right,
                [row["answer"] for row in rows] if fixed else right,
            )
    for name, labels in (
        ("glue/sentiment", ("negative", "positive")),
        ("glue/paraphrase", ("no", "yes")),
        ("glue/entailment", ("True", "Neither", "False")),
        ("superglue/boolq", ("no", "yes")),
    ):
        right = [row["label"] for row in benchmark(name)]
        found[f"benchmarks/{name}"] = ([labels] * len(right), right, right)
    rows = benchmark("superglue/copa")
    right = [row["label"] for row in rows]
    found["benchmarks/superglue/copa"] = ([(row["choice1"], row["choice2"]) for row in rows], right, right)
    rows = benchmark("mmlu/*")
    right = [row["answer"] for row in rows]
    found["benchmarks/mmlu"] = ([row["choices"] for row in rows], right, right)
    rows = benchmark("bbh/tracking_swaps")
    right = [ord(row["target"][1]) - ord("A") for row in rows]
    found["benchmarks/bbh/tracking_swaps"] = (
        [re.findall(r"^\([A-E]\) (.*)$", row["input"], re.MULTILINE) for row in rows],
        right,
        right,
    )
    right = [row["target"] == "True" for row in benchmark("bbh/boolean_expressions")]
    found["benchmarks/bbh/boolean_expressions"] = ([("False", "True")] * len(right), list(map(int, right)), right)
    return found


def chance(options: Sequence[Sequence[str]]) -> float:
    return sum(1 / len(listed) for listed in options) / len(options)


def figures() -> str:
    """The table of baselines and the line on variety, as they stand in the datasheet."""
    lines = ["| set | items | chance | longest option | most common label |", "|---|---|---|---|---|"]
    for name, (options, right, labels) in choices().items():
        # where the options are the same words in every row, the longest of them is one fixed label
        fixed = len({frozenset(listed) for listed in options}) == 1
        longest = "" if fixed else f"{longest_is_right(options, right):.1%}"
        lines.append(f"| `{name}` | {len(right)} | {chance(options):.1%} | {longest} | {most_common(labels):.1%} |")
    vocabulary, bigrams = variety(own_dialogues().values())
    lines += ["", f"Among {VARIETY_WORDS:,} spoken words of these dialogues there are {vocabulary:,.0f} different words and "
              f"{bigrams:,.0f} different pairs of neighbouring words (mean over 20 random orders of the dialogues)."]  # fmt: skip
    return "\n".join(lines)


def kept(text: str) -> str:
    """What stands between the markers of the datasheet."""
    return text.split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    text = figures()
    print(text)
    if "--write" in sys.argv[1:]:
        page = README.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
