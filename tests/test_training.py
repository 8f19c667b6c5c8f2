"""Fine-tuning: the loss by hand, what changes and what does not, and what has no influence."""

import copy
import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from utils.lab import ROOT, LabError
from utils.prompts import IGNORED, encode_example
from utils.training import FineTuneConfig, fine_tune, label_losses, lora_config, mean_loss

PAIRS = [
    ("the cat sat on the mat", "cat sat"),
    ("a dog ran", "dog"),
    ("person1 asks person2 to ran to the red house and the river", "person1 wants person2 to ran to the river"),
    ("big", "big"),
    ("the small blue house", "house : small and blue"),
    ("dog and cat", "dog"),
    ("person2 tells person1 the summary", "summary"),
    ("a river ran to the house", "river and house ran"),
]


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return model


@pytest.fixture
def sure(tiny):
    """The tiny model without dropout, and its tokenizer: what it computes in training is what it computes otherwise."""
    return without_dropout(tiny[0]), tiny[1]


def make_examples(model, tokenizer, pairs=PAIRS):
    encoder_decoder = model.config.is_encoder_decoder
    return [encode_example(tokenizer, p, c, encoder_decoder=encoder_decoder) for p, c in pairs]


def train(model, tokenizer, examples, *, adapter=None, **settings):
    settings = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 8, "micro_batch_size": 8} | settings
    return fine_tune(copy.deepcopy(model), tokenizer, examples, FineTuneConfig(**settings), adapter=adapter)


@torch.no_grad()
def loss_by_hand(model, examples):
    """Mean cross-entropy over every completion token of all `examples`, one example at a time without padding."""
    total, count = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        if model.config.is_encoder_decoder:
            start = torch.tensor([model.config.decoder_start_token_id])
            logits, targets = (
                model(input_ids=ids, decoder_input_ids=torch.cat([start, labels[:-1]])[None]).logits[0],
                labels,
            )
        else:
            first = int((labels != IGNORED).nonzero()[0])
            assert torch.equal(labels[first:], ids[0, first:])
            logits, targets = model(ids).logits[0, first - 1 : -1], labels[first:]
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count


def assert_same_weights(one, other, **tolerance):
    for (name, first), (_, second) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [True, False])
def test_first_loss_is_the_mean_cross_entropy_of_completion_tokens(sure, peft):
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    _, losses = train(model, tokenizer, examples, adapter=lora_config(model) if peft else None)
    assert losses == [pytest.approx(loss_by_hand(model, examples), rel=1e-5)]


def test_losses_and_weights_do_not_depend_on_micro_batches(sure):
    """Every token counts alike, whatever forward pass it is in."""
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    together, losses = train(model, tokenizer, examples, epochs=3)
    for micro_batch_size in (1, 2, 4):
        apart, same_losses = train(model, tokenizer, examples, epochs=3, micro_batch_size=micro_batch_size)
        assert same_losses == pytest.approx(losses, rel=1e-4)
        assert_same_weights(apart, together, atol=3e-4, rtol=1e-3)


def test_an_optimizer_step_takes_batch_size_examples(sure):
    model, tokenizer = sure
    _, losses = train(model, tokenizer, make_examples(model, tokenizer), epochs=3, batch_size=4, micro_batch_size=2)
    assert len(losses) == 6
    _, losses = train(model, tokenizer, make_examples(model, tokenizer), batch_size=2, micro_batch_size=4)
    assert len(losses) == 4


def test_padding_has_no_influence(sure):
    """An example without labels makes the batch long, and adds nothing else."""
    model, tokenizer = sure
    examples = make_examples(model, tokenizer, PAIRS[:4])
    long = {"input_ids": [5] * 60, "labels": [IGNORED] * 60}
    plain, losses = train(model, tokenizer, examples, epochs=3)
    padded, same_losses = train(model, tokenizer, [*examples, long], epochs=3)
    assert same_losses == pytest.approx(losses, rel=1e-5)
    assert_same_weights(padded, plain, atol=1e-4, rtol=1e-3)


