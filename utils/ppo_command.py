"""PPO outside a notebook: `python -m utils.ppo --profile embedded`, or with several processes

    torchrun --nproc-per-node 2 -m utils.ppo --profile embedded

The parameters are those of week 3: the notebook's own, changed by a profile of `labs/profiles` and by `-p`. The task is
week 3's without its supervised fine-tuning (give a fine-tuned model's folder as MODEL): a LoRA policy writes summaries of
heated dialogues, the reward is a preference model trained on the project's pairs.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.batch import notebook
from utils.lab import ROOT, Lab, LabError, check_parameters, read_profile, set_seed

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_parameters(profile: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Week 3's parameters under a profile. Raises `LabError` for a profile or a name that is not known."""
    import papermill

    declared = papermill.inspect_notebook(str(notebook("week3")))
    given = {**read_profile(profile, "week3"), **overrides}
    check_parameters(given, declared, where=f"profile {profile!r} or on the command line")
    return {name: ast.literal_eval(entry["default"]) for name, entry in declared.items()} | given


def train_reward(parameters: dict[str, Any], folder: Path) -> None:
    """Train the preference model and write it to `folder`, which appears whole or not at all."""
    import torch

    from utils.data import load_preferences
    from utils.models import load_model
    from utils.rewards import PreferenceModel, train_preference_model

    encoder, tokenizer = load_model(parameters["ENCODER"], num_labels=1, dtype=torch.float32)
    reward = PreferenceModel(encoder, tokenizer)
    pairs = load_preferences(split="train")
    pairs = pairs.select(range(min(parameters["N_PAIRS"], len(pairs))))
    blank = [""] * len(pairs)
    train_preference_model(reward, blank, pairs["chosen"], pairs["rejected"], epochs=1, seed=parameters["SEED"])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".reward-", dir=folder.parent) as partial:
            written = Path(partial) / "reward"
            reward.model.save_pretrained(written)
            tokenizer.save_pretrained(written)
            scale = {"mean": reward.mean, "std": reward.std, "made_of": _made_of(parameters)}
            (written / "scale.json").write_text(json.dumps(scale), encoding="utf-8")
            written.rename(folder)
    except OSError as error:
        raise LabError(f"The reward cannot be written to {folder} ({error}): choose another --output.") from error


def load_reward(parameters: dict[str, Any], folder: Path):
    """The preference model that `train_reward` wrote. Raises `LabError` where it was made of something else."""
    import torch

    from utils.models import load_model
    from utils.rewards import PreferenceModel

    scale = json.loads((folder / "scale.json").read_text(encoding="utf-8"))
    if scale["made_of"] != _made_of(parameters):
        raise LabError(f"{folder} holds a reward made of {scale['made_of']}: delete it, or choose another --output.")
    reward = PreferenceModel(*load_model(folder, num_labels=1, dtype=torch.float32))
    reward.mean, reward.std = scale["mean"], scale["std"]
    return reward


def _made_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: parameters[name] for name in ("ENCODER", "N_PAIRS", "SEED")}


def run(options: argparse.Namespace) -> None:
    """One run, from the parameters to `results.json`."""
    from accelerate import PartialState

    from utils.models import choose_device

    parameters = read_parameters(options.profile, {name: yaml.safe_load(value) for name, value in options.parameter})
    output = Path(options.output or ROOT / "build" / options.profile / "ppo")
    lab = Lab("ppo", {**parameters, "OUTPUT": str(output)})
    reward_folder = output / "reward"
    if options.only_reward:
        return train_reward(parameters, reward_folder)
    processes = PartialState(cpu=choose_device().type == "cpu")
    if processes.is_main_process and not reward_folder.is_dir():
        if processes.num_processes == 1:
            train_reward(parameters, reward_folder)
        else:  # TRL's trainer would take torchrun's processes for its own
            alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
            command = [sys.executable, "-m", "utils.ppo", *options.given, "--only-reward"]
            if subprocess.run(command, env=alone, cwd=ROOT, check=False).returncode:  # noqa: S603 - this very command
                raise LabError("The reward could not be trained: the reason stands above.")
    processes.wait_for_everyone()
    history = _train(parameters, reward_folder, output, options)
    first, last = history[0], history[-1]
    lab.record(
        kl_first_rollout=first["objective/kl"],
        kl_final=last["objective/kl"],
        score_first=first["objective/scores"],
        score_last=last["objective/scores"],
        optimizer_steps=last["optimizer_steps"],
    )
    if processes.is_main_process:
        print(f"KL is {last['objective/kl']:.2f} nats a sequence, the score went from {first['objective/scores']:+.3f} "
              f"to {last['objective/scores']:+.3f}; see {lab.save()} and {output / 'metrics.csv'}.")  # fmt: skip
    return None


