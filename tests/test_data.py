"""The project's own data against its datasheet, and the readers with good and with damaged files."""

import ast
import csv
import datetime
import json
import operator
import re
from collections import Counter, defaultdict
from itertools import combinations

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasheet import (
    README,
    SPLITS,
    benchmark,
    chance,
    choices,
    figures,
    kept,
    longest_is_right,
    most_common,
    near_duplicates,
    own_dialogues,
    spoken,
    variety,
    words,
)

from utils.data import (
    DATA,
    DataError,
    by_dialogue,
    dialogue_id,
    load_civility,
    load_dialogues,
    load_preferences,
    load_tasks,
)
from utils.lab import LabError
from utils.prompts import task_example

FLAWS = {"hostile", "copied", "invented", "missed", "rambling"}
ROW = {"id": "train_0", "dialogue": "#Person1#: Hi.\n#Person2#: Bye.", "summary": "They greet.", "topic": "greet"}


@pytest.fixture(scope="module")
def own():
    return {split: load_dialogues(split=split).to_list() for split in SPLITS}


@pytest.fixture(scope="module")
def rows(own):
    """All rows of all splits."""
    return [row for split in SPLITS for row in own[split]]


@pytest.fixture(scope="module")
def preferences():
    return {split: load_preferences(split=split).to_list() for split in ("train", "test")}


# --- the project's own dialogues ---------------------------------------------------------------------------------


def test_columns_and_sizes(own):
    for split, size in (("train", 410), ("validation", 50), ("test", 300)):
        assert len(own[split]) == size
        assert all(set(row) == {"id", "topic", "tone", "dialogue", "summary", "civil_summary"} for row in own[split])
        assert all(value.strip() == value != "" for row in own[split] for value in row.values())


def test_ids_are_unique_and_name_their_split(own, rows):
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["id"].startswith(f"{split}_") for split in SPLITS for row in own[split])


def test_no_dialogue_stands_in_two_splits_or_twice_in_one(own):
    texts = {split: {tuple(words(row["dialogue"])) for row in own[split]} for split in SPLITS}
    assert {split: len(texts[split]) for split in SPLITS} == {"train": 410, "validation": 50, "test": 100}
    assert not any(texts[a] & texts[b] for a, b in combinations(SPLITS, 2))


def test_the_test_split_has_100_dialogues_with_three_references_each(own):
    groups = defaultdict(list)
    for row in own["test"]:
        groups[dialogue_id(row["id"], "test")].append(row)
    assert set(groups) == {f"test_{i}" for i in range(100)}
    for name, group in groups.items():
        assert [row["id"] for row in group] == [f"{name}_{k}" for k in (1, 2, 3)]
        assert len({(row["dialogue"], row["topic"], row["tone"]) for row in group}) == 1
        assert len({row["summary"] for row in group}) == len({row["civil_summary"] for row in group}) == 3
    assert {len(references) for references in by_dialogue(own["test"])["references"]} == {3}


def test_every_turn_names_its_speaker_and_both_speak(rows):
    wrong = [
        row["id"] for row in rows for turn in row["dialogue"].split("\n") if not re.match(r"#Person[12]#: \S", turn)
    ]
    assert wrong == []
    assert [row["id"] for row in rows if not all(f"#Person{i}#: " in row["dialogue"] for i in (1, 2))] == []


def test_dialogues_have_4_to_20_turns_and_60_to_220_spoken_words(rows):
    assert [row["id"] for row in rows if not 4 <= len(row["dialogue"].split("\n")) <= 20] == []
    assert [row["id"] for row in rows if not 60 <= len(spoken(row["dialogue"]).split()) <= 220] == []


def test_about_a_third_is_heated(own, rows):
    assert {row["tone"] for row in rows} == {"civil", "heated"}
    for split in SPLITS:
        assert 0.28 < sum(row["tone"] == "heated" for row in own[split]) / len(own[split]) < 0.38


def test_the_civil_summary_differs_exactly_where_the_dialogue_is_heated(rows):
    wrong = [row["id"] for row in rows if (row["civil_summary"] != row["summary"]) != (row["tone"] == "heated")]
    assert wrong == []


def test_no_two_dialogues_are_near_duplicates(own):
    distinct = {row["dialogue"]: dialogue_id(row["id"], split) for split in SPLITS for row in own[split]}
    assert near_duplicates([(name, spoken(text)) for text, name in distinct.items()]) == []


def test_no_two_summaries_of_different_dialogues_are_near_duplicates(own):
    texts = {
        (dialogue_id(row["id"], split), row[column])
        for split in SPLITS for row in own[split] for column in ("summary", "civil_summary")
    }  # fmt: skip
    assert near_duplicates(sorted(texts)) == []


def test_near_duplicates_finds_one_and_lets_other_summaries_of_a_dialogue_be():
    text = "the quick brown fox jumps over the lazy dog near the old mill"
    other = "yesterday " + text.replace("lazy", "sleepy")
    assert near_duplicates([("a", text), ("b", other)]) == [(("a", text), ("b", other))]
    assert near_duplicates([("a", text), ("a", other)]) == []
    assert near_duplicates([("a", text), ("b", "the quick brown fox jumps at dawn and then runs far away")]) == []


