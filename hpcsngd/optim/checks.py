"""What every preconditioner refuses: choices and schedules out of their range, by name and value."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpcsngd.optim.base import Schedule, value_at


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


def positive(name: str, schedule: Schedule, step: int) -> float:
    """Returns the schedule's value at ``step``; raises ValueError unless it is positive and finite."""
    value = value_at(schedule, step)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} at step {step}: must be positive")
    return value


def at_least_one_step(schedule: Schedule, step: int) -> float:
    """Returns the refresh period at ``step``; raises ValueError unless it is at least 1."""
    value = value_at(schedule, step)
    if not value >= 1:
        raise ValueError(f"refresh_every={value} at step {step}: must be at least 1")
    return value


def check_progress(epoch: float, lr: float) -> None:
    """Raises ValueError unless both are finite and not negative."""
    if not (0 <= epoch < math.inf and 0 <= lr < math.inf):
        raise ValueError(f"epoch={epoch}, lr={lr}: must be finite and not negative")
