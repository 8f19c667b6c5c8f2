"""PPO: `utils.ppo` beside TRL 1.12.0, the last TRL with a PPO trainer; then generation beside transformers' own.

    python benchmarks/ppo.py [--trl-python PATH] [--only ppo|generation] [--prompts 32] [--steps 2] [--seed 0]

PPO: the same policy (the embedded model in bfloat16, LoRA r=8 on all its linear layers), prompts (the openings of training
dialogues, about 145 tokens), number and length of completions (32 tokens, which nobody may end early), epochs (2), one
optimizer step each, and reward: a tiny sequence classifier with random weights, since TRL takes no function. `trl` reads all
completions at once, without gradient checkpointing; `trl cut` cuts them as ours does, by gradient accumulation. Each run is a
process of its own. Printed are episodes a second (set-up and the first step not counted), the peak memory of the process,
where a step's time goes, and what share of the processor's fastest matrix product, measured beside it, each part reaches.

Generation: greedy decoding of all prompts at once, and of one after the other as courses do, with transformers' `generate`, in
float32, as it loads the model, and in our number format; and `utils.generation.generate`. Generating one token alone tells reading
the prompts from decoding. `docs/ppo_against_trl.md` keeps the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL, LENGTH = "smollm2-135m-instruct", 150  # prompts end with the last whole turn within so many tokens
KEPT = 3  # micro-batches whose scoring pass our update goes on from: the memory stays below a quarter of TRL's


# --- what all runs share -----------------------------------------------------------------------------------------


def make_prompts(tokenizer, number: int) -> list[str]:
    """The texts of so many different prompts, chat format and all."""
    from utils.data import load_dialogues
    from utils.prompts import encode, render, summary_prompt

    prompts = []
    for dialogue in load_dialogues(split="train").select(range(number))["dialogue"]:
        turns = dialogue.split("\n")
        while len(encode(tokenizer, prompt := summary_prompt("\n".join(turns)))) > LENGTH:
            turns.pop()
        prompts.append(render(tokenizer, prompt))
    return prompts


def no_early_end(model, tokenizer) -> None:
    """Make the end a token that nobody writes, so that all completions are as long as they may be. It pads as well."""
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # <|endoftext|>; a turn of a chat ends with another
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = model.config.pad_token_id = 0


def make_classifier(tokenizer):
    """The reward model of both sides: two small layers with random weights, one output for a whole text."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **size)
    return LlamaForSequenceClassification(config).eval()


