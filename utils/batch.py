"""Run labs in batch through papermill: `python -m utils.batch --profile smoke week1 week3`.

For each lab this writes `lab.ipynb` (executed), `lab.html`, `lab.log` and `results.json` to `build/<profile>/<lab>/`. A cell
that fails leaves the notebook as far as it ran; the message names the cell, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.lab import BASELINES, ROOT, LabError, check_parameters, read_profile, write_atomically

WEEKS = ("week1", "week2", "week3")
TABLE_BEGIN, TABLE_END = "<!-- run table: begin -->", "<!-- run table: end -->"


def notebook(lab: str) -> Path:
    """The notebook of a lab. Raises `LabError` where there is none of that name."""
    found = sorted((ROOT / "labs").glob(f"{lab}_*.ipynb"))
    if lab not in WEEKS or not found:
        raise LabError(f"There is no lab {lab!r}: choose from {', '.join(WEEKS)}.")
    return found[0]


def run_lab(lab: str, profile: str, overrides: dict[str, Any] | None = None, output: Path | None = None) -> dict:
    """Run one lab and return its results. Raises `LabError`, whose message names the cell where a cell failed."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source = notebook(lab)
    folder = Path(output or ROOT / "build" / profile) / lab
    parameters = {**read_profile(profile, lab), **(overrides or {}), "OUTPUT": str(folder)}
    declared = papermill.inspect_notebook(str(source))
    check_parameters(parameters, declared, where=f"profile {profile!r} or on the command line")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "lab.ipynb", "lab.html"):
            (folder / name).unlink(missing_ok=True)
        log = logging.FileHandler(folder / "lab.log", mode="w", encoding="utf-8")
    except OSError as error:
        raise LabError(
            f"The output folder {folder} cannot be written ({error.strerror or error}): choose another with --output."
        ) from error
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [log], False
    logger.setLevel(logging.INFO)
    partial, finished = folder / ".lab.partial.ipynb", folder / "lab.ipynb"
    try:
        papermill.execute_notebook(
            str(source),
            str(partial),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(ROOT / "labs"),
            log_output=True,
            progress_bar={"desc": lab, "disable": not sys.stderr.isatty(), "leave": False},
            request_save_on_cell_execute=True,
            **_kernel_transport(),
        )
    except PapermillExecutionError as error:
        raise LabError(
            f"{lab} failed in cell {error.cell_index} (In [{error.exec_count}]): {error.ename}: {error.evalue} "
            f"The notebook as far as it ran is {finished}, the log {folder / 'lab.log'}."
        ) from error
    except Exception as error:
        raise LabError(
            f"{lab} stopped: {type(error).__name__}: {str(error).strip() or 'no reason given'}. "
            f"The log is {folder / 'lab.log'}."
        ) from error
    finally:
        logger.handlers = []
        log.close()
        if partial.exists():
            os.replace(partial, finished)
    write_html(finished, folder / "lab.html")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


OFFLINE_PAGE = """{% extends "lab/index.html.j2" %}{% block html_head_js_mermaidjs %}{% endblock %}
{% block extra_css %}<style>.highlight pre { white-space: pre-wrap !important } math { font-size: 1.15em }</style>{% endblock %}"""