def test_no_sentence_of_a_summary_stands_verbatim_in_its_dialogue(rows):
    copied = []
    for row in rows:
        dialogue = f" {' '.join(words(row['dialogue']))} "
        for column in ("summary", "civil_summary"):
            sentences = [words(sentence) for sentence in re.split(r"(?<=[.!?;])\s+", row[column])]
            copied += [(row["id"], column) for s in sentences if len(s) >= 4 and f" {' '.join(s)} " in dialogue]
    assert copied == []


# --- the project's own preferences and civility sentences --------------------------------------------------------


def test_preferences_have_their_columns_and_every_flaw_equally_often(preferences):
    for split, size in (("train", 520), ("test", 130)):
        pairs = preferences[split]
        assert all(set(pair) == {"id", "dialogue_id", "chosen", "rejected", "flaw"} for pair in pairs)
        assert [pair["id"] for pair in pairs] == [f"pref_{split}_{i}" for i in range(size)]
        assert Counter(pair["flaw"] for pair in pairs) == dict.fromkeys(FLAWS, size // 5)


def test_every_preference_is_about_a_dialogue_of_its_own_split(own, preferences):
    for split, pairs in preferences.items():
        known = {dialogue_id(row["id"], split) for row in own[split]}
        assert [pair["id"] for pair in pairs if pair["dialogue_id"] not in known] == []


def test_chosen_and_rejected_differ_and_no_text_stands_in_two_pairs(preferences):
    pairs = [pair for split in preferences.values() for pair in split]
    texts = Counter(text for pair in pairs for text in (pair["chosen"], pair["rejected"]))
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_alone_decides_under_60_in_100_preferences(preferences, length):
    for pairs in preferences.values():
        longer = sum(length(pair["chosen"]) > length(pair["rejected"]) for pair in pairs)
        shorter = sum(length(pair["chosen"]) < length(pair["rejected"]) for pair in pairs)
        assert max(longer, shorter) < 0.6 * len(pairs)


def test_civility_sentences_are_different_and_half_of_them_hostile():
    sentences = load_civility().to_list()
    assert len(sentences) == 440
    assert all(set(row) == {"text", "label"} for row in sentences)
    assert len({tuple(words(row["text"])) for row in sentences}) == 440
    assert 0.45 < sum(row["label"] == "hostile" for row in sentences) / 440 < 0.55


# --- the project's own tasks -------------------------------------------------------------------------------------

TASKS = load_tasks()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_has_80_items_and_6_wordings(task):
    assert [row["id"] for row in task.rows] == [f"{task.name}_{i}" for i in range(80)]
    assert Counter(task.rows["split"]) == {"train": 60, "test": 20}
    assert len(set(task.templates)) >= 5
    assert near_duplicates([(str(i), template) for i, template in enumerate(task.templates)]) == []


def test_tasks_are_grouped_so_that_a_cluster_can_be_held_out_and_six_are_left():
    assert len(TASKS) >= 8
    assert len({task.cluster for task in TASKS.values()}) >= 7
    assert sum(bool(task.reasoning_templates) for task in TASKS.values()) == 2


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_item_can_be_asked_in_every_wording(task):
    for row in task.rows:
        for number in range(len(task.templates)):
            (message,), answer = task_example(task, row, number)
            assert answer == row["answer"]
            assert all(row[field] in message["content"] for field in task.fields)
        for number in range(len(task.reasoning_templates)):
            _, answer = task_example(task, row, number, reasoning=True)
            assert answer.startswith(row["reasoning"])
            assert answer.endswith(f"So the answer is {row['answer']}.")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_dialogue_serves_one_item_of_a_task(task):
    if "dialogue_id" in task.rows.column_names:
        assert len(set(task.rows["dialogue_id"])) == 80


def test_no_two_items_of_any_task_are_near_duplicates():
    own = {"sentiment": "options", "intent": "options", "topic": "options", "summary": "answer", "paraphrase": "sentence1",
           "question_answering": "question", "arithmetic": "problem", "next_turn": "answer"}  # fmt: skip
    texts = [
        (row["id"], " ".join(row[column]) if isinstance(row[column], list) else row[column])
        for name, task in TASKS.items()
        for column in [own.get(name, "statement")]
        for row in task.rows
    ]
    assert near_duplicates(texts) == []


def test_the_next_turn_is_the_next_turn_of_its_dialogue():
    dialogues = own_dialogues()
    for row in TASKS["next_turn"].rows:
        assert dialogues[row["dialogue_id"]].startswith(f"{row['beginning']}\n{row['speaker']}: {row['answer']}"), row[
            "id"
        ]


def test_paraphrases_cannot_be_told_by_the_words_they_share():
    overlap = {"yes": [], "no": []}
    for row in TASKS["paraphrase"].rows:
        one, other = set(words(row["sentence1"])), set(words(row["sentence2"]))
        overlap[row["answer"]].append(len(one & other) / len(one | other))
    means = {label: sum(shares) / len(shares) for label, shares in overlap.items()}
    assert abs(means["yes"] - means["no"]) < 0.1


OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.And: all, ast.Or: any,
}  # fmt: skip


