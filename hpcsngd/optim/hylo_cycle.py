"""When HyLo refreshes which layers, and how what hooks captured gets there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpcsngd.optim.calendar import Calendar
from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.capture import Capture
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.options import Options
from hpcsngd.optim.placement import refresh_cost
from hpcsngd.optim.refresh import Moment, Outcome, Refresher
from hpcsngd.optim.rows import Rows
from hpcsngd.optim.samplescale import SampleScale


class Cycle:
    """Takes the captured rows at the steps that refresh, and tells hooks what the next step wants.

    Args:
        options: of HyLo.
        layers: covered layers.
        capture: of their rows.
        refresher: makes curvatures of them.
        communicator: joins what layers cost.

    Attributes:
        calendar: which layers are due when; part of a run's state.
    """

    def __init__(
        self,
        options: Options,
        layers: Sequence[Layer],
        capture: Capture,
        refresher: Refresher,
        communicator: Communicator,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._capture, self._refresher, self._communicator = capture, refresher, communicator
        self._scale = SampleScale(options.loss_reduction, options.accumulation_steps)
        self._is_exact = options.conv_mode == "exact"
        self.calendar = Calendar(list(self._layers), options.refresh_every, stagger=options.stagger)

    @property
    def is_due(self) -> bool:
        """Returns whether this step refreshes any layer."""
        return self._capture.enabled

    def check(self, sample_scale: float | None, grad_scale: float) -> None:
        """Raises ValueError unless scales are positive."""
        self._scale.check(sample_scale, grad_scale)

    def expect(self, step: int) -> None:
        """Has the layers captured that are due at ``step``."""
        self._capture.due = frozenset(self.calendar.due(step))

    def refresh(self, now: Moment, sample_scale: float | None, grad_scale: float) -> Outcome:
        """Replaces the curvatures that are due.

        Args:
            now: the step, and what the refresh uses.
            sample_scale: of `HyLo.step`.
            grad_scale: from there.
        """
        self._scale.check_accumulation(sample_scale, self._capture.micro_batches)
        with self._refresher.stopwatch.phase("capture"):
            local = self._capture.take(self._scale.factor(sample_scale, grad_scale))
        if self.calendar.wants_costs:
            self._spread(local)
        outcome = self._refresher.refresh(local, now)
        if outcome.happened:
            self.calendar.refreshed(now.step)
        return outcome

    def _spread(self, local: Mapping[str, Rows | MisalignedError]) -> None:
        """Tells a staggered calendar what layers cost, once there are rows: from the joined batch's sizes."""
        counts = [len(rows) if isinstance(rows, Rows) else 0 for rows in local.values()]
        reads = [self._capture.reads.get(name, (0, 0)) for name in local]
        flat = [number for count, pair in zip(counts, reads, strict=True) for number in (count, *pair)]
        sums = self._communicator.sum_numbers("stagger", flat)
        if any(sums[::3]):
            costs = {
                name: refresh_cost(self._layers[name], *sums[3 * i : 3 * i + 3], exact=self._is_exact)
                for i, name in enumerate(local)
            }
            self.calendar.set_costs(costs)
