"""Critical periods on norms that can be worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from hpcsngd_analysis.critical import critical_epochs, periods


def test_epochs_in_which_the_norm_changes_by_half_are_critical() -> None:
    layers = {1: (3.0, 4.0), 2: (5.0, 0.0), 3: (0.0, 2.0), 4: (2.2, 0.0)}  # norms 5, 5, 2, 2.2
    rows = [
        {"run": "run", "epoch": epoch - half, "step": 2 * epoch - int(2 * half), "layer": name, "norm": norm}
        for epoch, norms in layers.items()
        for half in (0.5, 0.0)
        for name, norm in zip("ab", norms, strict=True)
    ]
    found = critical_epochs(pd.DataFrame(rows))
    assert found["epoch"].tolist() == [0, 1, 2, 3]
    assert found["norm"].tolist() == pytest.approx([5, 5, 2, 2.2])
    assert found["change"].tolist() == pytest.approx([math.nan, 0, 0.6, 0.1], nan_ok=True)
    assert found["is_critical"].tolist() == [True, False, True, False]
    assert critical_epochs(pd.DataFrame(rows), eta=0.7)["is_critical"].tolist() == [True, False, False, False]


def test_runs_do_not_follow_each_other() -> None:
    rows = [
        {"run": run, "epoch": 1.0, "step": 1, "layer": "a", "norm": norm}
        for run, norm in (("a", 1), ("b", 9))
    ]
    assert critical_epochs(pd.DataFrame(rows))["is_critical"].tolist() == [True, True]


def test_rows_without_an_epoch_are_left_out() -> None:
    rows = [{"run": "original", "epoch": math.nan, "step": 1, "layer": "a", "norm": 1.0}]
    assert critical_epochs(pd.DataFrame(rows)).empty


def test_periods_join_neighbors() -> None:
    assert periods([0, 1, 2, 7, 9, 10]) == [(0, 3), (7, 8), (9, 11)]
    assert periods([]) == []
