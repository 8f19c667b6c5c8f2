"""The GitHub workflows follow their schema and call what exists."""

import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def check(*files):
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, files),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_workflows_follow_the_schema():
    assert len(WORKFLOWS) == 2
    result = check(*WORKFLOWS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_check_notices_a_mistake(tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    assert check(broken).returncode != 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = set(re.findall(r"run: make ([a-z]+)", path.read_text()))
    assert called <= targets
    assert called


def test_pins_of_the_embedded_weights_agree_everywhere():
    from utils.models import EMBEDDED

    for model in EMBEDDED.values():
        for place in ("Makefile", ".github/workflows/cpu.yml"):
            assert model.requirement in (ROOT / place).read_text(), place


def test_conda_users_get_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_every_requirement_is_pinned_and_explained():
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                assert re.match(r"[\w-]+==[\d.]+(\s+# \S.*)?$", line), line
                assert "#" in line or line.startswith("pytest"), line
