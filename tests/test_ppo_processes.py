"""PPO runs that are killed, that are made by two processes, and that are started from the command line."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys

import ppo_worker
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_ppo import load

from utils.lab import LabError
from utils.ppo_shards import shard

WORKER = ROOT / "tests" / "ppo_worker.py"


def start(*command, timeout=120):
    env = {key: value for key, value in os.environ.items() if not key.startswith("LAB_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=timeout,
    )


def two_processes(*command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port,
    )
    return start(*launcher, *command)


def has_loopback():
    """Whether a socket can be bound and reached on 127.0.0.1, over which the processes of one machine meet."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def models(tiny_folders, tmp_path_factory):
    """A folder with the tiny models, by family."""
    folder = tmp_path_factory.mktemp("families")
    for kind in ("llama", "t5"):
        shutil.copytree(tiny_folders[kind], folder / kind)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forked")
def test_a_run_killed_at_any_moment_comes_to_the_same_end(models, tmp_path):
    result = start(WORKER, "kills", models, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    runs = json.loads((tmp_path / "kills.json").read_text())
    assert len(runs) == 10
    assert all(run["same"] for run in runs), runs
    assert all(not run["left"] for run in runs), runs
    assert sum(bool(run["checkpoints"]) for run in runs) >= 3


@pytest.fixture(scope="module")
def one_and_two(models, tmp_path_factory):
    """The runs of `ppo_worker.RUNS` in one process and in two: their folders, and what each process has written."""
    if not has_loopback():
        pytest.skip("torchrun's processes meet on 127.0.0.1, which cannot be reached here")
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    ppo_worker.processes(models, one)
    shutil.copytree(one / "llama, all trained, in shards" / "step-1", two / "from one")
    result = two_processes(WORKER, "processes", models, two)
    assert result.returncode == 0, result.stderr[-3000:]
    return one, two, *(json.loads(path.read_text()) for path in (one / "rank-0.json", *sorted(two.glob("rank-*.json"))))


def same_run(found, expected):
    """Whether metrics and final weights are the same, but for rounding."""
    for row, wanted in zip(found["history"], expected["history"], strict=True):
        row, wanted = ({k: v for k, v in r.items() if not k.startswith("seconds")} for r in (row, wanted))
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for weights, wanted in zip(found["weights"], expected["weights"], strict=True):
        assert weights == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", ppo_worker.RUNS)
def test_two_processes_make_the_same_updates_as_one(one_and_two, name):
    *folders, alone, first, second = one_and_two
    assert [found[name]["processes"] for found in (alone, first, second)] == [1, 2, 2]
    assert [found[name]["share"] for found in (alone, first, second)] == [4, 2, 2]
    assert first[name]["weights"] == second[name]["weights"]  # to the bit: the same sum for both
    assert first[name]["history"][0]["objective/kl"] == 0.0
    same_run(first[name], alone[name])
    assert first[name]["written"] == second[name]["written"] == alone[name]["written"]
    # one process writes, and it writes what the one alone does
    kept = [sorted(path.name for path in (folder / name).iterdir()) for folder in folders]
    assert kept[0] == kept[1] == ["metrics.csv", *(["step-1"] if "all trained" in name else []), "step-2"]


@pytest.mark.parametrize("name", [name for name in ppo_worker.RUNS if "in shards" in name])
def test_each_process_holds_its_shard_and_the_rest_only_when_it_is_used(one_and_two, name):
    *_, alone, first, second = one_and_two
    whole = alone[name]["held"]
    for held in (first[name]["held"], second[name]["held"]):
        policy, reference, means = held["at rest"]
        assert [2 * policy, 2 * reference] == whole["at rest"][:2]
        if "all trained" in name:  # embeddings, last norm and both heads are in each process
            rest = whole["at rest"][2] - 2 * policy
            assert means == policy + rest
        else:
            assert means == whole["at rest"][2]
        assert held["rollout"] == whole["rollout"] == [2 * policy]
        assert held["update"]
        assert all(policy < count < 2 * policy for count in held["update"])


def test_fused_lora_meets_whole_weights_where_they_are_in_shards(one_and_two):
    *_, alone, first, second = one_and_two
    for found in (alone, first, second):
        assert found["llama, bfloat16, in shards"]["fused"] == ["Parameter"]


def test_a_run_in_shards_goes_on_in_one_process_and_the_reverse(one_and_two, models):
    _, two, alone, first, second = one_and_two
    name = "llama, all trained, in shards"
    trainer = ppo_worker.run(name, models, None, shard=False)
    history = trainer.train(resume_from=two / name / "step-1")
    same_run({"history": history, "weights": ppo_worker.weights(trainer)}, first[name])
    for found in (first, second):
        same_run(found["resumed"], alone[name])


@pytest.mark.parametrize("name", ["llama, in shards", "llama, all trained, in shards"])
def test_what_was_in_shards_is_saved_whole(one_and_two, name):
    file = "model.safetensors" if "all trained" in name else "adapter_model.safetensors"
    one, two = (load_file(folder / f"{name}, saved" / file) for folder in one_and_two[:2])
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_cut_is_refused(one_and_two, models):
    *_, first, second = one_and_two
    for uneven, cut in (first["refused"], second["refused"]):
        assert "minibatch_size=4 in parts of micro_batch_size=4" in uneven
        assert "makes 1 micro-batches, and 2 processes need a multiple of 2" in uneven
        assert "hand over the whole model in each process and set PPOConfig(shard=True)" in cut
    model, _ = load(models / "llama")
    model._no_split_modules = None
    with pytest.raises(LabError, match="LlamaForCausalLM does not say which of its modules are blocks"):
        shard(model, 2)


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["utils.ppo", "--help"])
    monkeypatch.delitem(sys.modules, "utils.ppo")  # as in a process of its own
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("utils.ppo", run_name="__main__")
    assert stopped.value.code == 0
    assert "--rollout-batch-size" in capsys.readouterr().out


