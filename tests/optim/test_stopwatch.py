"""Phases add up, exclude each other, and cost nothing when off."""

from __future__ import annotations

import pytest

from hpcsngd.optim import stopwatch
from hpcsngd.optim.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second at each look."""
    ticks = iter(range(100))
    monkeypatch.setattr(stopwatch, "_now", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_inner_phases_do_not_count_in_outer_ones() -> None:
    watch = Stopwatch(enabled=True)
    with watch.phase("outer"):  # looks at 0 and 5
        for _ in range(2):
            with watch.phase("inner"):  # looks at 1, 2 and 3, 4
                pass
    with watch.phase("inner"):  # looks at 6, 7
        pass
    assert watch.take() == {"inner": 3.0, "outer": 3.0}
    assert watch.take() == {}


@pytest.mark.usefixtures("clock")
def test_a_phase_that_raises_counts() -> None:
    watch = Stopwatch(enabled=True)
    with pytest.raises(KeyError), watch.phase("x"):
        raise KeyError
    assert watch.take() == {"x": 1.0}


def test_off_means_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_now", lambda: pytest.fail("looked at the clock"))
    watch = Stopwatch(enabled=False)
    with watch.phase("x"):
        pass
    assert watch.take() == {}
