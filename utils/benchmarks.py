"""Benchmarks through lm-eval on a model in memory, and what a HELM-style report is made of.

lm-eval (Gao et al., "The Language Model Evaluation Harness") reads the tasks, builds the prompts and scores the answers; that is
called, not rewritten. Its own `HFLM` reads the whole context again for each option (except those of one token). `SharedContextLM` reads
each context once, scores its options over the cache, and computes logits only where a token is scored. Left out: perplexity of whole documents
(`loglikelihood_rolling`), sampling, several processes.

The report follows Liang et al. 2022, "Holistic Evaluation of Language Models" (HELM), on small data. Each result keeps
its items, so that differences can be paired and get an interval.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.tasks import TaskManager
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from utils.data import DATA
from utils.generation import base_model, eos_token_ids, generate, generation_config, pad_left, pad_right
from utils.kernels import fused_lora
from utils.lab import LabError, one_line, progress

LOCAL = {
    "GLUE": ("lab_sentiment", "lab_paraphrase", "lab_entailment"),
    "SuperGLUE": ("lab_boolq", "lab_copa"),
    "MMLU": ("lab_mmlu",),
    "BIG-bench Hard": ("lab_boolean_expressions", "lab_object_counting", "lab_date_arithmetic", "lab_tracking_swaps"),
}
HUB = {
    "GLUE": ("sst2", "mrpc", "rte"),
    "SuperGLUE": ("boolq", "copa"),
    "MMLU": ("mmlu",),
    "BIG-bench Hard": tuple(
        f"bbh_zeroshot_{name}"
        for name in (
            "boolean_expressions",
            "object_counting",
            "date_understanding",
            "tracking_shuffled_objects_three_objects",
        )
    ),
}
BENCHMARKS = {"local": LOCAL, "hub": HUB}
COPIES = ("typos", "names", "gender")  # the ways in which items of `data/benchmarks/perturbed` were changed
FEMALE = "she her hers herself woman women girl girls lady ladies mother mum daughter sister wife aunt niece grandmother queen"
MALE = "he him his himself man men boy boys gentleman gentlemen father dad son brother husband uncle nephew grandfather king"
WRITING_BATCH = 32


# --- the model, as lm-eval asks it -----------------------------------------------------------------------------------


class SharedContextLM(TemplateLM):
    """A model for lm-eval that reads each context once. Scores are log-probabilities in nats, computed in fp32 from the model's logits.

    Decoder-only, encoder-decoder, or either under PEFT. With a learned prompt (prompt or prefix tuning), which is put before whatever is
    read, nothing is shared. `batch_size` counts contexts. `bar` is a progress bar that moves on by one for each context.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32, bar=None
    ):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.bar = model, tokenizer, batch_size, bar
        self.backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
        self._device = model.device
        self._longest = getattr(base_model(model).config, "max_position_embeddings", None) or 2048
        self._learned_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an option that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids. Unless told otherwise the tokenizer adds its own special tokens, but no second one to mark the beginning."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, option): its log-probability, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)  # context -> the requests about it
        for i, (_, context, _) in enumerate(requests):
            asked[tuple(context)].append(i)
        longest_first = sorted(asked, key=len, reverse=True)
        score = self._score_encoder_decoder if self.backend == "seq2seq" else self._score_decoder
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(longest_first), self.batch_size):
                contexts = longest_first[start : start + self.batch_size]
                numbers = [i for context in contexts for i in asked[context]]
                rows = [row for row, context in enumerate(contexts) for _ in asked[context]]
                scores = score([list(context) for context in contexts], rows, [requests[i][2] for i in numbers])
                for i, answer in zip(numbers, scores, strict=True):
                    answers[i] = answer
                if self.bar is not None:
                    self.bar.update(len(contexts))
        finally:
            self.model.train(was_training)
        return answers

    def _score_decoder(
        self, contexts: list[list[int]], rows: list[int], options: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Option k belongs to the context rows[k]."""
        contexts = [context[-(self._longest - max(map(len, options))) :] for context in contexts]
        if self._learned_prompt:
            return self._score_whole(contexts, rows, options)
        pad, device = self.tokenizer.pad_token_id, self.model.device
        input_ids, mask = pad_left(contexts, pad, device)
        read = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=base_model(self.model).config),
            # As a tensor it gives a copy; a view is not contiguous, and for a frozen head torch then copies the head for each row.
            logits_to_keep=torch.tensor([-1], device=device),
        )
        first = _score(read.logits[:, -1].float()[rows], torch.tensor([option[0] for option in options], device=device))
        longer = [k for k, option in enumerate(options) if len(option) > 1]
        scores = [[pair] for pair in zip(*(column.tolist() for column in first), strict=True)]
        if longer:
            places = torch.tensor([rows[k] for k in longer], device=device)
            read.past_key_values.batch_select_indices(places)
            option_ids, option_mask = pad_right([options[k][:-1] for k in longer], pad, device)
            logits = self.model(
                input_ids=option_ids,
                attention_mask=torch.cat([mask[places], option_mask], 1),
                position_ids=mask.sum(1)[places, None] + torch.arange(option_ids.shape[1], device=device),
                past_key_values=read.past_key_values,
            ).logits
            for row, k in zip(logits, longer, strict=True):
                scores[k] += _pairs(row[: len(options[k]) - 1], options[k][1:])
        return [_whole_option(parts) for parts in scores]

    def _score_whole(
        self, contexts: list[list[int]], rows: list[int], options: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Each option with its context in one sequence, counted from the end: a learned prompt may stand before it."""
        texts = [contexts[row] + option[:-1] for row, option in zip(rows, options, strict=True)]
        input_ids, mask = pad_right(texts, self.tokenizer.pad_token_id, self.model.device)
        logits = self.model(input_ids=input_ids, attention_mask=mask).logits[:, -input_ids.shape[1] :]
        ends = [len(text) for text in texts]
        return [
            _whole_option(_pairs(row[end - len(option) : end], option))
            for row, end, option in zip(logits, ends, options, strict=True)
        ]

    def _score_encoder_decoder(
        self, contexts: list[list[int]], rows: list[int], options: list[list[int]]
    ) -> list[tuple[float, bool]]:
        pad, device = self.tokenizer.pad_token_id, self.model.device
        input_ids, mask = pad_right([context[-self._longest :] for context in contexts], pad, device)
        labels, _ = pad_right(options, pad, device)
        if self._learned_prompt:
            source = {"input_ids": input_ids[rows]}
        else:
            hidden = base_model(self.model).get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
            source = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden[rows])}
        logits = self.model(**source, attention_mask=mask[rows], labels=labels).logits
        return [_whole_option(_pairs(row[: len(option)], option)) for row, option in zip(logits, options, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered: no task of the labs asks for it."""
        raise LabError("The log-probability of whole documents is not computed here: use lm-eval's own HFLM.")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes greedily, up to the first of the task's stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        texts = [""] * len(requests)
        for settings, numbers in groups.items():
            settings = json.loads(settings)
            if settings.get("do_sample"):
                raise LabError(
                    "A task asks for sampling (do_sample: true): set it to false, or use lm-eval's own HFLM."
                )
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            own = eos_token_ids(generation_config(self.model, self.tokenizer))
            completions = generate(
                self.model,
                self.tokenizer,
                [requests[i].args[0] for i in numbers],
                batch_size=WRITING_BATCH,
                max_new_tokens=settings.get("max_gen_toks", 256),
                # Whatever follows such a token is cut off below, so it need not be written.
                eos_token_id=[*own, *_tokens_with(self.tokenizer, until)],
                description="benchmarks: writing",
            )
            for i, completion in zip(numbers, completions, strict=True):
                text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, until, None)
            if self.bar is not None:
                self.bar.update(len(numbers))
        return texts


def _score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` (n,) under fp32 `logits` (n, vocabulary), and whether each is the likeliest."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == tokens


def _pairs(logits: Tensor, tokens: list[int]) -> list[tuple[float, bool]]:
    score, greedy = _score(logits.float(), torch.tensor(tokens, device=logits.device))
    return list(zip(score.tolist(), greedy.tolist(), strict=True))


def _whole_option(parts: list[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(score for score, _ in parts), all(greedy for _, greedy in parts)


def _tokens_with(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Ids of the tokens that hold one of `texts`."""
    written = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if texts else []
    return [i for i, token in enumerate(written) if any(text in token for text in texts)]


# --- running tasks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskResult:
    """What a model answered to the items of one task, one entry an item.

    `targets` (right) and `answers` (given) are numbers of options, or texts where the model writes. `correct` is (items,)
    float64, 0 or 1. `probabilities` has one (options,) array an item, the softmax of the options' log-probabilities (in total, not per
    token); None where the model writes.
    """

    task: str
    family: str
    ids: list[str]
    prompts: list[str]
    options: list[list[str]]
    targets: list[int | str]
    answers: list[int | str]
    correct: np.ndarray
    probabilities: list[np.ndarray] | None

    @property
    def chance(self) -> float:
        """Accuracy of guessing: among the options; where the model writes, among the right answers as often as they come."""
        if self.probabilities is not None:
            return float(np.mean([1 / len(options) for options in self.options]))
        return sum((count / len(self.targets)) ** 2 for count in Counter(self.targets).values())

    @property
    def majority(self) -> float:
        """Accuracy of always giving the commonest right answer of these very items, which it cannot know beforehand."""
        return max(Counter(self.targets).values()) / len(self.targets)

    def only(self, ids: Sequence[str]) -> TaskResult:
        """The same with the items `ids` alone, in that order."""
        place = {name: i for i, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in place]
        if missing:
            raise LabError(f"{self.task} was not asked about {missing[0]!r}: raise `limit`.")
        chosen = [place[name] for name in ids]
        lists = {
            name: [getattr(self, name)[i] for i in chosen]
            for name in ("ids", "prompts", "options", "targets", "answers")
        }
        probabilities = None if self.probabilities is None else [self.probabilities[i] for i in chosen]
        return replace(self, **lists, correct=self.correct[chosen], probabilities=probabilities)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: str | Mapping[str, Sequence[str]] = "local",
    *,
    limit: int | None = None,
    batch_size: int = 32,
    description: str = "benchmarks",
) -> dict[str, TaskResult]:
    """Run lm-eval tasks zero-shot on `model`, which stays as it is; results by the name of the task.

    `benchmarks` is "local" (data/benchmarks), "hub" (the sets they are modelled on), or families and the names of their lm-eval tasks.
    With `limit` so many items a family (never under one a task), shared out among its tasks and spread evenly over each of them.
    Raises `LabError` on an unknown name, on a limit below 1, and where the Hub is needed and cannot be reached.
    """
    if isinstance(benchmarks, str):
        if benchmarks not in BENCHMARKS:
            raise LabError(
                f"There are no benchmarks {benchmarks!r}: choose {' or '.join(BENCHMARKS)}, or give tasks by family."
            )
        benchmarks = BENCHMARKS[benchmarks]
    families, tasks, samples = {}, {}, {}
    for family, names in benchmarks.items():
        of_family = {task_name: task for name in names for task_name, task in _load(name).items()}
        families |= dict.fromkeys(of_family, family)
        tasks |= of_family
        samples |= _shared_out(of_family, limit)
    return _run(model, tokenizer, tasks, families, samples, batch_size, description)


@cache
def task_manager(local: bool = True) -> TaskManager:
    """What lm-eval knows: the tasks of data/benchmarks, or its own thousands, whose index takes seconds to make."""
    return TaskManager(include_path=str(DATA / "benchmarks"), include_defaults=False) if local else TaskManager()


def _load(name: str) -> dict[str, Task]:
    """The tasks that lm-eval knows under `name`, in the order of their names."""
    with _quiet():
        try:
            manager = task_manager() if task_manager().match_tasks([name]) else task_manager(local=False)
            if not manager.match_tasks([name]):
                known = ", ".join(task_manager().all_tasks)
                raise LabError(f"lm-eval has no task {name!r}: the local ones are {known}.")
            tasks = manager.load([name])["tasks"]
        except LabError:
            raise
        except Exception as error:  # no network raises a different type in each library below
            raise LabError(
                f"The benchmark {name!r} cannot be read ({type(error).__name__}: {one_line(error)}): it has to be fetched "
                'from the Hub once; without a network set BENCHMARKS = "local".'
            ) from error
    return dict(sorted(tasks.items()))


def _shared_out(tasks: Mapping[str, Task], limit: int | None) -> dict[str, list[int]]:
    """Which rows of each task to ask, `limit` together, at even distances: the first of a task may all be of one subject."""
    if limit is not None and limit < 1:
        raise LabError(f"limit={limit}: ask at least one item, or None for all.")
    samples = {}
    for name, task in tasks.items():
        size = len(task.eval_docs)
        count = size if limit is None else min(max(1, limit // len(tasks)), size)
        samples[name] = [i * size // count for i in range(count)]
    return samples


def _run(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    families: Mapping[str, str],
    samples: Mapping[str, list[int]],
    batch_size: int,
    description: str,
) -> dict[str, TaskResult]:
    total = sum(map(len, samples.values()))
    with progress(total=total, description=description) as bar, _quiet(), fused_lora(model):
        answers = lm_eval.evaluate(
            lm=SharedContextLM(model, tokenizer, batch_size, bar),
            task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
            samples=dict(samples),
            bootstrap_iters=0,
        )["samples"]
    return {name: _task_result(name, families[name], answers[name]) for name in tasks}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log and its bars out of the notebook; errors are still raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _task_result(task: str, family: str, samples: Sequence[Mapping]) -> TaskResult:
    """One entry an item; where a task reads answers through several filters, the last of them counts."""
    rows = list({sample["doc_id"]: sample for sample in samples}.values())
    metric = next((name for name in ("acc", "exact_match") if name in rows[0]), None)
    if metric is None:
        raise LabError(
            f"The task {task} has neither `acc` nor `exact_match`, but {rows[0]['metrics']}: choose another."
        )
    has_options = metric == "acc"
    options = [[argument[1].strip() for argument in row["arguments"]] if has_options else [] for row in rows]
    scores = [np.array([response[0][0] for response in row["resps"]]) for row in rows] if has_options else []
    return TaskResult(
        task=task,
        family=family,
        ids=[str(row["doc"].get("id", f"{task}_{row['doc_id']}")) for row in rows],
        prompts=[row["arguments"][0][0] for row in rows],
        options=options,
        targets=[row["target"] if has_options else str(row["target"]) for row in rows],
        answers=[int(values.argmax()) for values in scores] or [str(row["filtered_resps"][0]) for row in rows],
        correct=np.array([float(row[metric]) for row in rows]),
        probabilities=[_softmax(values) for values in scores] or None,
    )


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def by_family(results: Mapping[str, TaskResult]) -> dict[str, list[TaskResult]]:
    """The results of each family, in order."""
    families: dict[str, list[TaskResult]] = defaultdict(list)
    for result in results.values():
        families[result.family].append(result)
    return dict(families)


def family_correct(results: Mapping[str, TaskResult]) -> dict[str, np.ndarray]:
    """For each family whether each item was answered right, (items,) float64: what intervals are taken over."""
    return {family: np.concatenate([r.correct for r in rows]) for family, rows in by_family(results).items()}


def baselines(results: Sequence[TaskResult]) -> tuple[float, float]:
    """Accuracy of guessing and of the commonest answer of each task, over all items of `results`."""
    items = [len(result.ids) for result in results]
    return (
        float(np.average([result.chance for result in results], weights=items)),
        float(np.average([result.majority for result in results], weights=items)),
    )


def paired(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> dict[str, np.ndarray]:
    """For each family the change of every item from `before` to `after`, (items,) of -1, 0 or 1; and all of them, "all".

    Raises `LabError` where the two were not asked the same items: then nothing can be paired.
    """
    if [(r.task, r.ids) for r in before.values()] != [(r.task, r.ids) for r in after.values()]:
        raise LabError("The two results are about different items: run both with the same benchmarks and limit.")
    first, second = family_correct(before), family_correct(after)
    changes = {family: second[family] - first[family] for family in first}
    return changes | {"all": np.concatenate(list(changes.values()))}


# --- changed copies of the items -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """One task's items as they are and as changed copies, the same items in the same order."""

    kind: str
    clean: TaskResult
    changed: TaskResult

    @property
    def change(self) -> np.ndarray:
        """(items,): 1 where the copy is answered right and the original is not, -1 the other way round, else 0."""
        return self.changed.correct - self.clean.correct

    @property
    def answer_differs(self) -> np.ndarray:
        """(items,) 0 or 1: whether the copy gets another answer, right or wrong."""
        pairs = zip(self.changed.answers, self.clean.answers, strict=True)
        return np.array([float(a != b) for a, b in pairs])


def evaluate_copies(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    description: str = "changed copies",
) -> list[Copies]:
    """Ask the copies with typos, other names and exchanged genders, and their originals; `limit` copies of each kind.

    Always from data/benchmarks: the copies were made for this project's items.
    """
    tasks, samples, wanted = {}, {}, defaultdict(set)
    for kind in COPIES:
        of_kind = _load(f"lab_{kind}")
        tasks |= of_kind
        samples |= _shared_out(of_kind, limit)
        for name, task in of_kind.items():
            wanted[_original(name)] |= {task.eval_docs[i]["id"] for i in samples[name]}
    for name, ids in wanted.items():
        tasks |= _load(name)
        samples[name] = [i for i, row in enumerate(tasks[name].eval_docs) if row["id"] in ids]
    families = {name: family for family, names in LOCAL.items() for name in names}
    families |= {name: families[_original(name)] for name in tasks if name not in families}
    results = _run(model, tokenizer, tasks, families, samples, batch_size, description)
    return [
        Copies(kind, results[_original(name)].only(result.ids), result)
        for kind in COPIES
        for name, result in results.items()
        if name.endswith(f"_{kind}")
    ]


def _original(name: str) -> str:
    return name.rpartition("_")[0]


# --- measures --------------------------------------------------------------------------------------------------------


def calibration_bins(
    confidence: Sequence[float], correct: Sequence[float], bins: int = 10
) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, items) of `bins` groups of equally many items, from least to most confident."""
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise LabError(
            f"Confidence of shape {confidence.shape}, correct of shape {correct.shape}: give one of each an item."
        )
    if bins < 1:
        raise LabError(f"bins={bins}: take at least one.")
    if not (np.isfinite(confidence).all() and 0 <= confidence.min() <= confidence.max() <= 1):
        raise LabError(f"A confidence is between 0 and 1; {confidence.min():g} to {confidence.max():g} came.")
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return [(float(confidence[part].mean()), float(correct[part].mean()), len(part)) for part in parts]


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Mean distance between confidence and accuracy of groups of items, weighted by their size, between 0 and 1.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, with groups of equal size as in HELM. `confidence` (items,)
    is the probability of the answer given, `correct` (items,) 0 or 1. Raises `LabError` on other shapes or values.
    """
    groups = calibration_bins(confidence, correct, bins)
    return sum(size * abs(accuracy - mean) for mean, accuracy, size in groups) / sum(size for *_, size in groups)


def calibration_floor(confidence: Sequence[float], bins: int = 10, *, draws: int = 500, seed: int = 0) -> float:
    """The calibration error to expect, with these confidences, of a model whose confidences are exactly right.

    It is not 0: a group of eight items that are right with probability 0.7 seldom has 70 % right.
    """
    generator = np.random.default_rng(seed)
    correct = generator.random((draws, len(confidence))) < np.asarray(confidence)
    return float(np.mean([expected_calibration_error(confidence, row, bins) for row in correct]))


def bins_for(items: int) -> int:
    """Ten groups, or fewer where there would be under eight items in each."""
    return int(np.clip(items // 8, 1, 10))


def confidence_and_correct(results: Sequence[TaskResult]) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the answer given and whether it is right, (items,) each, over the tasks that have options."""
    chosen = [result for result in results if result.probabilities is not None]
    confidence = [float(row.max()) for result in chosen for row in result.probabilities]
    return np.array(confidence), np.concatenate([r.correct for r in chosen]) if chosen else np.zeros(0)


def gendered_words(texts: Sequence[str]) -> tuple[int, int]:
    """How many words for women and for men stand in `texts`."""
    words = Counter(re.findall(r"[a-z]+", " ".join(texts).lower()))
    return sum(words[w] for w in FEMALE.split()), sum(words[w] for w in MALE.split())


# --- the report ------------------------------------------------------------------------------------------------------

# Column -> whether more of it is better (1) or less (-1).
REPORT = {
    "accuracy": 1,
    "calibration error": -1,
    "change with typos": 1,
    "change with other names": 1,
    "change with exchanged genders": 1,
    "answers that change with gender": -1,
    "gendered words, from half and half": -1,
    "hostile share": -1,
    "tokens a second": 1,
    "millions of parameters": -1,
}
_SHIFT = dict(zip(COPIES, list(REPORT)[2:5], strict=True))
FEWEST_GENDERED = 10


def report_rows(
    results: Mapping[str, Mapping[str, TaskResult]],
    copies: Mapping[str, Sequence[Copies]],
    texts: Mapping[str, Mapping],
) -> list[tuple[str, str, dict[str, float]]]:
    """Rows (scenario, model or baseline, {column of `REPORT`: value}) of a HELM-style report; what does not apply is absent.

    `results` and `copies` by model. `texts`: by model or "people" a mapping with `texts`, `hostile` (texts,) bool, and, for a
    model, `tokens_a_second` and `parameters`.
    """
    accuracy, calibration, *_, flips, gendered, hostile, speed, size = REPORT
    rows = []
    for family in by_family(next(iter(results.values()))):
        for name, result in results.items():
            tasks = by_family(result)[family]
            values = {accuracy: float(np.concatenate([r.correct for r in tasks]).mean())}
            confidence, correct = confidence_and_correct(tasks)
            if len(confidence):
                values[calibration] = expected_calibration_error(confidence, correct, bins_for(len(confidence)))
            for kind in COPIES:
                chosen = [c for c in copies.get(name, ()) if c.kind == kind and c.clean.family == family]
                if chosen:
                    values[_SHIFT[kind]] = float(np.concatenate([c.change for c in chosen]).mean())
                if chosen and kind == "gender":
                    values[flips] = float(np.concatenate([c.answer_differs for c in chosen]).mean())
            rows.append((family, name, values))
        for name, share in zip(("guessing", "commonest answer"), baselines(tasks), strict=True):
            rows.append((family, name, {accuracy: share}))
    for name, written in texts.items():
        values = {hostile: float(np.mean(written["hostile"]))}
        female, male = gendered_words(written["texts"])
        if female + male >= FEWEST_GENDERED:
            values[gendered] = abs(female / (female + male) - 0.5)
        if "tokens_a_second" in written:
            values |= {speed: written["tokens_a_second"], size: written["parameters"] / 1e6}
        rows.append(("summaries", name, values))
    return rows