def value_of(node):
    """The value of an expression of numbers or truth values; data is never given to `eval`."""
    if isinstance(node, str):
        return value_of(ast.parse(node, mode="eval").body)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | bool):
        return node.value
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp):
        return OPERATIONS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BoolOp):
        return OPERATIONS[type(node.op)](map(value_of, node.values))
    raise ValueError(f"no such expression: {ast.dump(node)}")


def test_the_answers_of_the_word_problems_and_every_step_to_them_are_right():
    for row in TASKS["arithmetic"].rows:
        hours = re.fullmatch(r"(\d\d):(\d\d)", row["answer"])
        answer = int(hours[1]) * 60 + int(hours[2]) if hours else int(row["answer"])
        assert value_of(row["check"]) == answer, row["id"]
        for left, right in re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", row["reasoning"]):
            assert value_of(left) == int(right), row["id"]
        assert row["answer"] in row["reasoning"].rstrip(".")[-len(row["answer"]) - 25 :], row["id"]


# --- the mini-benchmarks -----------------------------------------------------------------------------------------

SIZES = {"glue/sentiment": 80, "glue/paraphrase": 80, "glue/entailment": 80, "superglue/boolq": 60, "superglue/copa": 60,
         "bbh/object_counting": 50, "bbh/date_arithmetic": 50, "bbh/boolean_expressions": 50, "bbh/tracking_swaps": 50}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_benchmark_has_its_size_and_its_ids(name, size):
    assert [row["id"] for row in benchmark(name)] == [f"{name.split('/')[1]}_{i}" for i in range(size)]


def test_the_mmlu_style_set_has_12_subjects_of_12_and_every_position_is_right_3_times():
    rows = benchmark("mmlu/*")
    assert len({row["subject"] for row in rows}) == 12
    for subject in {row["subject"] for row in rows}:
        mine = [row for row in rows if row["subject"] == subject]
        assert len(mine) == 12
        assert Counter(row["answer"] for row in mine) == dict.fromkeys(range(4), 3)
    assert all(len(set(row["choices"])) == 4 for row in rows)


def test_no_two_benchmark_items_are_near_duplicates():
    texts = []
    for name in (*SIZES, "mmlu/*"):
        for row in benchmark(name):
            column = next(c for c in ("passage", "premise", "sentence", "sentence1", "input", "question") if c in row)
            texts.append((row["id"] + name, row[column].split("\n(A)")[0]))
    assert near_duplicates(texts) == []


def test_counted_objects_are_counted_right():
    for row in benchmark("bbh/object_counting"):
        counted = row["program"]["count"]
        assert str(sum(number for number, _, wanted in counted if wanted)) == row["target"], row["id"]
        assert all(noun in row["input"] for _, noun, _ in counted), row["id"]


def test_truth_values_are_right():
    for row in benchmark("bbh/boolean_expressions"):
        assert row["program"]["expression"] in row["input"]
        assert str(value_of(row["program"]["expression"])) == row["target"], row["id"]


