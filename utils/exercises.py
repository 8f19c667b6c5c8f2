"""Checks of the exercises: each says what is wrong with an answer, from an oracle that is not the reference solution.

A check raises `ExerciseError` with the first thing that is wrong, in the order in which one would mend it, and returns a sentence where all is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from utils.lab import ExerciseError
from utils.prompts import summary_prompt

Shot = tuple[str, str]


def check_shots(answer: Callable[[list[dict], list[dict], int], list[Shot]]) -> str:
    """Week 1: `answer(train, test, k)` picks k worked examples, `(dialogue, summary)`, for prompts about `test`."""
    train = [{"dialogue": f"#Person1#: train {i} " + "word " * i, "summary": f"Summary {i}."} for i in (3, 1, 4, 2)]
    train.append({"dialogue": "#Person1#: test 0", "summary": "The answer."})  # a test dialogue that has slipped in
    test = [{"dialogue": f"#Person1#: test {i}", "summary": "The answer."} for i in range(3)]
    picked = answer([dict(row) for row in train], [dict(row) for row in test], 3)
    if not isinstance(picked, list) or not all(isinstance(shot, tuple) and len(shot) == 2 for shot in picked):
        raise ExerciseError("A list of pairs (dialogue, summary) is expected: `summary_prompt` takes its shots so.")
    if len(picked) != 3:
        raise ExerciseError(f"Three examples were asked for, {len(picked)} came.")
    known = {row["dialogue"]: row["summary"] for row in train}
    asked = {row["dialogue"] for row in test}
    for dialogue, summary in picked:
        if dialogue in asked and dialogue not in known:
            raise ExerciseError(
                f"The example {dialogue!r} stands in the test split: the model is shown an answer it is about to be asked for."
            )
        if dialogue in asked:
            raise ExerciseError(
                f"The example {dialogue!r} is in the training split, but in the test split as well: compare with the test dialogues too."
            )
        if known.get(dialogue) != summary:
            raise ExerciseError(f"The example {dialogue!r} has {summary!r} beside it, which is not its own summary.")
    if len({dialogue for dialogue, _ in picked}) < 3:
        raise ExerciseError("One example comes twice: a second copy tells the model nothing new.")
    if picked != answer([dict(row) for row in train], [dict(row) for row in test], 3):
        raise ExerciseError("Two calls gave different examples: two runs would not be comparable.")
    return "Right: the examples come from training alone, each with its own summary, the same ones every time."


def check_fitting(
    answer: Callable[[PreTrainedTokenizerBase, str, Sequence[Shot], int, int], int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Week 1: `answer(tokenizer, dialogue, shots, context, max_new_tokens)` is how many of the shots, from the first, can stand in the prompt."""
    dialogue, shots = "#Person1#: Is it open?\n#Person2#: From nine.", [("#Person1#: Yes.", "A yes.")] * 6
    # An oracle by another way: let transformers itself count the tokens of the finished prompt.
    messages = [summary_prompt(dialogue, shots[:k]) for k in range(len(shots) + 1)]
    if tokenizer.chat_template:
        lengths = [
            len(
                tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
            )
            for m in messages
        ]
    else:
        lengths = [len(tokenizer("\n\n".join(message["content"] for message in m)).input_ids) for m in messages]
    for room in (0, 40):
        for k, length in enumerate(lengths):
            got = answer(tokenizer, dialogue, shots, length + room, room)
            if got == k:
                continue
            if room and got > k:
                raise ExerciseError(
                    f"With a context of {length + room} tokens you take {got} examples. They fit, but the answer of up to {room} tokens does not any more."
                )
            if got > k:
                raise ExerciseError(
                    f"{got} examples make a prompt of {lengths[min(got, len(shots))]} tokens, more than the context of {length}. "
                    "Are the special tokens of the chat format and the instruction counted?"
                )
            raise ExerciseError(
                f"You take {got} examples where {k} fit: a prompt that fills the context exactly is allowed."
            )
    if answer(tokenizer, dialogue, shots, lengths[-1] * 9, 0) != len(shots):
        raise ExerciseError("With room to spare all examples are to be taken, and no more than there are.")
    return "Right: prompt and answer fit together, and no example is left out that would have fitted."
