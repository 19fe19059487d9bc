"""Times the phases of a step when asked to, and costs nothing otherwise.

On the CPU by its clock. Once CUDA is in use, by events on the current stream: work that a phase starts counts
in it, and nothing waits for the GPU before the times are taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class _Span:
    """One passage through a phase; ``parent`` is the phase around it."""

    name: str
    parent: str | None
    start: float
    end: float
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None

    def seconds(self) -> float:
        return self.end - self.start if self.events is None else _elapsed_s(*self.events)


class Stopwatch:
    """Adds up the seconds spent in named phases until they are taken.

    Time counts once: an inner phase is no part of the outer one.

    Args:
        enabled: whether to measure at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._spans: list[_Span] = []
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the ``with`` block as phase ``name``."""
        if not self._enabled:
            yield
            return
        parent = self._open[-1] if self._open else None
        self._open.append(name)
        begin, start = _event(), _now()
        try:
            yield
        finally:
            end, finish = _now(), _event()
            events = None if begin is None or finish is None else (begin, finish)
            self._open.pop()
            self._spans.append(_Span(name, parent, start, end, events))

    def take(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call, and starts over; waits for the GPU once."""
        spans, self._spans = self._spans, []
        if any(span.events for span in spans):
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for span in spans:
            elapsed = span.seconds()
            seconds[span.name] = seconds.get(span.name, 0.0) + elapsed
            if span.parent is not None:
                seconds[span.parent] = seconds.get(span.parent, 0.0) - elapsed
        return seconds


def _now() -> float:
    return time.perf_counter()


def _event() -> torch.cuda.Event | None:
    """Returns an event recorded on the current stream; None while CUDA is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elapsed_s(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(begin.elapsed_time(end)) / 1e3
