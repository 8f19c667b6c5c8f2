"""The checks of the exercises: the right answer passes, and every plausible wrong one fails with its own message."""

import nbformat
import pytest
from conftest import make_tokenizer

from utils import batch
from utils.exercises import check_fitting, check_shots
from utils.lab import ExerciseError
from utils.prompts import encode, summary_prompt


def solution(week, name):
    """What the exercise cell that defines `name` defines, from the committed notebook."""
    cells = nbformat.read(batch.notebook(week), as_version=4).cells
    (source,) = [
        c.source for c in cells if "nbgrader" in c.metadata and f"def {name}(" in c.source and "SOLUTION" in c.source
    ]
    namespace = {"encode": encode, "summary_prompt": summary_prompt}
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


# --- week 1: shots -----------------------------------------------------------------------------------------------


def test_the_solution_of_the_shots_passes():
    assert check_shots(solution("week1", "choose_shots")).startswith("Right")


def of(rows):
    return [(row["dialogue"], row["summary"]) for row in rows]


def own_only(train, test):
    seen = {row["dialogue"] for row in test}
    return [row for row in train if row["dialogue"] not in seen]


WRONG_SHOTS = {
    "from the test split": (lambda train, test, k: of(test[:k]), "stands in the test split|in the test split as well"),
    "an overlap": (lambda train, test, k: of(sorted(train, key=lambda row: len(row["dialogue"]))[:k]), "in the test split as well"),
    "rows instead of pairs": (lambda train, test, k: own_only(train, test)[:k], "list of pairs"),
    "one too few": (lambda train, test, k: of(own_only(train, test)[: k - 1]), "Three examples were asked for, 2 came"),
    "summaries exchanged": (
        lambda train, test, k: [(a, of(own_only(train, test))[i - 1][1]) for i, (a, _) in enumerate(of(own_only(train, test))[:k])],
        "not its own summary",
    ),
    "one repeated": (lambda train, test, k: of(own_only(train, test)[:1]) * k, "comes twice"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "words"), WRONG_SHOTS.values(), ids=WRONG_SHOTS)
def test_a_wrong_choice_of_shots_is_told_what_is_wrong(answer, words):
    with pytest.raises(ExerciseError, match=words):
        check_shots(answer)


def test_shots_that_differ_from_call_to_call_are_found():
    calls = []

    def moody(train, test, k):
        calls.append(1)
        return of(own_only(train, test))[len(calls) % 2 :][:k]

    with pytest.raises(ExerciseError, match="Two calls gave different examples"):
        check_shots(moody)


# --- week 1: how many fit ----------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def tokenizer(request):
    return make_tokenizer(pad_is_eos=True, chat=request.param)


def largest(fits, shots):
    return max((k for k in range(len(shots) + 1) if fits(k)), default=0)


def length(tokenizer, dialogue, shots, k):
    return len(encode(tokenizer, summary_prompt(dialogue, shots[:k])))


def test_the_solution_of_the_fitting_passes(tokenizer):
    assert check_fitting(solution("week1", "shots_that_fit"), tokenizer).startswith("Right")


WRONG_FITS = {
    "no room for the answer": (lambda t, d, s, c, n: largest(lambda k: length(t, d, s, k) <= c, s), "the answer of up to 40 tokens does not"),
    "not up to the brim": (lambda t, d, s, c, n: largest(lambda k: length(t, d, s, k) + n < c, s), "fills the context exactly is allowed"),
    "all of them": (lambda t, d, s, c, n: len(s), "more than the context"),
    "characters": (lambda t, d, s, c, n: largest(lambda k: sum(len(a + b) for a, b in s[:k]) + len(d) + n <= c, s), "fit: a prompt|more than the context"),
    "only the texts": (
        lambda t, d, s, c, n: largest(lambda k: sum(len(t(a + b).input_ids) for a, b in s[:k]) + len(t(d).input_ids) + n <= c, s),
        "special tokens of the chat format",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "words"), WRONG_FITS.values(), ids=WRONG_FITS)
def test_a_wrong_count_of_shots_is_told_what_is_wrong(tokenizer, answer, words):
    with pytest.raises(ExerciseError, match=words):
        check_fitting(answer, tokenizer)
