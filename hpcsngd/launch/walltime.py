"""How much wall time is left, and when workers must be asked to leave so that their checkpoint is in time."""

from __future__ import annotations

from dataclasses import dataclass

from hpcsngd.lifeline import Beat

LEAST_MARGIN_S = 90.0
"""Without measurements, and at least: what schedulers usually give as warning."""
REQUEUE_S = 30.0
"""For the workers' exit, the last words and the scheduler's answer."""
RESERVE_S = 10.0
"""Workers that are still there so shortly before the end are ended: the agent must have its last word."""
EARLY_S = 60.0
"""Slurm may send its own warning so much earlier than asked (sbatch --signal)."""


@dataclass(frozen=True)
class WallTime:
    """The wall time of one attempt.

    Attributes:
        ends_at: reading of the monotonic clock at the end.
        total_s: how long it is.
        margin_s: what the site sets as margin; None: as measured.
    """

    ends_at: float
    total_s: float
    margin_s: float | None = None

    def is_due(self, now: float, beat: Beat | None) -> bool:
        """Returns whether workers should be asked to leave now.

        Args:
            now: reading of the monotonic clock.
            beat: what a worker has measured of itself; None if nothing is known.
        """
        return self.ends_at - now <= self.margin(beat)

    def is_near(self, now: float, beat: Beat | None) -> bool:
        """Returns whether a warning now is about the wall time, unless the scheduler says otherwise."""
        return self.ends_at - now <= self.margin(beat) + EARLY_S

    def margin(self, beat: Beat | None) -> float:
        """Returns how long before the end workers are asked to leave, in seconds; at most half of the total.

        As measured it is twice the longest checkpoint and the longest wait for a step boundary, because the
        next ones may be slower.
        """
        if self.margin_s is not None:
            return min(self.margin_s, self.total_s / 2)
        measured = 2 * (beat.checkpoint_s + beat.boundary_s) if beat else 0.0
        return min(max(LEAST_MARGIN_S, REQUEUE_S + measured), self.total_s / 2)
