"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpcsngd.config.experiment import Schedule


def multiplier(
    schedule: Schedule, step: int, *, steps_per_epoch: int, epochs: int, plateaus: int = 0
) -> float:
    """Returns what the peak learning rate is multiplied by at one update.

    Args:
        schedule: the experiment's schedule, in epochs.
        step: updates done before this one; 0 for the first.
        steps_per_epoch: updates per epoch.
        epochs: length of the run.
        plateaus: evaluations so far whose loss was no lower than the lowest before them.

    The warm-up rises linearly per step, from ``warmup_start`` at step 0 to 1 at ``warmup_epochs``. Cosine and
    linear run from its end to the end of the run, where they reach ``final``. Milestones count from the start
    of the run: the first step at or after one already has the smaller rate. With ``by: epoch`` all steps of
    an epoch have the rate of its first.

    Inverse_sqrt is ``min(s / w, sqrt(w / s))`` with s the number of this update, from 1, and w the
    ``warmup_steps`` (Vaswani et al., NeurIPS 2017, section 5.3: their rate is 1 / sqrt(d w) times this).
    """
    if schedule.kind == "inverse_sqrt":
        number, rise = step + 1, schedule.warmup_steps
        return min(number / rise, math.sqrt(rise / number))
    if schedule.kind == "plateau":
        return _warmed(schedule, step / steps_per_epoch) * schedule.gamma**plateaus
    epoch = float(step // steps_per_epoch) if schedule.by == "epoch" else step / steps_per_epoch
    if epoch < schedule.warmup_epochs:
        return _warmed(schedule, epoch)
    return _SHAPES[schedule.kind](schedule, epoch, epochs)


def _warmed(schedule: Schedule, epoch: float) -> float:
    """Returns the multiple in the warm-up; 1 after it."""
    if epoch >= schedule.warmup_epochs:
        return 1.0
    return schedule.warmup_start + (1 - schedule.warmup_start) * epoch / schedule.warmup_epochs


def _constant(schedule: Schedule, epoch: float, epochs: int) -> float:
    return 1.0


def _milestones(schedule: Schedule, epoch: float, epochs: int) -> float:
    return float(schedule.gamma ** sum(milestone <= epoch for milestone in schedule.milestones))


def _cosine(schedule: Schedule, epoch: float, epochs: int) -> float:
    falling = (1 + math.cos(math.pi * _progress(schedule, epoch, epochs))) / 2
    return schedule.final + (1 - schedule.final) * falling


def _linear(schedule: Schedule, epoch: float, epochs: int) -> float:
    return 1 + (schedule.final - 1) * _progress(schedule, epoch, epochs)


def _progress(schedule: Schedule, epoch: float, epochs: int) -> float:
    """Returns the share of the time after the warm-up that is over."""
    return (epoch - schedule.warmup_epochs) / (epochs - schedule.warmup_epochs)


_SHAPES: dict[str, Callable[[Schedule, float, int], float]] = {
    "constant": _constant,
    "milestones": _milestones,
    "cosine": _cosine,
    "linear": _linear,
}
