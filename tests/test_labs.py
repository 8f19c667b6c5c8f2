"""The three labs themselves, under the smoke profile: in batch, under nbval, and with an encoder-decoder."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, save_classifier

from utils import batch

NAMES = {
    "week1": {"rouge1_zero_shot", "rouge1_few_shot", "rouge1_few_shot_gain", "entropy_true", "entropy_fit", "heldout_loss_error"},
    "week2": {"rouge1_base", "rouge1_lora", "rouge1_full", "rouge1_gain"},
    "week3": {"kl_first_rollout", "kl_final", "reward_accuracy", "hostile_share_sft", "hostile_share_ppo", "rouge1_sft",
              "rouge1_ppo", "reward_gain", "hostile_change", "shuffled_reward_gain"},
}  # fmt: skip


def run(*command, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("LAB_")} | environment
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def results_of(folder, week):
    return json.loads((folder / week / "results.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Results of the three labs, run in batch into a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("smoke") / "with space"
    run("utils.batch", "--profile", "smoke", "--check", "--output", folder)
    return folder


@pytest.mark.parametrize("week", batch.WEEKS)
def test_a_lab_runs_and_records_what_others_read(smoke, week):
    results = results_of(smoke, week)
    assert NAMES[week] <= {*results["metrics"], *results["intervals"]}
    assert results["seconds"] > 0
    assert results["peak_memory_mb"] > 100


@pytest.mark.parametrize("week", batch.WEEKS)
def test_a_page_needs_no_network_and_its_pictures_have_words(smoke, week):
    page = (smoke / week / "lab.html").read_text(encoding="utf-8")
    notebook = nbformat.read(smoke / week / "lab.ipynb", as_version=4)
    assert 'src="http' not in page
    assert 'href="http' not in page.split("<body", 1)[0]
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert pictures
    assert all(len(out.metadata["image/png"]["alt"]) > 40 for out in pictures)


@pytest.mark.parametrize("week", batch.WEEKS)
def test_the_committed_notebook_is_as_nbval_and_a_reader_need_it(week):
    path = batch.notebook(week)
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert all(cell.execution_count for cell in code)
    assert not any(
        out.output_type in ("error",) or out.get("name") == "stderr" for cell in code for out in cell.outputs
    )
    assert all(cell.source.count("\n") < 40 for cell in notebook.cells)
    assert str(ROOT) not in text


def test_nbval_agrees_and_the_same_seed_gives_the_same_metrics(smoke):
    """nbval runs every notebook again, in new kernels: what it writes must equal the batch run's metrics, number by number."""
    run("pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider", *map(batch.notebook, batch.WEEKS), LAB_PROFILE="smoke")
    for week in batch.WEEKS:
        again, before = results_of(ROOT / "build" / "smoke", week), results_of(smoke, week)
        assert again["metrics"] == before["metrics"]
        assert again["intervals"] == before["intervals"]


def test_an_encoder_decoder_goes_through_all_three_weeks(tiny_folders, tmp_path):
    """As under the profile `course`: the reward of week 3 is a classifier's label."""
    given = ["--profile", "smoke", "--output", tmp_path / "labs", "-p", "MODEL", tiny_folders["t5"]]
    classifier = save_classifier(tiny_folders["bert"], tmp_path / "classifier", ("nothate", "hate"))
    run("utils.batch", "week1", "week2", *given)
    run("utils.batch", "week3", *given, "-p", "REWARD", classifier)
    for week in batch.WEEKS:
        results = results_of(tmp_path / "labs", week)
        assert NAMES[week] <= {*results["metrics"], *results["intervals"]}
    assert results_of(tmp_path / "labs", "week3")["metrics"]["kl_first_rollout"] == 0.0
    assert "The reward is the label 'nothate' of" in (tmp_path / "labs" / "week3" / "lab.ipynb").read_text()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MODEL", "no-such-model", "No model 'no-such-model'"),
        ("DATASET", "/nowhere/dialogues.jsonl", "does not exist"),
    ],
)
def test_a_wrong_name_ends_the_batch_with_one_sentence(tmp_path, name, value, words):
    command = [sys.executable, "-m", "utils.batch", "week1", "--profile", "smoke", "-p", name, value]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
