"""What surrounds the algorithm of `utils.ppo`: a run's settings and model are checked, its processes set up, its
checkpoints written and taken up again, and its metrics kept.

A checkpoint is a folder `step-<n>` of safetensors and JSON (no pickle), which is there whole or not at all.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from utils.lab import LabError, one_line, write_atomically
from utils.ppo_shards import cut_like, gather_shards

if TYPE_CHECKING:
    from utils.ppo import PPOTrainer

KEEPING = {"output_dir", "save_steps", "keep_checkpoints", "report_to", "shard"}  # settings that change no weight
NEUTRAL = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": True, "num_beams": 1}


class PPOError(LabError):
    """Training cannot go on; the message names the step, the value and what to try."""


@dataclass
class PPOConfig:
    """Settings of one run. Lengths are in tokens, KL in nats a sequence.

    `steps` rollouts of `batch_size` prompts each, `num_completions` for every prompt, of which `rollout_batch_size` are
    sampled together; a rollout is learned from for `epochs` passes in minibatches of `minibatch_size` completions (one
    optimizer step each), computed `micro_batch_size` at a time, and for no longer than `policy/approxkl` of a minibatch
    stays below `target_kl`, where that is set. With `kl_target` the coefficient adapts, without it stays at `kl_coef`.
    The policy is `softmax(logits / temperature)`: the one temperature applies to sampling, policy and reference alike,
    so what is scored is what is sampled. `scale_scores` divides scores by their running standard deviation.

    For the first `keep_graphs` micro-batches of a rollout the pass that scores them is also their first forward pass of the
    update: the same numbers, sooner, for the memory of their activations. `generation_kwargs` is for scripts that hand over
    settings of transformers' `generate`: those that leave the policy's distribution alone change nothing here either, any
    other is refused.

    With `shard` several processes keep the weights of the model's blocks, their gradients and their optimizer's state in shards,
    one for each process (`utils.ppo_shards`); a minibatch's micro-batches must be a multiple of the processes. With one
    process it changes nothing, and a checkpoint of either kind goes on as the other.

    With `output_dir` a checkpoint is written there every `save_steps` steps (the last `keep_checkpoints` are kept) and
    the metrics to `metrics.csv`; `report_to="tensorboard"` writes them for TensorBoard as well.
    """

    steps: int = 10
    batch_size: int = 16
    num_completions: int = 1
    rollout_batch_size: int = 32
    minibatch_size: int = 8
    micro_batch_size: int = 4
    epochs: int = 2
    max_new_tokens: int = 48
    temperature: float = 1.0
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    target_kl: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    scale_scores: bool = False
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    max_grad_norm: float = 1.0
    max_kl: float = 1000.0
    keep_graphs: int = 0
    shard: bool = False
    generation_kwargs: dict[str, Any] | None = None
    output_dir: str | None = None
    save_steps: int = 1
    keep_checkpoints: int = 1
    report_to: str | None = None
    seed: int = 0


# --- before a run ------------------------------------------------------------------------------------------------


def check_config(config: PPOConfig, rows: Sequence) -> None:
    """Raise `LabError` where the settings make no run."""
    completions = config.batch_size * config.num_completions
    if not rows:
        raise LabError("PPO needs at least one prompt.")
    if config.lr_scheduler_type not in ("linear", "constant"):
        raise LabError(f"lr_scheduler_type={config.lr_scheduler_type!r}: choose 'linear' (down to 0) or 'constant'.")
    if config.temperature <= 0:
        raise LabError(f"temperature={config.temperature}: PPO samples, so it must be above 0.")
    if config.save_steps < 1 or config.keep_checkpoints < 1:
        raise LabError(f"save_steps={config.save_steps}, keep_checkpoints={config.keep_checkpoints}: both start at 1.")
    if completions % config.minibatch_size or config.minibatch_size % config.num_completions:
        raise LabError(
            f"batch_size={config.batch_size} prompts with num_completions={config.num_completions} give {completions} "
            f"rows: this must be a multiple of minibatch_size={config.minibatch_size}, and that one of num_completions."
        )
    for name, value in (config.generation_kwargs or {}).items():
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise LabError(
                f"generation_kwargs {name}={value!r} changes the distribution that is sampled, while KL and the ratio are "
                "computed from the policy's own: leave it out"
                + (" and set PPOConfig.temperature." if name == "temperature" else ".")
            )


def check_model(model: nn.Module, reference: nn.Module | None) -> None:
    """Raise `LabError` for models whose log-probabilities or gradients the trainer would get wrong."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LabError("No parameter of the model requires gradients: pass a PEFT model or unfreeze the model.")
    if any(isinstance(p, DTensor) for given in (model, reference) if given is not None for p in given.parameters()):
        raise LabError(
            "The weights of model or reference are cut into shards (FSDP) already: hand over the whole model in each process "
            "and set PPOConfig(shard=True), which cuts it."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise LabError(
            "The adapter is a learned prompt, which is not part of the weights: use LoRA or another one that is."
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            raise LabError(
                f"The model changes its logits after the head ({name}), which the trainer does not: choose another."
            )


def frozen_adapter(model: PeftModel) -> str | None:
    """The adapter of which nothing is trained, "reference" if there are several; None where there is none."""
    trained = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
    frozen = [name for name in model.peft_config if name not in trained]
    if len(frozen) > 1 and "reference" not in frozen:
        raise LabError(f"Several adapters are frozen ({', '.join(frozen)}): call the one to stay near to 'reference'.")
    return "reference" if "reference" in frozen else next(iter(frozen), None)


class Processes:
    """The processes that `torchrun` started, or the one there is, and what they tell each other.

    On a CPU accelerate has to be told so, or each process would train for itself.
    """

    def __init__(self, device: torch.device):
        self.device, state = device, PartialState(cpu=device.type == "cpu")
        self.number, self.index, self.is_main = state.num_processes, state.process_index, state.is_main_process
        started = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1
        if self.number != started:
            raise LabError(
                f"{started} processes were started, but accelerate was set up for {self.number} before PPOTrainer was made: "
                "set it up with PartialState(cpu=True) on a CPU, or make PPOTrainer first."
            )

    def start_alike(self, parameters: Sequence[Tensor]) -> None:
        """Give all processes the main one's weights: an adapter's random start differs from process to process."""
        for parameter in parameters:
            broadcast(parameter.data)

    def share(self, pieces: Sequence) -> Sequence:
        """Those of the pieces of work that this process does."""
        return pieces[self.index :: self.number]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        return reduce(tensor.to(self.device), "sum").cpu() if self.number > 1 else tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients, which are shares of one mean already. A process that had no work has none.

        Those of weights in shards were added up in the backward pass.
        """
        if self.number == 1:
            return
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.sum(torch.cat([grad.flatten() for grad in grads])).to(self.device)
        for parameter, grad in zip(parameters, total.split([g.numel() for g in grads]), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype)

    def gather(self, objects: list) -> list:
        """The lists of all processes, one after the other."""
        return gather_object(objects)

    def from_main(self, value: Any) -> Any:
        """What the main process has."""
        return broadcast_object_list([value])[0]


def tensorboard_writer(config: PPOConfig) -> Any:
    """A writer for TensorBoard in `output_dir`, where one is wanted."""
    if config.report_to is None:
        return None
    if config.report_to != "tensorboard" or config.output_dir is None:
        raise LabError(f"report_to={config.report_to!r}: only 'tensorboard' is known, and it needs an output_dir.")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LabError(
            "report_to='tensorboard' needs a package that is not installed: `pip install tensorboard`."
        ) from error
    return SummaryWriter(os.path.join(config.output_dir, "tensorboard"))


# --- batches -----------------------------------------------------------------------------------------------------


def rows_of_step(config: PPOConfig, rows: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The prompts of a step: passes over all `rows`, each in its own order, that follow from the seed alone."""
    first, found = step * config.batch_size, []
    for position in range(first, first + config.batch_size):
        epoch, index = divmod(position, len(rows))
        generator = torch.Generator().manual_seed(config.seed * 7919 + epoch)
        found.append(rows[torch.randperm(len(rows), generator=generator)[index]])
    return found


def minibatches(config: PPOConfig, prompt_ids: list[list[int]], generator: torch.Generator) -> list[list[list[int]]]:
    """Random minibatches, each cut into micro-batches of like length. Completions of one prompt stay together."""
    group = config.num_completions
    size, micro = config.minibatch_size // group, max(1, config.micro_batch_size // group)
    order = torch.randperm(len(prompt_ids) // group, generator=generator).tolist()
    found = []
    for start in range(0, len(order), size):
        prompts = sorted(order[start : start + size], key=lambda p: len(prompt_ids[p * group]))
        rows = [[p * group + k for k in range(group)] for p in prompts]
        found.append([[*chain(*rows[i : i + micro])] for i in range(0, len(rows), micro)])
    return found


# --- checkpoints -------------------------------------------------------------------------------------------------


def save_checkpoint(trainer: PPOTrainer, folder: Path) -> Path:
    """Trainable weights, value head, optimizer, coefficient, moments, random numbers, metrics, and the step, from which the
    place in the data and the learning rate follow. All processes call it, since what is in shards is put together; the main one
    writes. Raises `PPOError` where that cannot be written."""
    tensors = dict(_weights(trainer))
    for index, parameter in enumerate(trainer.parameters):
        for name, tensor in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{index}.{name}"] = tensor
    tensors = gather_shards(tensors, keep=trainer.processes.is_main)
    if not trainer.processes.is_main:
        return folder
    state = {
        "run": _run(trainer),
        "step": trainer.step,
        "optimizer_steps": trainer.optimizer_steps,
        "kl_coef": trainer.kl_controller.value,
        "moments": vars(trainer.moments),
        "random": _random_state(),
        "history": trainer.history,
    }
    _write(folder, tensors, state)
    return folder


def load_checkpoint(trainer: PPOTrainer, folder: Path) -> None:
    """Bring `trainer` to where `save_checkpoint` left it, to the bit.

    Raises `PPOError` where `folder` is no checkpoint, or one of another run, and names what differs; then nothing has changed.
    """
    tensors, state = _read(folder)
    there, here = state["run"], json.loads(json.dumps(_run(trainer)))
    differ = [
        f"{name} ({there.get(name)!r} there, {here[name]!r} here)" for name in here if there.get(name) != here[name]
    ]
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    if shapes != {name: parameter.shape for name, parameter in _weights(trainer).items()}:
        differ.append("the weights that are trained")
    if differ:
        raise PPOError(f"{folder} is a checkpoint of another run, which differs in {'; '.join(differ)}.")
    with torch.no_grad():
        for name, parameter in _weights(trainer).items():
            parameter.copy_(cut_like(parameter, tensors[name]))
    trainer.optimizer.state.clear()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            parameter = trainer.parameters[int(index)]
            # all but the number of steps belongs to a number each
            value = tensor if field == "step" else cut_like(parameter, tensor)
            trainer.optimizer.state[parameter][field] = value
    trainer.optimizer.zero_grad(set_to_none=True)  # of a step that was interrupted
    trainer.step, trainer.optimizer_steps = state["step"], state["optimizer_steps"]
    trainer.kl_controller.value, trainer.history = state["kl_coef"], state["history"]
    vars(trainer.moments).update(state["moments"])
    _set_random_state(state["random"])


def begin(trainer: PPOTrainer, resume_from: str | os.PathLike | None) -> None:
    """Load what to resume from. What an earlier run left is neither mixed with this one nor overwritten."""
    output = trainer.config.output_dir
    if resume_from == "last":
        if output is None:
            raise PPOError('resume_from="last" looks in PPOConfig.output_dir, which is not set.')
        found = checkpoints_in(output)
        resume_from = found[-1] if found else None
    elif resume_from is None and output is not None and trainer.step == 0 and checkpoints_in(output):
        raise PPOError(
            f'{output} holds the checkpoints of an earlier run: go on with it by `train(resume_from="last")`, '
            "delete them, or choose another output_dir."
        )
    if resume_from is not None:
        load_checkpoint(trainer, Path(resume_from))


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in `folder`, that of the earliest step first. One that was being written has another name."""
    return sorted(Path(folder).glob("step-[0-9]*"), key=_number)


def where_to_resume(config: PPOConfig) -> str:
    """A sentence for somebody whose run has stopped."""
    kept = checkpoints_in(config.output_dir) if config.output_dir else []
    if kept:
        return f'The last whole checkpoint is {kept[-1]}: `train(resume_from="last")` goes on from there.'
    return "No checkpoint was written" + (" yet." if config.output_dir else ": PPOConfig.output_dir is not set.")


def _weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    weights = {f"policy.{name}": parameter for name, parameter in trainer.trainable.items()}
    return weights | {f"value_head.{name}": parameter for name, parameter in trainer.value_head.named_parameters()}


def _run(trainer: PPOTrainer) -> dict[str, Any]:
    """What makes a run the one it is: the settings that change a weight, the prompts and the model's shape."""
    run = {name: value for name, value in asdict(trainer.config).items() if name not in KEEPING}
    if trainer.config.lr_scheduler_type == "constant":
        del run["steps"]  # such a run may be made longer
    shape = {name: value for name, value in trainer.model.config.to_dict().items() if not name.startswith("_")}
    for name, value in (("prompts", trainer.rows), ("model", shape)):
        run[name] = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return run


def _write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write to a new name beside `folder`, then rename. Raises `PPOError` where that fails; nothing half is left."""
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        new, old = partial / "new", partial / "old"
        new.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except (OSError, SafetensorError) as error:
        kept = checkpoints_in(folder.parent)
        raise PPOError(
            f"The checkpoint {folder} cannot be written ({one_line(error)}): free some space or choose another output_dir. "
            "The run is whole in memory: `train()` goes on with it. "
            + (f"On disk the last whole checkpoint is {kept[-1]}." if kept else "On disk there is no checkpoint yet.")
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state that `_write` wrote. Raises `PPOError` where `folder` is no checkpoint."""
    try:
        # Cloned: what is mapped from a file lies at any address, and would keep the file open.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "state.safetensors").items()}
        return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise PPOError(f"{folder} is not a checkpoint ({type(error).__name__}: {one_line(error)}).") from error


def _remove_older(newest: Path, keep: int) -> None:
    """Remove the checkpoints of earlier steps than that of `newest`, but for the last `keep - 1`, and unfinished ones."""
    older = [path for path in checkpoints_in(newest.parent) if _number(path) < _number(newest)]
    for path in [*older[: max(0, len(older) - keep + 1)], *newest.parent.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's random numbers, fit for JSON."""
    numbers = np.random.get_state(legacy=False)
    numbers["state"]["key"] = numbers["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state().tolist()}


def _set_random_state(state: dict[str, Any]) -> None:
    """Take up random numbers where `_random_state` found them."""
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


# --- during and after a step ------------------------------------------------------------------------------------


class RunningMoments:
    """Mean and standard deviation of all scores so far, batch by batch (Chan et al. 1983, "Algorithms for computing the
    sample variance"). `std` is 1 as long as all scores are the same."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores: Tensor) -> None:
        """Account for `scores` (n,)."""
        scores = scores.double()
        count, delta = self.count + len(scores), float(scores.mean()) - self.mean
        self.squares += float(((scores - scores.mean()) ** 2).sum()) + delta**2 * self.count * len(scores) / count
        self.mean += delta * len(scores) / count
        self.count = count

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / max(1, self.count)) or 1.0


def keep_step(trainer: PPOTrainer) -> None:
    """Write what is kept of the step just made: a checkpoint where one is due, the table, TensorBoard's file.

    All processes call it, the main one writes.
    """
    config, last, is_main = trainer.config, trainer.history[-1], trainer.processes.is_main
    if config.output_dir is None:
        return
    if trainer.step % config.save_steps == 0 or trainer.step == config.steps:
        newest = save_checkpoint(trainer, Path(config.output_dir) / f"step-{trainer.step}")
        if is_main:
            _remove_older(newest, config.keep_checkpoints)
    if not is_main:
        return
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["step", *last])
    writer.writerows([step, *map(row.get, last)] for step, row in enumerate(trainer.history, 1))
    write_atomically(Path(config.output_dir) / "metrics.csv", table.getvalue())
    if trainer.tensorboard is not None:
        for name, value in last.items():
            trainer.tensorboard.add_scalar(name, value, trainer.step)
        trainer.tensorboard.flush()


# --- what the metrics mean ---------------------------------------------------------------------------------------

METRICS = {
    # name: what it is, and what a healthy run shows
    "objective/kl": ("KL of the samples from the reference, nats a sequence (k1)", "0 at first, grows slowly, below the target"),
    "objective/kl_coef": ("what a nat of KL costs", "fixed, or settles where KL is near its target"),
    "objective/entropy": ("minus the log-probability of a sample, nats a sequence", "falls slowly; a fall to 0: one answer for all"),
    "objective/scores": ("mean reward of the samples", "rises"),
    "objective/scores_running_mean": ("the same over all steps so far", "rises, later than the scores"),
    "objective/scores_running_std": ("standard deviation of all rewards so far", "well above 0: something to choose from"),
    "objective/non_score_reward": ("what KL has cost a sample: minus coefficient times KL", "small beside the gain in score"),
    "objective/rlhf_reward": ("score minus the cost of KL: what is maximised", "rises"),
    "policy/approxkl_avg": ("how far one update moved the policy, nats a token (k2)", "0.001 to 0.05"),
    "policy/clipfrac_avg": ("share of tokens whose ratio left the clip range", "a few per cent, not half"),
    "policy/entropy_avg": ("entropy of the next token, nats, mean over tokens", "falls slowly"),
    "loss/policy_avg": ("the clipped loss, mean over tokens", "near 0: advantages have mean 0; no trend to expect"),
    "loss/value_avg": ("half the squared error of the values", "falls"),
    "val/ratio": ("mean of new over old probability of a token", "0.95 to 1.05; exactly 1 in the first minibatch"),
    "val/clipfrac_avg": ("share of values that were clipped", "falls; near 1: the values cannot follow the returns"),
    "val/num_eos_tokens": ("samples that ended by themselves", "most of the batch"),
    "val/explained_variance": ("how well the values foretell the returns; 1 is perfect", "rises from 0; negative: worse than a constant"),
    "response/length_mean": ("tokens of a sample", "neither runs away nor collapses"),
    "response/truncated_frac": ("share of samples cut off at the limit", "far from 1"),
    "grad_norm": ("length of the gradient before it is cut to max_grad_norm", "same order throughout"),
    "lr": ("learning rate of the step", "as scheduled"),
    "optimizer_steps": ("updates so far", "steps x epochs x minibatches"),
    "seconds/rollout": ("time to sample and to score under policy and reference", "the larger part, on a CPU"),
    "seconds/score": ("time of the reward", "small"),
    "seconds/update": ("time to learn", "grows with epochs"),
}  # fmt: skip
