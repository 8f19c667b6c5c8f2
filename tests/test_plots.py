"""Figures and views: what a reader gets where somebody watches and where nobody does, and labels that cover nothing."""

import json
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from utils import plots
from utils.lab import LabError
from utils.pretraining import mask_tokens
from utils.scaling import TRAINING_RUNS, kaplan_optimal

WORDS = ["Tom", "</script>", '"ate"', "&", "⏎"]
MAPS = {"layer 0, head 1": np.tril(np.ones((5, 5)) / np.arange(1, 6)[:, None]), "layer 1, head 0": np.eye(5)}


@pytest.fixture
def shown(monkeypatch):
    """What the code displays, in order."""
    things = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **_: things.append(thing))
    return things


@pytest.mark.parametrize(("nobody", "kind"), [(True, "Image"), (False, "HTML")])
def test_heads_are_a_picture_when_nobody_watches_and_a_page_to_point_at_otherwise(monkeypatch, shown, nobody, kind):
    monkeypatch.setattr("utils.lab.headless", lambda: nobody)
    plots.show_attention(MAPS, WORDS, "What heads look at", alt="two heads over five words")
    assert [type(thing).__name__ for thing in shown] == [kind]
    if nobody:
        assert shown[0].alt == "two heads over five words"


def test_the_page_fetches_nothing_keeps_text_apart_from_code_and_holds_the_weights():
    page = plots.attention_view(MAPS, WORDS, "Heads & <tails>")
    assert "http" not in page
    assert page.count("</script>") == 1, "a token ends the script"
    assert "Heads &amp; &lt;tails&gt;" in page
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["tokens"] == WORDS
    levels = re.search(r'const levels = "(.*)"', page)[1]
    for name, weights in MAPS.items():
        back = np.array([(levels.index(c) / 63) ** 2 for c in data["heads"][name]]).reshape(5, 5)
        assert np.abs(back - weights).max() < 0.02


def test_a_page_too_large_for_a_notebook_says_what_to_do():
    many = {f"head {i}": np.ones((120, 120)) / 120 for i in range(20)}
    with pytest.raises(LabError, match=r"20 heads over 120 tokens.*give fewer heads or a shorter text"):
        plots.attention_view(many, ["word"] * 120, "too much")


def test_shown_source_has_neither_docstring_nor_checks_and_runs_as_it_stands(shown):
    plots.show_source(mask_tokens)
    source = shown[0]["text/plain"]
    assert '"""' not in source
    assert "_check" not in source
    assert "dice < 0.8" in source
    compile(source, "shown", "exec")


def covered(figure):
    """Pairs of labels that lie on each other."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [
        (note.get_text(), Text.get_window_extent(note, renderer))
        for axis in figure.axes
        for note in axis.texts
        if isinstance(note, Annotation)
    ]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[i + 1 :] if one.overlaps(two)]


def test_no_model_s_name_covers_another():
    models = {name: (run.parameters, run.tokens) for name, run in TRAINING_RUNS.items()}
    advice = {"Kaplan 2020": np.array([kaplan_optimal(c) for c in np.logspace(17, 27, 60)]).T}
    assert covered(plots.tokens_against_parameters(models, advice, [1e21, 1e23], "title")) == []


def test_no_setting_s_name_covers_another():
    names = ["greedy", "greedy, penalty 1.2", "beam search 4", "min-p 0.1", "top-p 0.8", "top-k 20"]
    quality = {name: (0.2 + i * 0.002, (0.17, 0.24)) for i, name in enumerate(names)}
    diversity = {name: 0.9 + i * 0.004 for i, name in enumerate(names)} | {"greedy": 0.2}
    assert covered(plots.quality_against_diversity(quality, diversity, "title")) == []


def points(axis):
    return [
        (float(x), float(y)) for line in axis.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def test_runs_and_the_yardstick_stand_where_their_kl_and_reward_are():
    figure = plots.reward_against_kl(
        {"a": (2.0, 0.5, (0.4, 0.7)), "b": (4.0, 0.1, (0.0, 0.2))}, [(0.0, 0.0), (0.2, 0.3)], "title"
    )
    assert {(2.0, 0.5), (4.0, 0.1), (0.0, 0.0), (0.2, 0.3)} <= set(points(figure.axes[0]))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(names) == ["a", "b", "best of n from the reference"]


def test_each_measure_has_a_panel_with_every_model_at_its_mean():
    figure = plots.before_and_after(
        {"reward": {"SFT": (-0.5, (-0.6, -0.4)), "PPO": (0.2, (0.1, 0.3))}, "words": {"SFT": (27.0, (26.0, 28.0)), "PPO": (24.0, (23.0, 25.0))}},
        "title",
    )  # fmt: skip
    assert [axis.get_ylabel() for axis in figure.axes] == ["reward", "words"]
    assert {(0.0, -0.5), (1.0, 0.2)} <= set(points(figure.axes[0]))
    assert {(0.0, 27.0), (1.0, 24.0)} <= set(points(figure.axes[1]))
    assert covered(figure) == []


def test_a_failure_that_stops_early_is_drawn_as_far_as_it_went():
    figure = plots.failures_beside_healthy(
        {"a": ("kl", [1.0], [0.1, 0.2]), "b": ("score", [3.0, 4.0], [5.0, 6.0])}, "title"
    )
    assert {(1.0, 1.0), (1.0, 0.1), (2.0, 0.2)} == set(points(figure.axes[0]))
    assert figure.axes[1].get_ylabel() == "score"
    assert not figure.axes[2].axison
