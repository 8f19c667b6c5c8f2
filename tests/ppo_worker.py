"""What the tests of killed runs and of several processes start: `python tests/ppo_worker.py kills|processes MODELS OUTPUT`.

`MODELS` holds the tiny models of `conftest.py`. What was found is written to `OUTPUT/<name>.json`.
"""
# ruff: noqa: E402 - the folders to import from are set first

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ["LAB_HEADLESS"] = "1"

import torch
from peft import PeftModel, get_peft_model
from test_ppo import PROMPTS, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from utils import kernels
from utils.generation import generate
from utils.lab import LabError
from utils.ppo import PPOConfig, PPOTrainer
from utils.ppo_shards import gather_shards
from utils.training import lora_config

torch.set_num_threads(1)
STEPS = 6


def count_letters(prompts, completions):
    """A reward with a little noise, whose place in Python's random numbers a resumed run has to find."""
    return [len(text) + random.random() / 10 for text in completions]


def trainer_for(folder, output=None, seed=1, *, peft=True, dtype=torch.float32, eos=0.0, prompts=PROMPTS, **settings):
    model, tokenizer = load(folder)
    model.get_output_embeddings().weight.data[2] += eos  # makes EOS likely
    model.to(dtype)
    torch.manual_seed(seed)
    random.seed(0)
    policy = get_peft_model(model, lora_config(model, r=4)) if peft else model
    plain = {"batch_size": 4, "minibatch_size": 4, "max_new_tokens": 8, "learning_rate": 1e-2, "kl_target": 1.0}
    config = PPOConfig(**plain | {"kl_horizon": 50, "output_dir": output and str(output)} | settings)
    return PPOTrainer(policy, count_letters, tokenizer, prompts, config)


def digest(trainer):
    """All that the run has made, as one number: weights and metrics."""
    found = hashlib.sha256()
    for parameter in trainer.parameters:
        found.update(parameter.detach().numpy().tobytes())
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in trainer.history]
    found.update(json.dumps(rows).encode())
    return found.hexdigest()


def fork(folder, output):
    """A child that makes the run, or goes on with it, and writes what came of it."""
    child = os.fork()
    if child:
        return child
    try:
        trainer = trainer_for(folder, output, steps=STEPS)
        trainer.train(resume_from="last")
        (output / "digest").write_text(digest(trainer))
    finally:
        os._exit(0)


def killed_after(seconds, folder, output):
    """Start a run and kill it (SIGKILL) so much later; whether it had not ended by itself before."""
    child = fork(folder, output)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kills(models, output):
    """Ten runs, each killed at a random moment and begun again, against one that nobody disturbed."""
    trainer_for(models / "llama", steps=1).train()  # what the first run alone would have to make ready
    begin = time.perf_counter()
    os.waitpid(fork(models / "llama", folder := output / "whole"), 0)
    seconds = time.perf_counter() - begin
    whole, runs = (folder / "digest").read_text(), []
    moments = random.Random(0)  # the moments are random; which moments is not
    for number in range(10):
        folder = output / f"killed-{number}"
        moment = seconds * (number + moments.random()) / 10  # one in each tenth of the run
        while not killed_after(moment, models / "llama", folder):  # it was quicker this time, and had ended
            shutil.rmtree(folder)
            moment *= 0.7
        checkpoints = sorted(path.name for path in folder.glob("step-*"))
        os.waitpid(fork(models / "llama", folder), 0)
        found = (folder / "digest").read_text() if (folder / "digest").is_file() else None
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        runs.append({"checkpoints": checkpoints, "same": found == whole, "left": left})
    (output / "kills.json").write_text(json.dumps(runs))


BEGIN_ALIKE = [
    "the cat sat on the mat and a dog ran to the big red house and the blue river " + text for text in PROMPTS
]
RUNS = {
    "llama": {},
    "t5": {},
    # what the two prompts of a micro-batch begin with is read once
    "llama, in shards": {
        "shard": True,
        "keep_graphs": 1,
        "prompts": BEGIN_ALIKE,
        "minibatch_size": 8,
        "micro_batch_size": 4,
    },
    "t5, in shards": {"shard": True},
    # in some micro-batches no completion is longer than one token
    "llama, all trained, in shards": {
        "shard": True,
        "peft": False,
        "eos": 2.0,
        "num_completions": 1,
        "micro_batch_size": 1,
        "keep_checkpoints": 2,
    },
    "llama, bfloat16, in shards": {"shard": True, "dtype": torch.bfloat16},
}


