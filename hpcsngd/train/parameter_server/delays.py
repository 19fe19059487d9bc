"""Delays that workers add to their own updates, to study what slow workers do to training.

A worker sleeps after its backward pass and before its push: the gradient grows old, as on a slow machine. The
delay of update k of worker r follows from (seed, r, k) alone, so that a run can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hpcsngd.train import seeds

Kind = Literal["constant", "gaussian"]

#: Mean delay of the named intensities, in milliseconds.
INTENSITIES = {"small": 30.0, "medium": 60.0, "long": 90.0}
#: Standard deviation where none is given, in milliseconds.
STD_MS = 5.0
#: How much later than the others a slow worker is.
SLOW_FACTOR = 2.0


@dataclass(frozen=True)
class DelayModel:
    """How long which workers wait.

    Attributes:
        mean_ms: mean delay of an update.
        std_ms: standard deviation of a Gaussian delay; negative draws count as zero.
        kind: constant or Gaussian.
        are_all_delayed: whether every worker waits; else only the slow one does.
        slow_worker: number of a worker, from 1, that waits `SLOW_FACTOR` times as long, with as many times
            the deviation; None for none.

    Raises:
        ValueError: a number is negative or not finite, or nobody would wait.
    """

    mean_ms: float
    std_ms: float = STD_MS
    kind: Kind = "gaussian"
    are_all_delayed: bool = True
    slow_worker: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean_ms", "std_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"delay {name}={getattr(self, name)}: must not be negative")
        if not self.are_all_delayed and self.slow_worker is None:
            raise ValueError("delay: neither all workers nor a slow one wait; leave the delay out")

    def seconds(self, seed: int, worker: int, update: int) -> float:
        """Returns how long a worker waits before an update.

        Args:
            seed: the run's.
            worker: from 1.
            update: counts the worker's updates, from 0.
        """
        is_slow = worker == self.slow_worker
        if not (self.are_all_delayed or is_slow):
            return 0.0
        factor = SLOW_FACTOR if is_slow else 1.0
        drawn = self.mean_ms
        if self.kind == "gaussian":
            generator = seeds.generator(seed, "delay", worker, update)
            drawn += self.std_ms * float(torch.randn((), generator=generator, dtype=torch.float64))
        return max(0.0, factor * drawn) / 1000
