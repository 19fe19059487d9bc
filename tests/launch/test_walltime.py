"""When workers are asked to leave: margins from the site, from measurements, and for short jobs."""

from __future__ import annotations

import pytest

from hpcsngd.launch.walltime import WallTime
from hpcsngd.lifeline import Beat


def beat(checkpoint_s: float, boundary_s: float) -> Beat:
    return Beat("rank0", "n0", 1, "compute", checkpoint_s=checkpoint_s, boundary_s=boundary_s)


@pytest.mark.parametrize(
    ("total_s", "set_s", "measured", "margin"),
    [
        (3600, None, None, 90),
        (3600, None, beat(1, 2), 90),
        (3600, None, beat(120, 15), 300),  # 30 + 2 * 135
        (3600, 20, beat(120, 15), 20),
        (60, None, None, 30),
        (60, 45, None, 30),
    ],
)
def test_margin(total_s: float, set_s: float | None, measured: Beat | None, margin: float) -> None:
    assert WallTime(1000.0, total_s, set_s).margin(measured) == margin


def test_due_at_the_margin_and_near_a_minute_before() -> None:
    walltime = WallTime(1000.0, 3600.0, 100.0)
    assert [walltime.is_due(now, None) for now in (899.0, 900.0)] == [False, True]
    assert [walltime.is_near(now, None) for now in (839.0, 840.0)] == [False, True]


def test_a_short_job_is_near_its_end_all_the_time() -> None:
    """Slurm has warned a job of one minute, asked to do so at 20 s, after 11 s."""
    walltime = WallTime(60.0, 60.0, 20.0)
    assert [walltime.is_near(now, None) for now in (0.0, 11.0)] == [True, True]
    assert [walltime.is_due(now, None) for now in (11.0, 40.0)] == [False, True]
