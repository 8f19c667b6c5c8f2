"""Prompts: templates, worked examples (shots), the chat format, and the label mask for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from utils.data import InstructionTask
from utils.lab import LabError

IGNORED = -100  # the label that cross-entropy leaves out

TEMPLATES = {
    "bare": "{dialogue}",
    "instruction": "Summarize the following conversation in one or two sentences.\n\n{dialogue}",
    "question": "{dialogue}\n\nWhat was this conversation about? Answer in one or two sentences.",
    "completion": "Conversation:\n{dialogue}\n\nSummary:",
}


def summary_prompt(
    dialogue: str, shots: Sequence[tuple[str, str]] = (), template: str = "instruction"
) -> list[dict[str, str]]:
    """Chat messages that ask for a summary, after worked examples `(dialogue, summary)`.

    Each shot is a question of the user and an answer of the assistant. Raises `LabError` on an unknown template.
    """
    if template not in TEMPLATES:
        raise LabError(f"There is no prompt template {template!r}: choose one of {', '.join(TEMPLATES)}.")
    ask = TEMPLATES[template].format
    messages = []
    for shot_dialogue, shot_summary in shots:
        messages.append({"role": "user", "content": ask(dialogue=shot_dialogue)})
        messages.append({"role": "assistant", "content": shot_summary})
    return [*messages, {"role": "user", "content": ask(dialogue=dialogue)}]


def task_example(
    task: InstructionTask, row: Mapping, template: int = 0, *, reasoning: bool = False
) -> tuple[list[dict[str, str]], str]:
    """Chat messages that put one item of an instruction task in one of its wordings, and the answer to learn.

    With `reasoning` the wording is one that asks to think first, and the answer gives the steps before the result (Wei et
    al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models"). Raises `LabError` where the task has
    no such wording.
    """
    wordings = task.reasoning_templates if reasoning else task.templates
    if not 0 <= template < len(wordings):
        kind = "reasoning wordings" if reasoning else "wordings"
        raise LabError(f"The task {task.name!r} has {len(wordings)} {kind}, numbered from 0: there is no {template}.")
    places = {name: row[name] for name in task.fields}
    if row.get("options"):
        places["options"] = "\n".join(f"- {option}" for option in row["options"])
    answer = f"{row['reasoning']} So the answer is {row['answer']}." if reasoning else row["answer"]
    return [{"role": "user", "content": wordings[template].format(**places)}], answer


def render(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> str:
    """The text the model reads: the chat template applied, or plain text for a model that has none.

    A string stands as it is; write chat messages where the model should see its chat format.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return "\n\n".join(message["content"] for message in prompt)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt. A chat template writes its own special tokens; without one the tokenizer adds its own."""
    has_own = not isinstance(prompt, str) and bool(tokenizer.chat_template)
    return tokenizer(render(tokenizer, prompt), add_special_tokens=not has_own).input_ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    completion: str,
    *,
    encoder_decoder: bool = False,
    max_length: int = 1024,
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one training example.

    Decoder-only: the prompt and the completion in one sequence, the prompt's labels `-100` so that only the
    completion is learned. Encoder-decoder: the prompt is the input, the completion the labels. A prompt too long for
    `max_length` tokens loses its beginning, never its completion. Raises `LabError` where the completion alone is too long.
    """
    inputs = encode(tokenizer, prompt)
    target = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if len(target) > max_length - (not encoder_decoder):  # a decoder-only model needs a token to predict it from
        raise LabError(f"A completion of {len(target)} tokens does not fit in max_length={max_length}: raise it.")
    if encoder_decoder:
        return {"input_ids": inputs[-max_length:], "labels": target}
    inputs = inputs[-(max_length - len(target)) :]
    return {"input_ids": inputs + target, "labels": [IGNORED] * len(inputs) + target}