def adapter():
    """LoRA r=8 on all linear layers but the head."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def speed_and_memory(moments: list[float], prompts: int) -> dict[str, float]:
    """Episodes a second, from the moments at which steps ended (the median of those after the first), and the peak memory."""
    from utils.lab import peak_memory_mb

    seconds = median(end - begin for begin, end in pairwise(moments))
    return {"episodes_per_second": prompts / seconds, "peak_memory_mb": peak_memory_mb()}


# --- runs, each in a process of its own --------------------------------------------------------------------------


def run_ours(given: argparse.Namespace) -> dict:
    """This trainer: speed, memory, and the seconds and multiplications of each part of a step."""
    import torch
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    from utils.lab import keep_freed_memory, quiet_libraries, set_seed
    from utils.models import load_model
    from utils.ppo import PPOConfig, PPOTrainer

    quiet_libraries()
    keep_freed_memory()
    model, tokenizer = load_model(MODEL)
    no_early_end(model, tokenizer)
    classifier = make_classifier(tokenizer)

    @torch.no_grad()
    def reward(prompts, completions):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return classifier(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()

    set_seed(given.seed)
    config = PPOConfig(
        steps=given.steps + 2, batch_size=given.prompts, minibatch_size=given.prompts, micro_batch_size=given.micro_batch,
        rollout_batch_size=given.prompts, epochs=given.epochs, max_new_tokens=given.tokens, keep_graphs=KEPT, seed=given.seed,
    )  # fmt: skip
    trainer = PPOTrainer(
        get_peft_model(model, adapter()), reward, tokenizer, make_prompts(tokenizer, given.prompts), config
    )
    seconds: dict[str, float] = {}
    flops: dict[str, int] = {}
    count = lambda: 0  # noqa: E731 - set for the last step, which is counted and not timed

    def watch(part: str, method: str) -> None:
        original = getattr(trainer, method)

        def watched(*arguments):
            begin, before = time.perf_counter(), count()
            result = original(*arguments)
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin
            flops[part] = count() - before
            return result

        setattr(trainer, method, watched)

    for part, method in (("sampling", "_sample"), ("rollout", "rollout"), ("reward", "score"), ("update", "update")):
        watch(part, method)
    moments: list[float] = []
    result: dict = {}
    with contextlib.ExitStack() as counting:

        def step_ended(history: list) -> None:
            nonlocal count
            moments.append(time.perf_counter())
            if len(history) == 1:
                seconds.clear()
            if len(history) == given.steps + 1:
                result.update(
                    speed_and_memory(moments, given.prompts), seconds={p: s / given.steps for p, s in seconds.items()}
                )
                custom = {
                    torch.ops.mkldnn._linear_pointwise: lambda x, *_, out_shape, **__: 2 * x[-1] * out_shape.numel()
                }
                custom[torch.ops.aten.addmm_] = lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]
                counter = counting.enter_context(FlopCounterMode(display=False, custom_mapping=custom))
                count = counter.get_total_flops

        history = trainer.train(on_step=step_ended)
    short = [row["response/length_mean"] for row in history if row["response/length_mean"] != given.tokens]
    if short:
        raise SystemExit(f"A completion ended early (mean lengths {short}): the sides would not do the same work.")
    return result | {"flops": flops, "peak_flops": fastest_product()}


def run_trl(given: argparse.Namespace) -> dict:
    """TRL's trainer, with models as transformers loads them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import __version__
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from utils.lab import quiet_libraries, set_seed
    from utils.models import resolve

    if __version__ != "1.12.0":
        raise SystemExit(f"--trl-python has trl {__version__}: it has to be 1.12.0.")
    quiet_libraries()
    folder = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    value = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16, num_labels=1)
    no_early_end(policy, tokenizer)
    cut = given.run == "trl cut"
    at_once = given.micro_batch if cut else given.prompts
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            moments.append(time.perf_counter())

    set_seed(given.seed)
    encoded = [tokenizer(text).input_ids for text in make_prompts(tokenizer, given.prompts)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = PPOConfig(
            scratch, per_device_train_batch_size=at_once, gradient_accumulation_steps=given.prompts // at_once,
            local_rollout_forward_batch_size=at_once, num_mini_batches=1, num_ppo_epochs=given.epochs,
            total_episodes=given.prompts * (given.steps + 1), response_length=given.tokens, temperature=1.0,
            learning_rate=1e-4, gradient_checkpointing=False, bf16=True, use_cpu=True, num_sample_generations=0,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000, seed=given.seed,
        )  # fmt: skip
        trainer = PPOTrainer(
            arguments, tokenizer, model=policy, ref_model=None, reward_model=make_classifier(tokenizer),
            value_model=value, train_dataset=Dataset.from_dict({"input_ids": encoded}), peft_config=adapter(),
            callbacks=[Clock()],
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return speed_and_memory(moments, given.prompts)


def run_generation(given: argparse.Namespace) -> dict:
    """Seconds for all prompts, reading them and decoding, of the ways to generate greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.generation import generate
    from utils.lab import keep_freed_memory, quiet_libraries
    from utils.models import load_model, resolve

    quiet_libraries()
    keep_freed_memory()
    ours, tokenizer = load_model(MODEL)
    as_loaded = AutoModelForCausalLM.from_pretrained(resolve(MODEL))
    same_format = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=ours.dtype)
    tokenizer.padding_side = "left"
    for model in (ours, as_loaded, same_format):
        no_early_end(model, tokenizer)
    prompts = make_prompts(tokenizer, given.prompts)

    def together(model, tokens: int) -> None:
        model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=tokens)

    def one_by_one(model, tokens: int) -> None:
        for prompt in prompts:
            model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens)

    def batched(tokens: int) -> None:
        generate(ours, tokenizer, prompts, batch_size=given.prompts, max_new_tokens=tokens, show_progress=False)

    def seconds(way: Callable[[int], None], tokens: int) -> float:
        begin = time.perf_counter()
        way(tokens)
        return time.perf_counter() - begin

    result = {}
    ways = {f"ours, {ours.dtype}".replace("torch.", ""): batched}
    for name, way in {"all at once": together, "one by one": one_by_one}.items():
        for model in (same_format, as_loaded):
            ways[f"transformers, {model.dtype}, {name}".replace("torch.", "")] = partial(way, model)
    with torch.no_grad():
        for name, way in ways.items():
            rounds = 1 if "one by one" in name else given.steps + 1
            way(2)
            reading = median(seconds(way, 1) for _ in range(rounds))
            whole = median(seconds(way, given.tokens) for _ in range(rounds))
            result[name] = {"reading": reading, "decoding": whole - reading}
    return result


def fastest_product() -> float:
    """Floating-point operations a second of the best of some products of bfloat16 matrices."""
    import torch

    best = 0.0
    for size in (1024, 2048):
        a, b = torch.randn(2, size, size).bfloat16()
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


# --- the table ---------------------------------------------------------------------------------------------------


def start(given: argparse.Namespace, run: str) -> dict:
    """One run in a process of its own."""
    python = given.trl_python if run.startswith("trl") else sys.executable
    command = [str(python), __file__, "--run", run]
    for name in ("prompts", "tokens", "epochs", "micro_batch", "steps", "seed"):
        command.append(f"--{name.replace('_', '-')}={getattr(given, name)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very file
    if done.returncode:
        sys.exit(f"{run} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    print(text, flush=True)


def compare_ppo(given: argparse.Namespace) -> None:
    """Our trainer and TRL's, one after the other."""
    say(f"{given.prompts} prompts a step, one completion of {given.tokens} tokens each, {given.epochs} epochs")
    ours = start(given, "ours")
    say(f"ours     {ours['episodes_per_second']:6.2f} episodes/s, {ours['peak_memory_mb']:6.0f} MiB at most")
    parts = {"rollout": ("sampling",), "scoring": ("rollout", "sampling"), "update": ("update",), "reward": ("reward",)}
    total = sum(ours["seconds"][part] for part in ("rollout", "reward", "update"))
    for name, (whole, *without) in parts.items():
        seconds, flops = (ours[key][whole] - sum(ours[key][w] for w in without) for key in ("seconds", "flops"))
        share = flops / seconds / ours["peak_flops"] if seconds else 0.0
        say(f"  {name:8}{seconds:6.2f} s, {seconds / total:4.0%} of a step, at {share:4.0%} of the matrix-product peak")
    say(f"  the peak is {ours['peak_flops'] / 1e9:.0f} GFLOP/s in bfloat16")
    if given.trl_python is None:
        say(trl_hint())
    else:
        for run in ("trl", "trl cut"):
            theirs = start(given, run)
            say(
                f"{run:9}{theirs['episodes_per_second']:6.2f} episodes/s, {theirs['peak_memory_mb']:6.0f} MiB at most: ours has "
                f"{ours['episodes_per_second'] / theirs['episodes_per_second']:.2f} times the speed in "
                f"{ours['peak_memory_mb'] / theirs['peak_memory_mb']:.2f} of the memory"
            )


def compare_generation(given: argparse.Namespace) -> None:
    """Ours and transformers' ways to write the same."""
    generation = start(given, "generation")
    tokens = given.prompts * given.tokens
    ours = next(iter(generation.values()))
    for name, way in generation.items():
        ratios = way["decoding"] / ours["decoding"], sum(way.values()) / sum(ours.values())
        say(
            f"{name:40}{tokens / sum(way.values()):6.0f} tokens/s; reading {way['reading']:6.2f} s, decoding "
            f"{way['decoding']:6.2f} s: ours decodes {ratios[0]:.2f} times as fast, {ratios[1]:.2f} times with the reading"
        )


def trl_hint() -> str:
    """How to make an environment with TRL 1.12.0 from the one that runs this."""
    lib = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    return (
        f"TRL is not measured without --trl-python. To make its environment: `{sys.executable} -m venv build/trl && "
        f"echo {sys.prefix}/{lib} > build/trl/{lib}/parent.pth && build/trl/bin/pip install --no-deps trl==1.12.0`; "
        "then give --trl-python build/trl/bin/python."
    )


RUNS = {"ours": run_ours, "trl": run_trl, "trl cut": run_trl, "generation": run_generation}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--trl-python", type=Path, help="the Python of an environment with trl==1.12.0")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step, one completion each")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a completion")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8, help="completions a forward pass of the update")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed, after one that is not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("ppo", "generation"), help="one of the two comparisons")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](arguments)))
    else:
        say("Some minutes; close what else uses the processor.")
        if arguments.only != "generation":
            compare_ppo(arguments)
        if arguments.only != "ppo":
            compare_generation(arguments)
