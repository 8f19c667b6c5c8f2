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
from conftest import ROOT

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


@pytest.mark.skipif(not has_loopback(), reason="torchrun's processes meet on 127.0.0.1, which cannot be reached here")
def test_two_processes_make_the_same_updates_as_one(models, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    ppo_worker.processes(models, one)
    result = two_processes(WORKER, "processes", models, two)
    assert result.returncode == 0, result.stderr[-3000:]
    alone = json.loads((one / "rank-0.json").read_text())
    ranks = [json.loads((two / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for kind in ("llama", "t5"):
        assert [found[kind]["processes"] for found in (alone, *ranks)] == [1, 2, 2]
        assert [found[kind]["share"] for found in (alone, *ranks)] == [4, 2, 2]
        assert ranks[0][kind]["weights"] == ranks[1][kind]["weights"]  # to the bit: the same sum for both
        assert ranks[0][kind]["history"][0]["objective/kl"] == 0.0
        for row, expected in zip(ranks[0][kind]["history"], alone[kind]["history"], strict=True):
            row, expected = ({k: v for k, v in r.items() if not k.startswith("seconds")} for r in (row, expected))
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for weights, expected in zip(ranks[0][kind]["weights"], alone[kind]["weights"], strict=True):
            assert weights == pytest.approx(expected, abs=1e-4)
        # one process writes, and it writes what the one alone does
        kept = [sorted(path.name for path in (folder / kind).iterdir()) for folder in (one, two)]
        assert kept[0] == kept[1] == ["metrics.csv", "step-2"]


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
