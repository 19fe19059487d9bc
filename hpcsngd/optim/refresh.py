"""One refresh of HyLo: from the rows captured here to new curvatures on every rank that needs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.checks import at_least_one_step
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.compare import Comparison
from hpcsngd.optim.curvature import SampleCurvature, build_all
from hpcsngd.optim.held import Curvatures
from hpcsngd.optim.observe import Observer
from hpcsngd.optim.options import Options
from hpcsngd.optim.placement import Placer
from hpcsngd.optim.records import Fallback, Kept
from hpcsngd.optim.reporting import fall_back
from hpcsngd.optim.rows import Rows
from hpcsngd.optim.sketches import Batch, Compression, Plain
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """What is so at one refresh.

    Attributes:
        step: steps done before it.
        method: that it uses.
        damping: that it uses.
    """

    step: int
    method: Plain
    damping: float


@dataclass(frozen=True)
class Outcome:
    """What a refresh did.

    Attributes:
        happened: whether there were any rows.
        fallbacks: layers whose refresh failed.
        kept: what compressed methods kept.
        captured_bytes: in this rank's rows, before they travelled.
    """

    happened: bool
    fallbacks: tuple[Fallback, ...] = ()
    kept: tuple[Kept, ...] = ()
    captured_bytes: int = 0


class Refresher:
    """Recomputes curvatures from rows.

    Attributes:
        compression: what makes sketches of a batch; its seed is part of a run's state.
        comparison: what results are compared with.
        stopwatch: counts phases.

    Args:
        options: of HyLo.
        communicator: gathers the rows.
        curvatures: where new ones go.
        observer: looks at kernels.
        stopwatch: counts phases.
    """

    def __init__(
        self,
        options: Options,
        communicator: Communicator,
        curvatures: Curvatures,
        observer: Observer,
        stopwatch: Stopwatch,
    ) -> None:
        self.compression: Compression = options.compression()
        self.comparison = Comparison()
        self._options, self._placement = options, options.effective_placement()
        self._communicator, self._curvatures = communicator, curvatures
        self._observer, self.stopwatch = observer, stopwatch

    def refresh(self, local: Mapping[str, Rows | MisalignedError], now: Moment) -> Outcome:
        """Replaces the curvature of every layer that has rows on some rank.

        Args:
            local: this rank's rows by layer; the same layers on every rank.
            now: the same on every rank.
        """
        with self.stopwatch.phase("gather"):
            period = at_least_one_step(self._options.refresh_every, now.step)
            batch = self.compression.gather(
                self._communicator,
                local,
                now.method,
                step=now.step,
                damping=now.damping,
                everything=self._observer.wants_exact,
                placer=Placer(self._placement, self._communicator.world_size, period),
                stopwatch=self.stopwatch,
            )
        if not batch.samples and not batch.faults:
            return Outcome(happened=False)
        with self.stopwatch.phase("factorise"):
            failures, kept = self._factorise(batch, now)
        if self._observer.wants_exact:
            with self.stopwatch.phase("observe"):
                self._factorise_to_compare(batch, now)
        faults = {**batch.faults, **failures}
        fallbacks = tuple(self._fall_back(name, reason, now.step) for name, reason in faults.items())
        captured_bytes = sum(rows.size_bytes for rows in local.values() if isinstance(rows, Rows))
        return Outcome(True, fallbacks, kept, captured_bytes)

    def _factorise(self, batch: Batch, now: Moment) -> tuple[dict[str, str], tuple[Kept, ...]]:
        """Replaces curvatures; returns where that failed and why, and what was kept."""
        sketches = {name: sketch for name, sketch in batch.sketches.items() if sketch is not None}
        kernels = [sketch.kernel() for sketch in sketches.values()]
        with self.stopwatch.phase("invert"):
            curvatures = build_all(list(sketches.values()), kernels, now.damping, self._options.complement)
        found = dict(zip(sketches, curvatures, strict=True))
        # None for a failure here; layers owned elsewhere are their owners' to judge.
        built = {name: found.get(name) for name in batch.sketches}
        with self.stopwatch.phase("observe"):
            for name, kernel in zip(sketches, kernels, strict=True):
                if built[name] is not None:
                    self._observer.kernel(name, kernel, now.damping)
        # The same rows on unlike hardware may fail on one rank only: one rank's failure is everybody's.
        failures = [int(name in built and built[name] is None) for name in batch.samples]
        kept = [len(sketches[name].rows) if name in sketches else 0 for name in batch.owners]
        sums = self._communicator.sum_numbers("factorise", [*failures, *kept])
        failed = [name for name, ranks in zip(batch.samples, sums, strict=False) if ranks]
        succeeded = {name: built.get(name) for name in batch.samples if name not in failed}
        self._curvatures.replace(succeeded, batch.owners)
        sizes = {name: len(sketch.rows) for name, sketch in sketches.items()}
        sizes.update(zip(batch.owners, sums[len(failures) :], strict=True))
        return dict.fromkeys(failed, "kernel is not positive definite"), self._kept(batch, sizes, now)

    def _kept(self, batch: Batch, sizes: Mapping[str, int], now: Moment) -> tuple[Kept, ...]:
        rule = self.compression.rule.name
        return tuple(
            Kept(now.step + 1, name, now.method, rule, batch.samples[name], size)
            for name, size in sizes.items()
            if size and now.method != "sngd"
        )

    def _factorise_to_compare(self, batch: Batch, now: Moment) -> None:
        """Keeps the exact curvature of the same batch, and that of the other of KID and KIS."""

        def build(name: str, method: Plain) -> SampleCurvature | None:
            sketch = self.compression.sketch(method, name, batch.everything[name], now.step, now.damping)
            if sketch is None:
                return None
            return SampleCurvature.build(sketch, sketch.kernel(), now.damping, self._options.complement)

        compressed: tuple[Plain, ...] = () if self._options.method == "sngd" else ("kid", "kis")
        self.comparison.refresh(batch, [method for method in compressed if method != now.method], build)

    def _fall_back(self, name: str, reason: str, step: int) -> Fallback:
        instead = "last good curvature" if self._curvatures.is_covered(name) else "plain gradient"
        return fall_back(logger, step + 1, name, reason, instead)
