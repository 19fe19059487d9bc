"""Settings of the strategy ``parameter_server``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hpcsngd.config.fields import Strict


class DelayCompensation(Strict):
    """What a stale gradient is changed by (DC-ASGD): g + lambda g g (w - w_then)."""

    strength: float = Field(ge=0)
    """Lambda, or lambda_0 if adaptive; 0 changes nothing."""
    adaptation: Literal["constant", "adaptive"] = "constant"
    """Adaptive: lambda_0 over the root of the gradients' mean square, entry by entry."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of that mean square."""
    eps: float = Field(default=1e-7, gt=0)
    """Added to it."""


class Delay(Strict):
    """What workers wait before each push, to study slow ones."""

    intensity: Literal["small", "medium", "long"] | None = None
    """Mean of 30, 60 or 90 ms."""
    mean_ms: float | None = Field(default=None, ge=0)
    """Instead: the mean in milliseconds."""
    std_ms: float = Field(default=5.0, ge=0)
    """Standard deviation of gaussian delays; what would be negative is 0."""
    kind: Literal["constant", "gaussian"] = "gaussian"
    """Whether every delay is the mean, or drawn."""
    all_workers: bool = True
    """Delay all workers; false: the slow one only."""
    slow_worker: int | None = Field(default=None, ge=1)
    """A worker, from 1, that waits twice as long, with twice the deviation; null: none."""

    @model_validator(mode="after")
    def _somebody_waits(self) -> Delay:
        if (self.intensity is None) == (self.mean_ms is None):
            raise ValueError("a delay takes one of intensity and mean_ms")
        if not self.all_workers and self.slow_worker is None:
            raise ValueError("all_workers: false needs a slow_worker; without a delay leave it out")
        return self


class ParameterServer(Strict):
    """Rank 0 is the server, all others are workers; see hpcsngd/train/parameter_server."""

    mode: Literal["async", "sync"] = "async"
    """Async: every push is an update. Sync: an update is the mean of one push of each worker."""
    partition: Literal["dealt", "shared", "split", "labels", "labels_unscaled"] = "dealt"
    """Which samples a worker trains on: what comes next in an order that all share, all samples in an order
    of its own, or a part of its own: at random, or by labels (cut to equal size, or not)."""
    shares: Literal["free", "equal"] = "free"
    """Async: whether whoever is ready computes the next update, or each worker's share of the whole run is
    set before (by the size of its part), so that slow workers are not left behind."""
    compensation: DelayCompensation | None = None
    """Compensation of delays, async only; null: none."""
    delay: Delay | None = None
    """Delays that workers add; null: none."""
    replay: str | None = None
    """Run directory, or its staleness.csv, whose order of pulls and pushes is repeated, async only."""
    lost_after_s: float = Field(default=60.0, gt=0)
    """Seconds without a word of a worker's process after which it counts as lost."""

    @model_validator(mode="after")
    def _fits_the_mode(self) -> ParameterServer:
        given = {
            "compensation": self.compensation is not None,
            "replay": self.replay is not None,
            "shares: equal": self.shares == "equal",
        }
        wrong = [name for name, is_given in given.items() if is_given]
        if self.mode == "sync" and wrong:
            raise ValueError(f"{', '.join(wrong)}: not in mode sync, where all workers wait for each other")
        if self.replay is not None and self.shares == "equal":
            raise ValueError("replay repeats who computed what, so shares: equal says nothing")
        return self
