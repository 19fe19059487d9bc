"""Schedules that follow the epoch, so that they mean the same for every batch size and refresh period."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class DampingDecay:
    """HyLo's damping decay, by epochs.

    From ``warmup_epochs`` on, the gap to the target shrinks every epoch by the factor ``1 - alpha`` with
    ``alpha = 2 log10(initial / target) / epochs``:

        damping(e) = target + (initial - target) (1 - alpha)^max(0, e - warmup_epochs)

    After ``epochs`` epochs the gap is about ``(initial / target)^-0.87`` of its start, for example 0.23 for
    1.5 -> 0.1 in 90 epochs. Source: HyLo (Mu et al., SC 2022) and its published code, which applies the
    recursion once per *refresh*, so that its "epochs" are epochs only if there is one refresh in each.

    Attributes:
        initial: damping at the start.
        target: damping that is approached, at most ``initial``.
        epochs: sets the pace, see above.
        warmup_epochs: epochs at ``initial`` before the decay begins.

    Raises:
        ValueError: a number out of its range, or ``epochs`` so few that alpha is not below 1.
    """

    initial: float
    target: float
    epochs: float
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.target <= self.initial < math.inf:
            raise ValueError(
                f"damping decays from {self.initial} to {self.target}: wants 0 < target <= initial"
            )
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: must not be negative")
        least = 2 * math.log10(self.initial / self.target)
        if not self.epochs > max(0.0, least):
            raise ValueError(f"epochs={self.epochs}: this decay needs more than {least:.3g} epochs")

    def at_epoch(self, epoch: float) -> float:
        """Returns the damping after ``epoch`` epochs, which may be fractional."""
        alpha = 2 * math.log10(self.initial / self.target) / self.epochs
        gap: float = (1 - alpha) ** max(0.0, epoch - self.warmup_epochs)
        return self.target + (self.initial - self.target) * gap


@dataclass(frozen=True)
class DampingSteps:
    """Damping that is multiplied by a factor at some epochs, as K-FAC's training scripts do.

    Source: the ImageNet program of DP-KFAC (Zhang et al., TCC 2022), which halves 0.002 at epochs 40 and 80.

    Attributes:
        initial: damping at the start.
        factor: what it is multiplied by at each milestone.
        milestones: epochs; the first step at or after one has the new damping.

    Raises:
        ValueError: a number out of its range, or milestones that do not rise.
    """

    initial: float
    factor: float
    milestones: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (0 < self.initial < math.inf and 0 < self.factor < math.inf):
            raise ValueError(f"initial={self.initial}, factor={self.factor}: must be positive")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)}: must rise")

    def at_epoch(self, epoch: float) -> float:
        """Returns the damping after ``epoch`` epochs, which may be fractional."""
        return self.initial * self.factor ** sum(milestone <= epoch for milestone in self.milestones)


EpochDamping: TypeAlias = DampingDecay | DampingSteps


def epoch_damping(fields: Mapping[str, Any]) -> EpochDamping:
    """Returns the damping by epochs that a mapping describes: `DampingSteps` if it has milestones.

    Raises:
        ValueError: a number out of its range.
    """
    if "milestones" in fields:
        return DampingSteps(**{**fields, "milestones": tuple(fields["milestones"])})
    return DampingDecay(**fields)