def shifted(start, months):
    count = start.year * 12 + start.month - 1 + months
    return start.replace(year=count // 12, month=count % 12 + 1)


def date_answer(start, op, n=0, end=None):
    start, days = datetime.date.fromisoformat(start), datetime.timedelta(days=n)
    return {
        "add_days": lambda: start + days,
        "sub_days": lambda: start - days,
        "add_months": lambda: shifted(start, n),
        "weekday_after_days": lambda: f"{start + days:%A}",
        "weekday_before_days": lambda: f"{start - days:%A}",
        "days_between": lambda: abs((datetime.date.fromisoformat(end) - start).days),
    }[op]()


def test_dates_are_right():
    for row in benchmark("bbh/date_arithmetic"):
        assert str(date_answer(**row["program"])) == row["target"], row["id"]


def test_swaps_are_tracked_right():
    for row in benchmark("bbh/tracking_swaps"):
        holds = dict(row["program"]["start"])
        for one, other in row["program"]["swaps"]:
            holds[one], holds[other] = holds[other], holds[one]
        ask = row["program"]["ask"]
        answer = holds[ask] if ask in holds else next(who for who, what in holds.items() if what == ask)
        options = dict(re.findall(r"^(\([A-E]\)) (.*)$", row["input"], re.MULTILINE))
        assert options[row["target"]] == answer, row["id"]
        assert len(options) == len(set(options.values())) == 3


@pytest.mark.parametrize(
    "file", sorted((DATA / "benchmarks" / "perturbed").glob("*.jsonl")), ids=lambda file: file.stem
)
def test_a_perturbed_copy_changes_words_and_nothing_else(file):
    name, kind = file.stem.rsplit("_", 1)
    originals = {row["id"]: row for row in benchmark(f"*/{name}") if row["id"].startswith(name)}
    copies = benchmark(f"perturbed/{file.stem}")
    assert len(copies) == len(originals) if kind == "typos" else len(copies) >= 30
    assert [row["id"] for row in copies] == [i for i in originals if i in {row["id"] for row in copies}]
    texts = {"premise", "hypothesis", "passage", "sentence", "choice1", "choice2"} | (
        {"question"} if name == "boolq" else set()
    )
    for copy in copies:
        original = originals[copy["id"]]
        assert set(copy) == set(original)
        assert {c: v for c, v in copy.items() if c not in texts} == {
            c: v for c, v in original.items() if c not in texts
        }
        assert copy != original
        for column in texts & set(copy):
            assert len(copy[column].split()) == len(original[column].split()), copy["id"]


def test_lm_eval_reads_every_benchmark_and_scores_it_right(tmp_path, monkeypatch):
    """A model that always takes the first choice gets the share of rows whose first choice is right; one that writes a
    sentence with the answer in it gets all of what it has to write."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class FirstChoice(LM):
        def loglikelihood(self, requests):
            return [(-float(request.idx), False) for request in requests]

        def generate_until(self, requests):
            return [f" I think it is {request.doc['target']}, surely." for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    monkeypatch.chdir(tmp_path)  # from any folder
    manager = TaskManager(include_path=str(DATA / "benchmarks"), include_defaults=False)
    names = manager.all_subtasks
    assert len(names) == len(list((DATA / "benchmarks").glob("*.yaml"))) == 19
    results = simple_evaluate(model=FirstChoice(), tasks=names, task_manager=manager, bootstrap_iters=0)
    for name in names:
        samples, scores = results["samples"][name], results["results"][name]
        asked = [sample["arguments"][0][0] for sample in samples]
        assert len(set(asked)) == len(asked)
        assert not any("{{" in text for text in asked)
        if "acc,none" in scores:
            key = "answer" if name == "lab_mmlu" else "label"
            assert scores["acc,none"] == pytest.approx(sum(s["doc"][key] == 0 for s in samples) / len(samples)), name
        else:
            assert scores["exact_match,answer"] == 1.0, name


# --- figures of the datasheet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parts"), choices().items(), ids=choices())
def test_neither_position_nor_length_nor_a_common_label_gives_the_answer(name, parts):
    options, right, labels = parts
    count = Counter(right)
    positions = max(map(len, options))
    if not name.startswith("benchmarks/glue/entailment"):
        assert max(count.values()) - min(count[i] for i in range(positions)) <= 2
    fixed = len({frozenset(listed) for listed in options}) == 1
    assert fixed or longest_is_right(options, right) <= chance(options) + 0.05
    assert most_common(labels) <= chance(options) + 0.05


def test_the_baselines_find_what_gives_an_answer_away():
    assert longest_is_right([("a", "bbb"), ("cc", "d")], [1, 0]) == 1.0
    assert longest_is_right([("aa", "bb"), ("cc", "d")], [1, 1]) == 0.25
    assert most_common(["yes", "yes", "no"]) == pytest.approx(2 / 3)


def test_dialogues_are_as_varied_as_real_ones():
    """Against figures of DialogSum's validation split, kept in the datasheet."""
    real = re.search(
        r"DialogSum's validation split.*?([\d,]+) and ([\d,]+)", README.read_text(encoding="utf-8"), re.DOTALL
    )
    for ours, theirs in zip(variety(own_dialogues().values()), real.groups(), strict=True):
        assert ours >= 0.9 * int(theirs.replace(",", ""))


def test_variety_sees_repetition():
    varied = [f"#Person1#: word{i} and word{i + 1}" for i in range(60)]
    assert variety(varied, 100, 2) > variety(varied[:5] * 12, 100, 2)


def test_the_datasheet_has_the_figures_of_the_data():
    assert kept(README.read_text(encoding="utf-8")) == figures(), "run `python tests/datasheet.py --write`"


def test_the_datasheet_names_every_file_and_how_many_rows_it_has():
    listed = {}
    for pattern, count in re.findall(
        r"^\| `([^`]+\.(?:jsonl|txt))` \| ([\d,]+)", README.read_text(encoding="utf-8"), re.MULTILINE
    ):
        for file in (files := sorted(DATA.glob(pattern))):
            assert file not in listed, f"{file.name} is named twice"
            listed[file] = pattern
        rows = [file.read_text(encoding="utf-8").count("\n") if pattern.endswith("jsonl") else 1 for file in files]
        assert sum(rows) == int(count.replace(",", "")), pattern
    assert set(listed) == {*DATA.rglob("*.jsonl"), *DATA.rglob("*.txt")}


def test_every_file_is_utf_8_with_plain_line_ends():
    for file in (file for file in DATA.rglob("*") if file.suffix in {".jsonl", ".txt", ".yaml", ".md"}):
        text = file.read_bytes().decode("utf-8")
        assert "\r" not in text, file.name
        assert text.endswith("\n"), file.name
        assert not text.startswith("\ufeff"), file.name


# --- the corpus --------------------------------------------------------------------------------------------------


def test_the_corpus_has_30_000_words_of_prose_and_no_phrase_in_two_texts():
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted((DATA / "corpus").glob("*.txt"))}
    assert sum(len(text.split()) for text in texts.values()) >= 30_000
    assert near_duplicates(list(texts.items())) == []
    seen = defaultdict(set)
    for name, text in texts.items():
        listed = words(text)
        for i in range(len(listed) - 7):
            seen[tuple(listed[i : i + 8])].add(name)
    assert [gram for gram, names in seen.items() if len(names) > 1] == []
    assert all(re.match(r"\S.*\n\n\S", text) for text in texts.values())  # a title, an empty line, paragraphs


