"""When K-FAC updates which factors and inverses, and from what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd.optim.kfac_collect import Collector
from hpcsngd.optim.kfac_costs import update_costs
from hpcsngd.optim.kfac_curvature import Curvature
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_options import Options
from hpcsngd.optim.kfac_timetable import Timetable
from hpcsngd.optim.stopwatch import Stopwatch


@dataclass(frozen=True)
class Inverted:
    """What became of the inverses that were due.

    Attributes:
        damping: that they have.
        failed: layer -> why it keeps what it had.
    """

    damping: float
    failed: dict[str, str]


class Cycle:
    """Brings what hooks collected into the running factors, and factors into inverses, when they are due.

    Args:
        options: of KFAC.
        layers: covered layers.
        collector: of their statistics.
        curvature: has factors and inverses.
        stopwatch: counts phases ``capture`` and ``invert``.

    Attributes:
        timetable: what is due when; part of a run's state.
    """

    def __init__(
        self,
        options: Options,
        layers: Sequence[CoveredLayer],
        collector: Collector,
        curvature: Curvature,
        stopwatch: Stopwatch,
    ) -> None:
        self._options, self._layers = options, layers
        self._collector, self._curvature, self._stopwatch = collector, curvature, stopwatch
        self.timetable = Timetable(
            [layer.name for layer in layers],
            options.factor_every,
            options.inverse_every,
            stagger=options.stagger,
        )

    def expect(self, step: int) -> None:
        """Tells the hooks what the coming step needs."""
        self._collector.expect(self.timetable.factors_due(step), step)

    def update_factors(self, step: int, sample_scale: float | None, grad_scale: float) -> dict[str, str]:
        """Adds what was captured to the running factors; returns whose could not be used, and why.

        Args:
            step: steps done before it.
            sample_scale: of `KFAC.step`.
            grad_scale: from there.
        """
        due = frozenset(self.timetable.factors_due(step))
        if not due:
            return {}
        reduced = self._collector.collect(due, sample_scale, grad_scale)
        with self._stopwatch.phase("capture"):
            self._curvature.update(reduced.names, reduced.means, self._options.decay_at(step))
        if reduced.names:
            self.timetable.factors_done(step)
            if self.timetable.wants_costs:
                self.timetable.set_costs(update_costs(self._layers, self._options.inverse, reduced.inputs))
        return reduced.faults

    def invert(self, step: int, epoch: float | None) -> Inverted | None:
        """Computes the inverses that are due; returns None where nothing is.

        Args:
            step: steps done before it.
            epoch: epochs done, where that is known.
        """
        known = self._curvature.known
        due = [name for name in self.timetable.inverses_due(step) if name in known]
        if not due:
            return None
        damping = self._options.damping_at(epoch, step)
        with self._stopwatch.phase("invert"):
            failed = self._curvature.refresh(due, damping)
        self.timetable.inverses_done(step)
        return Inverted(damping, failed)