def test_the_command_runs_from_a_profile_resumes_and_is_plain_about_errors(tiny_folders, tmp_path, capsys, monkeypatch):
    from utils.ppo_command import main, read_parameters

    monkeypatch.setenv("LAB_HEADLESS", "1")
    assert read_parameters("embedded", {})["MODEL"] == "smollm2-135m-instruct"
    assert read_parameters("smoke", {"PPO_STEPS": 9})["PPO_STEPS"] == 9
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--profile" in capsys.readouterr().out
    assert main(["--profile", "nowhere"]) == 1
    assert "no profile 'nowhere'" in capsys.readouterr().err
    assert main(["-p", "PPO_STEPZ", "3"]) == 1
    assert "Unknown parameter 'PPO_STEPZ'" in capsys.readouterr().err
    small = ["--profile", "smoke", "-p", "MODEL", str(tiny_folders["t5"]), "-p", "ENCODER", str(tiny_folders["bert"])]
    small += ["--output", str(tmp_path)]
    assert main([*small, "-p", "PPO_UPPER_SHARE", "1.0"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["lab"] == "ppo"
    assert results["metrics"]["kl_first_rollout"] == 0.0
    assert results["metrics"]["optimizer_steps"] > 0
    assert {"metrics.csv", "adapter", "reward", "step-2"} <= {path.name for path in tmp_path.iterdir()}
    assert main([*small, "-p", "PPO_UPPER_SHARE", "1.0"]) == 1
    assert "earlier run" in capsys.readouterr().err
    assert main([*small, "-p", "PPO_UPPER_SHARE", "1.0", "-p", "KL_COEF", "0.5", "--resume"]) == 1
    there = read_parameters("smoke", {})["KL_COEF"]
    assert f"kl_coef ({there} there, 0.5 here)" in capsys.readouterr().err
    assert main([*small, "-p", "PPO_UPPER_SHARE", "1.0", "-p", "N_PAIRS", "40", "--resume"]) == 1
    assert "holds a reward made of" in capsys.readouterr().err
    assert main([*small, "-p", "PPO_UPPER_SHARE", "1.0", "--resume"]) == 0