def test_tokens_without_a_label_are_not_learned(sure):
    """What follows the last label changes nothing."""
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    longer = []
    for i, example in enumerate(examples):
        extra = [4 + i] * (i % 3 + 1)
        ids = example["input_ids"] if model.config.is_encoder_decoder else example["input_ids"] + extra
        longer.append({"input_ids": ids, "labels": example["labels"] + [IGNORED] * len(extra)})
    plain, losses = train(model, tokenizer, examples, epochs=3)
    other, same_losses = train(model, tokenizer, longer, epochs=3)
    assert same_losses == pytest.approx(losses, rel=1e-5)
    assert_same_weights(other, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tiny", ["llama", "gpt2"], indirect=True)  # an encoder's input has no labels
def test_labels_on_the_prompt_change_the_loss(sure):
    """The reverse: a mask that has no effect would pass the tests above."""
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    everything = [{"input_ids": e["input_ids"], "labels": e["input_ids"]} for e in examples]
    _, (completions,) = train(model, tokenizer, examples)
    _, (whole,) = train(model, tokenizer, everything)
    total = sum(
        float(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").detach())
        for ids in (torch.tensor(example["input_ids"]) for example in examples)
    )
    assert whole == pytest.approx(total / sum(len(e["input_ids"]) - 1 for e in examples), rel=1e-5)
    assert whole != pytest.approx(completions, rel=1e-4)


def test_examples_without_any_label_are_refused(sure):
    model, tokenizer = sure
    examples = [{"input_ids": e["input_ids"], "labels": [IGNORED] * len(e["labels"])} for e in make_examples(*sure)]
    with pytest.raises(LabError, match="label"):
        train(model, tokenizer, examples)
    with pytest.raises(LabError, match="label"):
        train(model, tokenizer, [])


# --- what changes ------------------------------------------------------------------------------------------------


def test_an_adapter_is_all_that_changes(tiny):
    model, tokenizer = tiny
    before = copy.deepcopy(model)
    ids = torch.tensor([[4, 5, 6]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        logits = before(**inputs).logits
    config = FineTuneConfig(learning_rate=1e-2, epochs=3)
    trained, _ = fine_tune(model, tokenizer, make_examples(*tiny), config, adapter=lora_config(model, r=4))
    assert isinstance(trained, PeftModel)
    assert trained.get_base_model() is model
    own = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for name, parameter in before.named_parameters():
        assert torch.equal(own.pop(name), parameter), name
    assert own == {}
    assert all("lora_" in name for name, parameter in trained.named_parameters() if parameter.requires_grad)
    assert all(bool(p.detach().any()) for name, p in trained.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        assert not torch.equal(trained(**inputs).logits, logits)
        with trained.disable_adapter():
            assert torch.equal(trained(**inputs).logits, logits)


def test_lora_is_on_every_linear_layer_but_the_head(tiny):
    from peft import get_peft_model

    model, _ = tiny
    linear = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    adapted = get_peft_model(model, lora_config(model, r=4))
    with_lora = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert with_lora == linear - {"lm_head"}


def test_without_an_adapter_the_model_itself_is_trained(tiny):
    model, tokenizer = tiny
    before = copy.deepcopy(model)
    trained, _ = fine_tune(model, tokenizer, make_examples(*tiny), FineTuneConfig(epochs=3))
    assert trained is model
    assert not isinstance(trained, PeftModel)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert not any(same)


@pytest.mark.parametrize("peft", [True, False])
def test_the_model_comes_back_in_evaluation_mode_and_generates(tiny, peft):
    from utils.generation import generate

    model, tokenizer = tiny
    adapter = lora_config(model) if peft else None
    trained, _ = train(model, tokenizer, make_examples(*tiny), adapter=adapter)
    assert not any(module.training for module in trained.modules())
    assert len(generate(trained, tokenizer, ["the cat", "a dog ran"], max_new_tokens=3, show_progress=False)) == 2


@pytest.mark.parametrize("peft", [True, False])
def test_a_copy_of_the_tuned_model_computes_with_its_own_weights(tiny, peft):
    model, tokenizer = tiny
    trained, _ = train(model, tokenizer, make_examples(*tiny), adapter=lora_config(model) if peft else None)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.get_output_embeddings().weight.zero_()
    start = {"decoder_input_ids": torch.tensor([[0]])} if model.config.is_encoder_decoder else {}
    logits = [network(torch.tensor([[5, 6, 7]]), **start).logits for network in (other, trained)]
    assert not logits[0].any(), "the copy calls the model it was copied from"
    assert logits[1].any()


@pytest.mark.parametrize(("peft", "share"), [(True, 0.97), (False, 0.5)])
def test_eight_examples_are_learned(sure, peft, share):
    """By an adapter less well: the head of a tiny model has small weights, and an adapter leaves them small."""
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    adapter = lora_config(model, r=16, alpha=64) if peft else None
    trained, losses = train(model, tokenizer, examples, adapter=adapter, epochs=25, learning_rate=2e-2)
    assert len(losses) == 25
    assert all(map(math.isfinite, losses))
    assert losses[-1] < share * losses[0]
    assert loss_by_hand(trained, examples) < share * losses[0]


# --- seeds -------------------------------------------------------------------------------------------------------


def test_same_seed_same_losses_and_another_seed_others(tiny):
    """With dropout, an adapter's random weights and the order of the batches."""
    model, tokenizer = tiny
    settings = dict(batch_size=2, learning_rate=1e-2)
    runs = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)  # what went on earlier does not matter
        adapter = lora_config(model, dropout=0.1)
        trained, losses = train(model, tokenizer, make_examples(*tiny), adapter=adapter, seed=seed, **settings)
        runs.append((losses, [parameter.detach() for parameter in trained.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert runs[0][0] != runs[2][0]


def test_nothing_is_drawn_when_headless(tiny, capfd):
    train(*tiny, make_examples(*tiny))
    assert capfd.readouterr() == ("", "")


# --- checkpoints -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
import utils.training as training
from utils.models import load_model
from utils.prompts import encode_example
from utils.training import FineTuneConfig, fine_tune, lora_config, mean_loss

moment, step, source, folder, adapted = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], sys.argv[5] == "lora"
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class Killed(training.ProgressBar):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if moment == "step" and state.global_step == step:
            die()

training.ProgressBar = Killed
for name in ("_CompletionTrainer", "_EncoderDecoderTrainer"):
    trainer = getattr(training, name)
    def save(self, output_dir, old=trainer._save_optimizer_and_scheduler):
        old(self, output_dir)
        if moment == "saving" and self.state.global_step == step:
            die()
    trainer._save_optimizer_and_scheduler = save
if moment == "rename":
    replace, training.os.replace = os.replace, None
    def moved(src, dst):
        if str(dst).endswith(f"checkpoint-{{step}}"):
            die()
        replace(src, dst)
    training.os.replace = moved
model, tokenizer = load_model(source)
examples = [encode_example(tokenizer, p, c, encoder_decoder=model.config.is_encoder_decoder) for p, c in {pairs!r}]
config = FineTuneConfig(learning_rate=1e-2, epochs=3, batch_size=2, micro_batch_size=1, save_steps=2)
tuned, losses = fine_tune(
    model, tokenizer, examples, config, adapter=lora_config(model) if adapted else None, checkpoints=folder or None
)
torch.save((dict(tuned.state_dict()), losses), sys.argv[6])
"""


def run_training(moment, step, source, folder, kind, result):
    code = KILLED.format(root=str(ROOT), pairs=PAIRS)
    command = [sys.executable, "-c", code, moment, step, source, folder, kind, result]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("llama", "full"), ("t5", "full")])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tiny_folders, tmp_path, family, kind):
    """Killed again and again: before the first checkpoint, between two, while one is written, before it is renamed."""
    source, folder = tiny_folders[family], tmp_path / "checkpoints"
    done = run_training("never", 0, source, "", kind, tmp_path / "whole.pt")
    assert done.returncode == 0, done.stderr
    moments = (("step", 1), ("saving", 4), ("step", 7), ("rename", 8), ("step", 11))
    for moment, step in moments if kind == "lora" else moments[1:3]:
        killed = run_training(moment, step, source, folder, kind, tmp_path / "never.pt")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run_training("never", 0, source, folder, kind, tmp_path / "resumed.pt")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    (whole, losses), (resumed, again) = (torch.load(tmp_path / f"{n}.pt") for n in ("whole", "resumed"))
    assert losses == again
    assert len(losses) == 12
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_checkpoints_of_another_run_are_refused(sure, tmp_path):
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(LabError, match="other settings, data or model: delete"):
        fine_tune(copy.deepcopy(model), tokenizer, examples, FineTuneConfig(), checkpoints=tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir()


def test_mean_loss_is_that_of_single_examples(sure):
    model, tokenizer = sure
    examples = make_examples(model, tokenizer)
    assert mean_loss(model, tokenizer, examples, batch_size=3) == pytest.approx(loss_by_hand(model, examples), rel=1e-5)


def test_label_losses_stand_in_the_order_of_the_examples(sure):
    model, tokenizer = sure
    examples = sorted(make_examples(model, tokenizer), key=lambda e: -len(e["input_ids"]))  # read shortest first
    losses = label_losses(model, tokenizer, examples, batch_size=3)
    assert len({round(float(each.mean()), 4) for each in losses}) > 1
    for example, each in zip(examples, losses, strict=True):
        assert each.mean() == pytest.approx(loss_by_hand(model, [example]), rel=1e-5)
