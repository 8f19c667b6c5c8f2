"""Every figure of the labs, one function each. Colours: Okabe and Ito's palette, told apart by colour-blind readers."""

from __future__ import annotations

import hashlib
import io
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")  # figures are shown as images with alt text; no window, no backend of the notebook's

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

BLACK, ORANGE, BLUE, GREEN, VERMILION, GREY = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#999999"
SKY = "#56B4E9"
VIEW_LIMIT = 200_000  # bytes of an interactive view: it is kept in the notebook


def show(figure: Figure, alt: str) -> None:
    """Display a figure in the notebook with `alt` as its text for readers who cannot see it."""
    from IPython.display import display

    display(_image(figure, alt))


def _image(figure: Figure, alt: str):
    from IPython.display import Image

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return Image(data=image.getvalue(), format="png", alt=alt)


def attention_masks(masks: Mapping[str, tuple], tokens: Sequence[str], title: str) -> Figure:
    """Masks side by side. `masks`: name to (mask (n, n) bool, number of source tokens or None)."""
    figure = Figure(figsize=(4.2 * len(masks), 4.6))
    for axis, (name, (mask, source)) in zip(
        figure.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True
    ):
        axis.imshow(mask, cmap=matplotlib.colors.ListedColormap(["white", BLUE]), vmin=0, vmax=1)
        n = len(mask)
        axis.set_xticks(range(n), tokens[:n], rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(n), tokens[:n], fontsize=8)
        axis.set_xticks([i - 0.5 for i in range(1, n)], minor=True)
        axis.set_yticks([i - 0.5 for i in range(1, n)], minor=True)
        axis.grid(which="minor", color=GREY, linewidth=0.5)
        axis.tick_params(which="minor", length=0)
        if source:
            axis.axhline(source - 0.5, color=VERMILION, linewidth=2)
            axis.axvline(source - 0.5, color=VERMILION, linewidth=2)
        axis.set_xlabel("token looked at")
        axis.set_title(name, fontsize=10)
    figure.axes[0].set_ylabel("token that looks")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def means_with_intervals(
    means: Sequence[float], intervals: Sequence[tuple[float, float]], labels: Sequence[str], title: str, ylabel: str
) -> Figure:
    """One point with its interval for each label, from left to right."""
    figure = Figure(figsize=(1.5 + 1.3 * len(means), 3.6))
    axis = figure.subplots()
    errors = [
        [m - low for m, (low, _) in zip(means, intervals, strict=True)],
        [h - m for m, (_, h) in zip(means, intervals, strict=True)],
    ]
    axis.errorbar(range(len(means)), means, yerr=errors, fmt="o", color=BLUE, capsize=5, linewidth=2)
    for i, mean in enumerate(means):
        axis.annotate(f"{mean:.3f}", (i, mean), textcoords="offset points", xytext=(10, -3))
    axis.set_xticks(range(len(means)), labels)
    axis.set_xlim(-0.5, len(means) - 0.1)
    axis.set_ylabel(ylabel)
    axis.set_title(textwrap.fill(title, 62), fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    return figure


def loss_curve(losses: Sequence[float], title: str) -> Figure:
    """Training loss by optimizer step, with its running mean."""
    figure = Figure(figsize=(6.4, 3.2))
    axis = figure.subplots()
    window = max(1, len(losses) // 8)
    running = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
    steps = range(1, len(losses) + 1)
    axis.plot(steps, losses, color=GREY, linewidth=1, label="each step")
    axis.plot(steps, running, color=BLUE, linewidth=2, label=f"mean of the last {window}")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats a token)")
    axis.set_title(textwrap.fill(title, 62), fontsize=10)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def paired_changes(before: Sequence[float], after: Sequence[float], title: str, label: str) -> Figure:
    """One line a dialogue, from its value before to its value after: rising ones blue, falling ones orange."""
    figure = Figure(figsize=(4.6, 4.2))
    axis = figure.subplots()
    for b, a in zip(before, after, strict=True):
        axis.plot([0, 1], [b, a], color=BLUE if a >= b else ORANGE, alpha=0.45, linewidth=1)
    means = [sum(before) / len(before), sum(after) / len(after)]
    axis.plot([0, 1], means, color=BLACK, linewidth=3, marker="o", label="mean")
    axis.plot([], [], color=BLUE, label="rises")
    axis.plot([], [], color=ORANGE, label="falls")
    axis.set_xticks([0, 1], ["before", "after"])
    axis.set_xlim(-0.2, 1.2)
    axis.set_ylabel(label)
    axis.set_title(textwrap.fill(title, 62), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def ppo_curves(history: Sequence[Mapping[str, float]], title: str, kl_target: float | None = None) -> Figure:
    """Score and KL of each PPO step, side by side."""
    figure = Figure(figsize=(9, 3.4))
    steps = range(1, len(history) + 1)
    left, right = figure.subplots(1, 2)
    left.plot(steps, [m["objective/scores"] for m in history], color=BLUE, marker="o", label="score")
    left.plot(
        steps,
        [m["objective/rlhf_reward"] for m in history],
        color=ORANGE,
        marker="s",
        linestyle="--",
        label="score minus KL penalty",
    )
    left.set_ylabel("reward (standard deviations)")
    left.legend(frameon=False)
    right.plot(steps, [m["objective/kl"] for m in history], color=VERMILION, marker="o")
    if kl_target is not None:
        right.axhline(kl_target, color=BLACK, linestyle=":", label="target")
        right.legend(frameon=False)
    right.set_ylabel("KL from the reference\n(nats a sequence)")
    for axis in (left, right):
        axis.set_xlabel("PPO step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 100), fontsize=10)
    figure.tight_layout()
    return figure


def live_ppo_curves(steps: int, kl_target: float | None = None) -> Callable[[Sequence[Mapping[str, float]]], None]:
    """For `PPOTrainer.train(on_step=...)`: one figure of `ppo_curves` that is drawn anew after each of `steps` steps.

    Where nobody watches, it is drawn once, after the last.
    """
    from IPython.display import display

    from utils.lab import headless

    shown = None

    def draw(history: Sequence[Mapping[str, float]]) -> None:
        nonlocal shown
        if headless() and len(history) < steps:
            return
        last = history[-1]
        title = (
            f"Step {len(history)} of {steps}: score {last['objective/scores']:+.2f}, KL {last['objective/kl']:.1f} nats"
        )
        alt = f"Left: score by PPO step. Right: KL from the reference by PPO step. {title}."
        image = _image(ppo_curves(history, title, kl_target), alt)
        if shown is None:
            shown = display(image, display_id=not headless())
        else:
            shown.update(image)

    return draw


GROUP_STYLES = (  # colour and shape both tell groups apart
    (BLUE, "o"),
    (ORANGE, "s"),
    (GREEN, "^"),
    (VERMILION, "D"),
    ("#CC79A7", "P"),
    (BLACK, "X"),
)


def tokens_per_word(shares: Mapping[str, Sequence[float]], title: str) -> Figure:
    """For each group of words the share cut into 1, 2, 3, and 4 or more tokens, as one bar of total length 1."""
    figure = Figure(figsize=(7.2, 0.8 + 0.55 * len(shares)))
    axis = figure.subplots()
    left = [0.0] * len(shares)
    for step, (label, colour) in enumerate(
        zip(("1 token", "2 tokens", "3 tokens", "4 or more"), (BLUE, "#56B4E9", ORANGE, VERMILION), strict=True)
    ):
        widths = [share[step] for share in shares.values()]
        axis.barh(range(len(shares)), widths, left=left, color=colour, edgecolor="white", label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(shares)), list(shares))
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the words")
    figure.suptitle(textwrap.fill(title, 90), fontsize=10)
    axis.legend(frameon=False, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(shares) - 0.12))
    figure.tight_layout()
    return figure


def embedding_map(points, groups: Sequence[str], title: str, shares: Sequence[float]) -> Figure:
    """A two-dimensional map of vectors, `points` (n, 2), one colour and shape a group; `shares`: variance along each axis."""
    figure = Figure(figsize=(7.6, 5))
    axis = figure.subplots()
    for (colour, marker), group in zip(GROUP_STYLES, dict.fromkeys(groups), strict=False):
        rows = [i for i, name in enumerate(groups) if name == group]
        axis.scatter(
            [float(points[i][0]) for i in rows],
            [float(points[i][1]) for i in rows],
            color=colour,
            marker=marker,
            s=36,
            alpha=0.8,
            label=f"{group} ({len(rows)})",
        )
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axis.set_ylabel(f"second principal component ({shares[1]:.0%})")
    axis.set_title(textwrap.fill(title, 80), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def next_token_panels(
    before: Sequence[float], panels: Mapping[str, Sequence[float]], tokens: Sequence[str], title: str
) -> Figure:
    """Probability of the likeliest tokens before a setting (outlined) and after it (filled), one panel a setting."""
    columns = 3
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(10.5, 0.4 + 0.24 * len(tokens) * lines + 0.7 * lines))
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    places = range(len(tokens))
    for axis, (name, after) in zip(axes, panels.items(), strict=False):
        axis.barh(places, after, color=BLUE, height=0.8, label="after")
        axis.barh(places, before, facecolor="none", edgecolor=BLACK, linewidth=1, height=0.8, label="before")
        for place, value in enumerate(after):
            if value == 0:
                axis.text(0.005, place, "ruled out", fontsize=6, color=VERMILION, va="center")
        axis.set_title(name, fontsize=9)
        axis.set_yticks(places, tokens, fontsize=7, family="monospace")
        axis.grid(axis="x", alpha=0.3)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in figure.axes[columns * (lines - 1) :]:
        axis.set_xlabel("probability of the next token", fontsize=8)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


def quality_against_diversity(
    quality: Mapping[str, tuple[float, tuple[float, float]]], diversity: Mapping[str, float], title: str
) -> Figure:
    """ROUGE-1 with its interval against distinct-2, one point a setting, each with its name beside it."""
    figure = Figure(figsize=(8.4, 4.8))
    axis = figure.subplots()
    for name, (mean, (low, high)) in quality.items():
        axis.errorbar(
            diversity[name], mean, yerr=[[mean - low], [high - mean]], fmt="o", color=BLUE, capsize=3, linewidth=1.2
        )
    axis.margins(x=0.15, y=0.2)
    axis.set_xlabel("diversity: different word pairs among all word pairs of a dialogue's samples (distinct-2)")
    axis.set_ylabel("ROUGE-1, mean of the samples")
    axis.set_title(textwrap.fill(title, 90), fontsize=10)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    to_pixels, taken = axis.transData.transform, []
    bars = [
        pixel
        for name, (_, (low, high)) in quality.items()
        for pixel in to_pixels([(diversity[name], y) for y in np.linspace(low, high, 40)])
    ]
    sides = [(6, 4, "left"), (-6, 4, "right"), (6, -12, "left"), (-6, -12, "right")]
    sides += [(6, y, "left") for y in (16, 28, 40, -24, -36, -48)] + [
        (-6, y, "right") for y in (16, 28, 40, -24, -36, -48)
    ]
    leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    for name, (mean, _) in quality.items():
        point = (diversity[name], mean)
        places = [(point, (x, y), {"ha": side, "fontsize": 8, "arrowprops": leader}) for x, y, side in sides]
        taken.append(_label(axis, name, places, taken, bars))
    return figure


def objectives(rows: Sequence[tuple[str, Sequence[str], Sequence[str], Sequence[bool]]], title: str) -> Figure:
    """What each objective reads and learns. `rows`: (name, tokens read, labels under them, "" for none, where a token was hidden)."""
    figure = Figure(figsize=(11, 1.7 * len(rows) + 0.6))
    longest = max(len(read) for _, read, _, _ in rows)
    for axis, (name, read, labels, hidden) in zip(
        figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True
    ):
        for i, (token, label, is_hidden) in enumerate(zip(read, labels, hidden, strict=True)):
            colours = (ORANGE if is_hidden else "white", BLUE if label else "white")
            for height, text, colour in zip((1, 0), (token, label), colours, strict=True):
                axis.add_patch(
                    matplotlib.patches.Rectangle(
                        (i, height), 0.96, 0.9, facecolor=colour, edgecolor=GREY, linewidth=0.8
                    )
                )
                ink = "white" if colour == BLUE else BLACK
                axis.text(i + 0.48, height + 0.45, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_xlim(0, longest)
        axis.set_ylim(0, 2)
        axis.set_yticks([1.45, 0.45], ["reads", "learns"])
        axis.set_xticks([])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(name, fontsize=10, loc="left")
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def losses_by_compute(curves: Mapping[str, tuple[Sequence[float], float]], title: str) -> Figure:
    """Running mean of each training loss over the compute spent. `curves`: name to (loss of each step, operations a step)."""
    figure = Figure(figsize=(7.2, 3.6))
    axis = figure.subplots()
    for (name, (losses, flops)), colour, style in zip(
        curves.items(), (BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=False
    ):
        window = max(1, len(losses) // 20)
        running = [
            sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
            for i in range(len(losses))
        ]
        spent = [(i + 1) * flops / 1e12 for i in range(len(losses))]
        axis.plot(spent, running, color=colour, linestyle=style, linewidth=2, label=name)
    axis.set_xlabel("compute spent (10$^{12}$ floating-point operations)")
    axis.set_ylabel("training loss (nats a label)")
    axis.set_title(textwrap.fill(title, 76), fontsize=10)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def shares_against_chance(
    groups: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]], chance: float | None, title: str, ylabel: str
) -> Figure:
    """Shares with intervals, several series side by side. `groups`: series to {label: (share, (low, high))}."""
    labels = list(next(iter(groups.values())))
    figure = Figure(figsize=(2.2 + 1.6 * len(labels), 3.8))
    axis = figure.subplots()
    for k, ((name, values), colour, mark) in enumerate(
        zip(groups.items(), (BLUE, ORANGE, GREEN), ("o", "s", "^"), strict=False)
    ):
        places = [i + (k - (len(groups) - 1) / 2) * 0.22 for i in range(len(labels))]
        shares = [values[label][0] for label in labels]
        errors = [
            [max(0.0, share - values[label][1][0]) for share, label in zip(shares, labels, strict=True)],
            [max(0.0, values[label][1][1] - share) for share, label in zip(shares, labels, strict=True)],
        ]
        axis.errorbar(places, shares, yerr=errors, fmt=mark, color=colour, capsize=4, linewidth=2, label=name)
        for x, share in zip(places, shares, strict=True):
            axis.annotate(
                f"{share:.2f}", (x, share), textcoords="offset points", xytext=(6, 4), fontsize=8, color=colour
            )
    if chance is not None:
        axis.axhline(chance, color=BLACK, linestyle=":", label=f"chance, {chance:.2f}")
    axis.set_xticks(range(len(labels)), labels)
    axis.margins(y=0.12)
    axis.set_xlim(-0.5, len(labels) - 0.4)
    axis.set_ylabel(ylabel)
    axis.set_title(textwrap.fill(title, 72), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    return figure


def show_source(*things) -> None:
    """Display the source of functions and classes in colour: code that is kept in `utils` and not repeated in a notebook.

    Left out are docstrings, and checks of the arguments (an `if` that only raises, a call that only checks).
    """
    from IPython.display import display
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    source = "\n\n".join(_without_docstrings(thing) for thing in things)
    style = "color:#222;background:#f8f8f8;padding:0.6em;border-left:3px solid #999;line-height:1.35;overflow-x:auto"
    html = highlight(
        source, PythonLexer(), HtmlFormatter(noclasses=True, cssstyles=style, prestyles="font-family:monospace")
    )
    display({"text/html": html, "text/plain": source}, raw=True)


def _without_docstrings(thing) -> str:
    """Source of `thing` with its comments and without the lines of its docstrings and of its checks."""
    import ast
    import inspect

    source = textwrap.dedent(inspect.getsource(thing))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        drop = isinstance(node, ast.If) and not node.orelse and all(isinstance(line, ast.Raise) for line in node.body)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            drop = getattr(node.value.func, "id", "").startswith("_check")
        first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            drop, first, last = True, node.body[0].lineno, node.body[0].end_lineno
            if last < len(lines) and not lines[last] and isinstance(node, ast.ClassDef):
                last += 1  # and the empty line under a class's docstring
        if drop:
            lines[first - 1 : last] = [None] * (last - first + 1)
    return "\n".join(line for line in lines if line is not None)


def attention_steps(steps: Mapping[str, Sequence], tokens: Sequence[str], title: str) -> Figure:
    """Heat maps side by side with their numbers. `steps`: name to a square of numbers; minus infinity is left white."""
    import numpy as np

    figure = Figure(figsize=(3.9 * len(steps), 4.3))
    for axis, (name, values) in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps.items(), strict=True):
        values = np.asarray(values, dtype=float)
        shown = np.where(np.isfinite(values), values, np.nan)
        low, high = np.nanmin(shown), np.nanmax(shown)
        axis.imshow(shown, cmap="Blues", vmin=low, vmax=high)
        for i, j in np.ndindex(values.shape):
            finite = np.isfinite(values[i, j])
            dark = finite and values[i, j] > low + 0.6 * (high - low)
            text = f"{values[i, j]:.2f}" if finite else "−∞"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(tokens)), tokens, fontsize=8)
        axis.set_xlabel("token looked at (key)")
        axis.set_title(name, fontsize=10)
    figure.axes[0].set_ylabel("token that looks (query)")
    figure.suptitle(textwrap.fill(title, 100), fontsize=11)
    figure.tight_layout()
    return figure


