"""Batch execution: parameters, errors, bands, the run table; with a small notebook in the place of a lab."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from utils import batch
from utils.lab import Lab, LabError, check_parameters, read_profile, write_atomically

READ_ONLY = "/proc/lab" if sys.platform == "linux" else None


def run(*arguments, **environment):
    """`python -m utils.batch` in a process of its own: (status, what it said)."""
    result = subprocess.run(
        [sys.executable, "-m", "utils.batch", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def small_lab(tmp_path, monkeypatch):
    """Makes `week1` a notebook of a few lines whose last cell is `code`."""

    def make(code):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        declared = {"X": 1, "OUTPUT": None, **read_profile("smoke", "week1"), "PROFILE": "interactive"}
        parameters = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in declared.items()))
        parameters.metadata["tags"] = ["parameters"]
        notebook.cells = [
            parameters,
            nbformat.v4.new_code_cell(
                f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom utils.lab import Lab\nlab = Lab('week1', globals())"
            ),
            nbformat.v4.new_code_cell(code),
        ]
        path = tmp_path / "week1_small.ipynb"
        nbformat.write(notebook, path)
        monkeypatch.setattr(batch, "notebook", lambda lab: path)
        return path

    return make


def test_a_page_draws_its_formulas_itself(tmp_path):
    text = "The $\\frac{n-1}{n}$ is drawn, `$x$` is code.\n\n$$\\pi^*(x) \\propto e^{r(x)/\\beta}$$\n\n| $a_1$ | $b_1$ |\n|---|---|\n| 1 | $2^*$ |"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, tmp_path / "formulas.ipynb")
    batch.write_html(tmp_path / "formulas.ipynb", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8").split("<body", 1)[1]
    assert page.count("<math") == 5
    assert "<mfrac>" in page
    assert 'display="block"' in page
    assert "<code>$x$</code>" in page
    assert "\\frac" not in page
    assert "\\pi" not in page
    assert page.count("<td>") == 2


def test_a_lab_leaves_notebook_page_log_and_results(small_lab, tmp_path):
    small_lab("lab.record(x=X, gain=(0.0, 1.0))\nlab.save();\nprint('seen')")
    results = batch.run_lab("week1", "smoke", {"X": 7}, tmp_path / "out put")
    folder = tmp_path / "out put" / "week1"
    assert results["metrics"] == {"x": 7.0}
    assert results["intervals"] == {"gain": [0.0, 1.0]}
    assert {"lab", "profile", "seconds", "peak_memory_mb", "versions", "steps"} <= set(results)
    assert results["profile"] == "smoke"
    assert sorted(path.name for path in folder.iterdir()) == ["lab.html", "lab.ipynb", "lab.log", "results.json"]
    page = (folder / "lab.html").read_text()
    assert "seen" in page
    assert "cdn" not in page.lower()
    assert "seen" in (folder / "lab.log").read_text()


def test_a_failing_cell_is_named_and_the_notebook_is_left(small_lab, tmp_path):
    small_lab("print('before')\n1 / 0")
    with pytest.raises(LabError, match=r"week1 failed in cell \d+ \(In \[\d+\]\): ZeroDivisionError"):
        batch.run_lab("week1", "smoke", {}, tmp_path)
    notebook = nbformat.read(tmp_path / "week1" / "lab.ipynb", as_version=4)
    assert any("before" in str(cell.get("outputs")) for cell in notebook.cells)
    assert not (tmp_path / "week1" / "results.json").exists()


def test_a_kernel_that_dies_is_an_error_and_leaves_the_notebook(small_lab, tmp_path):
    small_lab("import os\nos._exit(1)")
    with pytest.raises(LabError, match="DeadKernelError"):
        batch.run_lab("week1", "smoke", {}, tmp_path)
    assert (tmp_path / "week1" / "lab.ipynb").exists()


def test_results_of_an_earlier_run_do_not_survive_a_failed_one(small_lab, tmp_path):
    small_lab("lab.save();")
    batch.run_lab("week1", "smoke", {}, tmp_path)
    small_lab("raise ValueError('no')")
    with pytest.raises(LabError):
        batch.run_lab("week1", "smoke", {}, tmp_path)
    assert not (tmp_path / "week1" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("week1", "-p", "N_EVALS", "3"), "Unknown parameter 'N_EVALS'"),
        (("week9",), "no lab 'week9'"),
        (("--profile", "tiny"), "no profile 'tiny': choose one of course, embedded, smoke"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    status, said = run(*arguments)
    assert status == 1
    assert words in said
    assert "Traceback" not in said


@pytest.mark.skipif(READ_ONLY is None, reason="needs a folder that not even root can write to")
def test_an_output_folder_that_cannot_be_written():
    status, said = run("week1", "--profile", "smoke", "--output", READ_ONLY)
    assert status == 1
    assert "cannot be written" in said
    assert "Traceback" not in said


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LabError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "results.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    write_atomically(target, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LabError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_profile_reaches_the_notebook_through_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("LAB_PROFILE", "smoke")
    parameters = dict.fromkeys([*read_profile("smoke", "week1"), "SEED", "OUTPUT"], None) | {"SEED": 0}
    lab = Lab("week1", parameters)
    assert (
        parameters["N_EVAL"] == read_profile("smoke", "week1")["N_EVAL"] == 2
    )  # the week's own, not that of all weeks
    assert lab.profile == "smoke"
    del parameters["SHOTS"]
    with pytest.raises(LabError, match="Unknown parameter 'SHOTS' in profile 'smoke'"):
        Lab("week1", parameters)


@pytest.mark.parametrize("profile", ["smoke", "embedded", "course"])
@pytest.mark.parametrize("week", batch.WEEKS)
def test_profiles_hold_only_parameters_that_the_labs_declare(profile, week):
    import papermill

    declared = papermill.inspect_notebook(str(batch.notebook(week)))
    check_parameters(read_profile(profile, week), declared, where=profile)


def test_a_broken_profile_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.lab.PROFILES", tmp_path)
    (tmp_path / "odd.yaml").write_text("week1: [")
    with pytest.raises(LabError, match=r"odd\.yaml is not valid YAML"):
        read_profile("odd", "week1")


def test_a_metric_outside_its_band_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "BASELINES", tmp_path / "baselines.json")
    bands = {"rouge1": [0.2, None], "gain.low": [0.05, None], "lost": [0, 1]}
    batch.BASELINES.write_text(json.dumps({"smoke": {"week1": {"bands": bands}}}))
    results = {"lab": "week1", "profile": "smoke", "metrics": {"rouge1": 0.3}, "intervals": {"gain": [0.06, 0.2]}}
    assert batch.outside_bands(results) == ["week1: results.json has no lost."]
    bad = results | {"metrics": {"rouge1": 0.1, "lost": 2}, "intervals": {"gain": [0.04, 0.2]}}
    assert [complaint.split(" is ")[0] for complaint in batch.outside_bands(bad)] == [
        "week1: rouge1", "week1: gain.low", "week1: lost",
    ]  # fmt: skip
    not_a_number = results | {"metrics": {"rouge1": float("nan"), "lost": 0}}
    assert len(batch.outside_bands(not_a_number)) == 1


def test_the_run_table_of_the_readme_is_that_of_the_baselines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert batch.with_run_table(readme, batch.read_baselines()) == readme
    assert readme.count("| [week") == 3
