"""Scaling efficiency and stragglers, worked out by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from hpcsngd_analysis.scaling import efficiency, step_seconds, stragglers


def profiling(rows: list[tuple[int, int, str, float]], run: str = "run") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["step", "rank", "phase", "seconds"]).assign(run=run)


def test_strong_scaling() -> None:
    found = efficiency(pd.Series({8: 40.0, 2: 100.0, 4: 62.5}), is_weak=False)
    assert found.index.tolist() == [2, 4, 8]
    assert found["speedup"].tolist() == pytest.approx([1, 1.6, 2.5])
    assert found["efficiency"].tolist() == pytest.approx([1, 0.8, 0.625])


def test_weak_scaling() -> None:
    found = efficiency(pd.Series({1: 10.0, 4: 12.5}), is_weak=True)
    assert found["efficiency"].tolist() == pytest.approx([1, 0.8])
    assert found["speedup"].tolist() == pytest.approx([1, 3.2])


def test_two_times_for_one_number_of_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="one time per number of ranks"):
        efficiency(pd.Series([1.0, 2.0], index=[4, 4]), is_weak=False)


def test_a_step_is_the_sum_of_its_phases_without_capture() -> None:
    rows = [(1, 0, "forward", 1.0), (1, 0, "capture", 0.5), (1, 0, "update", 0.25), (1, 1, "forward", 2.0)]
    found = step_seconds(profiling(rows))
    assert found[["rank", "seconds"]].to_numpy().tolist() == [[0, 1.25], [1, 2.0]]


def test_the_slow_rank_is_found_by_its_own_work() -> None:
    rows = []
    for step in (1, 2, 3, 4):
        for rank, seconds in enumerate((1.0, 1.02, 1.2)):
            # the others wait in the update for rank 2, which says nothing about them
            rows += [(step, rank, "forward", seconds), (step, rank, "update", 1.2 - seconds)]
    rows += [(4, 0, "forward", 1.0)]  # once rank 0 was the slowest
    found = stragglers(profiling(rows)).set_index("rank")
    assert found["seconds"].tolist() == pytest.approx([1.0, 1.02, 1.2])
    assert found["ratio"].tolist() == pytest.approx([1 / 1.02, 1, 1.2 / 1.02])
    assert found["slowest"].tolist() == [0.25, 0, 0.75]
    assert found["is_straggler"].tolist() == [False, False, True]


def test_one_rank_is_no_straggler_and_steps_that_a_rank_lacks_do_not_count() -> None:
    alone = stragglers(profiling([(1, 0, "forward", 1.0)]))
    assert alone["is_straggler"].tolist() == [False]
    lacking = profiling([(1, 0, "forward", 1.0), (1, 1, "forward", 3.0), (2, 1, "forward", 9.0)])
    assert stragglers(lacking)["seconds"].tolist() == [1.0, 3.0]
    assert stragglers(profiling([])).columns.tolist()[:2] == ["run", "rank"]
