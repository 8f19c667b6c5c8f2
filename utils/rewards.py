"""What PPO maximises, and what judges the result: a preference model or a classifier's label, and a civility judge.

Reward and judge are separate on purpose: they are trained on different data, and the judge is never part of a reward.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import RewardConfig, RewardTrainer

from utils.data import DataError
from utils.lab import LabError
from utils.models import choose_dtype, load_model, resolve
from utils.training import ProgressBar, common_arguments


class _EncoderReward:
    """One output of an encoder as the score of a completion, read with the encoder's own tokenizer.

    Called as a reward: `reward(prompts, completions)`. With `reads_prompt` it sees prompt and completion as a pair of texts,
    otherwise the completion alone. A score is `(logit - mean) / std`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        output: int,
        reads_prompt: bool,
        batch_size: int,
    ):
        self.model, self.tokenizer, self.output = model.eval(), tokenizer, output
        self.reads_prompt, self.batch_size = reads_prompt, batch_size
        self.mean, self.std = 0.0, 1.0

    def encode(self, prompt: str, completion: str) -> list[int]:
        """Token ids of one text or pair; where the two do not fit together the prompt is cut."""
        limit = _longest(self.model, self.tokenizer)
        if self.reads_prompt:
            fits = len(self.tokenizer(completion).input_ids) < limit // 2
            cut = "only_first" if fits else "longest_first"
            return self.tokenizer(prompt, completion, truncation=cut, max_length=limit).input_ids
        return self.tokenizer(_readable(self.tokenizer, completion), truncation=True, max_length=limit).input_ids

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
        encoded = [self.encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores = []
        for start in range(0, len(encoded), self.batch_size):
            batch = self.tokenizer.pad({"input_ids": encoded[start : start + self.batch_size]}, return_tensors="pt")
            scores += self.model(**batch.to(self.model.device)).logits[:, self.output].float().tolist()
        return [(score - self.mean) / self.std for score in scores]


class PreferenceModel(_EncoderReward):
    """A scalar score for a completion, from an encoder with one output.

    Scores are shifted and scaled by `mean` and `std`, which `train_preference_model` sets so that completions it was
    trained on have mean 0 and standard deviation 1: then one KL coefficient means the same for any reward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reads_prompt: bool = False,
        batch_size: int = 32,
    ):
        if model.config.num_labels != 1:
            raise LabError(
                f"A preference model has one output, this one has {model.config.num_labels} "
                f"({', '.join(map(str, model.config.id2label.values()))}): load it with num_labels=1, or pick a label with "
                "ClassifierReward."
            )
        super().__init__(model, tokenizer, 0, reads_prompt, batch_size)


class ClassifierReward(_EncoderReward):
    """The logit of one label of a text classifier, found by the label's name.

    The number of a label differs from classifier to classifier, and pipelines sort by score: neither says which label a
    number belongs to, the name in the configuration does. The logit, not the probability: that is flat where the
    classifier is sure, so that nothing would be left to gain. Raises `LabError` where `label` is none of the
    classifier's, with those it has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str,
        reads_prompt: bool = False,
        batch_size: int = 32,
    ):
        names = {str(name): number for number, name in model.config.id2label.items()}
        if label not in names:
            raise LabError(f"label={label!r} is none of the classifier's: choose one of {', '.join(names)}.")
        super().__init__(model, tokenizer, names[label], reads_prompt, batch_size)
        self.label = label

    @classmethod
    def load(cls, name: str | os.PathLike, label: str, **options: Any) -> ClassifierReward:
        """The classifier `name`, a folder or a Hub id, with the labels it was saved with. Raises what `load_model` raises."""
        folder = resolve(name)
        labels = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels
        return cls(*load_model(folder, num_labels=labels), label=label, **options)