def position_encodings(
    sinusoids,
    learned,
    turns: Mapping[str, Sequence[float]],
    slopes: Sequence[float],
    buckets: Mapping[str, Sequence],
    title: str,
) -> Figure:
    """Five kinds of positions.

    `sinusoids` (positions, width); `learned` (positions, positions) cosine similarities; `turns`: name of a pair of
    numbers to its cosine at distance 0, 1, ...; `slopes` of ALiBi's heads; `buckets`: name to (distances, bucket numbers).
    """
    figure = Figure(figsize=(12, 7))
    axes = figure.subplots(2, 3).flatten()
    axis = axes[0]
    axis.imshow(sinusoids, cmap="RdBu", aspect="auto", vmin=-1, vmax=1, interpolation="nearest")
    axis.set(xlabel="number in the vector", ylabel="position", title="sinusoidal: added to the embedding")
    axis = axes[1]
    image = axis.imshow(learned, cmap="viridis", vmin=-0.2, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.85, label="cosine similarity")
    axis.set(xlabel="position", ylabel="position", title="learned (MiniLM's): added to the embedding")
    axis = axes[2]
    for (name, cosines), colour, style in zip(
        turns.items(), (BLUE, ORANGE, GREEN, VERMILION), ("-", "--", "-.", ":"), strict=False
    ):
        axis.plot(cosines, color=colour, linestyle=style, label=name)
    axis.set(xlabel="distance (tokens)", ylabel="cosine of the angle", title="rotary: turns queries and keys")
    axis.legend(fontsize=8, loc="lower left")
    axis = axes[3]
    distance = range(65)
    for i, slope in enumerate(slopes):
        axis.plot(distance, [-slope * d for d in distance], color=matplotlib.colormaps["viridis"](i / len(slopes)))
        axis.annotate(f"head {i}", (64, -slope * 64), fontsize=7, va="center") if i < 3 else None
    axis.set(
        xlabel="distance (tokens)",
        ylabel="added to the score",
        title="ALiBi: a straight line a head",
        ylim=(-34, 1),
        xlim=(0, 74),
    )
    axis = axes[4]
    for (name, (distances, numbers)), colour in zip(buckets.items(), (BLUE, VERMILION), strict=False):
        axis.step(distances, numbers, where="mid", color=colour, label=name)
    axis.set(
        xlabel="key's position minus query's (tokens)", ylabel="bucket", title="T5: a learned number for each bucket"
    )
    axis.legend(fontsize=8)
    axes[5].axis("off")
    for axis in axes[:5]:
        axis.title.set_fontsize(10)
    figure.suptitle(textwrap.fill(title, 110), fontsize=11)
    figure.tight_layout()
    return figure