def run(name, models, output, seed=1, **settings):
    """The trainer of one of `RUNS`, alike in one process and in several."""
    kind = name.split(", ")[0]
    plain = {"steps": 2, "epochs": 2, "learning_rate": 1e-3, "num_completions": 2, "micro_batch_size": 2}
    plain |= {"rollout_batch_size": 4, "minibatch_size": 4} | RUNS[name]
    return trainer_for(models / kind, output, seed, **plain | settings)


def processes(models, output):
    """The same short runs in however many processes torchrun has started."""
    found, rank = {}, int(os.environ.get("RANK", 0))
    for name in RUNS:
        # another start in each process, as a user's would be; that of the first holds
        trainer = run(name, models, output / name, seed=1 + rank)
        shared = trainer.processes.share(list(range(4)))
        with watched(trainer) as (held, fused):
            history = trainer.train()
        trainer.rollout(PROMPTS)
        save(trainer, output / f"{name}, saved")
        found[name] = {
            "processes": trainer.processes.number,
            "share": len(shared),
            "history": history,
            "weights": weights(trainer),
            "held": {phase: sorted(counts) for phase, counts in held.items()} | {"at rest": at_rest(trainer)},
            "fused": sorted(fused),
            "written": [
                completion.text for completion in generate(trainer.model, trainer.tokenizer, PROMPTS, max_new_tokens=4)
            ],
        }
    if trainer.processes.number > 1:
        resumed = run("llama, all trained, in shards", models, None)
        resumed.train(resume_from=output / "from one")
        found["resumed"] = {"history": resumed.history, "weights": weights(resumed)}
        found["refused"] = [refusal(lambda: run("t5, in shards", models, None, micro_batch_size=4))]
        found["refused"].append(
            refusal(lambda: PPOTrainer(resumed.model, count_letters, resumed.tokenizer, PROMPTS, PPOConfig()))
        )
    (output / f"rank-{rank}.json").write_text(json.dumps(found))


def save(trainer, folder):
    """The way `utils.ppo_shards` says: an adapter by the main process alone, a whole model's weights put together by all."""
    state = None
    if not isinstance(trainer.model, PeftModel):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(trainer.model, options=options)
    if trainer.processes.is_main:
        trainer.model.save_pretrained(folder, state_dict=state)


def weights(trainer):
    """All that is trained, whole, in each process."""
    named = gather_shards(dict(enumerate(trainer.parameters)), keep=True)
    return [tensor.flatten().tolist() for tensor in named.values()]


def blocks(model):
    return [
        module
        for module in model.modules()
        if type(module).__name__.removeprefix("FSDP") in ("LlamaDecoderLayer", "T5Block")
    ]


def numbers(model):
    """How many numbers of the blocks' own weights, no adapter's, this process holds."""
    named = [pair for block in blocks(model) for pair in block.named_parameters()]
    return sum(local(parameter).numel() for name, parameter in named if "lora" not in name)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def at_rest(trainer):
    """What the process holds between two steps: of the policy, of a reference of its own, and AdamW's means of all that trains."""
    reference = numbers(trainer.reference) if trainer.reference is not None else 0
    means = sum(local(state["exp_avg"]).numel() for state in trainer.optimizer.state.values())
    return [numbers(trainer.model), reference, means]


@contextlib.contextmanager
def watched(trainer):
    """What the process holds of the policy each time its last block computes, by phase, and the weights that fused LoRA meets."""
    held, fused = {"rollout": set(), "update": set()}, set()
    phase, update, product = ["rollout"], trainer.update, kernels._product

    def look(*_):
        held[phase[-1]].add(numbers(trainer.model))

    def learn(rollout):
        phase.append("update")
        metrics = update(rollout)
        phase.pop()
        return metrics

    def seen(rows, base, *factors):
        fused.add(type(base.weight).__name__)
        return product(rows, base, *factors)

    blocks(trainer.model)[-1].register_forward_pre_hook(look)
    trainer.update, kernels._product = learn, seen
    yield held, fused
    trainer.update, kernels._product = update, product


def refusal(make):
    try:
        make()
    except LabError as error:
        return str(error)


if __name__ == "__main__":
    {"kills": kills, "processes": processes}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
