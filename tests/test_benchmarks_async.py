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


def test_every_matrix_has_its_baseline_on_every_seed() -> None:
    rows = async_study.rows(study())
    assert [row.seed for row in rows] == sorted(row.seed for row in rows)
    for name, baseline in study().studies.items():
        seeds = [row.seed for row in rows if (row.study, row.label) == (name, baseline)]
        assert seeds == [1, 2, 3, 4, 5], name


def test_cells_that_several_matrices_share_are_trained_once() -> None:
    rows = [row for row in async_study.rows(study()) if row.seed == 1]
    plain = {
        row.study for row in rows if async_study.facts(row.resolved) == async_study.facts(rows[0].resolved)
    }
    assert plain == set(study().studies) - {"study-async-partition"}
    assert (
        len({async_study.facts(row.resolved) for row in rows}) == len(rows) - 5
    )  # plain: three more; slow and sync: one each


def test_a_difference_is_told_only_where_the_seeds_suffice() -> None:
    values = {"base": [0.80, 0.81, 0.82], "better": [0.90, 0.905, 0.92], "unclear": [0.79, 0.84, 0.80]}
    frame = pd.DataFrame(
        {
            "study": "s",
            "cell": cell,
            "seed": seed,
            "accuracy": value,
            "staleness": 2.0,
            "updates": 9,
            "train_s": 5,
        }
        for cell, column in values.items()
        for seed, value in enumerate(column)
    )
    lines = async_study.render(frame, {"s": "base", "not-run": "base"}).splitlines()
    assert lines[0] == "s; baseline: base"
    assert lines[2].split() == ["81.00", "2.00", "9", "5", "base"]
    assert "higher" in lines[3]
    assert "cannot tell" in lines[4]
    assert len(lines) == 5


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
