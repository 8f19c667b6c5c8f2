"""Dialogues, preferences, civility labels and instruction tasks: read, check, group.

Every reader checks what it read and names the file, the row and the column of the first thing that is wrong.
"""

from __future__ import annotations

import csv
import json
import os
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from datasets import Dataset

from utils.lab import ROOT, LabError, one_line

DATA = ROOT / "data"
DIALOGUE_COLUMNS = ("id", "dialogue", "summary", "topic")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "dev", "val"), "test": ("test",)}
SUFFIXES = (".jsonl", ".csv", ".parquet")


class DataError(LabError):
    """A data file is missing or holds something that cannot be used."""


def load_dialogues(source: str | os.PathLike = DATA / "dialogues", split: str = "train") -> Dataset:
    """Dialogues with their summaries, one row a reference summary.

    `source` is a JSONL, CSV or Parquet file, a folder that holds one such file a split, or a Hub id; `split` is
    `"train"`, `"validation"` or `"test"`. The columns are those of `knkarthick/dialogsum`: `id`, `dialogue`,
    `summary`, `topic`, all strings; further columns are kept. A set with several references for a dialogue repeats
    the dialogue, as DialogSum does: `by_dialogue` groups them. Raises `DataError`.
    """
    rows, where = _read(source, split)
    for _, row in rows:
        if "id" not in row and "fname" in row:  # the name in DialogSum's own release
            row["id"] = row.pop("fname")
    return _checked(rows, where, DIALOGUE_COLUMNS, unique="id")


def by_dialogue(rows: Dataset | Iterable[dict]) -> Dataset:
    """One row a dialogue, with its summaries as the list `references`; other columns from its first row.

    Counting rows instead of dialogues makes a test set look larger than it is: DialogSum's test split has 1,500 rows
    and 500 dialogues.
    """
    groups: dict[str, dict] = {}
    for row in rows:
        first = groups.setdefault(row["dialogue"], {**row, "references": [], "civil_references": []})
        first["references"].append(row["summary"])
        first["civil_references"].append(row.get("civil_summary") or row["summary"])
    return Dataset.from_list([{k: v for k, v in row.items() if "summary" not in k} for row in groups.values()])


def load_preferences(source: str | os.PathLike = DATA / "preferences", split: str = "train") -> Dataset:
    """Pairs of summaries of a dialogue: `id`, `dialogue_id`, `chosen`, `rejected`, `flaw`. Raises `DataError`."""
    rows, where = _read(source, split)
    return _checked(rows, where, ("id", "dialogue_id", "chosen", "rejected", "flaw"), unique="id")


def load_civility(source: str | os.PathLike = DATA / "civility.jsonl") -> Dataset:
    """Single sentences with `text` and `label` (`"civil"` or `"hostile"`). Raises `DataError`."""
    rows, where = _read(source, "train")
    for number, row in rows:
        if row.get("label") not in ("civil", "hostile", None):
            raise DataError(
                f"{where}, row {number}, column 'label': {row['label']!r} is neither 'civil' nor 'hostile'."
            )
    return _checked(rows, where, ("text", "label"), unique="text")


@dataclass(frozen=True)
class InstructionTask:
    """One task of instruction tuning: its items, and several wordings of what is asked (Wei et al. 2021, "Finetuned
    Language Models Are Zero-Shot Learners", section 2.1).

    `rows` have `id`, `split`, `answer`, every name in `fields`, `options` where there is a choice, and `reasoning`
    where `reasoning_templates` ask for it. `cluster` names the group of like tasks that is held out together.
    """

    name: str
    cluster: str
    fields: tuple[str, ...]
    templates: tuple[str, ...]
    reasoning_templates: tuple[str, ...]
    rows: Dataset


def load_tasks(
    folder: str | os.PathLike = DATA / "tasks", dialogues: str | os.PathLike = DATA / "dialogues"
) -> dict[str, InstructionTask]:
    """The instruction tasks of `folder` by name: `<name>.jsonl` with the items, `<name>.yaml` with the wordings.

    The items of `split` `train` are about training dialogues, those of `test` about held-out ones. Raises `DataError`.
    """
    folder = Path(folder)
    texts = {
        split: {dialogue_id(row["id"], split): row["dialogue"] for row in load_dialogues(dialogues, split)}
        for split in ("train", "test")
    }
    found = sorted(folder.glob("*.yaml"))
    if not found:
        raise DataError(
            f"The folder {folder} has no task: check the path, or put a .yaml file with wordings and a .jsonl file with items there."
        )
    return {path.stem: _load_task(path, texts) for path in found}


def dialogue_id(row_id: str, split: str) -> str:
    """`test_7` for `test_7_2`, the second reference of that dialogue, as DialogSum numbers its test split; else the id itself."""
    return row_id.rsplit("_", 1)[0] if split == "test" else row_id