def write_html(source: Path, target: Path) -> None:
    """Convert a notebook to one HTML file that needs no network: nothing in it is fetched from a CDN.

    Formulas become MathML, which browsers draw themselves. Long lines of code are wrapped.
    """
    from jinja2 import DictLoader, pass_context
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Formulas(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return convert(body, display="block")

        def inline_math(self, body: str) -> str:
            return convert(body)

    class Page(HTMLExporter):
        @pass_context
        def markdown2html(self, context, text: str) -> str:
            renderer = Formulas(escape=False, anchor_link_text=self.anchor_link_text)
            return MarkdownWithMath(renderer=renderer).render(text)

    exporter = Page(
        mathjax_url="",
        require_js_url="",
        jquery_url="",
        extra_loaders=[DictLoader({"offline.html.j2": OFFLINE_PAGE})],
        template_file="offline.html.j2",
    )
    page, _ = exporter.from_filename(str(source))
    write_atomically(target, page)


def keep_outputs(lab: str, executed: Path) -> None:
    """Put the outputs of an executed notebook into the committed one, without the parameters that papermill injected."""
    import nbformat

    path = notebook(lab)
    committed, ran = nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4)
    cells = [cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if [cell.source for cell in cells] != [cell.source for cell in committed.cells]:
        raise LabError(f"{executed} was not made from {path}: run the lab again.")
    count = 0
    for cell, source in zip(committed.cells, cells, strict=True):
        if cell.cell_type == "code":
            count += 1
            cell.execution_count, cell.outputs = count, source.outputs
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = count
    write_atomically(path, nbformat.writes(committed) + "\n")


def _kernel_transport() -> dict[str, Any]:
    """Talk to the kernel through local sockets where there are any: no open ports, and it works with no network at all."""
    from jupyter_core.paths import jupyter_runtime_dir
    from traitlets.config import Config

    longest = len(jupyter_runtime_dir()) + len("/kernel-01234567-0123-0123-0123-0123456789ab-ipc-1")
    if sys.platform == "win32" or longest > 100:  # a socket's path has about a hundred characters at most
        return {}

    return {"config": Config({"KernelManager": {"transport": "ipc"}})}


# --- baselines and the run table ---------------------------------------------------------------------------------


def read_baselines() -> dict:
    """What `tests/baselines.json` keeps: a profile's labs with seconds, memory, steps and the bands of their metrics."""
    return json.loads(BASELINES.read_text(encoding="utf-8"))


def outside_bands(results: dict) -> list[str]:
    """One sentence for each metric or interval bound that is missing or lies outside its band."""
    bands = read_baselines().get(results["profile"], {}).get(results["lab"], {}).get("bands", {})
    complaints = []
    for name, (low, high) in bands.items():
        if name in results["metrics"]:
            values = [results["metrics"][name]]
        elif name.rpartition(".")[0] in results["intervals"]:
            interval, _, end = name.rpartition(".")
            values = [results["intervals"][interval][("low", "high").index(end)]]
        else:
            complaints.append(f"{results['lab']}: results.json has no {name}.")
            continue
        for value in values:
            if not (low is None or value >= low) or not (high is None or value <= high):
                complaints.append(f"{results['lab']}: {name} is {value:.4g}, outside its band {low} to {high}.")
    return complaints


def keep(results: dict) -> None:
    """Keep a run as the baseline (the bands stay as they are), and renew the README's table."""
    baselines = read_baselines() if BASELINES.exists() else {}
    entry = baselines.setdefault(results["profile"], {}).setdefault(results["lab"], {"bands": {}})
    for name in ("seconds", "peak_memory_mb", "steps", "metrics", "intervals"):
        entry[name] = results[name]
    write_atomically(BASELINES, json.dumps(baselines, indent=1) + "\n")
    readme = ROOT / "README.md"
    if readme.exists():
        write_atomically(readme, with_run_table(readme.read_text(encoding="utf-8"), baselines))


def with_run_table(readme: str, baselines: dict) -> str:
    """The README with its run table made anew from the baselines of the embedded profile."""
    head, _, rest = readme.partition(TABLE_BEGIN)
    _, _, tail = rest.partition(TABLE_END)
    return f"{head}{TABLE_BEGIN}\n{run_table(baselines)}{TABLE_END}{tail}"


def run_table(baselines: dict) -> str:
    """Markdown rows: lab, minutes, memory, and what the run showed."""
    lines = ["| lab | minutes | memory | what you will see |", "|---|---|---|---|"]
    for lab in WEEKS:
        kept = baselines.get("embedded", {}).get(lab)
        if kept is None or "seconds" not in kept:
            continue
        path = notebook(lab)
        saw = _SEEN[lab].format(**kept["metrics"], **{k: Interval(v) for k, v in kept["intervals"].items()})
        lines.append(
            f"| [{lab}](labs/{path.name}) | {kept['seconds'] / 60:.1f} | {kept['peak_memory_mb'] / 1024:.1f} GiB | {saw} |"
        )
    return "\n".join(lines) + "\n"


class Interval(list):
    """Two bounds, printed as `+0.01 to +0.09`."""

    def __format__(self, spec: str) -> str:
        return f"{self[0]:+.3f} to {self[1]:+.3f}"


_SEEN = {
    "week1": "three families trained from nothing: zero-shot the decoder is right on {zero_shot_decoder:.0%} of minimal pairs, the encoder "
    "on {zero_shot_encoder:.0%}; a scaling law that finds a known entropy of {entropy_true:.3f} at {entropy_fit:.3f}; a real model's ROUGE-1 from "
    "{rouge1_zero_shot:.3f} with no example to {rouge1_few_shot:.3f} with a few (95 % interval of the change {rouge1_few_shot_gain})",
    "week2": "ROUGE-1 from {rouge1_base:.3f} to {rouge1_lora:.3f} by LoRA (95 % interval of the gain {rouge1_gain})",
    "week3": "KL from {kl_first_rollout:.1f} to {kl_final:.1f} nats while the reward rises (95 % interval {reward_gain}) and the "
    "share of hostile summaries goes from {hostile_share_sft:.2f} to {hostile_share_ppo:.2f} (interval {hostile_change})",
}


# --- command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.batch", description="Run labs through papermill.")
    parser.add_argument("labs", nargs="*", help=f"which labs (default: {' '.join(WEEKS)})")
    parser.add_argument(
        "--profile", default="embedded", help="a file of labs/profiles, without .yaml (default: embedded)"
    )
    parser.add_argument("--output", type=Path, help="folder for the results (default: build/<profile>)")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set one parameter"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where a metric is outside its band in tests/baselines.json"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="for maintainers: keep seconds, memory and metrics in tests/baselines.json and the README, and, under the embedded "
        "profile, the outputs in the committed notebook",
    )
    options = parser.parse_args(arguments)
    os.environ.pop("LAB_PROFILE", None)  # the profile is passed as parameters
    os.environ["LAB_HEADLESS"] = "1"
    status = 0
    try:
        overrides = {name: yaml.safe_load(value) for name, value in options.parameter}
        for lab in options.labs or WEEKS:
            notebook(lab)
        for lab in options.labs or WEEKS:
            begin = time.perf_counter()
            print(f"{lab}: running under profile {options.profile} ...", flush=True)
            results = run_lab(lab, options.profile, overrides, options.output)
            print(
                f"{lab}: done in {time.perf_counter() - begin:.0f} s, {results['peak_memory_mb'] / 1024:.1f} GiB; "
                f"see {(options.output or ROOT / 'build' / options.profile) / lab / 'lab.html'}",
                flush=True,
            )
            if options.check:
                for complaint in outside_bands(results):
                    print(complaint, file=sys.stderr)
                    status = 1
            if options.keep:
                keep(results)
                if options.profile == "embedded":
                    keep_outputs(lab, (options.output or ROOT / "build" / "embedded") / lab / "lab.ipynb")
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
