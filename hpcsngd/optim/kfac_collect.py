"""From K-FAC's hooks to the statistics of a step, joined over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from hpcsngd.optim import fisher as fishers
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kaisa import Role
from hpcsngd.optim.kfac_early import EarlySums
from hpcsngd.optim.kfac_exchange import Reduced, Reducer
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_options import Options
from hpcsngd.optim.kfac_watch import Announcement, Found, Watch
from hpcsngd.optim.samplescale import SampleScale
from hpcsngd.optim.stopwatch import Stopwatch


class Collector:
    """Watches the layers and brings their statistics to the ranks that hold the factors.

    Args:
        layers: covered layers.
        options: K-FAC's arguments.
        communicator: does and counts the exchange.
        roles: of every layer.
        stopwatch: counts ``capture`` and ``reduce``.

    Attributes:
        watch: the hooks.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        options: Options,
        communicator: Communicator,
        roles: Mapping[str, Role],
        stopwatch: Stopwatch,
    ) -> None:
        self._layers, self._options = layers, options
        self._communicator, self._roles, self._stopwatch = communicator, roles, stopwatch
        self._scale = SampleScale(options.loss_reduction, options.accumulation_steps)
        self._is_empirical = options.fisher == "empirical"
        self.watch = Watch(layers, stopwatch, options.dtype, pushes=not self._is_empirical)
        exchanges = options.overlap and options.factors == "all" and communicator.world_size > 1
        self._early = EarlySums(communicator, roles, self.watch.dtype) if exchanges else None
        self._announced_scale: float | None = None
        self._step = self._pushes = 0

    def expect(self, due: Collection[str], step: int) -> None:
        """Tells the hooks whose factors the coming step updates, as far as this rank's samples count."""
        rank, is_local = self._communicator.rank, self._options.factors == "local"
        mine = (name for name in due if not is_local or self._roles[name].holders[0] == rank)
        self.watch.due, self.watch.announced = frozenset(mine), None
        self._step, self._pushes = step, 0

    def begin_step(self, sample_scale: float | None, micro_batches: int) -> None:
        """See `hpcsngd.optim.KFAC.begin_step`."""
        self._scale.check(sample_scale, 1.0)
        if micro_batches < 1:
            raise ValueError(f"micro_batches={micro_batches}: must be at least 1")
        if self._early is None:
            return
        self._early.expect([layer for layer in self._layers if layer.name in self.watch.due])
        self._announced_scale = sample_scale
        scale = self._scale.factor(sample_scale, 1.0) if self._is_empirical else _unscaled
        self.watch.announced = Announcement(micro_batches, scale, self._send_early)

    def push(self, outputs: Tensor) -> None:
        """Sends the gradients of the Fisher matrix through the graph; none for the empirical one."""
        if not self.watch.is_waiting:
            return
        options = self._options
        with self._stopwatch.phase("capture"), torch.autocast(outputs.device.type, enabled=False):
            if options.fisher == "type-2":
                gradients = fishers.columns(options.loss, outputs, options.loss_reduction)
            else:
                generator = self._generator(outputs.device)
                count = options.mc_samples
                gradients = fishers.draws(options.loss, outputs, options.loss_reduction, count, generator)
            self.watch.push(outputs, gradients)
        self._pushes += 1

    def check(self, sample_scale: float | None, grad_scale: float) -> None:
        """Refuses what a step cannot be done with.

        Raises:
            ValueError: a scale is not positive, or not what was announced.
            RuntimeError: nobody called `push` where that is needed.
        """
        self._scale.check(sample_scale, grad_scale)
        if self.watch.announced and sample_scale != self._announced_scale:
            raise ValueError(
                f"sample_scale={sample_scale}: begin_step was told {self._announced_scale}; factors are sent"
            )
        if self.watch.is_waiting and not self.watch.micro_batches:
            raise RuntimeError(f"fisher={self._options.fisher!r}: call before_backward(outputs) first")

    def collect(self, due: Collection[str], sample_scale: float | None, grad_scale: float) -> Reduced:
        """Returns the statistics of the layers that are due, and forgets what was captured.

        Args:
            due: names, the same on every rank.
            sample_scale: see `hpcsngd.optim.KFAC.step`.
            grad_scale: the same.
        """
        factor = self._scale.factor(sample_scale, grad_scale)
        if self._is_empirical:
            self._scale.check_accumulation(sample_scale, self.watch.micro_batches)
        else:
            # Their gradients are those of own losses from the start.
            factor, grad_scale = _unscaled, 1.0
        announced = self.watch.announced
        with self._stopwatch.phase("capture"):
            local = self.watch.take(announced.scale if announced else factor)
        with self._stopwatch.phase("reduce"):
            early = self._early.finish(local, grad_scale) if announced and self._early else None
            layers = [layer for layer in self._layers if layer.name in due]
            reducer = Reducer(self._communicator, layers, self._roles, self._options.factors)
            return reducer.reduce(local, early)

    def close(self) -> None:
        """Removes every hook and waits for what was sent."""
        self.watch.close()
        if self._early is not None:
            self._early.expect([])

    def _send_early(self, name: str, found: Found) -> None:
        if self._early is not None:
            with self._stopwatch.phase("reduce"):
                self._early.add(name, found)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Returns a generator for this rank's draws of one micro-batch: the same after a resume."""
        numbers = (self._options.seed, self._communicator.rank, self._step, self._pushes)
        # Python hashes a tuple of integers alike in every process.
        return torch.Generator(device).manual_seed(hash(numbers) % 2**63)


def _unscaled(_: int) -> float:
    return 1.0