def _train(parameters: dict[str, Any], reward_folder: Path, output: Path, options: argparse.Namespace) -> list[dict]:
    from peft import get_peft_model

    from utils.data import DATA, load_dialogues
    from utils.models import load_model
    from utils.ppo import PPOConfig, PPOTrainer
    from utils.prompts import summary_prompt
    from utils.training import lora_config

    source = DATA / "dialogues" if parameters["DATASET"] == "dialogues" else parameters["DATASET"]
    heated = load_dialogues(source, "train").filter(lambda row: row["tone"] == "heated")
    prompts = [summary_prompt(d) for d in sorted(heated["dialogue"], key=len)[: parameters["N_PROMPTS"]]]
    model, tokenizer = load_model(parameters["MODEL"])
    set_seed(parameters["SEED"])
    policy = get_peft_model(model, lora_config(model, upper_share=parameters["PPO_UPPER_SHARE"]))
    config = PPOConfig(
        steps=parameters["PPO_STEPS"],
        batch_size=parameters["PPO_BATCH_SIZE"],
        num_completions=parameters["NUM_COMPLETIONS"],
        rollout_batch_size=options.rollout_batch_size,
        minibatch_size=parameters["PPO_MINIBATCH_SIZE"],
        micro_batch_size=options.micro_batch_size,
        keep_graphs=options.keep_graphs,
        shard=options.shard,
        epochs=parameters["PPO_EPOCHS"],
        learning_rate=parameters["PPO_LEARNING_RATE"],
        lr_scheduler_type="constant",
        kl_coef=parameters["KL_COEF"],
        lam=parameters["LAM"],
        temperature=parameters["TEMPERATURE"],
        max_new_tokens=parameters["MAX_NEW_TOKENS"],
        output_dir=str(output),
        save_steps=options.save_steps,
        report_to=options.report_to,
        seed=parameters["SEED"],
    )
    trainer = PPOTrainer(policy, load_reward(parameters, reward_folder), tokenizer, prompts, config)
    history = trainer.train(resume_from="last" if options.resume else None)
    if trainer.processes.is_main:
        policy.save_pretrained(output / "adapter")
    return history


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.ppo",
        description="Train a policy with PPO on week 3's task, from week 3's parameters.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m utils.ppo ... Each keeps the whole model, or with --shard a "
        "part of it.",
    )
    parser.add_argument("--profile", default="embedded", help="a file of labs/profiles, without .yaml (default: embedded)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for all that is written (default: build/<profile>/ppo)")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set one parameter"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--save-steps", type=int, default=1, help="steps between two checkpoints (default: 1)")
    parser.add_argument("--rollout-batch-size", type=int, default=32, help="completions sampled together; several processes "
                        "share what is more (default: 32)")  # fmt: skip
    parser.add_argument("--micro-batch-size", type=int, default=8, help="completions a forward pass; several processes share "
                        "a minibatch's (default: 8)")  # fmt: skip
    parser.add_argument("--keep-graphs", type=int, default=0, help="micro-batches whose scoring pass the update goes on from: "
                        "sooner done, for the memory of their activations (default: 0)")  # fmt: skip
    parser.add_argument("--shard", action="store_true", help="several processes keep the model's blocks in shards, one each, and "
                        "gather them when they are used")  # fmt: skip
    parser.add_argument("--report-to", choices=["tensorboard"], help="write the metrics for TensorBoard as well")
    parser.add_argument("--only-reward", action="store_true", help="train the reward and stop")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.pop("LAB_PROFILE", None)
    os.environ["LAB_HEADLESS"] = "1"
    try:
        run(options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