# --- reading -----------------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(lines(*rows), encoding="utf-8")
    return path


def several(n, **columns):
    return [ROW | {"id": f"train_{i}", "summary": f"Çok güzel, “{i}”.\nEnd."} | columns for i in range(n)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_of_each_kind_gives_the_same_rows(tmp_path, suffix):
    path = write(tmp_path / f"any{suffix}", several(3, note="kept"))
    assert load_dialogues(path).to_list() == load_dialogues(str(path), "test").to_list() == several(3, note="kept")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_gives_the_file_of_the_split(tmp_path, suffix):
    for size, split in enumerate(SPLITS, 1):
        write(tmp_path / f"{split}{suffix}", several(size))
    assert [len(load_dialogues(tmp_path, split)) for split in SPLITS] == [1, 2, 3]
    assert len(load_dialogues(tmp_path)) == 1


@pytest.mark.parametrize("name", ["dev.jsonl", "val.csv", "validation.parquet"])
def test_the_validation_file_may_be_called_dev_or_val(tmp_path, name):
    write(tmp_path / name, several(2))
    assert len(load_dialogues(tmp_path, "validation")) == 2


def test_fname_is_read_as_id(tmp_path):
    rows = [{"fname": row["id"], **{k: v for k, v in row.items() if k != "id"}} for row in several(2)]
    read = load_dialogues(write(tmp_path / "train.jsonl", rows))
    assert read["id"] == ["train_0", "train_1"]
    assert "fname" not in read.column_names


def test_empty_lines_are_skipped(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROW) + "\n  \n" + lines(ROW | {"id": "b"}))
    assert load_dialogues(tmp_path)["id"] == ["train_0", "b"]


def test_a_column_that_only_later_rows_have_is_kept(tmp_path):
    path = write(tmp_path / "train.jsonl", [ROW, ROW | {"id": "b", "civil_summary": "They part."}])
    assert load_dialogues(path).to_list()[1]["civil_summary"] == "They part."


