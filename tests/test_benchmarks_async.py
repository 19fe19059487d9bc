"""The parameter-server study: which cells it has, and what it says of their numbers. Nothing is trained."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from benchmarks import async_study
from hpcsngd.config import strict
from hpcsngd_analysis import stats


def study() -> async_study.Study:
    return async_study.Study.model_validate(strict.load(async_study.STUDY).data)


def test_every_matrix_has_its_baseline_on_every_seed_or_fold() -> None:
    rows = async_study.rows(study())
    assert [row.replicate for row in rows] == sorted(row.replicate for row in rows)
    pairs = [(name, baseline) for name, several in study().studies.items() for baseline in several]
    for name, baseline in pairs:
        replicates = [row.replicate for row in rows if (row.study, row.label) == (name, baseline)]
        seeds = (
            [(1, fold) for fold in range(5)] if name == "study-async-folds" else [(s, 0) for s in range(1, 6)]
        )
        assert replicates == seeds, name


def test_the_product_has_every_combination_once() -> None:
    rows = [row for row in async_study.rows(study()) if row.study == "study-async-product"]
    assert len(rows) == len({(row.label, row.replicate) for row in rows}) == 2 * 2 * 3 * 2 * 2 * 3
    keys = [key for each in study().effects["study-async-product"].values() for key in each]
    assert all(sorted(row.axes) == sorted(keys) for row in rows)


def test_an_effect_is_the_mean_of_paired_differences_over_all_other_axes() -> None:
    """+2 points by delay in every pair, whatever partitions cost; without its partner a cell is left out."""
    wanted = [row for row in async_study.rows(study()) if row.study == "study-async-product"]
    gains = {"delay": 2.0, "partition": -3.0}
    frame = pd.DataFrame(
        {
            "study": row.study,
            "cell": row.label,
            "seed": row.replicate[0],
            "accuracy": 0.7
            + 0.01 * row.replicate[0]
            + sum(
                gain / 100
                for axis, gain in gains.items()
                if row.axes[f"parameter_server.{axis}"] not in (None, "dealt")
            ),
        }
        for row in wanted[1:]
    )
    text = async_study.render_effects(wanted, frame, study().effects["study-async-product"])
    lines = {line[61:].strip(): line[:61].split() for line in text.splitlines()[1:]}
    assert lines["parameter_server.delay=null"] == ["71", "69.99"]
    assert lines['parameter_server.delay={"intensity": "long"}'][:5] == [
        "+2.00",
        "[+2.00,",
        "+2.00]",
        "higher",
        "71",
    ]
    assert lines["parameter_server.partition=labels"][3:5] == ["lower", "47"]
    assert lines["parameter_server.compensation=null"][-2] == "71"


def test_cells_that_several_matrices_share_are_trained_once() -> None:
    rows = [row for row in async_study.rows(study()) if row.replicate == (1, 0)]
    rows = [row for row in rows if row.study in study().studies]
    plain = {
        row.study for row in rows if async_study.facts(row.resolved) == async_study.facts(rows[0].resolved)
    }
    assert plain == set(study().studies) - {"study-async-partition", "study-async-folds"}
    # plain: three more; slow and sync: one each
    assert len({async_study.facts(row.resolved) for row in rows}) == len(rows) - 5


def outcomes(cells: dict[str, list[float]], folds: int = 0) -> pd.DataFrame:
    """Returns results of cells, one per seed or, with folds, one per fold of one seed."""
    return pd.DataFrame(
        {
            "study": "s",
            "cell": cell,
            "seed": 0 if folds else replicate,
            "fold": replicate if folds else 0,
            "folds": folds,
            "accuracy": value,
            "staleness": 2.0,
            "updates": 9,
            "train_s": 5,
        }
        for cell, column in cells.items()
        for replicate, value in enumerate(column)
    )


def test_a_difference_is_told_only_where_the_seeds_suffice() -> None:
    values = {"base": [0.80, 0.81, 0.82], "better": [0.90, 0.905, 0.92], "unclear": [0.79, 0.84, 0.80]}
    lines = async_study.render(outcomes(values), {"s": ["base"], "not-run": ["base"]}).splitlines()
    assert lines[0] == "s; baseline: base"
    assert lines[2].split() == ["81.00", "2.00", "9", "5", "base"]
    assert "higher" in lines[3]
    assert "cannot tell" in lines[4]
    assert len(lines) == 5


def test_folds_of_one_training_set_tell_less_than_as_many_seeds() -> None:
    values = {"base": [0.80, 0.81, 0.82], "other": [0.815, 0.835, 0.85]}
    for folds, word in ((0, "higher"), (3, "cannot tell")):
        assert word in async_study.render(outcomes(values, folds), {"s": ["base"]}).splitlines()[3]


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.2, "higher"),
        (-0.2, -0.1, "lower"),
        (-0.1, 0.2, "cannot tell"),
        (math.nan, math.nan, "cannot tell"),
    ],
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert async_study.verdict(stats.Interval((low + high) / 2, low, high, 3)) == word