def _load_task(path: Path, dialogues: dict[str, dict[str, str]]) -> InstructionTask:
    words = _read_wording(path)
    fields, templates, reasoning = (tuple(words[key]) for key in ("fields", "templates", "reasoning_templates"))
    rows, where = _read(path.with_suffix(".jsonl"), "train")
    choice = any("options" in row for _, row in rows)
    for number, row in rows:
        if row.get("split") not in tuple(dialogues):
            raise DataError(
                f"{where}, row {number}, column 'split': {row.get('split')!r} is not among {', '.join(dialogues)}: write one of these."
            )
        if "dialogue" in fields:
            known, own = dialogues[row["split"]], row.get("dialogue_id")
            if not isinstance(own, str) or own not in known:
                raise DataError(
                    f"{where}, row {number}, column 'dialogue_id': {own!r} is no dialogue of the split {row['split']!r}: "
                    f"give one that is, such as {next(iter(known))!r}."
                )
            row["dialogue"] = known[own]
        if choice and not _is_texts(row.get("options")):
            raise DataError(
                f"{where}, row {number}, column 'options': a list of texts is expected, {row.get('options')!r} came: "
                'write ["yes", "no"], in all rows of the task or in none.'
            )
        if choice and row.get("answer") not in row["options"]:
            raise DataError(
                f"{where}, row {number}, column 'answer': {row.get('answer')!r} is none of the options {row['options']}: copy one of them."
            )
    table = _checked(
        rows, where, ("id", "split", "answer", *fields, *(("reasoning",) if reasoning else ())), unique="id"
    )
    wanted = {*fields, *(("options",) if choice else ())}
    for template in (*templates, *reasoning):
        try:
            places = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise DataError(
                f"{path}: a template has a brace too many or too few ({error}): {template[:60]!r}; write a brace that is meant as {{{{ or }}}}."
            ) from error
        if places != wanted:
            raise DataError(
                f"{path}: a template has the places {sorted(places)}, its task has {sorted(wanted)}: {template[:60]!r}; "
                "name each of them in it, and no other."
            )
    return InstructionTask(path.stem, words["cluster"], fields, templates, reasoning, table)


def _read_wording(path: Path) -> dict[str, Any]:
    """What a task's YAML file holds, with `reasoning_templates` even where there are none."""
    try:
        words = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): save it as UTF-8 text.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or one_line(error)
        line = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}{line}: not valid YAML ({problem}): look at quotes and indents there.") from error
    if not isinstance(words, dict) or not isinstance(words.get("cluster"), str):
        raise DataError(f"{path} does not say to which cluster its task belongs: add `cluster: name`.")
    words = {**words, "reasoning_templates": words.get("reasoning_templates") or []}
    for key in ("fields", "templates"):
        if not words.get(key):
            raise DataError(f"{path} has no {key}: it needs cluster, fields and templates.")
    for key in ("fields", "templates", "reasoning_templates"):
        if words[key] and not _is_texts(words[key]):
            raise DataError(
                f"{path}: {key} is {words[key]!r}, where a list of texts is expected: write one after each dash."
            )
    return words


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


# --- reading -----------------------------------------------------------------------------------------------------


Rows = list[tuple[int, dict]]  # with the number a reader finds them by: of the line, or counted from 1


def _read(source: str | os.PathLike, split: str) -> tuple[Rows, str]:
    """Rows of a file, of a folder's file for `split`, or of a Hub data set; and the name to use in messages."""
    if split not in SPLIT_NAMES:
        raise DataError(f"There is no split {split!r}: choose one of {', '.join(SPLIT_NAMES)}.")
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / (name + suffix) for name in SPLIT_NAMES[split] for suffix in SUFFIXES]
        existing = [file for file in found if file.is_file()]
        if not existing:
            raise DataError(f"The folder {path} has no {found[0].name} (nor .csv, .parquet) for the split {split!r}.")
        path = existing[0]
    if path.is_file():
        return _read_file(path), str(path)
    if path.suffix in SUFFIXES or path.is_absolute() or len(path.parts) > 2:
        raise DataError(f"The data file {path} does not exist: check the path.")
    return _read_hub(os.fspath(source), split), f"{source} ({split})"


def _read_file(path: Path) -> Rows:
    try:
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return [(n, _without_overflow(row, path, n)) for n, row in enumerate(csv.DictReader(file), 1)]
        if path.suffix == ".parquet":
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {one_line(error)}).") from error
    raise DataError(f"{path} is neither {', '.join(SUFFIXES)}: convert it to one of these.")


def _read_jsonl(path: Path) -> Rows:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, row {number}: not valid JSON ({error.msg} at character {error.pos}): write one object a line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: a JSON {type(row).__name__} where an object is expected.")
            rows.append((number, row))
    return rows


def _without_overflow(row: dict, path: Path, number: int) -> dict:
    if None in row or None in row.values():
        raise DataError(f"{path}, row {number}: it does not have as many fields as the header (an unquoted comma?).")
    return row


def _read_hub(name: str, split: str) -> Rows:
    from datasets import load_dataset

    try:
        return list(enumerate(load_dataset(name, split=split).to_list(), 1))
    except Exception as error:
        raise DataError(
            f"No data set {name!r}: it is not a file, not a folder, and not on the Hub ({type(error).__name__}); "
            f"the project's own is {DATA / 'dialogues'}."
        ) from error


def _checked(rows: Rows, where: str, columns: Sequence[str], *, unique: str) -> Dataset:
    """The rows as a table, or `DataError` at the first row that lacks a column, a value or a new `unique` value."""
    if not rows:
        raise DataError(f"{where} has no rows.")
    seen: dict[str, int] = {}
    for number, row in rows:
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{where}, row {number}: no column {column!r} (it has {', '.join(map(str, row))}): add it."
                )
            value = row[column]
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}, row {number}, column {column!r}: text expected, found {value!r}.")
        if row[unique] in seen:
            raise DataError(
                f"{where}, row {number}, column {unique!r}: {row[unique]!r} stands in row {seen[row[unique]]} already: give each row its own."
            )
        seen[row[unique]] = number
    every = dict.fromkeys(column for _, row in rows for column in row)  # `from_list` takes those of the first row only
    try:
        return Dataset.from_list([{column: row.get(column) for column in every} for _, row in rows])
    except (pyarrow.ArrowException, UnicodeError, TypeError) as error:
        raise DataError(
            f"{where} does not make a table ({one_line(error)}): give each column values of one kind, in valid Unicode."
        ) from error