def attention_heads(maps: Mapping[str, Sequence], tokens: Sequence[str], title: str) -> Figure:
    """Attention weights of several heads over one text, a square each. `maps`: name to (n, n), rows look at columns."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.9 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, weights) in zip(axes, maps.items(), strict=False):
        image = axis.imshow(weights, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1))
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=5)
        axis.set_yticks(range(len(tokens)), tokens, fontsize=5)
        axis.set_title(textwrap.fill(name, 44), fontsize=9)
    for axis in axes[len(maps) :]:
        axis.axis("off")
    for axis in axes[: len(maps) : columns]:
        axis.set_ylabel("token that looks")
    figure.suptitle(textwrap.fill(title, 34 * columns), fontsize=11)
    figure.tight_layout()
    figure.colorbar(image, ax=axes.tolist(), shrink=0.5, label="share of the attention", ticks=[0, 0.05, 0.25, 0.5, 1])
    return figure


def attention_view(maps: Mapping[str, Sequence], tokens: Sequence[str], title: str) -> str:
    """The same as a page to point at: choose a head, then a token, and see what it looks at. HTML with its script, nothing fetched.

    A weight is kept as one of 64 levels (of its square root), so shares are shown to about 2 points. Raises `LabError`
    where the page would be larger than `VIEW_LIMIT`.
    """
    from html import escape

    from utils.lab import LabError

    levels = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    packed = {
        name: "".join(levels[round(min(max(float(w), 0.0), 1.0) ** 0.5 * 63)] for row in weights for w in row)
        for name, weights in maps.items()
    }
    data = json.dumps({"tokens": list(tokens), "heads": packed}).replace("<", "\\u003c")
    mark = hashlib.sha256(data.encode()).hexdigest()[:12]
    page = _ATTENTION_PAGE.replace("MARK", mark).replace("TITLE", escape(title)).replace("DATA", data)
    if len(page.encode()) > VIEW_LIMIT:
        raise LabError(
            f"This view of {len(maps)} heads over {len(tokens)} tokens has {len(page.encode()):,} bytes: give fewer heads or a shorter text."
        )
    return page


_ATTENTION_PAGE = """<div data-attention="MARK" style="font-family:sans-serif;color:#111;background:#fff;padding:0.6em;border:1px solid #999">
<p style="margin:0 0 0.5em"><b>TITLE</b></p>
<label>head <select style="color:#111;background:#fff"></select></label>
<span style="color:#444"> Point at a token, or move with Tab; a click holds it.</span>
<p data-text style="line-height:2;font-family:monospace"></p>
<p data-says role="status" aria-live="polite" style="min-height:1.4em;margin:0"></p>
</div>
<script>
(function () {
  const data = DATA;
  const levels = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  document.querySelectorAll('[data-attention="MARK"]:not([data-ready])').forEach(function (box) {
    box.setAttribute("data-ready", "");
    const select = box.querySelector("select"), text = box.querySelector("[data-text]"), says = box.querySelector("[data-says]");
    const n = data.tokens.length;
    let held = null;
    Object.keys(data.heads).forEach(function (name) { select.add(new Option(name)); });
    const buttons = data.tokens.map(function (token, i) {
      const button = document.createElement("button");
      button.textContent = token;
      button.style.cssText = "border:1px solid #ddd;border-radius:3px;margin:1px;padding:1px 4px;font:inherit;color:#111;background:#fff";
      button.onmouseenter = button.onfocus = function () { if (held === null) look(i); };
      button.onclick = function () { held = held === i ? null : i; look(i); };
      text.appendChild(button);
      return button;
    });
    function look(i) {
      const head = data.heads[select.value];
      const weights = buttons.map(function (_, j) { return Math.pow(levels.indexOf(head[i * n + j]) / 63, 2); });
      buttons.forEach(function (button, j) {
        button.style.background = "rgba(230,159,0," + Math.sqrt(weights[j]).toFixed(2) + ")";
        button.style.outline = j === i ? "2px solid #0072B2" : "none";
        button.title = "about " + Math.round(100 * weights[j]) + " %";
      });
      const most = weights.map(function (w, j) { return [w, j]; }).sort(function (a, b) { return b[0] - a[0]; }).slice(0, 4);
      says.textContent = "Token " + i + " (" + data.tokens[i] + ") looks at: " + most.filter(function (p) { return p[0] > 0.01; })
        .map(function (p) { return data.tokens[p[1]] + " (token " + p[1] + ", about " + Math.round(100 * p[0]) + " %)"; }).join(", ");
    }
    select.onchange = function () { look(held === null ? n - 1 : held); };
    look(n - 1);
  });
})();
</script>"""


def show_attention(maps: Mapping[str, Sequence], tokens: Sequence[str], title: str, alt: str, static: int = 6) -> None:
    """Heads over a text: a figure of the first `static` of them when nobody watches, a page to point at where somebody does."""
    from utils.lab import headless

    if headless():
        show(attention_heads(dict(list(maps.items())[:static]), tokens, title), alt=alt)
        return
    from IPython.display import HTML, display

    display(HTML(attention_view(maps, tokens, title)))


def cache_speed(lengths: Sequence[int], with_cache: Sequence[float], without: Sequence[float], title: str) -> Figure:
    """Seconds for one more token after texts of several lengths, with and without a key-value cache, and their ratio."""
    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2)
    left.plot(lengths, [1000 * s for s in without], color=VERMILION, marker="s", label="all read again")
    left.plot(lengths, [1000 * s for s in with_cache], color=BLUE, marker="o", label="with a cache")
    left.set_yscale("log")
    left.set_ylabel("time of the next token (ms)")
    left.legend(frameon=False, fontsize=8)
    ratios = [b / a for a, b in zip(with_cache, without, strict=True)]
    right.plot(lengths, ratios, color=BLACK, marker="o")
    for length, ratio in zip(lengths, ratios, strict=True):
        right.annotate(
            f"{ratio:.1f}", (length, ratio), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8
        )
    right.set_ylabel("times faster with the cache")
    right.set_ylim(0, 1.15 * max(ratios))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xlabel("tokens already read")
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 100), fontsize=10)
    figure.tight_layout()
    return figure


def memory_on_paper(
    names: Sequence[str],
    reading: Mapping[str, Sequence[float]],
    training: Mapping[str, Sequence[float]],
    gpu: float,
    title: str,
) -> Figure:
    """Gigabytes to hold each model's weights and to train it with Adam, by number format; `gpu` is one GPU's memory in GB."""
    figure = Figure(figsize=(10, 0.8 + 0.34 * len(names)))
    styles = list(zip((BLACK, BLUE, ORANGE, GREEN), ("s", "o", "D", "^"), strict=True))
    for axis, data, what in zip(
        figure.subplots(1, 2, sharey=True),
        (reading, training),
        ("to read with (weights)", "to train with Adam"),
        strict=True,
    ):
        for (name, values), (colour, marker) in zip(data.items(), styles, strict=True):
            axis.plot(
                values, range(len(names)), color=colour, marker=marker, linestyle="none", label=name, markersize=6
            )
        axis.axvline(gpu, color=VERMILION, linestyle="--", linewidth=1)
        axis.annotate(
            f"one GPU,\n{gpu:g} GB",
            (gpu, 0.1),
            color=VERMILION,
            fontsize=8,
            ha="left",
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
        )
        axis.set_xscale("log")
        axis.set_xlabel("memory (GB, logarithmic)")
        axis.set_title(what, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


def life_cycle(stages: Mapping[str, Mapping[str, str | None]], title: str) -> Figure:
    """A project's stages from left to right. `stages`: stage to its steps; a step to where the course works on it, or None."""
    colours = {"1": SKY, "2": ORANGE, "3": GREEN}
    figure = Figure(figsize=(12, 4.6))
    axis = figure.subplots()
    for x, (stage, steps) in enumerate(stages.items()):
        axis.text(x, 1.02, f"{x + 1}. {stage}", ha="center", va="bottom", fontsize=11, weight="bold")
        for i, (step, where) in enumerate(steps.items()):
            y = 0.86 - 0.235 * i
            week = next((c for c in where or "" if c in colours), None)
            box = dict(
                boxstyle="round,pad=0.5",
                edgecolor=BLACK if week else GREY,
                linestyle="-" if week else "--",
                facecolor=colours.get(week, "white"),
            )
            text = textwrap.fill(step, 24) + f"\n({where or 'not in this course'})"
            axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)
        if x:
            axis.annotate("", (x - 0.41, 1.06), (x - 0.59, 1.06), arrowprops=dict(arrowstyle="-|>", color=BLACK))
    axis.set(xlim=(-0.5, len(stages) - 0.5), ylim=(0, 1.15))
    axis.axis("off")
    axis.set_title(textwrap.fill(title, 110), fontsize=11)
    figure.tight_layout()
    return figure


