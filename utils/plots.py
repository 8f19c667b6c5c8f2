"""Every figure of the labs, one function each. Colours: Okabe and Ito's palette, told apart by colour-blind readers."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # figures are shown as images with alt text; no window, no backend of the notebook's

from matplotlib.figure import Figure

BLACK, ORANGE, BLUE, GREEN, VERMILION, GREY = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#999999"


def show(figure: Figure, alt: str) -> None:
    """Display a figure in the notebook with `alt` as its text for readers who cannot see it."""
    from IPython.display import Image, display

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    display(Image(data=image.getvalue(), format="png", alt=alt))


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
    order = sorted(quality, key=lambda name: diversity[name])
    for place, name in enumerate(order):
        mean, (low, high) = quality[name]
        axis.errorbar(
            diversity[name], mean, yerr=[[mean - low], [high - mean]], fmt="o", color=BLUE, capsize=3, linewidth=1.2
        )
        # The names stand above and below by turns, since neighbouring points crowd.
        above = place % 2 == 0
        axis.annotate(
            name,
            (diversity[name], high if above else low),
            textcoords="offset points",
            xytext=(0, 5 if above else -5),
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            rotation=20,
        )
    axis.margins(x=0.1, y=0.2)
    axis.set_xlabel("diversity: different word pairs among all word pairs of a dialogue's samples (distinct-2)")
    axis.set_ylabel("ROUGE-1, mean of the samples")
    axis.set_title(textwrap.fill(title, 90), fontsize=10)
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
