"""What a notebook's first cell needs: parameters, seeds, progress bars, and the results file."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "labs" / "profiles"
BASELINES = ROOT / "tests" / "baselines.json"


class LabError(Exception):
    """Something the reader can put right; the message is one sentence that says how."""


class ExerciseError(LabError):
    """An answer to an exercise is not right yet; the message says what is wrong with it."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for a sentence that quotes it."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


class Lab:
    """One run of one lab.

        lab = Lab("week1", globals())

    `parameters` is the notebook's namespace; names in capitals are its parameters. Where the environment variable
    `LAB_PROFILE` names a profile, its values replace them (tools such as nbval cannot pass parameters; papermill can,
    and needs no `LAB_PROFILE`). Seeds Python, NumPy and torch with `SEED`.
    """

    def __init__(self, name: str, parameters: MutableMapping[str, Any]):
        self.name = name
        self.started = time.perf_counter()
        profile = os.environ.get("LAB_PROFILE")
        if profile:
            declared = {key for key in parameters if key.isupper()}
            parameters.update(check_parameters(read_profile(profile, name), declared, where=f"profile {profile!r}"))
        self.profile = parameters.get("PROFILE", "interactive")
        self.output = Path(parameters.get("OUTPUT") or ROOT / "build" / self.profile / name)
        self.seed = parameters.get("SEED", 0)
        self.metrics: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.steps: dict[str, float] = {}
        self._expected = _expected_seconds(name, self.profile)
        keep_freed_memory()
        quiet_libraries()
        set_seed(self.seed)
        if self._expected.get("total"):
            print(f"{name}: about {_minutes(self._expected['total'])} on two cores under this profile.")

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Time a step that takes a while; before one of over a minute, say how long it took when last measured."""
        expected = self._expected.get(title, 0)
        if expected > 60:
            print(f"{title}: about {_minutes(expected)} on two cores.", flush=True)
        begin = time.perf_counter()
        yield
        release_freed_memory()
        self.steps[title] = round(time.perf_counter() - begin, 1)

    def record(self, **values: float | tuple[float, float]) -> None:
        """Keep metrics (`rouge1=0.31`) and intervals (`rouge1_gain=(0.02, 0.09)`) for `results.json`."""
        for key, value in values.items():
            if isinstance(value, tuple | list):
                self.intervals[key] = [float(bound) for bound in value]
            else:
                self.metrics[key] = float(value)

    def save(self) -> Path:
        """Write `results.json` under a temporary name, rename it, and return its path."""
        path = self.output / "results.json"
        write_atomically(
            path,
            json.dumps(
                {
                    "lab": self.name,
                    "profile": self.profile,
                    "seed": self.seed,
                    "seconds": round(time.perf_counter() - self.started, 1),
                    "peak_memory_mb": round(peak_memory_mb(), 1),
                    "metrics": self.metrics,
                    "intervals": self.intervals,
                    "steps": self.steps,
                    "versions": versions(),
                },
                indent=1,
            ),
        )
        return path


def read_profile(profile: str, lab: str) -> dict[str, Any]:
    """The parameters that `labs/profiles/<profile>.yaml` gives to `lab` (those under `all`, then those under its name)."""
    import yaml

    path = PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise LabError(f"There is no profile {profile!r}: choose one of {known}, or write {path.name} in {PROFILES}.")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise LabError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return {"PROFILE": profile, **(sections.get("all") or {}), **(sections.get(lab) or {})}


def check_parameters(given: dict[str, Any], declared: Iterable[str], *, where: str) -> dict[str, Any]:
    """Return `given`, or raise `LabError` where it names a parameter that the lab does not declare."""
    declared = sorted(declared)
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise LabError(f"Unknown parameter {unknown[0]!r} in {where}: this lab takes {', '.join(declared)}.")
    return given


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    from transformers import set_seed as seed_all

    seed_all(seed)


def headless() -> bool:
    """Whether nobody watches: `LAB_HEADLESS` is set by batch runs, `LAB_PROFILE` by regression runs."""
    return bool(os.environ.get("LAB_HEADLESS") or os.environ.get("LAB_PROFILE"))


def progress(iterable: Iterable | None = None, *, total: int | None = None, description: str = "", **options):
    """A progress bar: in the page for a reader, on the terminal (not in the saved notebook) when headless.

    Headless with no terminal behind it, nothing is drawn.
    """
    if headless():
        from tqdm import tqdm

        terminal = sys.__stderr__
        options["file"] = terminal
        options["disable"] = options.get("disable") or terminal is None or not terminal.isatty()
    else:
        from tqdm.auto import tqdm
    return tqdm(iterable, total=total, desc=description, leave=False, dynamic_ncols=True, **options)


def quiet_libraries() -> None:
    """Silence messages that say nothing about the lab and would differ from run to run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b.*")
    for message in (
        "Unsupported layer type",  # PEFT, of normalisation layers, which it trains all the same
        "Position ids are not supported",  # PEFT, of learned prompts, in front of which it counts on its own
        "Sparse invariant checks",  # torch, of the sparse changes that PEFT builds itself
        "`torch.jit.script",  # torch about itself, at an import
        "FSDP2-wrapped module",  # torch, of outputs that are views, which nobody here changes in place
    ):
        warnings.filterwarnings("ignore", message=message)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of returning each to the system (Linux with glibc; elsewhere nothing).

    Every activation of a training step is such a block; without this a tenth to a fifth of the time goes into page faults.
    One arena for all threads: what the forward pass frees the backward pass, another thread, can use.
    """
    if sys.platform != "linux" or "glibc" not in platform.libc_ver():
        return
    import ctypes

    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_threshold, 2**30)
    libc.mallopt(m_trim_threshold, 2**30)


def release_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` has kept, so that one step's blocks are not in the next one's way."""
    if sys.platform == "linux" and "glibc" in platform.libc_ver():
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` under a temporary name in the same folder and rename it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LabError(
            f"{path} cannot be written ({error.strerror or error}): choose a folder you can write to, or free some space."
        ) from error


def peak_memory_mb() -> float:
    """The largest resident memory this process has had, in MiB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class PeakMemory:
    """The most memory the process held inside a `with`, beyond what it held at its start: `peak_mb`, in MiB.

    Looked at every 20 ms. Memory freed before is given back first, so that what comes does not fill it unseen.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        release_freed_memory()
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._watch.join()
        self.peak_mb = (max(self._most, self._process.memory_info().rss) - self._before) / 2**20


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _expected_seconds(lab: str, profile: str) -> dict[str, float]:
    """Seconds of the whole lab (`total`) and of its steps as last measured, from the kept baselines."""
    try:
        kept = json.loads(BASELINES.read_text(encoding="utf-8"))[profile if profile != "interactive" else "embedded"][
            lab
        ]
        return {"total": kept["seconds"], **kept["steps"]}
    except (OSError, ValueError, KeyError):
        return {}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} seconds"
