"""Ranks, norms, critical periods and series over time: numbers by hand, and that the figures draw them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hpcsngd_analysis import curvature_figures as figures
from hpcsngd_analysis import series
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.series import LINES, POINTS, Member

A, B = Member("a", 0, True, ("a",)), Member("b", 1, True, ("b",))
BOTH = Member("both", 2, False, ("a", "b"))


def test_ranks_are_distributed_by_batch_and_share() -> None:
    rows = [("a", 0.9, 64, rank) for rank in (1, 2, 3, 4, 5)] + [("a", 0.9, 128, 7), ("a", 0.5, 64, 1)]
    table = pd.DataFrame(rows, columns=["run", "share", "samples", "low_rank"])
    found = figures.rank_boxes(table, [Group("g", ("a",))])
    assert list(found) == ["g, share 0.5", "g, share 0.9"]
    five = found["g, share 0.9"]["64"]
    assert (five.low, five.q1, five.median, five.q3, five.high, five.n) == (1, 2, 3, 4, 5, 5)
    _, drawn = figures.rank_figure(found).data
    assert (list(drawn.x), list(drawn.median), list(drawn.upperfence)) == (["64", "128"], [3, 7], [5, 7])


def test_the_norm_over_layers_is_euclidean() -> None:
    rows = [("a", 1, 0.5, "x", 3.0), ("a", 1, 0.5, "y", 4.0), ("a", 2, 1.0, "x", 2.0)]
    found = figures.total_norm(pd.DataFrame(rows, columns=["run", "step", "epoch", "layer", "norm"]))
    assert found["norm"].tolist() == [5.0, 2.0]


def test_a_deep_net_shows_layers_evenly_spread() -> None:
    names = [str(number) for number in range(31)]
    assert figures.some_layers(names) == ["0", "5", "10", "15", "20", "25", "30"]
    assert figures.some_layers(names[:3]) == ["0", "1", "2"]


def test_critical_epochs_are_those_of_kid() -> None:
    switches = pd.DataFrame({"epoch": [0, 1, 2, 5, 6], "method": ["kid", "kid", "kis", "kid", "kis"]})
    assert figures.critical_epochs(switches) == [(0.0, 2.0), (5.0, 6.0)]
    assert figures.critical_epochs(switches[:1]) == [(0.0, 1.0)]


def test_the_rate_falls_at_a_milestone_and_not_at_the_end_of_a_cosine() -> None:
    lr = [0.1, 0.1, 0.01, 0.01, 0.009, 0.004, 0.001]
    train = pd.DataFrame({"lr": lr, "epoch": np.arange(7.0)})
    assert figures.lr_drops(train) == [2.0]


def test_the_norm_figure_has_layers_periods_and_drops() -> None:
    rows = [("x", epoch, 1.0 + epoch) for epoch in (0.5, 1.0)] + [("y", 1.0, 4.0)]
    table = pd.DataFrame(rows, columns=["layer", "epoch", "norm"])
    drawing = figures.norm_figure(table, [(0.0, 2.0)], [3.0])
    assert {line.name: list(line.y) for line in drawing.data} == {"layer x": [1.5, 2.0], "layer y": [4.0]}
    assert [(shape.name, shape.x0, shape.x1) for shape in drawing.layout.shapes] == [
        ("critical", 0.0, 2.0),
        ("learning rate falls", 3.0, 3.0),
    ]


def test_staleness_by_worker() -> None:
    table = pd.DataFrame({"run": "a", "worker": [1, 1, 1, 2], "staleness": [0, 1, 5, 2]})
    found = figures.worker_boxes(table, [Group("g", ("a",))])
    assert {worker: each.median for worker, each in found["g"].items()} == {"1": 1.0, "2": 2.0}
    (drawn,) = figures.worker_figure(found).data
    assert (list(drawn.lowerfence), list(drawn.upperfence)) == ([0.0, 2.0], [5.0, 2.0])


def test_what_lbfgs_spent_and_what_became_of_its_pairs() -> None:
    """Counters run on over a resume; the pairs are those of the last step, damped ones stored as well."""
    rows = [("a", 2, 7, 2, 1, 0), ("a", 1, 3, 1, 0, 0), ("b", 1, 2, 0, 0, 1), ("a", 3, 9, 2, 1, 1)]
    columns = ["run", "step", "evaluations", "kept", "damped", "skipped"]
    table = pd.DataFrame(rows, columns=columns)
    spent = figures.evaluations_per_step(table)
    assert spent[spent["run"] == "a"]["per_step"].tolist()[1:] == [4, 2]
    assert spent["per_step"].isna().sum() == 2
    found = figures.pairs(table, [Group("one", ("a",)), Group("both", ("a", "b")), Group("none", ("c",))])
    assert found.to_dict() == {
        "one": {"stored as they were": 1, "damped and stored": 1, "skipped": 1},
        "both": {"stored as they were": 0.5, "damped and stored": 0.5, "skipped": 1},
    }


def test_eigenvalue_over_damping() -> None:
    table = pd.DataFrame({"top_eigenvalue": [0.6], "damping": [0.3]})
    assert figures.eigenvalue_over_damping(table)["strength"].tolist() == [2.0]


def over_time(rows: list[tuple[str, float, float, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["run", "epoch", "value", "kind"])


def test_a_series_is_the_median_and_the_range_of_its_rows() -> None:
    table = over_time(
        [("a", 1.0, 1.0, "k"), ("a", 1.0, 2.0, "k"), ("a", 1.0, 9.0, "k"), ("a", 2.0, 5.0, "k")]
    )
    (found,) = series.spreads(table, [A, B], "value")
    assert found.x.tolist() == [1.0, 2.0]
    assert (found.median.tolist(), found.low.tolist(), found.high.tolist()) == ([2, 5], [1, 5], [9, 5])
    low, high, line = series.figure([found], "value").data
    assert (list(low.y), list(high.y), list(line.y)) == ([1, 5], [9, 5], [2, 5])
    assert (line.meta, high.fill) == ({"run": 0}, "tonexty")


def test_kinds_are_series_with_an_entry_in_the_legend() -> None:
    table = over_time([("a", 1.0, 1.0, "kid"), ("a", 1.0, 2.0, "kis"), ("b", 1.0, 3.0, "kis")])
    found = series.spreads(table, [A, B], "value", kind="kind")
    assert [(each.member.name, each.kind) for each in found] == [("a", "kid"), ("a", "kis"), ("b", "kis")]
    drawing = series.figure(found, "value")
    assert [trace.name for trace in drawing.data if trace.showlegend is not False] == ["kid", "kis"]
    dashes = {trace.name: trace.line.dash for trace in drawing.data}
    assert dashes["a, kid"] == "solid"
    assert dashes["a, kis"] == dashes["b, kis"] == "dash"


def test_a_group_sums_up_its_runs() -> None:
    table = over_time([("a", 1.0, 1.0, ""), ("b", 1.0, 3.0, ""), ("other", 1.0, 100.0, "")])
    (found,) = series.spreads(table, [BOTH], "value")
    assert (found.low.tolist(), found.median.tolist(), found.high.tolist()) == ([1.0], [2.0], [3.0])
    assert series.figure([found], "value").data[0].meta == {"group": 2}


def test_a_long_series_keeps_its_extremes() -> None:
    values = np.sin(np.arange(5000.0))
    values[1234], values[4321] = 50.0, -50.0
    table = pd.DataFrame({"run": "a", "epoch": np.arange(5000.0), "value": values})
    (found,) = series.spreads(table, [A], "value")
    assert len(found.x) <= POINTS
    assert (found.low.min(), found.high.max()) == (-50.0, 50.0)


def test_rotation_stays_linear_and_a_wide_range_is_logarithmic() -> None:
    table = over_time([("a", 1.0, 0.001, ""), ("a", 2.0, 90.0, "")])
    found = series.spreads(table, [A], "value")
    assert series.figure(found, "value").layout.yaxis.type == "log"
    assert series.figure(found, "value", is_log=False).layout.yaxis.type == "linear"


def test_the_lines_limit_is_known() -> None:
    assert LINES < 56  # up to here every run looks different


def test_a_box_of_one_value() -> None:
    one = series.box(np.array([3.0]))
    assert (one.low, one.median, one.high, one.n) == (3.0, 3.0, 3.0, 1)
    assert pytest.approx(3.0) == one.q1