def formats_side_by_side(
    names: Sequence[str],
    megabytes: Sequence[float],
    speeds: Mapping[str, Sequence[float]],
    scores: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    title: str,
) -> Figure:
    """Number formats of one model: size, tokens a second (`speeds`: batch to one value a format), ROUGE-1 with its interval."""
    figure = Figure(figsize=(11.5, 3.5))
    size, speed, score = figure.subplots(1, 3)
    places = range(len(names))
    bars = size.bar(places, megabytes, color=SKY, edgecolor=BLACK)
    size.bar_label(bars, [f"{m:.0f}" for m in megabytes], fontsize=8)
    size.set_ylabel("weights (MB)")
    for i, ((batch, values), colour) in enumerate(zip(speeds.items(), (BLUE, ORANGE), strict=True)):
        bars = speed.bar(
            [p + 0.4 * (i - 0.5) for p in places],
            values,
            width=0.38,
            color=colour,
            edgecolor=BLACK,
            hatch="//" if i else None,
            label=batch,
        )
        speed.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=8)
    speed.set_ylabel("tokens written a second")
    speed.margins(y=0.25)
    speed.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    errors = [
        [s - low for s, (low, _) in zip(scores, intervals, strict=True)],
        [high - s for s, (_, high) in zip(scores, intervals, strict=True)],
    ]
    score.errorbar(places, scores, yerr=errors, fmt="o", color=BLUE, capsize=5)
    score.set_ylabel("ROUGE-1 (95 % interval)")
    score.set_xlim(-0.5, len(names) - 0.5)
    for axis in (size, speed, score):
        axis.set_xticks(places, names)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(textwrap.fill(title, 120), fontsize=10)
    figure.tight_layout()
    return figure


def scaling_fit(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[Sequence[float]],
    predicted: Sequence[Sequence[float]],
    held_out: int,
    floor: float,
    title: str,
) -> Figure:
    """Loss above `floor` by tokens and by parameters: measured (points) and predicted (lines); one line a model.

    `losses` and `predicted` are (models, read-outs), in nats a token. The model with index `held_out` was not in the fit.
    """
    figure = Figure(figsize=(10, 4.4))
    by_tokens, by_parameters = figure.subplots(1, 2, sharey=True)

    def draw(axis, x, measured, line, colour, marker, label):
        axis.plot(x, [v - floor for v in line], color=colour, linewidth=1.5)
        axis.plot(x, [v - floor for v in measured], marker, color=colour, markersize=5, label=label)

    for i in range(len(parameters)):
        colour, marker = (VERMILION, "D") if i == held_out else (BLUE, "o")
        draw(by_tokens, tokens, losses[i], predicted[i], colour, marker, {0: "fitted", held_out: "held out"}.get(i))
    order = sorted(range(len(parameters)), key=lambda i: parameters[i])
    columns = {0: BLACK, len(tokens) // 2: GREEN, len(tokens) - 1: ORANGE}  # first, middle and last read-out
    for j, colour in columns.items():
        x = [parameters[i] for i in order]
        measured, line = ([values[i][j] for i in order] for values in (losses, predicted))
        draw(by_parameters, x, measured, line, colour, "o", f"{tokens[j] / 1e3:.0f} k tokens")
    for j in columns:
        by_parameters.plot(
            parameters[held_out], losses[held_out][j] - floor, "D", color=VERMILION, label=None if j else "held out"
        )
    by_tokens.set_xlabel("training tokens (at each line: the model's parameters)")
    by_parameters.set_xlabel("parameters")
    by_tokens.set_ylabel("loss above the known entropy\n(nats a token)")
    for axis in (by_tokens, by_parameters):
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g} k")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
    by_tokens.set_xlim(min(tokens) / 1.15, max(tokens) * (max(tokens) / min(tokens)) ** 0.2)  # room for the labels
    figure.suptitle(textwrap.fill(title, 125), fontsize=10)
    figure.tight_layout()
    lowest = by_tokens.bbox.y0 - 12  # labels go up from the lowest line, each at least a line of text above the last
    for i in sorted(range(len(parameters)), key=lambda i: predicted[i][-1]):
        end = by_tokens.transData.transform((max(tokens), predicted[i][-1] - floor))
        lowest = max(end[1], lowest + 12)
        by_tokens.annotate(
            f"{parameters[i] / 1e3:.1f} k", by_tokens.transData.inverted().transform((end[0], lowest)), textcoords="offset points",
            xytext=(7, -3), fontsize=8, color=VERMILION if i == held_out else BLUE,
        )  # fmt: skip
    return figure


