"""Layers, confusion and landscapes: numbers by hand, and that the figures draw them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hpcsngd_analysis import model_figures as figures


def test_dimensions_count_a_bias_and_each_model_once() -> None:
    rows = [("a", 9, 16, 1), ("a", 20, 10, 0), ("a", 0, 0, 0), ("b", 9, 16, 1), ("c", 99, 5, 1)]
    layers = pd.DataFrame(rows, columns=["run", "d_in", "d_out", "has_bias"])
    found = figures.dimension_boxes(layers, {"a": "net", "b": "net", "c": "other"})
    inputs = found["inputs"]["net"]
    assert (inputs.low, inputs.high, inputs.n) == (10.0, 20.0, 2)
    assert found["outputs"]["other"].median == 5.0
    drawn, _ = figures.dimension_figure(found).data
    assert (list(drawn.x), list(drawn.median)) == (["net", "other"], [15.0, 100.0])


def confusion() -> pd.DataFrame:
    rows = [(0, 0, 3), (0, 1, 1), (1, 1, 4), (2, 0, 2), (0, 0, 2)]
    return figures.confusion_matrix(pd.DataFrame(rows, columns=["label", "predicted", "count"]))


def test_confusion_is_square_and_summed_over_runs() -> None:
    assert confusion().to_numpy().tolist() == [[5, 1, 0], [0, 4, 0], [2, 0, 0]]


def test_precision_recall_and_f1_by_hand() -> None:
    found = figures.class_report(confusion())
    assert found["precision"].tolist() == pytest.approx([5 / 7, 4 / 5, math.nan], nan_ok=True)
    assert found["recall"].tolist() == pytest.approx([5 / 6, 1.0, 0.0])
    assert found["f1"].tolist() == pytest.approx([10 / 13, 8 / 9, math.nan], nan_ok=True)
    assert found["support"].tolist() == [6, 4, 2]


def test_the_matrix_is_drawn_as_shares_with_counts() -> None:
    (heat,) = figures.confusion_figure(confusion()).data
    assert np.array(heat.z)[0].tolist() == pytest.approx([5 / 6, 1 / 6, 0.0])
    assert list(heat.text[0]) == ["5", "1", "0"]
    assert list(heat.x) == ["0", "1", "2"]


def plane(*, is_random: bool = False, scale: float = 1.0) -> pd.DataFrame:
    share = math.nan if is_random else 0.75
    rows = [
        {"row": i, "column": j, "a": float(j), "b": -float(i), "loss": scale * (1.0 + i + 10 * j)}
        for i in range(2)
        for j in range(3)
    ]
    return pd.DataFrame(rows).assign(share_a=share, share_b=0.2)


PATH = pd.DataFrame({"run": "<r>", "step": [1, 2], "a": [0.0, 2.0], "b": [0.0, -1.0], "loss": [5.0, 1.0]})


def test_the_grid_is_put_together_and_gaps_stay() -> None:
    a, b, loss = figures.loss_grid(plane()[1:])
    assert (a.tolist(), b.tolist()) == ([0.0, 1.0, 2.0], [0.0, -1.0])
    assert math.isnan(loss[0, 0])
    assert loss[1].tolist() == [2.0, 12.0, 22.0]


def test_contours_and_surface_draw_the_plane_and_the_way() -> None:
    for make in (figures.contour_figure, figures.surface_figure):
        ground, way = make(plane(), PATH).data
        assert np.array(ground.z).tolist() == [[1.0, 11.0, 21.0], [2.0, 12.0, 22.0]]
        assert (list(way.x), list(way.y), way.name) == ([0.0, 2.0], [0.0, -1.0], "&lt;r&gt;")
    assert list(way.z) == [5.0, 1.0]
    contour = figures.contour_figure(plane(), PATH)
    assert contour.layout.xaxis.title.text == "first axis (75.0% of the variance)"
    assert figures.contour_figure(plane(is_random=True), PATH).layout.xaxis.title.text == "first axis"


def test_a_steep_landscape_is_drawn_by_its_logarithm() -> None:
    steep = plane()
    steep.loc[0, "loss"] = 1e-3
    ground, way = figures.surface_figure(steep, PATH).data
    assert np.array(ground.z)[0, 0] == pytest.approx(-3.0)
    assert list(way.z) == pytest.approx([math.log10(5.0), 0.0])