def train_preference_model(
    preference_model: PreferenceModel,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    epochs: int = 2,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """Train in place on pairs, with TRL's RewardTrainer; return the loss of each step.

    The loss is -log sigmoid(score of the chosen - score of the rejected), the mean over pairs (Bradley and Terry 1952; Ouyang et
    al. 2022, equation 1).
    """
    model, tokenizer = preference_model.model, preference_model.tokenizer
    if not len(prompts) == len(chosen) == len(rejected) > 0:
        raise DataError(f"Unequal or no pairs: {len(prompts)} prompts, {len(chosen)} chosen, {len(rejected)} rejected.")
    pairs = Dataset.from_dict(
        {
            "chosen_ids": [preference_model.encode(p, c) for p, c in zip(prompts, chosen, strict=True)],
            "rejected_ids": [preference_model.encode(p, r) for p, r in zip(prompts, rejected, strict=True)],
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=pairs,
            args=RewardConfig(
                output_dir=scratch,
                per_device_train_batch_size=batch_size,
                num_train_epochs=epochs,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                max_length=None,
                disable_dropout=True,
                save_strategy="no",
                seed=seed,
                **common_arguments(model) | {"bf16": choose_dtype(model.device) == torch.bfloat16},
            ),
            callbacks=[ProgressBar("preference model")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    preference_model.mean, preference_model.std = 0.0, 1.0
    scores = torch.tensor(preference_model([*prompts, *prompts], [*chosen, *rejected]))
    preference_model.mean, preference_model.std = float(scores.mean()), max(float(scores.std()), 1e-6)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fit_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[str],
    l2: float = 1e-3,
) -> None:
    """Fit the output layer `model.classifier` of an encoder with as many outputs as there are labels, in place; the rest stays.

    The outputs get the labels' names, in the order in which they first come. Without randomness.
    """
    names = list(dict.fromkeys(labels))
    if len(names) != model.config.num_labels:
        raise DataError(
            f"{len(names)} labels ({', '.join(names)}) for {model.config.num_labels} outputs: load it with num_labels={len(names)}."
        )
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    rows: list[Tensor] = []
    watch = model.classifier.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    with torch.no_grad():
        for batch in _batches(model, tokenizer, texts):
            model(**batch)
    watch.remove()
    features, targets = torch.cat(rows), torch.tensor([names.index(label) for label in labels], device=rows[0].device)
    _minimize(
        model.classifier.parameters(),
        lambda: F.cross_entropy(model.classifier(features), targets) + l2 * model.classifier.weight.square().sum(),
    )


@torch.no_grad()
def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 32
) -> Tensor:
    """Sentence embeddings, (texts, hidden) fp32 of length 1: the mean of the encoder's last hidden states over real tokens."""
    rows = []
    for batch in _batches(model, tokenizer, texts, batch_size):
        hidden, mask = model(**batch).last_hidden_state.float(), batch.attention_mask[..., None]
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows).cpu()


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int = 32
) -> Iterator[BatchEncoding]:
    """Texts as the encoder reads them, so many at a time, cut where they are too long."""
    settings = dict(padding=True, truncation=True, max_length=_longest(model, tokenizer), return_tensors="pt")
    for start in range(0, len(texts), size):
        readable = [_readable(tokenizer, text) for text in texts[start : start + size]]
        yield tokenizer(readable, **settings).to(model.device)


def _minimize(parameters: Iterable[Tensor], objective: Callable[[], Tensor]) -> None:
    """Bring `objective`, which depends on the parameters, to its minimum by L-BFGS: no randomness, the same result every time."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def _readable(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text`, or the padding token where there would be nothing to read: an empty text, and a tokenizer without marks."""
    return text if tokenizer(text).input_ids else tokenizer.pad_token


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens the encoder can read; some tokenizers do not know it."""
    return min(tokenizer.model_max_length, model.config.max_position_embeddings)


class CivilityJudge:
    """Tells hostile sentences from civil ones: logistic regression on frozen sentence embeddings."""

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.encoder, self.tokenizer = encoder, tokenizer
        self.weight = self.bias = None

    def fit(self, texts: Sequence[str], labels: Sequence[str], *, l2: float = 1e-3) -> CivilityJudge:
        """Fit to `labels` `"civil"` and `"hostile"`, without randomness."""
        unknown = set(labels) - {"civil", "hostile"}
        if unknown:
            raise DataError(f"The label {min(unknown)!r} is neither 'civil' nor 'hostile'.")
        x = embed(self.encoder, self.tokenizer, texts)
        y = torch.tensor([label == "hostile" for label in labels], dtype=torch.float32)
        self.weight, self.bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
        _minimize(
            [self.weight, self.bias],
            lambda: (
                F.binary_cross_entropy_with_logits(x @ self.weight + self.bias, y) + l2 * self.weight.square().sum()
            ),
        )
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Probability that each text is hostile, (texts,)."""
        if self.weight is None:
            raise LabError("The judge has not been fitted: call `fit` first.")
        return torch.sigmoid(embed(self.encoder, self.tokenizer, texts) @ self.weight + self.bias)
