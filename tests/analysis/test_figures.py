"""Figures, by the numbers that they draw."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from hpcsngd_analysis import figures
from hpcsngd_analysis.drawing import PALETTE, style
from hpcsngd_analysis.figures import MANY, Curve, Curves, band_figure, bands, curves, figure
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import Runs, load
from tests.analysis.runs import EXAMPLES, make_run


@pytest.fixture(scope="module")
def examples() -> Runs:
    return load([EXAMPLES], ["train", "eval"])


def line(data: Curves, run: str, split: str) -> Curve:
    (found,) = [curve for curve in data.lines if (curve.run, curve.split) == (run, split)]
    return found


def trace(drawing: go.Figure, position: int, split: str) -> go.Scatter:
    (found,) = [each for each in drawing.data if each.meta == {"run": position, "split": split}]
    return found


def test_accuracy_against_epoch(examples: Runs) -> None:
    data = curves(examples, "accuracy", "epoch")
    test = line(data, "complete", "test")
    assert test.x.tolist() == [1.0, 2.0, 3.0]
    assert test.y.tolist() == [0.6, 0.85, 0.825]
    train = line(data, "resumed", "train")
    assert train.x.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert train.y.tolist() == [0.4, 0.75, 0.8, 0.9, 0.925, 0.95]
    assert (data.x_title, data.y_title) == ("epoch", "accuracy")


def test_every_run_with_rows_is_drawn_training_first(examples: Runs) -> None:
    drawn = [(curve.run, curve.split) for curve in curves(examples, "loss", "epoch").lines]
    assert drawn == [
        ("complete", "train"),
        ("failed", "train"),
        ("resumed", "train"),
        ("running", "train"),
        ("complete", "test"),
        ("resumed", "test"),
    ]


def test_loss_against_training_time(examples: Runs) -> None:
    data = curves(examples, "loss", "train_s")
    test = line(data, "resumed", "test")
    assert test.x.tolist() == [3.0, 6.0, 9.0]
    assert test.y.tolist() == [0.8, 0.5, 0.3]
    failed = line(data, "failed", "train").y
    assert failed[0] == 300.0
    assert math.isnan(failed[1])
    assert data.x_title == "training time (s)"


def test_accuracy_against_samples_and_charged_time(examples: Runs) -> None:
    samples = line(curves(examples, "accuracy", "samples"), "complete", "test")
    train = examples.tables["train"].query("run == 'complete'")
    assert samples.x[-1] == train["samples"].iloc[-1]
    charged = curves(examples, "accuracy", "charged_s")
    assert charged.x_title == "charged time (s)"
    trained = curves(examples, "accuracy", "train_s")
    for each in charged.lines:
        assert (each.x >= line(trained, each.run, each.split).x[-len(each.x) :]).all()


def test_the_loss_axis_is_logarithmic_where_a_run_diverges(examples: Runs, tmp_path: Path) -> None:
    diverging = curves(examples, "loss", "epoch")  # from 300 down to 0.2
    assert diverging.decades == pytest.approx(math.log10(300 / 0.2))
    assert diverging.y_title == "loss (log scale)"
    assert figure(diverging, examples).layout.yaxis.type == "log"
    calm = load([EXAMPLES / "complete"], ["train", "eval"])  # from 2.1 down to 0.4
    assert figure(curves(calm, "loss", "epoch"), calm).layout.yaxis.type == "linear"
    make_run(
        tmp_path, tables={"train": [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 0.0))]}
    )
    with_zero = load([tmp_path], ["train", "eval"])
    assert curves(with_zero, "loss", "epoch").decades == 0.0


@pytest.mark.parametrize(
    ("train_s", "title", "x"),
    [
        (119.0, "training time (s)", 119.0),
        (120.0, "training time (min)", 2.0),
        (7199.0, "training time (min)", 7199 / 60),
        (9000.0, "training time (h)", 2.5),
    ],
)
def test_time_is_in_the_unit_that_suits_the_longest_run(
    tmp_path: Path, train_s: float, title: str, x: float
) -> None:
    make_run(tmp_path, tables={"train": [{"step": 1, "train_s": 1.0}, {"step": 2, "train_s": train_s}]})
    data = curves(load([tmp_path]), "loss", "train_s")
    assert data.x_title == title
    assert data.lines[0].x[-1] == pytest.approx(x)


def test_each_split_is_a_curve_of_its_own(tmp_path: Path) -> None:
    rows = [{"step": 1, "split": "test", "loss": 2.0}, {"step": 1, "split": "validation", "loss": 3.0}]
    make_run(tmp_path, tables={"eval": rows})
    data = curves(load([tmp_path]), "loss", "epoch")
    assert {curve.split: curve.y.tolist() for curve in data.lines} == {"test": [2.0], "validation": [3.0]}


def test_the_figure_draws_the_curves(examples: Runs) -> None:
    data = curves(examples, "accuracy", "train_s")
    drawing = figure(data, examples)
    assert len(drawing.data) == len(data.lines) == 6
    drawn = trace(drawing, 2, "test")
    assert list(drawn.x) == [3.0, 6.0, 9.0]
    assert list(drawn.y) == [0.8, 0.925, 0.975]
    assert drawn.name == "resumed, test"
    assert drawing.layout.xaxis.title.text == "training time (s)"
    assert drawing.layout.yaxis.title.text == "accuracy"
    assert "fullData.name" in drawn.hovertemplate


def test_a_run_has_one_color_and_marker_in_all_figures(examples: Runs) -> None:
    drawings = [
        figure(curves(examples, metric, clock), examples)
        for metric in ("accuracy", "loss")
        for clock in ("epoch", "train_s")
    ]
    for position in range(len(examples.records)):
        looks = {
            (each.line.color, each.marker.symbol)
            for drawing in drawings
            for each in drawing.data
            if each.meta["run"] == position
        }
        assert looks == {(style(position).color, style(position).symbol)}


def test_fifty_six_runs_look_different() -> None:
    assert len({style(position) for position in range(56)}) == 56
    assert style(56) == style(0)
    assert len(set(PALETTE)) == len(PALETTE) == 7


def test_a_lone_number_is_visible_as_a_marker(examples: Runs) -> None:
    drawing = figure(curves(examples, "loss", "epoch"), examples)
    assert trace(drawing, 1, "train").mode == "lines+markers"  # 300, then nan
    assert trace(drawing, 0, "train").mode == "lines"


def test_training_curves_start_hidden_where_they_would_cover_the_rest(tmp_path: Path) -> None:
    for number in range(MANY + 1):
        tables = {"train": [{"step": 1}], "eval": [{"step": 1, "split": "test"}]}
        make_run(tmp_path, f"run{number}", tables=tables)
    crowded = load([tmp_path])
    drawing = figure(curves(crowded, "loss", "epoch"), crowded)
    assert {each.meta["split"]: each.visible for each in drawing.data} == {
        "train": "legendonly",
        "test": True,
    }
    few = load([tmp_path / f"run{number}" for number in range(MANY)])
    assert {each.visible for each in figure(curves(few, "loss", "epoch"), few).data} == {True}


def test_names_are_text_for_plotly(tmp_path: Path) -> None:
    make_run(tmp_path, "<b>bold<b> & more", tables={"train": [{"step": 1}]})
    runs = load([tmp_path])
    (drawn,) = figure(curves(runs, "loss", "epoch"), runs).data
    assert drawn.name == "&lt;b&gt;bold&lt;b&gt; &amp; more, train"


def test_a_figure_without_rows_says_so(tmp_path: Path) -> None:
    make_run(tmp_path)
    runs = load([tmp_path])
    drawing = figure(curves(runs, "accuracy", "train_s"), runs)
    assert len(drawing.data) == 0
    assert drawing.layout.annotations[0].text == "no rows"


def test_long_runs_are_thinned_in_figures(tmp_path: Path) -> None:
    make_run(tmp_path, tables={"train": [{"step": step, "loss": float(step)} for step in range(1, 31)]})
    data = curves(load([tmp_path]), "loss", "epoch", points=8)
    assert len(data.lines[0].y) <= 8
    assert data.lines[0].y[[0, -1]].tolist() == [1.0, 30.0]


def seeds(tmp_path: Path, accuracies: dict[str, list[float]]) -> Runs:
    for name, values in accuracies.items():
        rows = [
            {"step": step, "split": "test", "epoch": float(step), "accuracy": value}
            for step, value in enumerate(values, start=1)
        ]
        make_run(tmp_path, name, tables={"eval": rows})
    return load([tmp_path])


def test_a_band_is_the_mean_with_an_interval_that_holds_it(tmp_path: Path) -> None:
    runs = seeds(
        tmp_path, {"a": [0.5, 0.7, 0.9], "b": [0.7, 0.9, 0.9], "c": [0.6, 0.8, 0.9], "d": [0.1, 0.2]}
    )
    groups = (Group("seeds", ("a", "b", "c")), Group("alone", ("d",)))
    first, alone = bands(runs, groups, "accuracy", "epoch", generator=np.random.default_rng(0))
    assert first.x.tolist() == [1.0, 2.0, 3.0]
    assert first.mean == pytest.approx([0.6, 0.8, 0.9])
    assert (first.low <= first.mean).all()
    assert (first.mean <= first.high).all()
    assert (first.low[:2] < first.mean[:2]).all()
    assert (first.low[0], first.high[0]) == pytest.approx((0.5, 0.7))  # three values cannot give more
    assert np.isnan(alone.low).all()
    assert (first.n, alone.n) == (3, 1)


def test_a_band_ends_where_the_shortest_run_ended(tmp_path: Path) -> None:
    runs = seeds(tmp_path, {"a": [0.5, 0.7, 0.9], "b": [0.7, 0.9]})
    (band,) = bands(runs, (Group("g", ("a", "b")),), "accuracy", "epoch", generator=np.random.default_rng(0))
    assert band.x.tolist() == [1.0, 2.0]
    assert band.mean == pytest.approx([0.6, 0.8])


def test_a_band_is_the_same_again(tmp_path: Path) -> None:
    runs = seeds(tmp_path, {"a": [0.5, 0.7], "b": [0.7, 0.8], "c": [0.9, 0.95]})
    group = (Group("g", ("a", "b", "c")),)
    one, two = (bands(runs, group, "accuracy", "epoch", generator=np.random.default_rng(1)) for _ in range(2))
    assert one[0].low.tolist() == two[0].low.tolist()


def test_the_band_figure_draws_mean_and_ends(tmp_path: Path) -> None:
    runs = seeds(tmp_path, {"a": [0.5, 0.7], "b": [0.7, 0.9], "c": [0.2, 0.3]})
    groups = (Group("<pair>", ("a", "b")), Group("alone", ("c",)))
    found = bands(runs, groups, "accuracy", "epoch", generator=np.random.default_rng(0))
    drawing = band_figure(found, "accuracy", "epoch")
    low, high, mean, alone = drawing.data
    assert list(mean.y) == pytest.approx([0.6, 0.8])
    assert list(low.y) == found[0].low.tolist()
    assert list(high.y) == found[0].high.tolist()
    assert (high.fill, mean.name, alone.name) == ("tonexty", "&lt;pair&gt; (2 runs)", "alone (1 run)")
    assert {each.meta["group"] for each in drawing.data} == {0, 1}


def test_samples_between_two_rows_grow_with_steps(tmp_path: Path) -> None:
    train = [{"step": 10, "samples": 640}, {"step": 20, "samples": 1280}]
    make_run(tmp_path, tables={"train": train, "eval": [{"step": 15, "split": "test"}]})
    make_run(tmp_path, "bare", tables={"eval": [{"step": 15, "split": "test"}]})
    tables = load([tmp_path]).tables
    found = figures.samples_at(tables["train"], tables["eval"])
    assert found[tables["eval"]["run"] == "run"].tolist() == [960.0]
    assert found[tables["eval"]["run"] == "bare"].isna().all()


def test_scores_are_drawn_by_run_and_split(tmp_path: Path) -> None:
    def rows(metric: str, split: str, *values: float) -> list[dict[str, object]]:
        return [
            {"epoch": float(epoch), "step": epoch, "split": split, "metric": metric, "value": value}
            for epoch, value in enumerate(values, start=1)
        ]

    scores = [*rows("perplexity", "validation", 900.0, 90.0, 9.0), *rows("perplexity", "test", 80.0, 8.0)]
    make_run(tmp_path, tables={"scores": [*scores, *rows("bleu", "test", 30.0)]})
    runs = load([tmp_path], ["scores"])
    data = figures.score_curves(runs, "perplexity")
    assert line(data, "run", "validation").x.tolist() == [1.0, 2.0, 3.0]
    assert line(data, "run", "validation").y.tolist() == [900.0, 90.0, 9.0]
    assert line(data, "run", "test").y.tolist() == [80.0, 8.0]
    assert data.y_title == "perplexity (log scale)"
    drawing = figure(data, runs)
    assert "perplexity %{y:.4~g}" in trace(drawing, 0, "test").hovertemplate
    assert [curve.y.tolist() for curve in figures.score_curves(runs, "bleu").lines] == [[30.0]]
