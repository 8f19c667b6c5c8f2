"""Supervised fine-tuning with LoRA: `utils.training` beside TRL's own SFTTrainer, on the same model, data, batch and adapter.

    python benchmarks/sft.py [--dialogues 64] [--batch 8] [--seed 0] [--same-batches]

Three runs, each in a process of its own, so that none has another's memory: `ours`; `trl defaults`, with gradient
checkpointing and weights as the trainer loads them; `trl fast`, without checkpointing and with weights in bfloat16. Printed
are tokens a second (tokens of the examples, padding not counted, set-up not counted), the ratio to ours, the peak memory,
and the loss: of the first and last third of the steps, and on held-out dialogues afterwards. Ours groups texts by length, so
the batches differ, and with them the losses; with `--same-batches` TRL's trainer gets our batches, in our order, and the
losses are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = ("ours", "trl defaults", "trl fast")


def one_run(name: str, dialogues: int, batch: int, seed: int, same_batches: bool) -> dict:
    """Train as `name` says in this process."""
    from transformers import PrinterCallback, set_seed

    from utils.data import load_dialogues
    from utils.lab import keep_freed_memory, peak_memory_mb, quiet_libraries
    from utils.models import load_model
    from utils.prompts import IGNORED, encode_example, summary_prompt
    from utils.training import FineTuneConfig, LikeLengths, fine_tune, lora_config, mean_loss

    quiet_libraries()
    model, tokenizer = load_model("smollm2-135m-instruct")

    def encoded(rows):
        return [encode_example(tokenizer, summary_prompt(row["dialogue"]), row["summary"]) for row in rows]

    examples = encoded(load_dialogues(split="train").select(range(dialogues)))
    adapter, rate = lora_config(model), 1e-3
    ours = FineTuneConfig(rate, batch_size=batch, seed=seed)
    set_seed(seed)
    if name == "ours":
        keep_freed_memory()
        begin = time.perf_counter()
        tuned, losses = fine_tune(model, tokenizer, examples, ours, adapter=adapter)
        seconds = time.perf_counter() - begin
    else:
        import tempfile

        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        fast = dict(gradient_checkpointing=False) if name == "trl fast" else {}
        # An object keeps its dtype (bfloat16); a path is loaded as the trainer likes.
        subject = model if fast else model.name_or_path
        del model  # else the path's run would hold it, too
        rows = [
            {
                "input_ids": e["input_ids"],
                "completion_mask": [int(label != IGNORED) for label in e["labels"]],
            }
            for e in examples
        ]

        class OurOrder(SFTTrainer):
            def _get_train_sampler(self, train_dataset=None):
                return LikeLengths([e["input_ids"] for e in examples], ours.micro_batch_size, seed)

        with tempfile.TemporaryDirectory() as scratch:
            config = SFTConfig(
                scratch,
                per_device_train_batch_size=batch,
                learning_rate=rate,
                num_train_epochs=1,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                report_to="none",
                completion_only_loss=True,  # what has no completion column is learned whole otherwise
                shuffle_dataset=not same_batches,
                seed=seed,
                **fast,
            )
            trainer = (OurOrder if same_batches else SFTTrainer)(
                subject, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
            )
            trainer.pop_callback(PrinterCallback)
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        tuned = trainer.model.eval()
    peak = peak_memory_mb()
    held_out = mean_loss(tuned, tokenizer, encoded(load_dialogues(split="validation")))
    third = max(1, len(losses) // 3)
    return {
        "tokens_per_second": sum(len(e["input_ids"]) for e in examples) / seconds,
        "peak_memory_mb": peak,
        "loss_first_third": sum(losses[:third]) / third,
        "loss_last_third": sum(losses[-third:]) / third,
        "loss_held_out": held_out,
        "losses": losses,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dialogues", type=int, default=64, help="training dialogues, one epoch")
    parser.add_argument("--batch", type=int, default=8, help="examples an optimizer step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--same-batches", action="store_true", help="give TRL's trainer the batches that ours makes")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(one_run(given.run, given.dialogues, given.batch, given.seed, given.same_batches)))
        sys.exit()
    results = {}
    print(f"{given.dialogues} dialogues, {given.batch} a step, each of {len(RUNS)} runs takes minutes.", flush=True)
    for name in RUNS:
        command = [sys.executable, __file__, "--run", name]
        command += [f"--{key}={getattr(given, key)}" for key in ("dialogues", "batch", "seed")]
        command += ["--same-batches"] if given.same_batches else []
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - this very file
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        result = results[name] = json.loads(done.stdout.splitlines()[-1])
        ratio = results["ours"]["tokens_per_second"] / result["tokens_per_second"]
        print(
            f"{name:13}{result['tokens_per_second']:7.0f} tokens/s (ours is {ratio:.2f} times as fast), "
            f"{result['peak_memory_mb']:6.0f} MiB, loss {result['loss_first_third']:.3f} to {result['loss_last_third']:.3f}, "
            f"held out {result['loss_held_out']:.3f}",
            flush=True,
        )
        if given.same_batches and name != "ours":
            differences = [b - a for a, b in zip(results["ours"]["losses"], result["losses"], strict=True)]
            print(
                f"{'':13}same batches: over {len(differences)} steps the loss differs by {sum(differences) / len(differences):+.4f} "
                f"on average and by {max(map(abs, differences)):.4f} at most",
                flush=True,
            )
