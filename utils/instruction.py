"""Instruction tuning on a mixture of tasks: how many examples of which, in which wording, and how answers are scored.

After Wei et al. 2021 ("Finetuned Language Models Are Zero-Shot Learners", FLAN): tasks stand in clusters, each task has
several wordings, and a cluster that is tested is held out as a whole. Left out of it: its "OPTIONS:" suffix (the wordings
here say in words that there is a choice) and packing several examples into one sequence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from utils.data import InstructionTask
from utils.generation import base_model, like_lengths, pad_right, read_prompts, select_rows
from utils.kernels import fused_lora
from utils.lab import LabError, progress
from utils.prompts import encode, encode_example, task_example


@dataclass(frozen=True)
class Item:
    """One row of a task in one wording: chat messages `prompt`, the `answer` to learn, and the `options` (none where it is free)."""

    task: str
    row: str
    prompt: list[dict[str, str]]
    answer: str
    options: tuple[str, ...]


def clusters(tasks: Mapping[str, InstructionTask]) -> dict[str, list[InstructionTask]]:
    """Cluster to its tasks, both in the order of their names."""
    names = sorted({task.cluster for task in tasks.values()})
    return {name: [tasks[key] for key in sorted(tasks) if tasks[key].cluster == name] for name in names}


def shortest(task: InstructionTask, share: float) -> InstructionTask:
    """`task` with that share of its training rows alone (at least one), those with the shortest texts. Test rows and the order stay."""
    rows = task.rows
    train = [i for i, split in enumerate(rows["split"]) if split == "train"]
    by_length = sorted(train, key=lambda i: sum(len(rows[i][name]) for name in task.fields))
    dropped = set(by_length[max(1, round(share * len(train))) :])
    return replace(task, rows=rows.select([i for i in range(len(rows)) if i not in dropped]))


def mixing_rates(sizes: Sequence[int], cap: float = float("inf")) -> np.ndarray:
    """Share of the training examples that each task gives, (tasks,) float64 with sum 1: proportional to its size, at most `cap`.

    Raffel et al. 2020 ("Exploring the Limits of Transfer Learning", section 3.5.2): without a cap, one large task would crowd
    out the others. A cap no larger than the smallest task mixes all equally. Raises `LabError` on sizes or a cap below 1.
    """
    if not len(sizes) or min(sizes) < 1 or not cap >= 1:
        raise LabError(
            f"sizes={list(sizes)}, cap={cap}: every task needs at least one example, and the cap lets one in."
        )
    counted = np.minimum(np.asarray(sizes, dtype=np.float64), cap)
    return counted / counted.sum()


def shares_to_counts(rates: Sequence[float], total: int) -> list[int]:
    """Whole numbers with sum `total`, each as near to its share as that allows (largest remainders)."""
    exact = np.asarray(rates, dtype=np.float64) * total
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[place] += 1
    return counts.tolist()


def mixture(
    tasks: Sequence[InstructionTask],
    total: int,
    *,
    templates: Sequence[int],
    cap: float = float("inf"),
    reasoning: bool = False,
    seed: int = 0,
) -> list[Item]:
    """`total` training items of `tasks`, as many of each as `mixing_rates` says, in the wordings numbered `templates`.

    A task gives its training rows in a random order, again from the first where it has too few, and takes its wordings in turn.
    With `reasoning` the wordings are those that ask for the steps, and the answers give them. Raises `LabError` where a task
    has no training row or no such wording.
    """
    generator, items = np.random.default_rng(seed), []
    pools = [[row for row in task.rows if row["split"] == "train"] for task in tasks]
    for task, pool in zip(tasks, pools, strict=True):
        if not pool:
            raise LabError(f"The task {task.name!r} has no row with split 'train': it can only be tested on.")
    counts = shares_to_counts(mixing_rates([len(pool) for pool in pools], cap), total)
    for task, pool, count in zip(tasks, pools, counts, strict=True):
        order = generator.permutation(len(pool))
        for k in range(count):
            row, template = pool[order[k % len(pool)]], templates[k % len(templates)]
            items.append(wording(task, row, template, reasoning=reasoning))
    return [items[i] for i in generator.permutation(total)]


def wording(task: InstructionTask, row: Mapping, template: int, *, reasoning: bool = False) -> Item:
    """One row of a task in its wording number `template` (see `task_example`)."""
    prompt, answer = task_example(task, row, template, reasoning=reasoning)
    return Item(task.name, row["id"], prompt, answer, tuple(row.get("options") or ()))


def encode_items(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, encoder_decoder: bool = False, max_length: int = 1024
) -> list[dict[str, list[int]]]:
    """What `fine_tune` takes: `input_ids` and `labels` of each item, only the answer learned."""
    return [
        encode_example(tokenizer, item.prompt, item.answer, encoder_decoder=encoder_decoder, max_length=max_length)
        for item in items
    ]


@torch.no_grad()
def option_scores(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    description: str = "scoring",
) -> list[np.ndarray]:
    """Log-probability in nats, computed in fp32, of each option as the whole answer: one (options,) array an item.

    The end-of-text token counts: without it *yes* could not lose against *yes and no*. A batch is at most `batch_size` prompts of
    like length, each of two tokens or more and read once for all its options. The model is in evaluation mode meanwhile.
    Raises `LabError` where an item has no options.
    """
    for item in items:
        if not item.options:
            raise LabError(
                f"The item {item.row!r} has no options to choose among: let the model write, with `generate`."
            )
    prompts = [encode(tokenizer, item.prompt) for item in items]
    options = [
        [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in item.options]
        for item in items
    ]
    by_length = sorted(range(len(items)), key=lambda i: len(prompts[i]), reverse=True)
    score = _score_encoder_decoder if model.config.is_encoder_decoder else _score_decoder
    scores: list[np.ndarray] = [np.zeros(0)] * len(items)
    was_training = model.training
    model.eval()
    try:
        with fused_lora(model), progress(total=len(items), description=description) as bar:
            for part in like_lengths([len(prompts[i]) for i in by_length], batch_size):
                numbers = by_length[part]
                owner = [place for place, i in enumerate(numbers) for _ in options[i]]
                texts = [option for i in numbers for option in options[i]]
                found = score(model, tokenizer.pad_token_id, [prompts[i] for i in numbers], owner, texts)
                for place, i in enumerate(numbers):
                    scores[i] = np.array([v for v, mine in zip(found, owner, strict=True) if mine == place])
                bar.update(len(numbers))
    finally:
        model.train(was_training)
    return scores


def _score_decoder(
    model, pad: int, prompts: list[list[int]], owner: list[int], options: list[list[int]]
) -> list[float]:
    """Log-probability of each option; number k follows the prompt `owner[k]`."""
    # The last token of a prompt predicts the first of an option, so it is read with the options.
    read = read_prompts(base_model(model), [prompt[:-1] for prompt in prompts], pad)
    rows = read.index[torch.tensor(owner, device=model.device)]
    texts = [[prompts[row][-1], *option[:-1]] for row, option in zip(owner, options, strict=True)]
    option_ids, option_mask = pad_right(texts, pad, model.device)
    logits = model(
        input_ids=option_ids,
        attention_mask=torch.cat([read.mask[rows], option_mask], 1),
        position_ids=read.mask.sum(1)[rows, None] + torch.arange(option_ids.shape[1], device=model.device),
        past_key_values=select_rows(read.cache, rows),
    ).logits
    return _totals(logits, options)


def _score_encoder_decoder(
    model, pad: int, prompts: list[list[int]], owner: list[int], options: list[list[int]]
) -> list[float]:
    ids, mask = pad_right(prompts, pad, model.device)
    hidden = base_model(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = torch.tensor(owner, device=model.device)
    labels, _ = pad_right(options, pad, model.device)
    encoded = BaseModelOutput(last_hidden_state=hidden[rows])
    return _totals(model(encoder_outputs=encoded, attention_mask=mask[rows], labels=labels).logits, options)


def _totals(logits: Tensor, options: list[list[int]]) -> list[float]:
    """Sum of the options' log-probabilities; logits (options, length, vocabulary), each row as long as the longest option."""
    totals = []
    for row, option in zip(logits, options, strict=True):
        row = row[: len(option)].float()
        chosen = row.gather(1, torch.tensor(option, device=row.device)[:, None])[:, 0]
        totals.append(float((chosen - row.logsumexp(1)).sum()))
    return totals


def choices_right(items: Sequence[Item], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Whether the likeliest option is the answer, (items,) float64 of 0 and 1 (rank classification, Wei et al. 2021, section 2.3)."""
    return np.array(
        [float(item.options[int(np.argmax(row))] == item.answer) for item, row in zip(items, scores, strict=True)]
    )


def chance(items: Sequence[Item]) -> float:
    """Accuracy of guessing among the options."""
    return float(np.mean([1 / len(item.options) for item in items]))


def final_answer(text: str) -> str:
    """What stands after the last "the answer is" of a text, or the text where there is none: lower case, no full stop.

    Of a text that goes on after the answer, only the answer's own sentence counts.
    """
    found = re.split(r"\bthe answer is\b:?", text, flags=re.IGNORECASE)
    last = found[-1].strip()
    if len(found) > 1:
        last = re.split(r"\.(?=\s|$)|\n", last)[0]  # not the point in 3.5
    return " ".join(last.lower().rstrip(".!").split())
