"""What the tests of killed runs and of several processes start: `python tests/ppo_worker.py kills|processes MODELS OUTPUT`.

`MODELS` holds the tiny models of `conftest.py`. What was found is written to `OUTPUT/<name>.json`.
"""
# ruff: noqa: E402 - the folders to import from are set first

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
from peft import get_peft_model
from test_ppo import PROMPTS, load

from utils.ppo import PPOConfig, PPOTrainer
from utils.training import lora_config

torch.set_num_threads(1)
STEPS = 6


def count_letters(prompts, completions):
    """A reward with a little noise, whose place in Python's random numbers a resumed run has to find."""
    return [len(text) + random.random() / 10 for text in completions]


def trainer_for(folder, output=None, seed=1, **settings):
    model, tokenizer = load(folder)
    torch.manual_seed(seed)
    random.seed(0)
    policy = get_peft_model(model, lora_config(model, r=4))
    plain = {"batch_size": 4, "minibatch_size": 4, "max_new_tokens": 8, "learning_rate": 1e-2, "kl_target": 1.0}
    config = PPOConfig(**plain | {"kl_horizon": 50, "output_dir": output and str(output)} | settings)
    return PPOTrainer(policy, count_letters, tokenizer, PROMPTS, config)


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


def processes(models, output):
    """The same short runs in however many processes torchrun has started."""
    found = {}
    for kind in ("llama", "t5"):
        rank = int(os.environ.get("RANK", 0))
        settings = {"steps": 2, "epochs": 2, "learning_rate": 1e-3, "num_completions": 2, "micro_batch_size": 2}
        # another start in each process, as a user's would be; that of the first holds
        trainer = trainer_for(
            models / kind, output / kind, seed=1 + rank, rollout_batch_size=4, minibatch_size=4, **settings
        )
        shared = trainer.processes.share(list(range(4)))
        history = trainer.train()
        weights = [parameter.detach().flatten().tolist() for parameter in trainer.parameters]
        found[kind] = {
            "processes": trainer.processes.number,
            "share": len(shared),
            "history": history,
            "weights": weights,
        }
    (output / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"kills": kills, "processes": processes}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
