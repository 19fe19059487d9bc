"""Phases add up, exclude each other, and cost nothing when off."""

from __future__ import annotations

import time

import pytest
import torch

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


class Event:
    """Stands for a CUDA event of a stream whose time is twice the clock's looks so far."""

    looks = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = float("nan")

    def record(self) -> None:
        Event.looks += 1
        self.at_ms = 2e3 * Event.looks

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


@pytest.mark.usefixtures("clock")
def test_events_count_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events give the times, the clock none of them, and the device is waited for once, at the end."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    watch = Stopwatch(enabled=True)
    with watch.phase("outer"):
        for _ in range(2):
            with watch.phase("inner"):
                pass
    assert waits == []
    assert watch.take() == {"inner": 4.0, "outer": 6.0}
    assert waits == ["wait"]


@pytest.mark.usefixtures("clock")
def test_a_phase_in_which_cuda_starts_goes_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(enabled=True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with watch.phase("x"):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert watch.take() == {"x": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_work_on_a_gpu_counts_where_it_was_started() -> None:
    """Products that take much longer than starting them, then a phase that starts nothing."""
    x = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    watch = Stopwatch(enabled=True)
    begin = time.perf_counter()
    with watch.phase("products"):
        for _ in range(10):
            x @ x
    with watch.phase("nothing"):
        pass
    started = time.perf_counter() - begin
    seconds = watch.take()
    assert seconds["products"] > 2 * started
    assert seconds["nothing"] < 0.1 * seconds["products"]