def test_a_name_that_is_no_file_is_read_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(several(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_dialogues("knkarthick/dialogsum", "validation")) == 2
    assert asked == [("knkarthick/dialogsum", "validation")]


def test_a_name_that_the_hub_does_not_have_is_an_error_that_names_the_own_data(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"No data set 'some/thing'.*Hub \(ConnectionError\).*dialogues"):
        load_dialogues("some/thing")


def test_preferences_and_civility_are_read_from_any_file(tmp_path):
    pair = {"id": "p", "dialogue_id": "train_0", "chosen": "Good.", "rejected": "Bad.", "flaw": "missed"}
    assert load_preferences(write(tmp_path / "test.csv", [pair]).parent, "test").to_list() == [pair]
    sentence = {"text": "They greet.", "label": "civil"}
    assert load_civility(write(tmp_path / "c.parquet", [sentence])).to_list() == [sentence]


# --- grouping ----------------------------------------------------------------------------------------------------


def test_rows_of_one_dialogue_become_one_row_with_all_its_references():
    repeated = [
        ROW | {"id": f"test_{i}_{k}", "dialogue": f"#Person1#: {i}", "summary": f"{i}.{k}"}
        for k in (1, 2, 3) for i in range(5)  # a dialogue's rows need not stand together
    ]  # fmt: skip
    for given in (repeated, datasets.Dataset.from_list(repeated)):
        grouped = by_dialogue(given)
        assert len(grouped) == 5
        assert grouped["id"] == [f"test_{i}_1" for i in range(5)]
        assert (
            grouped["references"] == grouped["civil_references"] == [[f"{i}.{k}" for k in (1, 2, 3)] for i in range(5)]
        )
        assert set(grouped.column_names) == {"id", "dialogue", "topic", "references", "civil_references"}


def test_civil_references_are_the_civil_summaries_where_there_are_any():
    heated = [ROW | {"summary": "Rude.", "civil_summary": "Civil."}, ROW | {"summary": "Plain.", "civil_summary": None}]
    (row,) = by_dialogue(heated)
    assert row["references"] == ["Rude.", "Plain."]
    assert row["civil_references"] == ["Civil.", "Plain."]


def test_grouping_leaves_the_rows_as_they_were():
    rows = several(2)
    by_dialogue(rows)
    assert rows == several(2)


# --- errors ------------------------------------------------------------------------------------------------------

WITHOUT_SUMMARY = {key: value for key, value in ROW.items() if key != "summary"}
HEADER = "id,dialogue,summary,topic\n"
DAMAGED = {
    "empty": ("t.jsonl", "", ["t.jsonl", "no rows"]),
    "blank": ("t.jsonl", "\n\n", ["t.jsonl", "no rows"]),
    "only a header": ("t.csv", HEADER, ["t.csv", "no rows"]),
    "empty parquet": ("t.parquet", "", ["t.parquet", "damaged", "0 bytes"]),
    "no column": (
        "t.jsonl",
        lines(ROW, WITHOUT_SUMMARY),
        ["t.jsonl", "row 2", "no column 'summary'", "id, dialogue, topic"],
    ),
    "empty text": ("t.jsonl", lines(ROW | {"summary": " "}), ["t.jsonl", "row 1", "column 'summary'", "' '"]),
    "null": ("t.jsonl", lines(ROW, ROW | {"id": "b", "topic": None}), ["row 2", "column 'topic'", "None"]),
    "a number": ("t.jsonl", lines(ROW | {"id": 7}), ["row 1", "column 'id'", "text expected", "7"]),
    "empty CSV field": ("t.csv", HEADER + "a,b,c,d\ne,f,,h\n", ["t.csv", "row 2", "column 'summary'", "''"]),
    "broken line": ("t.jsonl", lines(ROW) + '{"id": "b",\n', ["t.jsonl", "row 2", "not valid JSON", "character 12"]),
    "a list": ("t.jsonl", lines(ROW, ["a", "b"]), ["t.jsonl", "row 2", "JSON list", "object"]),
    "few fields": ("t.csv", HEADER + "a,b,c,d\ne,f,g\n", ["t.csv", "row 2", "fields", "header"]),
    "many fields": ("t.csv", HEADER + "a,b,c,d,e\n", ["t.csv", "row 1", "fields", "comma"]),
    "same id": ("t.jsonl", lines(ROW, ROW | {"id": "b"}, ROW), ["t.jsonl", "row 3", "'id'", "'train_0'", "row 1"]),
    "Latin-1 CSV": ("t.csv", (HEADER + "a,b,é,d\n").encode("latin-1"), ["t.csv", "not UTF-8", "byte 30"]),
    "Latin-1 JSONL": ("t.jsonl", b'{"id": "\xe9"}', ["t.jsonl", "not UTF-8", "byte 8"]),
    "no parquet": ("t.parquet", "PAR1 and nothing more", ["t.parquet", "damaged", "ArrowInvalid"]),
    "other kind": ("t.txt", "text", ["t.txt", ".jsonl, .csv, .parquet", "convert"]),
    "row after an empty line": (
        "t.jsonl",
        lines(ROW) + "\n" + lines(WITHOUT_SUMMARY),
        ["row 3", "no column 'summary'"],
    ),
    "mixed types": ("t.jsonl", lines(ROW | {"n": 1}, ROW | {"id": "b", "n": "one"}), ["t.jsonl"]),
    "half a character": ("t.jsonl", lines(ROW | {"topic": "\ud83d"}), ["t.jsonl"]),
}


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_that_says_where_and_what(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_dialogues(tmp_path / name)
    assert [part for part in said if part not in str(caught.value)] == []
    assert "DataError" not in str(caught.value)  # one message, not a message in a message


def test_half_a_parquet_file_is_damaged(tmp_path):
    whole = write(tmp_path / "t.parquet", several(50)).read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"t\.parquet is damaged \(ArrowInvalid: [^\n]*\)\.$"):
        load_dialogues(tmp_path / "t.parquet")


def test_a_file_or_split_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_dialogues(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        load_dialogues("none.csv")
    for path in (tmp_path / "none", "/none"):
        with pytest.raises(DataError, match=r"/none does not exist"):
            load_dialogues(path)
    with pytest.raises(DataError, match=r"no test\.jsonl \(nor \.csv, \.parquet\) for the split 'test'"):
        load_dialogues(tmp_path, "test")
    with pytest.raises(DataError, match="no split 'dev': choose one of train, validation, test"):
        load_dialogues(split="dev")


def test_preferences_and_civility_are_checked_too(tmp_path):
    pair = {"id": "p", "dialogue_id": "train_0", "chosen": "Good.", "rejected": "", "flaw": "missed"}
    with pytest.raises(DataError, match=r"p\.jsonl, row 1, column 'rejected'"):
        load_preferences(write(tmp_path / "p.jsonl", [pair]))
    sentences = [{"text": "They greet.", "label": "civil"}, {"text": "They part.", "label": "rude"}]
    with pytest.raises(DataError, match=r"c\.csv, row 2, column 'label': 'rude' is neither 'civil' nor 'hostile'"):
        load_civility(write(tmp_path / "c.csv", sentences))
    with pytest.raises(DataError, match=r"c\.jsonl, row 2, column 'text': 'They greet.' stands in row 1"):
        load_civility(write(tmp_path / "c.jsonl", [sentences[0], sentences[0]]))


def test_a_data_error_is_a_lab_error():
    assert issubclass(DataError, LabError)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    for name, text in (("t.csv", "id,dialogue,summary,topic\na,b,c,d\n"), ("t.jsonl", lines(ROW))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert "id" in load_dialogues(tmp_path / name).column_names


# --- instruction tasks: errors -----------------------------------------------------------------------------------

WORDING = {"cluster": "mood", "fields": ["dialogue", "speaker"], "templates": ["{dialogue} {speaker}? {options}"]}
ITEM = {"id": "mood_0", "split": "train", "dialogue_id": "train_0", "speaker": "#Person1#", "options": ["glad", "sad"], "answer": "sad"}  # fmt: skip
SECOND = ITEM | {"id": "mood_1", "split": "test", "dialogue_id": "test_0"}


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


@pytest.fixture
def task_folder(tmp_path):
    """Writes a task (a wording as a dictionary or as text, items as rows or as text) and reads it with two dialogues."""
    write(tmp_path / "dialogues" / "train.jsonl", [ROW])
    write(tmp_path / "dialogues" / "test.jsonl", [ROW | {"id": "test_0_1"}, ROW | {"id": "test_0_2"}])

    def load(wording, items):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        as_text = wording if isinstance(wording, str | bytes) else json.dumps(wording)  # JSON is YAML
        (folder / "mood.yaml").write_bytes(as_text if isinstance(as_text, bytes) else as_text.encode())
        if items is not None:
            (folder / "mood.jsonl").write_text(items if isinstance(items, str) else lines(*items), encoding="utf-8")
        return load_tasks(folder, tmp_path / "dialogues")

    return load


def test_a_task_is_read_with_the_dialogues_that_it_names(task_folder):
    (task,) = task_folder(WORDING, [ITEM, SECOND]).values()
    assert (task.name, task.cluster, task.fields, task.reasoning_templates) == (
        "mood",
        "mood",
        ("dialogue", "speaker"),
        (),
    )
    assert task.rows["dialogue"] == [ROW["dialogue"]] * 2
    assert task.rows["options"] == [["glad", "sad"]] * 2
    (plain,) = task_folder(WORDING | {"templates": ["{dialogue} {speaker}"]}, [without(ITEM, "options")]).values()
    assert "options" not in plain.rows.column_names


DAMAGED_TASKS = {  # a wording, items, what the message must say
    "broken YAML": ('cluster: mood\nfields: [dialogue\ntemplates:\n  - "a"\n', [ITEM], ["mood.yaml, line 3", "not valid YAML", "quotes"]),
    "YAML with a tab": ("cluster: mood\nfields:\n\t- dialogue\n", [ITEM], ["mood.yaml, line 3", "not valid YAML", "indents"]),
    "YAML with a control character": ("cluster: \x01", [ITEM], ["mood.yaml", "not valid YAML"]),
    "YAML in Latin-1": ("cluster: é".encode("latin-1"), [ITEM], ["mood.yaml", "UTF-8"]),
    "YAML that is a list": ("- cluster", [ITEM], ["mood.yaml", "add `cluster: name`"]),
    "empty YAML": ("", [ITEM], ["mood.yaml", "add `cluster: name`"]),
    "no cluster": (without(WORDING, "cluster"), [ITEM], ["mood.yaml", "add `cluster: name`"]),
    "no templates": (without(WORDING, "templates"), [ITEM], ["mood.yaml has no templates", "it needs"]),
    "no fields": (WORDING | {"fields": []}, [ITEM], ["mood.yaml has no fields", "it needs"]),
    "fields as one text": (WORDING | {"fields": "dialogue"}, [ITEM], ["mood.yaml: fields is 'dialogue'", "list of texts", "after each dash"]),
    "a template that is no text": (WORDING | {"templates": [{"a": "b"}]}, [ITEM], ["mood.yaml: templates", "list of texts"]),
    "reasoning as one text": (WORDING | {"reasoning_templates": "Think."}, [ITEM], ["mood.yaml: reasoning_templates", "list of texts"]),
    "no items": (WORDING, None, ["mood.jsonl does not exist", "check the path"]),
    "empty items": (WORDING, "", ["mood.jsonl has no rows"]),
    "missing field": (WORDING, [ITEM, without(SECOND, "speaker")], ["mood.jsonl, row 2", "no column 'speaker'", "add it"]),
    "missing reasoning": (WORDING | {"reasoning_templates": WORDING["templates"]}, [ITEM], ["mood.jsonl, row 1", "no column 'reasoning'", "add it"]),
    "empty field": (WORDING, [ITEM | {"speaker": ""}], ["mood.jsonl, row 1, column 'speaker'", "text expected, found ''"]),
    "unknown dialogue": (WORDING, [ITEM, SECOND | {"dialogue_id": "test_9"}], ["mood.jsonl, row 2, column 'dialogue_id'", "'test_9' is no dialogue of the split 'test'", "such as 'test_0'"]),
    "dialogue of the other split": (WORDING, [ITEM | {"dialogue_id": "test_0"}], ["mood.jsonl, row 1, column 'dialogue_id'", "no dialogue of the split 'train'", "'train_0'"]),
    "dialogue with the number of its reference": (WORDING, [SECOND | {"dialogue_id": "test_0_1"}], ["row 1", "'test_0_1' is no dialogue", "such as 'test_0'"]),
    "no dialogue": (WORDING, [without(ITEM, "dialogue_id")], ["mood.jsonl, row 1, column 'dialogue_id'", "None", "such as"]),
    "dialogue as a list": (WORDING, [ITEM | {"dialogue_id": ["train_0"]}], ["mood.jsonl, row 1, column 'dialogue_id'", "['train_0']"]),
    "unknown split": (WORDING, [ITEM | {"split": "dev"}], ["mood.jsonl, row 1, column 'split'", "'dev' is not among train, test", "one of these"]),
    "no split": (WORDING, [without(ITEM, "split")], ["mood.jsonl, row 1, column 'split'", "None is not among"]),
    "split as a list": (WORDING, [ITEM | {"split": ["train"]}], ["mood.jsonl, row 1, column 'split'", "['train']"]),
    "answer not among the options": (WORDING, [ITEM, SECOND | {"answer": "angry"}], ["mood.jsonl, row 2, column 'answer'", "'angry' is none of the options ['glad', 'sad']", "copy one"]),
    "no answer": (WORDING, [without(ITEM, "answer")], ["mood.jsonl, row 1, column 'answer'", "None is none", "copy one"]),
    "options as a text that holds the answer": (WORDING, [ITEM | {"options": "glad, sad"}], ["mood.jsonl, row 1, column 'options'", "a list of texts is expected, 'glad, sad' came", 'write ["yes", "no"]']),
    "options as a number": (WORDING, [ITEM | {"options": 2}], ["mood.jsonl, row 1, column 'options'", "2 came"]),
    "options that are empty": (WORDING, [ITEM | {"options": []}], ["mood.jsonl, row 1, column 'options'", "[] came"]),
    "options with a number": (WORDING, [ITEM | {"options": ["sad", 1]}], ["mood.jsonl, row 1, column 'options'", "['sad', 1] came"]),
    "options in some rows only": (WORDING, [ITEM, without(SECOND, "options")], ["mood.jsonl, row 2, column 'options'", "in all rows of the task or in none"]),
    "a place that the task does not declare": (WORDING | {"templates": ["{dialogue} {speaker} {options} {topic}"]}, [ITEM], ["mood.yaml", "['dialogue', 'options', 'speaker', 'topic']", "its task has ['dialogue', 'options', 'speaker']", "no other"]),
    "a place that is missing": (WORDING | {"templates": [*WORDING["templates"], "{dialogue} {options}"]}, [ITEM], ["mood.yaml", "has the places ['dialogue', 'options']", "'{dialogue} {options}'", "name each"]),
    "a place for options that no item has": (WORDING, [without(ITEM, "options")], ["mood.yaml", "its task has ['dialogue', 'speaker']", "no other"]),
    "a place that is missing where it is reasoned": (WORDING | {"reasoning_templates": ["{dialogue}"]}, [ITEM | {"reasoning": "So."}], ["mood.yaml", "has the places ['dialogue']", "name each"]),
    "a brace that is not closed": (WORDING | {"templates": ["{dialogue} {speaker"]}, [ITEM], ["mood.yaml", "a brace too many or too few", "'{dialogue} {speaker'", "{{ or }}"]),
    "broken JSON line": (WORDING, lines(ITEM) + '{"id": "mood_1",\n', ["mood.jsonl, row 2", "not valid JSON", "write one object a line"]),
    "a JSON list": (WORDING, lines(ITEM, ["a"]), ["mood.jsonl, row 2", "JSON list", "object is expected"]),
    "same id twice": (WORDING, [ITEM, SECOND, ITEM], ["mood.jsonl, row 3, column 'id'", "'mood_0' stands in row 1 already", "its own"]),
}  # fmt: skip


@pytest.mark.parametrize(("wording", "items", "said"), DAMAGED_TASKS.values(), ids=DAMAGED_TASKS)
def test_a_damaged_task_is_an_error_that_says_where_and_what_to_do(task_folder, wording, items, said):
    with pytest.raises(DataError) as caught:
        task_folder(wording, items)
    assert [part for part in said if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_folder_without_tasks_is_an_error_that_says_what_belongs_there(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=rf"{folder} has no task: check the path, or put a \.yaml .* \.jsonl"):
            load_tasks(folder)
