"""Phases, bytes, clocks and scaling: numbers worked out by hand, and that the figures draw them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from hpcsngd.rundir import write_yaml
from hpcsngd_analysis import cost_figures as figures
from hpcsngd_analysis.groups import Group, groups
from hpcsngd_analysis.load import load
from tests.analysis.runs import make_run

ONE, TWO = Group("one", ("a", "b")), Group("two", ("c",))


def profiling(*rows: tuple[str, int, int, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["run", "step", "refresh", "phase", "seconds"])


ROWS = profiling(
    ("a", 1, 1, "forward", 3.0),
    ("a", 1, 1, "backward", 5.0),
    ("a", 1, 1, "capture", 2.0),
    ("a", 1, 1, "gather", 1.0),
    ("a", 2, 0, "forward", 9.0),
    ("b", 1, 1, "gather", 3.0),
    ("b", 2, 1, "gather", 8.0),
    ("c", 1, 0, "forward", 4.0),
    ("c", 1, 0, "mystery", 0.5),
)


def test_phases_are_medians_of_refreshes_and_disjoint() -> None:
    found = figures.phase_seconds(ROWS, (ONE, TWO))
    assert list(found.index) == ["forward and backward", "capture", "gather", "mystery"]
    assert found["one"][:3].tolist() == [6.0, 2.0, 3.0]  # 3 + 5 - 2; the median of 1, 3 and 8
    assert found["two"]["forward and backward"] == 4.0  # no refresh: all steps stand in
    assert math.isnan(found["two"]["gather"])


def test_steps_between_refreshes() -> None:
    found = figures.phase_seconds(ROWS, (ONE, TWO), refreshes_only=False)
    assert found["one"]["forward and backward"] == 9.0


def test_phases_are_summed_by_kind() -> None:
    found = figures.by_kind(figures.phase_seconds(ROWS, (ONE, TWO)))
    assert found["one"].dropna().to_dict() == {
        "training": 6.0,
        "compute factors": 2.0,
        "communicate factors": 3.0,
    }
    assert found["two"]["mystery"] == 0.5


def test_the_bars_have_the_numbers_and_nothing_where_there_is_none() -> None:
    drawing = figures.time_figure(figures.phase_seconds(ROWS, (ONE, TWO)))
    bars = {bar.name: list(bar.x) for bar in drawing.data}
    assert bars["gather"] == [3.0, None]
    assert bars["forward and backward"] == [6.0, 4.0]
    assert list(drawing.data[0].y) == ["one", "two"]
    assert (drawing.layout.barmode, drawing.layout.xaxis.title.text) == ("stack", "s per step")


def test_a_phase_has_one_color_in_all_figures() -> None:
    both = [figures.time_figure(figures.phase_seconds(ROWS, chosen)) for chosen in ((ONE, TWO), (ONE,))]
    colors = [{bar.name: bar.marker.color for bar in drawing.data} for drawing in both]
    assert colors[0]["gather"] == colors[1]["gather"]
    assert len(set(colors[0].values())) == 4


def test_timing_against_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2):
        seconds = {"forward": 9.0, "gather": 1.0 * ranks, "invert": 4.0 / ranks, "observe": 7.0}
        rows = [{"step": 1, "refresh": 1, "phase": phase, "seconds": each} for phase, each in seconds.items()]
        run = make_run(
            tmp_path, f"run{ranks}", settings={"batch_size": 8 // ranks}, tables={"profiling": rows}
        )
        write_yaml(run.attempt(1).attempt_yaml, {"world_size": ranks})
    runs = load([tmp_path])
    families = groups(runs, without=("ranks", "batch_size"))
    found = figures.computation_and_communication(runs.tables["profiling"], runs, families)
    assert found.to_numpy().tolist() == [["digits-sgd", 1, 4.0, 1.0], ["digits-sgd", 2, 2.0, 2.0]]
    drawing = figures.ranks_figure(found)
    assert {bar.name: list(bar.x) for bar in drawing.data} == {
        "computation": [4.0, 2.0],
        "communication": [1.0, 2.0],
    }
    assert list(drawing.data[0].y) == ["digits-sgd, 1 rank", "digits-sgd, 2 ranks"]


def test_bytes_of_a_step_are_summed_over_calls() -> None:
    rows = [
        ("a", 1, "gather", 100),
        ("a", 1, "gather", 50),
        ("a", 2, "gather", 250),
        ("c", 1, "broadcast", 8),
    ]
    table = pd.DataFrame(rows, columns=["run", "step", "phase", "size_bytes"])
    found = figures.bytes_per_refresh(table, (ONE, TWO))
    assert found["one"]["gather"] == 200.0
    assert found["two"]["broadcast"] == 8.0
    drawing = figures.bytes_figure(found * 1024, " per step")
    assert {bar.name: list(bar.x) for bar in drawing.data} == {
        "gather": [200.0, None],
        "broadcast": [None, 8.0],
    }
    assert drawing.layout.xaxis.title.text == "KiB per step"


def test_scaling_of_equal_global_and_of_equal_local_batches(tmp_path: Path) -> None:
    # seconds of ten steps: 1 rank x 8, 2 ranks x 4 (strong), 2 ranks x 8 (weak)
    for name, ranks, batch, seconds in (("a", 1, 8, 10.0), ("b", 2, 4, 8.0), ("c", 2, 8, 12.5)):
        rows = [{"step": step, "train_s": 5.0 + seconds * (step - 1) / 10} for step in (1, 11)]
        run = make_run(tmp_path, name, settings={"batch_size": batch}, tables={"train": rows})
        write_yaml(run.attempt(1).attempt_yaml, {"world_size": ranks})
    runs = load([tmp_path])
    found = figures.scaling_rows(runs, lambda without: groups(runs, without=without))
    strong, weak = (found[found["kind"] == kind] for kind in ("strong", "weak"))
    assert strong["seconds"].tolist() == pytest.approx([1.0, 0.8])
    assert strong["efficiency"].tolist() == pytest.approx([1.0, 10 / 16])
    assert weak["efficiency"].tolist() == pytest.approx([1.0, 0.8])
    (line,) = figures.scaling_figure(weak).data
    assert (list(line.x), list(line.y)) == ([1.0, 2.0], pytest.approx([1.0, 0.8]))


def test_clocks_are_drawn_in_a_unit_that_suits() -> None:
    drawing = figures.clock_figure(pd.DataFrame({"one": {"queue": 60.0, "training": 120.0}}))
    assert {bar.name: list(bar.x) for bar in drawing.data} == {"queue": [1.0], "training": [2.0]}
    assert drawing.layout.xaxis.title.text == "min"