def bootstrap_histogram(
    draws: Sequence[float], interval: tuple[float, float], known: float, title: str, xlabel: str
) -> Figure:
    """Bootstrap draws of a quantity as a histogram, with their interval and the known value."""
    figure = Figure(figsize=(6.4, 3.0))
    axis = figure.subplots()
    low, high = interval
    room = 0.4 * max(high - low, abs(known - low), abs(known - high))
    edges = (min(low, known) - room, max(high, known) + room)
    axis.hist([min(max(draw, edges[0]), edges[1]) for draw in draws], bins=40, range=edges, color=GREY)
    axis.axvspan(low, high, color=BLUE, alpha=0.2, label="95 % interval")
    axis.axvline(known, color=VERMILION, linewidth=2, label="known")
    beyond = any(not edges[0] <= draw <= edges[1] for draw in draws)
    axis.set_xlabel(xlabel + ("; the outermost bars hold all beyond" if beyond else ""))
    axis.set_ylabel("bootstrap fits")
    axis.set_title(textwrap.fill(title, 76), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def tokens_against_parameters(
    models: Mapping[str, tuple[float, float]],
    advice: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    budgets: Sequence[float],
    title: str,
) -> Figure:
    """Published models by size and data. `models`: name to (parameters, tokens).

    `advice`: name of a law to the parameters and tokens it advises along growing budgets, points close enough to keep
    labels off the line. `budgets`: operations, one line of equal 6 N D each.
    """
    figure = Figure(figsize=(9, 6.2))
    axis = figure.subplots()
    low, high = 5e7, 2e12
    for budget in budgets:
        axis.plot([low, high], [budget / 6 / n for n in (low, high)], color=GREY, linewidth=0.8, linestyle=":")
    colours, styles = (VERMILION, GREEN, ORANGE, BLACK), ("-", "--", "-.", (0, (1, 1)))
    for (name, (parameters, tokens)), colour, style in zip(advice.items(), colours, styles, strict=False):
        axis.plot(parameters, tokens, color=colour, linestyle=style, linewidth=1.8, label=name)
    for n, d in models.values():
        axis.plot(n, d, "o", color=BLUE, markersize=6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(2e9, 4e13)
    axis.set_xlabel("parameters")
    axis.set_ylabel("training tokens")
    axis.set_title(textwrap.fill(title, 95), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    axis.grid(alpha=0.2)
    figure.tight_layout()
    # Labels last, each where it covers nothing. What may not be covered, in pixels: the models, and the lines of advice.
    to_pixels = axis.transData.transform
    crowded = [*to_pixels(list(models.values()))]
    for line in advice.values():
        crowded += [*to_pixels(np.transpose(line))]
    around = [Bbox([point - 10, point + 10]) for point in to_pixels(list(models.values()))]
    sides = [(7, -3, "left"), (-7, -3, "right"), (0, 7, "center"), (0, -13, "center"), (6, 6, "left"), (6, -12, "left")]
    sides += [(-6, 6, "right"), (-6, -12, "right"), (0, 17, "center"), (0, -23, "center")]
    sides += [(-12, 30, "right"), (12, 30, "left"), (-12, -36, "right"), (12, -36, "left")]
    leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    taken = []
    for i, (name, point) in enumerate(models.items()):
        places = [(point, (x, y), {"ha": side, "fontsize": 8, "arrowprops": leader}) for x, y, side in sides]
        taken.append(_label(axis, name, places, [*taken, *around[:i], *around[i + 1 :]], crowded))
    (_, top), (_, bottom) = to_pixels([(low, 1e12), (high, 1e12 * low / high)])
    (left, _), (right, _) = to_pixels([(low, 1e12), (high, 1e12)])
    style = {"rotation": math.degrees(math.atan2(bottom - top, right - left)), "fontsize": 7, "color": "#555555"}
    for budget in budgets:
        along = [n for n in np.geomspace(low * 1.2, high / 6, 30) if 3e9 < budget / 6 / n < 2e13]
        places = [((n, budget / 6 / n), (2, 2), {**style, "rotation_mode": "anchor"}) for n in reversed(along)]
        taken.append(_label(axis, f"{budget:.0e} operations".replace("e+", "e"), places, taken, crowded))
    return figure


def _label(axis, text: str, places: Sequence[tuple], taken: Sequence, crowded: Sequence):
    """Write `text` at the one of `places` (point, offset, style) where it covers least, the first of these; returns its box.

    `taken`: boxes of other labels, `crowded`: points; both in pixels.
    """
    renderer = FigureCanvasAgg(axis.figure).get_renderer()
    best = None
    for point, offset, style in places:
        note = axis.annotate(text, point, textcoords="offset points", xytext=offset, **style)
        note.update_positions(renderer)
        box = Text.get_window_extent(note, renderer)  # of the text alone, without the line to its point
        inside = axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
        covered = sum(1000 for other in taken if box.overlaps(other)) + box.count_contains(crowded) + 500 * (not inside)
        if best is None or covered < best[0]:
            if best:
                best[1].remove()
            best = covered, note, box
        else:
            note.remove()
    return best[2]


def padded_batches(batches: Mapping[str, Sequence[tuple[int, int]]], title: str) -> Figure:
    """Batches as bars of tokens, one row an example: prompt, completion, padding. `batches`: name to (tokens of each) a row."""
    figure = Figure(figsize=(5.2 * len(batches), 1.4 + 0.26 * max(map(len, batches.values()))))
    axes = figure.subplots(1, len(batches), sharex=True, squeeze=False)[0]
    for axis, (name, rows) in zip(axes, batches.items(), strict=True):
        longest = max(map(sum, rows))
        places, left = range(len(rows)), np.zeros(len(rows))
        padding = [longest - sum(row) for row in rows]
        for widths, colour, hatch, label in (
            ([prompt for prompt, _ in rows], SKY, "", "prompt: read"),
            ([completion for _, completion in rows], ORANGE, "", "completion: read and learned"),
            (padding, "white", "////", "padding: computed for nothing"),
        ):
            axis.barh(places, widths, left=left, color=colour, edgecolor=GREY, hatch=hatch, linewidth=0.5, label=label)
            left = left + widths
        share = sum(padding) / (longest * len(rows))
        axis.set_title(f"{name}: {share:.0%} of this batch is padding", fontsize=10)
        axis.set_xlabel("tokens")
        axis.set_yticks([])
        axis.invert_yaxis()
    axes[0].set_ylabel("examples of the batch")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(textwrap.fill(title, 100), fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles, labels, frameon=False, ncols=3, fontsize=8, loc="lower center")
    return figure


def losses_and_endings(runs: Mapping[str, tuple[Sequence[float], float]], before: float, title: str) -> Figure:
    """Training losses, and how sure each model is to end where a reference ends. `runs`: name to (loss of each step, probability)."""
    figure = Figure(figsize=(9.6, 3.6))
    left, right = figure.subplots(1, 2)
    styles = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (VERMILION, "^", "-."))
    for (name, (losses, _)), (colour, marker, line) in zip(runs.items(), styles, strict=False):
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, color=colour, marker=marker, linestyle=line, markersize=4, label=name)
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss (nats a label)")
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    endings = {"before training": before, **{name: ending for name, (_, ending) in runs.items()}}
    colours = [GREY, *(colour for colour, _, _ in styles)][: len(endings)]
    right.barh(range(len(endings)), list(endings.values()), color=colours)
    for place, value in enumerate(endings.values()):
        right.text(value + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
    right.set_yticks(range(len(endings)), [textwrap.fill(name, 22) for name in endings], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 1.15)
    right.set_xticks([0, 0.25, 0.5, 0.75, 1])
    right.set_xlabel("probability of EOS where the reference ends")
    figure.suptitle(textwrap.fill(title, 105), fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="lower center")
    return figure


def memory_by_component(
    panels: Mapping[str, tuple[str, Mapping[str, Mapping[str, float]]]],
    title: str,
    limits: Sequence[float] = (),
    components: Sequence[str] = ("weights", "gradients", "optimizer", "activations"),
) -> Figure:
    """Stacked bars of memory, one panel a model. `panels`: name to (unit, {bar: {component: size}}); no size is no part.

    `limits` are drawn in the last panel: the memory of GPUs, in its unit. `components`, four at most, are what the bars are made of.
    """
    longest = max(len(bars) for _, bars in panels.values())
    figure = Figure(figsize=(6.2 * len(panels), 1.9 + 0.42 * longest))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, (unit, bars)) in zip(axes, panels.items(), strict=True):
        left = np.zeros(len(bars))
        for component, colour in zip(components, (BLUE, ORANGE, GREEN, SKY), strict=False):
            widths = np.nan_to_num([parts.get(component, 0.0) for parts in bars.values()])
            axis.barh(range(len(bars)), widths, left=left, color=colour, edgecolor="white", label=component)
            left = left + widths
        for place, total in enumerate(left):
            axis.text(
                total + 0.01 * left.max(),
                place,
                f"{total:,.0f}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        axis.set_yticks(range(len(bars)), list(bars), fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.14 * left.max())
        axis.set_xlabel(f"memory ({unit})")
        axis.set_title(name, fontsize=10)
    for limit in limits:
        axes[-1].axvline(limit, color=BLACK, linestyle=":", linewidth=1.2, zorder=0)
        axes[-1].annotate(
            f"a GPU of {limit:g} {unit}", (limit, 0.03), xycoords=("data", "axes fraction"), xytext=(3, 0),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(textwrap.fill(title, 110), fontsize=11)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles, labels, frameon=False, ncols=4, fontsize=9, loc="lower center")
    return figure


def strips(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, percent: Sequence[str] = ()) -> Figure:
    """Every value as a point, one row a name, with the mean. `panels`: label of an axis to {name: values}.

    The panels share their names, which may differ in number of values. Axes named in `percent` hold shares.
    """
    names = list(next(iter(panels.values())))
    figure = Figure(figsize=(4.9 * len(panels) + 0.6, 1.2 + 0.75 * len(names)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, rows) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            values = np.asarray(rows[name], dtype=float)
            height = place + 0.3 + 0.3 * (np.arange(len(values)) * 0.618 % 1)  # spread evenly, the same in every run
            axis.plot(values, height, "o", color=BLUE, alpha=0.4, markersize=4, markeredgewidth=0)
            mean = float(np.mean(values))
            axis.plot([mean, mean], [place + 0.22, place + 0.68], color=VERMILION, linewidth=2.5)
            text = f"{mean:.0%}" if label in percent else f"{mean:.0f}"
            axis.annotate(
                text, (mean, place + 0.07), ha="center", va="center", fontsize=8, color=VERMILION,
                annotation_clip=False,
            )  # fmt: skip
        axis.set_xlabel(label)
        if label in percent:
            axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.set_yticks([place + 0.45 for place in range(len(names))], names)
        axis.set_ylim(len(names) - 0.1, -0.12)
        axis.grid(axis="x", alpha=0.3)
    axes[0].plot([], [], "o", color=BLUE, alpha=0.5, label="one dialogue")
    axes[0].plot([], [], color=VERMILION, linewidth=2.5, label="mean")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=2, loc="lower center")
    figure.suptitle(textwrap.fill(title, 58 * len(panels)), fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def true_against_false(
    names: Sequence[str],
    groups: Sequence[str],
    panels: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
) -> Figure:
    """Pairs of scores, one row a case: a true text (circle) and a false one (square), the line blue where the true one is higher.

    `groups`: the kind of each case, cases of a kind next to each other; `panels`: score to (of the true ones, of the false ones).
    """
    figure = Figure(figsize=(4.4 + 3.6 * len(panels), 1.3 + 0.3 * len(names)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    # A row of its own above each kind, for its name.
    places, heads, row = [], {}, 0
    for i, group in enumerate(groups):
        if not i or group != groups[i - 1]:
            heads[group], row = row, row + 1
        places.append(row)
        row += 1
    for axis, (label, (true, false)) in zip(axes, panels.items(), strict=True):
        for place, t, f in zip(places, true, false, strict=True):
            right = t > f
            axis.plot([t, f], [place, place], color=BLUE if right else VERMILION, linestyle="-" if right else "--", linewidth=1.8)  # fmt: skip
        axis.plot(true, places, "o", color=BLUE, markersize=6.5, linestyle="none", label="true paraphrase")
        axis.plot(false, places, "s", color=ORANGE, markeredgecolor=BLACK, markeredgewidth=0.6, markersize=6, linestyle="none", label="false near-copy")  # fmt: skip
        axis.plot([], [], color=BLUE, label="the true one is higher")
        axis.plot([], [], color=VERMILION, linestyle="--", label="the false one is")
        for head in heads.values():
            axis.axhline(head, color=GREY, linewidth=0.6)
        axis.set_xlabel(label)
        axis.set_xlim(min(0.0, *true, *false) - 0.04, 1.04)
        axis.grid(axis="x", alpha=0.3)
    ticks = sorted([*zip(places, names, strict=True), *((head, group.upper()) for group, head in heads.items())])
    axes[0].set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes[0].set_ylim(row - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="lower center")
    figure.suptitle(textwrap.fill(title, 40 + 34 * len(panels)), fontsize=10)
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    return figure


def show_matches(rows: Sequence[tuple[str, Sequence[str], Sequence[bool]]]) -> None:
    """Display texts word by word, matched words on colour and in bold. `rows`: (what it is, its words, which of them match)."""
    from html import escape

    from IPython.display import display

    def shown(word: str, found: bool) -> str:
        style = f"background:{ORANGE};color:black;font-weight:bold" if found else f"border-bottom:1px solid {GREY}"
        return f'<span style="{style};padding:0 3px;margin-right:4px">{escape(word)}</span>'

    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left;font-family:monospace">{"".join(map(shown, words, found))}</td></tr>'
        for name, words, found in rows
    )
    text = "\n".join(
        f"{name}: " + " ".join(f"[{w}]" if f else w for w, f in zip(words, found, strict=True))
        for name, words, found in rows
    )
    display({"text/html": f"<table>{body}</table>", "text/plain": text}, raw=True)


def quality_against_parameters(points: Mapping[str, tuple[int, float, str]], base_loss: float, title: str) -> Figure:
    """Held-out loss (nats a token) over the number of trained parameters, on a logarithmic axis.

    `points`: method to (trained parameters, loss, family). The dotted line is the untrained model.
    """
    figure = Figure(figsize=(7.2, 4))
    axis = figure.subplots()
    looks = dict(
        zip(
            dict.fromkeys(kind for *_, kind in points.values()),
            zip((BLUE, ORANGE, GREEN, BLACK), "osD^", strict=True),
            strict=False,
        )
    )
    for kind, (colour, mark) in looks.items():
        members = [(n, loss) for n, loss, k in points.values() if k == kind]
        axis.scatter(*zip(*members, strict=True), color=colour, marker=mark, s=45, label=kind, zorder=3)
    axis.axhline(base_loss, color=GREY, linestyle=":", label="base model")
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.margins(x=0.15, y=0.15)
    axis.set_title(textwrap.fill(title, 84), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="best")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    centres = axis.transData.transform([(n, loss) for n, loss, _ in points.values()])
    taken: list = []
    for name, (n, loss, kind) in points.items():
        style = {"fontsize": 8, "color": looks[kind][0]}
        places = [
            ((n, loss), offset, style | {"ha": side})
            for offset, side in (
                *(((7, 3), "left"), ((7, -11), "left"), ((-7, 3), "right"), ((-7, -11), "right")),
                *(((0, -16), "center"), ((0, 8), "center")),
            )
        ]
        taken.append(_label(axis, name, places, taken, centres))
    return figure


def prompt_lengths(
    lengths: Sequence[int], curves: Mapping[str, tuple[float, Sequence[float], float]], title: str
) -> Figure:
    """Held-out loss over the number of learned vectors, a colour a model: after Lester et al. 2021, figure 3a.

    `curves`: name to (loss untuned, loss with a prompt of each of `lengths`, loss after full fine-tuning), in nats a token.
    """
    figure = Figure(figsize=(6.4, 4))
    axis = figure.subplots()
    for (name, (untuned, tuned, full)), colour in zip(curves.items(), (BLUE, VERMILION, GREEN, BLACK), strict=False):
        axis.plot(lengths, tuned, "o-", color=colour, label=f"{name}: learned prompt")
        axis.axhline(untuned, color=colour, linestyle=":", label="no tuning")
        axis.axhline(full, color=colour, linestyle="--", label="full fine-tuning")
    axis.set_xscale("log")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel("learned vectors in front of the text")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.set_title(textwrap.fill(title, 72), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def by_clusters(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, tuple[float, float]]]]],
    labels: Sequence[str],
    title: str,
    chance: Mapping[str, float] | None = None,
    xlabel: str = "clusters trained on",
) -> Figure:
    """Shares with intervals by number of task clusters. `panels`: axis label to {series: one (share, (low, high)) a label}.

    `chance` draws, in the first panel, what guessing gets in a series, dotted in its colour. The first label is joined to the
    others by no line where it is no number: it is a model that was not trained here.
    """
    figure = Figure(figsize=(4.9 * len(panels), 4.0))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (ylabel, series) in zip(axes, panels.items(), strict=True):
        for k, ((name, values), colour, mark) in enumerate(
            zip(series.items(), (BLUE, ORANGE, GREEN), ("o", "s", "^"), strict=False)
        ):
            places = [i + (k - (len(series) - 1) / 2) * 0.14 for i in range(len(labels))]
            shares = [share for share, _ in values]
            errors = [
                [max(0.0, share - low) for share, (low, _) in values],
                [max(0.0, high - share) for share, (_, high) in values],
            ]
            axis.errorbar(places, shares, yerr=errors, fmt=mark, color=colour, capsize=4, linewidth=1.5, label=name)
            numbered = [i for i, label in enumerate(labels) if label.isdigit()]
            axis.plot(
                [places[i] for i in numbered], [shares[i] for i in numbered], color=colour, linewidth=1, alpha=0.6
            )
            if axis is axes[0] and chance and name in chance:
                axis.axhline(chance[name], color=colour, linestyle=":", linewidth=1.5)
        axis.set_xticks(range(len(labels)), [textwrap.fill(label, 9) for label in labels])
        axis.set_ylim(0, 1)
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.grid(axis="y", alpha=0.3)
    if chance:
        axes[0].plot([], [], color=GREY, linestyle=":", label="guessing, in the same colour")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(textwrap.fill(title, 46 * len(panels)), fontsize=10)
    figure.tight_layout()
    return figure


def helm_report(
    rows: Sequence[tuple[str, str, Mapping[str, float]]],
    columns: Mapping[str, int],
    title: str,
    signed: Sequence[str] = (),
) -> Figure:
    """A heat map of scenarios by metrics. `rows`: (scenario, model or baseline, {column: value}); absent values stay blank.

    `columns`: column to 1 where more is better, -1 where less is, 0 where neither is. Each column is scaled on its own, its best value darkest;
    where all are the same it is pale. Values of the columns `signed` are written with their sign.
    """
    names = list(columns)
    values = np.array([[float(row.get(name, np.nan)) for name in names] for _, _, row in rows])
    shade = np.full_like(values, np.nan)
    for j, name in enumerate(names):
        column = values[:, j] * columns[name]
        known = column[~np.isnan(column)]
        if known.size:
            spread = np.ptp(known)
            shade[:, j] = (column - known.min()) / spread * 0.75 if spread else column * 0
    figure = Figure(figsize=(3.0 + 1.02 * len(names), 1.9 + 0.31 * len(rows)))
    axis = figure.subplots()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="white")
    axis.imshow(np.ma.masked_invalid(shade), cmap=colours, vmin=-0.08, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = f"{value:.0f}" if abs(value) >= 10 else f"{value:+.2f}" if names[j] in signed else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if shade[i, j] > 0.6 else BLACK)
    axis.set_xticks(range(len(names)), [textwrap.fill(name, 13) for name in names], fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [f"{scenario}: {name}" for scenario, name, _ in rows], fontsize=9)
    axis.tick_params(length=0)
    for i in range(1, len(rows)):
        if rows[i][0] != rows[i - 1][0]:
            axis.axhline(i - 0.5, color=BLACK, linewidth=1)
    axis.set_xlabel(
        "metric (shares between 0 and 1 unless a unit is named; darker is better within a column)", fontsize=9
    )
    axis.set_title(textwrap.fill(title, 110), fontsize=10, pad=12)
    figure.tight_layout()
    return figure


