"""Puts together what one step of HyLo has to tell."""

from __future__ import annotations

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.compare import Comparison
from hpcsngd.optim.held import Curvatures
from hpcsngd.optim.observe import Observer
from hpcsngd.optim.records import Memory, StepRecord
from hpcsngd.optim.refresh import Outcome
from hpcsngd.optim.reporting import phase_times, traffic
from hpcsngd.optim.stopwatch import Stopwatch


class Recorder:
    """Takes what was counted and measured since the last step.

    Args:
        communicator: counts bytes.
        curvatures: what is held between refreshes.
        comparison: what is held besides, to compare with.
        observer: what was looked at.
        stopwatch: phases.
        measures: whether to tell the bytes held.
    """

    def __init__(
        self,
        communicator: Communicator,
        curvatures: Curvatures,
        comparison: Comparison,
        observer: Observer,
        stopwatch: Stopwatch,
        *,
        measures: bool,
    ) -> None:
        self._communicator, self._curvatures, self._comparison = communicator, curvatures, comparison
        self._observer, self._stopwatch, self._measures = observer, stopwatch, measures

    def record(self, step: int, outcome: Outcome, *, damping: float, failures: int) -> StepRecord:
        """Returns the record of the latest step.

        Args:
            step: steps done.
            outcome: of its refresh.
            damping: in use.
            failures: fallbacks so far.
        """
        return StepRecord(
            step,
            outcome.happened,
            damping,
            failures,
            jittered=sum(curvature.jitter > 0 for curvature in self._curvatures.values()),
            phases=phase_times(step, self._stopwatch.take()),
            communication=traffic(step, self._communicator.take_traffic()),
            memory=tuple(Memory(step, *item) for item in self._sizes(outcome).items()),
            rank_analysis=self._observer.take_rank_analysis(step),
            grad_norm=self._observer.take_grad_norm(step),
            grad_error=self._observer.take_grad_error(step),
            fallbacks=outcome.fallbacks,
            kept=outcome.kept,
        )

    def _sizes(self, outcome: Outcome) -> dict[str, int]:
        """Returns bytes by kind of memory; nothing if nobody asked."""
        if not self._measures:
            return {}
        compared = sum(sum(c.size_bytes) for c in self._comparison.curvatures())
        sizes = {"captured": outcome.captured_bytes, "rows": 0, "factors": 0, "comparison": compared}
        for curvature in self._curvatures.values():
            for kind, size in zip(("rows", "factors"), curvature.size_bytes, strict=True):
                sizes[kind] += size
        return sizes
