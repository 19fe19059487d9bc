"""Times the phases of a step when asked to, and costs nothing otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds spent in named phases until they are taken.

    Time counts once: an inner phase is no part of the outer one. Work on a GPU is waited for at both ends of
    a phase, so that it counts in the phase that started it; this is why profiling slows a run down.

    Args:
        enabled: whether to measure at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the ``with`` block as phase ``name``."""
        if not self._enabled:
            yield
            return
        before, self._inner = self._inner, 0.0
        start = _now()
        try:
            yield
        finally:
            elapsed = _now() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - self._inner
            self._inner = before + elapsed

    def take(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call, and starts over."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def _now() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