def changes_by_group(
    changes: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]], title: str, ylabel: str
) -> Figure:
    """Changes with intervals around a line at zero. `changes`: series to {label: (mean, (low, high))}."""
    labels = list(next(iter(changes.values())))
    figure = Figure(figsize=(2.4 + 1.5 * len(labels), 3.8))
    axis = figure.subplots()
    looks = zip((BLUE, ORANGE, GREEN, VERMILION, BLACK, GREY, SKY), ("o", "s", "^", "D", "v", "P", "X"), strict=True)
    width = min(0.22, 0.8 / len(changes))
    for k, ((name, values), (colour, mark)) in enumerate(zip(changes.items(), looks, strict=False)):
        places = [i + (k - (len(changes) - 1) / 2) * width for i in range(len(labels))]
        means = [values[label][0] for label in labels]
        errors = [
            [max(0.0, mean - values[label][1][0]) for mean, label in zip(means, labels, strict=True)],
            [max(0.0, values[label][1][1] - mean) for mean, label in zip(means, labels, strict=True)],
        ]
        axis.errorbar(places, means, yerr=errors, fmt=mark, color=colour, capsize=4, linewidth=2, label=name)
    axis.axhline(0, color=BLACK, linewidth=1)
    for i in range(1, len(labels)):
        axis.axvline(i - 0.5, color=GREY, linewidth=0.5)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_ylabel(ylabel)
    axis.set_title(textwrap.fill(title, 72), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    return figure


def reliability(groups: Mapping[str, Sequence[tuple[float, float, int]]], title: str) -> Figure:
    """Accuracy against confidence of groups of items, one series a model. `groups`: model to (confidence, accuracy, items)."""
    figure = Figure(figsize=(4.8, 4.2))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=BLACK, linestyle=":", label="calibrated")
    for (name, points), colour, mark in zip(
        groups.items(), (BLUE, ORANGE, GREEN, VERMILION), ("o", "s", "^", "D"), strict=False
    ):
        confidence, accuracy, _ = zip(*points, strict=True)
        axis.plot(confidence, accuracy, color=colour, marker=mark, label=name)
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("mean confidence of a group of items (probability)")
    axis.set_ylabel("share answered right")
    axis.set_title(textwrap.fill(title, 56), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def table(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Display a table as HTML; every cell is shown as text."""
    from html import escape

    from IPython.display import HTML, display

    head = "".join(f'<th scope="col" style="text-align:left">{escape(str(name))}</th>' for name in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left;vertical-align:top">{escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    display(HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"))


def show_labels(tokenizer, example: Mapping[str, Sequence[int]]) -> None:
    """Display an example's tokens, those that have a label on colour; for an encoder-decoder input and labels apart."""
    from html import escape

    from IPython.display import HTML, display

    def spans(token_ids: Sequence[int], learned: Sequence[bool]) -> str:
        pieces = []
        for token, is_learned in zip(token_ids, learned, strict=True):
            text = escape(tokenizer.decode([token])).replace("\n", "&#9166;<br>") or "&nbsp;"
            colour = f"background:{ORANGE};color:black" if is_learned else f"border-bottom:1px solid {GREY}"
            pieces.append(f'<span style="{colour};margin-right:1px">{text}</span>')
        return "".join(pieces)

    inputs, labels = example["input_ids"], example["labels"]
    if len(inputs) == len(labels):
        body = spans(inputs, [label >= 0 for label in labels])
    else:
        body = spans(inputs, [False] * len(inputs)) + "<br><b>&rarr;</b> " + spans(labels, [True] * len(labels))
    display(HTML(f'<div style="font-family:monospace;line-height:1.7">{body}</div>'))


# --- week 3


def ppo_loop(title: str) -> Figure:
    """The four roles of PPO on a language model and what passes between them: trained ones orange, frozen ones white."""
    figure = Figure(figsize=(11.5, 4.6))
    axis = figure.subplots()
    boxes = {
        "prompts": (0.6, 2.0, "prompts", None),
        "policy": (2.7, 2.0, "POLICY\nwrites, learns", ORANGE),
        "completions": (5.0, 2.0, "completions", None),
        "reward": (7.3, 3.3, "REWARD\nreads the text,\ngives one number", "white"),
        "reference": (7.3, 2.0, "REFERENCE\nhow likely was\neach token before?", "white"),
        "value": (7.3, 0.7, "VALUE\nwhat score is\nto be expected?", ORANGE),
        "advantage": (10.3, 2.0, "advantage\nof each token", None),
    }
    for x, y, text, colour in boxes.values():
        box = {"boxstyle": "round,pad=0.45", "edgecolor": BLACK, "facecolor": colour} if colour else None
        axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box, zorder=3)
    arrows = [
        ((1.1, 2.0), (1.9, 2.0), "", (0, 0)),
        ((3.5, 2.0), (4.3, 2.0), "", (0, 0)),
        ((5.7, 2.15), (6.35, 3.1), "", (0, 0)),
        ((5.7, 2.0), (6.3, 2.0), "", (0, 0)),
        ((5.7, 1.85), (6.35, 0.9), "", (0, 0)),
        ((8.2, 3.3), (10.0, 2.4), "score, on the last token", (0.35, 0.32)),
        ((8.4, 2.0), (9.5, 2.0), "KL, each token", (0, 0.14)),
        ((8.2, 0.7), (10.0, 1.6), "values", (0.15, -0.3)),
    ]
    for start, end, text, (right, up) in arrows:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": BLACK})
        axis.text((start[0] + end[0]) / 2 + right, (start[1] + end[1]) / 2 + up, text, fontsize=8.5, ha="center")
    back = {"arrowstyle": "-|>", "color": VERMILION, "connectionstyle": "angle,angleA=-90,angleB=0,rad=12"}
    axis.plot([10.3, 10.3], [1.6, -0.15], color=VERMILION, linewidth=1.2)
    axis.annotate(
        "", (2.7, 1.5), (10.3, -0.15), arrowprops=back | {"connectionstyle": "angle,angleA=0,angleB=90,rad=12"}
    )
    axis.text(
        5.6, -0.42, "update: good tokens become likelier, within the clip", color=VERMILION, fontsize=9.5, ha="center"
    )
    axis.set(xlim=(0, 11.2), ylim=(-0.6, 4.0))
    axis.axis("off")
    axis.set_title(textwrap.fill(title, 110), fontsize=11)
    figure.tight_layout()
    return figure


def bradley_terry_toy(
    differences: Sequence[float],
    shares: Sequence[float],
    true: Sequence[float],
    found: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Left, the share of comparisons won by difference of quality on the sigmoid; right, the scores found against the true ones."""
    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    x = np.linspace(-4, 4, 200)
    left.plot(x, 1 / (1 + np.exp(-x)), color=BLACK, label="sigmoid of the difference")
    left.plot(differences, shares, "o", color=BLUE, label="counted")
    left.set_xlabel("difference of quality")
    left.set_ylabel("share of comparisons won")
    ends = [min(true) - 0.6, max(true) + 0.6]
    right.plot(ends, ends, color=BLACK, linestyle=":", label="found = true")
    for (name, scores), colour, mark in zip(found.items(), (ORANGE, BLUE, GREEN), ("s", "o", "^"), strict=False):
        right.plot(true, scores, mark, color=colour, label=name)
    right.set_xlabel("true quality")
    right.set_ylabel("score found")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


def kl_terms(
    tokens: Sequence[str],
    distributions: Mapping[str, Sequence[float]],
    terms: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Left, two distributions over a few tokens; right, what each token adds to KL, for each direction in `terms`."""
    figure = Figure(figsize=(10, 3.4))
    for axis, data, ylabel in zip(
        figure.subplots(1, 2), (distributions, terms), ("probability", "contribution to KL (nats)"), strict=True
    ):
        for k, ((name, values), colour, hatch) in enumerate(zip(data.items(), (BLUE, ORANGE), ("", "//"), strict=True)):
            places = [i + (k - 0.5) * 0.36 for i in range(len(tokens))]
            axis.bar(places, values, 0.34, color=colour, edgecolor=BLACK, hatch=hatch, label=name)
        axis.axhline(0, color=BLACK, linewidth=0.8)
        axis.set_ylim(top=1.3 * max(map(max, data.values())))
        axis.set_xticks(range(len(tokens)), tokens)
        axis.set_xlabel("token")
        axis.set_ylabel(ylabel)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


def two_directions(reference: Sequence[float], fits: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A distribution with two peaks, and the single peaks that come nearest to it, one a panel."""
    figure = Figure(figsize=(10, 3.2))
    for axis, (name, fit), colour in zip(
        figure.subplots(1, len(fits), sharey=True), fits.items(), (BLUE, VERMILION), strict=True
    ):
        axis.bar(range(len(reference)), reference, 1.0, color=GREY, alpha=0.6, label="reference")
        axis.step(range(len(fit)), fit, where="mid", color=colour, linewidth=2, label="policy")
        axis.set_xlabel("token")
        axis.set_title(name, fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("probability")
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


def kl_estimators(
    means: Mapping[str, Sequence[float]],
    exact: float,
    distances: Sequence[float],
    bias: Mapping[str, Sequence[float]],
    spread: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Estimators of KL: how their `means` over samples lie around `exact`; bias and spread of one sample by distance.

    `bias` and `spread` are relative to the KL at each of `distances` (nats).
    """
    figure = Figure(figsize=(12.5, 3.7))
    first, second, third = figure.subplots(1, 3)
    styles = zip(means, (BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=True)
    for name, colour, line in styles:
        values, count = np.unique(np.round(means[name], 6), return_counts=True)
        first.plot(values, count / count.sum(), color=colour, linestyle=line, label=name)
        first.fill_between(values, 0, count / count.sum(), color=colour, alpha=0.2)
        second.plot(distances, bias[name], color=colour, linestyle=line, linewidth=2, label=name)
        third.plot(distances, spread[name], color=colour, linestyle=line, linewidth=2, label=name)
    first.axvline(exact, color=BLACK, linestyle=":", label="exact")
    first.set_xlabel("estimate (nats a token)")
    first.set_ylabel("share of the repeats")
    second.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    second.set_ylabel("mean estimate / KL")
    third.set_ylabel("standard deviation of a sample / KL")
    third.set_yscale("log")
    for axis in (second, third):
        axis.set_xscale("log")
        axis.set_xlabel("KL (nats a token)")
    for axis in (first, second, third):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 130), fontsize=10)
    figure.tight_layout()
    return figure


def running_estimates(runs: Mapping[str, tuple[Sequence[float], float]], title: str) -> Figure:
    """Running mean of an estimate by number of samples, with the true value of what was sampled. `runs`: name to (values, truth)."""
    figure = Figure(figsize=(7.6, 3.8))
    axis = figure.subplots()
    for (name, (values, truth)), colour, line in zip(
        runs.items(), (BLUE, VERMILION, GREEN), ("-", "--", "-."), strict=False
    ):
        number = np.arange(1, len(values) + 1)
        axis.plot(number, np.cumsum(values) / number, color=colour, linestyle=line, label=name)
        axis.axhline(truth, color=colour, linewidth=0.8, linestyle=":")
    axis.axhline(0, color=BLACK, linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("tokens sampled")
    axis.set_ylabel("mean of k1 (nats a token)")
    axis.set_title(textwrap.fill(title, 80), fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def clipping(
    ratios: Sequence[float],
    losses: Mapping[str, tuple[Sequence[float], Sequence[bool]]],
    values: Sequence[float],
    value: tuple[Sequence[float], Sequence[bool]],
    clip_range: float,
    title: str,
) -> Figure:
    """Left and middle, policy loss by ratio; right, value loss by value. Each is (loss, whether its gradient is zero)."""
    figure = Figure(figsize=(12.5, 3.6))
    axes = figure.subplots(1, 3)
    panels = [(ratios, curve, name, "ratio new / old", 1.0) for name, curve in losses.items()]
    panels.append((values, value, "value: old 0, return 2", "new value", 0.0))
    for axis, (x, (loss, flat), name, xlabel, centre) in zip(axes, panels, strict=True):
        loss, flat = np.asarray(loss, float), np.asarray(flat, bool)
        axis.plot(x, loss, color=BLUE, linewidth=2, label="loss")
        axis.plot(x, np.where(flat, loss, np.nan), color=VERMILION, linewidth=4, label="gradient 0")
        axis.axvspan(centre - clip_range, centre + clip_range, color=GREY, alpha=0.2, label="clip range")
        axis.set_xlabel(xlabel)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("loss of one token")
    figure.suptitle(textwrap.fill(title, 130), fontsize=10)
    figure.tight_layout()
    return figure


def advantages_by_lambda(advantages: Mapping[str, Sequence[float]], title: str) -> Figure:
    """The advantage of each token of one completion, one line for each lambda."""
    figure = Figure(figsize=(7.2, 3.6))
    axis = figure.subplots()
    looks = zip((BLUE, GREEN, ORANGE, VERMILION), ("o", "^", "s", "D"), ("-", "--", "-.", ":"), strict=True)
    for (name, values), (colour, mark, line) in zip(advantages.items(), looks, strict=False):
        axis.plot(range(1, len(values) + 1), values, color=colour, marker=mark, linestyle=line, label=name)
    axis.axhline(0, color=BLACK, linewidth=0.8)
    axis.set_xticks(range(1, len(values) + 1))
    axis.set_xlabel("token of the completion (the last one gets the score)")
    axis.set_ylabel("advantage")
    axis.set_title(textwrap.fill(title, 76), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def one_token_optima(
    words: Sequence[str],
    reference: Sequence[float],
    found: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    objectives: Mapping[str, tuple[Sequence[float], float]],
    title: str,
) -> Figure:
    """Distributions over `words`: reference, closed-form optimum and what PPO found, one panel a coefficient; last, the objective.

    `found`: name to (optimum, found); `objectives`: the same name to (objective at each step, its largest possible value).
    """
    figure = Figure(figsize=(3.6 * (len(found) + 1), 3.9))
    *panels, last = figure.subplots(1, len(found) + 1)
    places = np.arange(len(words))
    for axis, (name, (optimum, learned)) in zip(panels, found.items(), strict=True):
        axis.bar(places, reference, 0.8, color=GREY, alpha=0.45, label="reference")
        axis.plot(places, optimum, "_", color=BLACK, markersize=13, markeredgewidth=2.5, label="optimum, closed form")
        axis.plot(places, learned, "o", color=ORANGE, markeredgecolor=BLACK, label="found by PPO")
        axis.set_xticks(places, words, rotation=60, ha="right", fontsize=8)
        axis.set_ylim(0, 1.12 * max(max(reference), *(max(p) for pair in found.values() for p in pair)))
        axis.set_title(name, fontsize=10)
    panels[0].set_ylabel("probability")
    panels[0].legend(frameon=False, fontsize=8)
    looks = zip((BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=True)
    for (name, (values, best)), (colour, line) in zip(objectives.items(), looks, strict=False):
        last.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, label=name)
        last.axhline(best, color=colour, linewidth=0.9, linestyle=":")
    last.set_xlabel("PPO step")
    last.set_ylabel("objective: reward - beta KL")
    last.set_title("dotted: the best there is", fontsize=10)
    last.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.4))
    last.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 130), fontsize=10)
    figure.tight_layout()
    return figure


def controller_curves(kl: Sequence[float], kl_coef: Sequence[float], target: float, due: float, title: str) -> Figure:
    """KL by PPO step with its target, and the coefficient with the value that is due in theory, side by side."""
    figure = Figure(figsize=(9.5, 3.4))
    for axis, values, line, name, ylabel, colour in zip(
        figure.subplots(1, 2), (kl, kl_coef), (target, due), ("target", "coefficient whose optimum has the target's KL"),
        ("KL (nats a sequence)", "coefficient"), (BLUE, ORANGE), strict=True,
    ):  # fmt: skip
        axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=2)
        axis.axhline(line, color=BLACK, linestyle=":", label=name)
        axis.set_xlabel("PPO step")
        axis.set_ylabel(ylabel)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    figure.tight_layout()
    return figure


