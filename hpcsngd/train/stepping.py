"""Where a step's batches come from, and how its gradients become weights. The loop has no branches on it.

Most optimizers see a step's batch once. L-BFGS evaluates it again, at other weights, as often as its line
search asks. All evaluations of a step must be of one function, so each begins with

- the same samples, in the same micro-batches on the same ranks, changed at random in the same way;
- the same random streams (dropout), which follow from seed, rank and step;
- the same buffers, those of the beginning of the step.

In training mode batch norm computes with the statistics of each micro-batch, so these are part of the
function. Its running statistics advance once per step, by the first evaluation, as with other optimizers:
weights that a line search has tried and left leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from hpcsngd import dist
from hpcsngd.optim.lbfgs import LBFGS
from hpcsngd.train import data, seeds
from hpcsngd.train.data import Batch, Wanted
from hpcsngd.train.metrics import Recorder
from hpcsngd.train.sampler import ShardedSampler

#: Runs the model over so many micro-batches, of so many samples on all ranks; leaves the mean gradient of
#: these and returns this rank's part of their mean loss.
Pass = Callable[[Iterator[Batch], int, int], Tensor]


class Stepping(Protocol):
    """What the loop asks of it."""

    def start(self, epoch: int, step: int) -> None:
        """Sets where the next steps are: epoch from 0, step within the epoch from 0."""

    def batches(self, step: int) -> Iterator[Batch]:
        """Returns an iterator whose next micro-batches are those of a step within the epoch."""

    @property
    def can_recover(self) -> bool:
        """Returns whether `update` knows what to do where the loss is not finite."""

    def update(self, loss: Tensor, run_pass: Pass) -> int:
        """Turns the gradients of the step's batch into new weights.

        Args:
            loss: this rank's part of the batch's mean loss, finite on all ranks unless `can_recover`.
            run_pass: computes loss and gradients anew.

        Returns:
            How many samples it used for that, all ranks.
        """

    def record(self, recorder: Recorder, step: int) -> None:
        """Writes what there is to say of the latest step, so many steps done."""


class GradientStepping:
    """One pass over each step's batch; optimizers that need no more than its gradients.

    Args:
        batches: this rank's training batches.
        sampler: the one that ``batches`` iterates.
        optimizers: each has a part of the parameters.
        scaler: of the loss.
    """

    def __init__(
        self,
        batches: DataLoader[Batch],
        sampler: ShardedSampler,
        optimizers: list[Optimizer],
        scaler: torch.amp.GradScaler,
    ) -> None:
        self._loader, self._sampler, self._optimizers, self._scaler = batches, sampler, optimizers, scaler
        self._batches: Iterator[Batch] = iter(())

    def start(self, epoch: int, step: int) -> None:
        """Begins to load."""
        self._sampler.start_at(epoch, step)
        self._batches = iter(self._loader)

    def batches(self, step: int) -> Iterator[Batch]:
        """Returns the one iterator of the epoch."""
        return self._batches

    @property
    def can_recover(self) -> bool:
        """Returns False: nothing is known of other weights."""
        return False

    def update(self, loss: Tensor, run_pass: Pass) -> int:
        """Does a step of each optimizer."""
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return 0

    def record(self, recorder: Recorder, step: int) -> None:
        """Writes nothing."""


class StepSampler(Sampler[Wanted]):
    """Yields the micro-batches that were chosen last, with their epoch.

    Args:
        sampler: of the training set; says which epoch it is in.
    """

    def __init__(self, sampler: ShardedSampler) -> None:
        self._sampler = sampler
        self._chosen: list[list[int]] = []

    def choose(self, micro_batches: list[list[int]]) -> int:
        """Sets what the next iteration yields; returns their number."""
        self._chosen = micro_batches
        return len(micro_batches)

    def __iter__(self) -> Iterator[Wanted]:
        for indices in self._chosen:
            yield Wanted(indices, self._sampler.epoch)


class ClosureStepping:
    """L-BFGS: as many passes over each step's batch as it asks for; they are read anew, never all held.

    Args:
        optimizer: of all parameters; the gradients of ``run_pass`` come reduced.
        model: the bare model.
        samples: the training set.
        sampler: cuts it into steps. Where these overlap, the shared samples are what curvature comes from.
        seed: of the run.
        workers: loader processes.
        pin: whether batches lie in pinned memory.
    """

    def __init__(
        self,
        optimizer: LBFGS,
        model: nn.Module,
        samples: data.Samples,
        sampler: ShardedSampler,
        *,
        seed: int,
        workers: int,
        pin: bool,
    ) -> None:
        self._optimizer, self._model, self._sampler, self._seed = optimizer, model, sampler, seed
        self._chosen = StepSampler(sampler)
        self._loader = data.loader(samples, self._chosen, workers=workers, pin=pin)
        self._epoch, self._step, self._objective = 0, 0, float("nan")
        self._buffers: list[Tensor] = []

    def start(self, epoch: int, step: int) -> None:
        """Notes the epoch; loading begins with each step."""
        self._sampler.start_at(epoch, step)
        self._epoch = epoch

    def batches(self, step: int) -> Iterator[Batch]:
        """Returns the batch's micro-batches and sets the scene of every evaluation in this step."""
        self._step, self._buffers = step, self._copied_buffers()
        self._seed_streams()
        self._chosen.choose(self._sampler.batch(step))
        return iter(self._loader)

    @property
    def can_recover(self) -> bool:
        """Returns whether there are pairs to forget; without any the weights are at fault, or the data."""
        return self._optimizer.has_pairs

    def update(self, loss: Tensor, run_pass: Pass) -> int:
        """Does a step of L-BFGS, whose first evaluation has just been made."""
        step, used = self._step, 0
        advanced, first = self._copied_buffers(), [loss]

        def evaluate(micro_batches: list[list[int]], size: int) -> Tensor:
            nonlocal used
            used += size
            self._set_buffers(self._buffers)
            self._seed_streams()
            count = self._chosen.choose(micro_batches)
            return run_pass(iter(self._loader), count, size)

        def closure() -> Tensor:
            return first.pop() if first else evaluate(self._sampler.batch(step), self._sampler.sizes[step])

        def on_shared() -> Tensor:
            return evaluate(self._sampler.shared(step), self._sampler.shared_size(step))

        pairs = on_shared if self._sampler.shared_size(step) else None
        self._objective = self._optimizer.step(closure, pair_closure=pairs)
        self._set_buffers(advanced)
        return used

    def record(self, recorder: Recorder, step: int) -> None:
        """Writes a row of lbfgs.csv."""
        recorder.lbfgs(step, self._objective, self._optimizer.counts)

    def _seed_streams(self) -> None:
        where = ("closure", dist.rank(), self._epoch, self._step)
        seeds.seed_streams(seeds.derive(self._seed, *where))

    def _copied_buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._model.buffers()]

    @torch.no_grad()
    def _set_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._model.buffers(), values, strict=True):
            buffer.copy_(value)