# --- week 3, sections 5 to 9


def before_and_after(measures: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]], title: str) -> Figure:
    """One panel a measure, one point with its interval a model. `measures`: axis label to {model: (mean, (low, high))}."""
    figure = Figure(figsize=(2.4 * len(measures), 3.4))
    for axis, (label, models) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True
    ):
        for place, ((colour, marker), (mean, (low, high))) in enumerate(
            zip(GROUP_STYLES, models.values(), strict=False)
        ):
            errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axis.errorbar([place], [mean], yerr=errors, fmt=marker, color=colour, capsize=5, linewidth=2)
            axis.annotate(f"{mean:.3g}", (place, mean), textcoords="offset points", xytext=(7, -3), fontsize=8)
        axis.set_xticks(range(len(models)), list(models), rotation=35, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(models) - 0.1)
        axis.margins(y=0.15)
        axis.set_ylabel(textwrap.fill(label, 34), fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(textwrap.fill(title, 30 * len(measures)), fontsize=10)
    figure.tight_layout()
    return figure


def reward_against_kl(
    runs: Mapping[str, tuple[float, float, tuple[float, float]]],
    yardstick: Sequence[tuple[float, float]],
    title: str,
    ylabel: str = "reward (standard deviations)",
) -> Figure:
    """What a nat of KL buys: each run's end as (KL, reward, interval of the reward), and best-of-n's points (KL, reward) as a line."""
    figure = Figure(figsize=(7.2, 4.2))
    axis = figure.subplots()
    axis.plot(*zip(*yardstick, strict=True), color=GREY, marker=".", label="best of n from the reference")
    styles = [*GROUP_STYLES, (SKY, "v"), (GREY, "*")]
    for (name, (kl, reward, (low, high))), (colour, marker) in zip(runs.items(), styles, strict=False):
        errors = [[max(0.0, reward - low)], [max(0.0, high - reward)]]
        axis.errorbar([kl], [reward], yerr=errors, fmt=marker, color=colour, markersize=8, capsize=4, label=name)
    axis.set_xlabel("KL from the reference (nats a sequence)")
    axis.set_ylabel(ylabel)
    axis.set_title(textwrap.fill(title, 80), fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def failures_beside_healthy(
    panels: Mapping[str, tuple[str, Sequence[float], Sequence[float]]], title: str, columns: int = 3
) -> Figure:
    """One panel a failure. `panels`: its name to (metric, values of the failing run by step, values of the healthy one)."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, (metric, failing, healthy)) in zip(axes, panels.items(), strict=False):
        axis.plot(range(1, len(healthy) + 1), healthy, color=BLUE, marker=".", label="healthy")
        axis.plot(range(1, len(failing) + 1), failing, color=VERMILION, marker="x", linestyle="--", label="failing")
        axis.set_title(textwrap.fill(name, 40), fontsize=9)
        axis.set_ylabel(metric, fontsize=8)
        axis.set_xlabel("PPO step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(textwrap.fill(title, 32 * columns), fontsize=10)
    figure.tight_layout()
    return figure
