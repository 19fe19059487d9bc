"""Which samples each rank uses in each step.

The order of an epoch follows from (seed, epoch) alone and is cut into global steps by the number of samples
and the global batch alone; ranks then share each step. So the samples of step k are the same for any number
of ranks with the same global batch, and training can be resumed at any step, even on another number of ranks.

Every sample is used exactly once per epoch: nothing is padded, repeated or dropped. Only where consecutive
steps are to overlap does a step also have the last samples of the one before, which is what it says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from hpcsngd.train import seeds
from hpcsngd.train.faults import SettingError


def step_sizes(samples: int, global_batch: int, ranks: int) -> list[int]:
    """Returns the number of samples of every global step of an epoch.

    All steps have ``global_batch`` samples but the last, which takes the rest: as a step of its own if that
    is at least half a global batch, and otherwise together with the step before. The rule depends on the
    number of ranks only where ranks have one sample each: there half a batch would leave ranks without any.

    Raises:
        SettingError: fewer samples than ranks.
    """
    if samples < ranks:
        raise SettingError(f"{samples} training samples cannot be shared by {ranks} ranks")
    full, rest = divmod(samples, global_batch)
    sizes = [global_batch] * full
    if rest == 0:
        return sizes
    if full and (2 * rest < global_batch or rest < ranks):
        return [*sizes[:-1], global_batch + rest]
    return [*sizes, rest]


def even_parts(total: int, parts: int) -> list[int]:
    """Returns ``parts`` sizes that sum to ``total`` and differ by at most one, the larger ones first."""
    size, larger = divmod(total, parts)
    return [size + (index < larger) for index in range(parts)]


def micro_batch_count(size: int, batch_size: int, ranks: int) -> int:
    """Returns how many micro-batches every rank makes of its share of a global step of ``size`` samples.

    The number is the same on all ranks, no micro-batch is empty, and none exceeds ``batch_size`` (unless that
    is 1, where a step that took in the rest may have micro-batches of 2).
    """
    shares = even_parts(size, ranks)
    return min(-(-shares[0] // batch_size), shares[-1])


class ShardedSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches, as lists of sample indices, from a position to the end of its epoch.

    Args:
        samples: size of the training set.
        batch_size: samples per rank and micro-batch.
        accumulate: micro-batches per step; None: as many as the whole set takes, which then is one step.
        rank: this rank.
        ranks: number of ranks.
        seed: of the order.
        blocks: sizes of consecutive parts of the set that are gone through one after the other, in a new
            order each epoch (files, of which one is in memory); default: one part.
        by_block: whether each block is one step.
        overlap: share of a step's own samples, its last ones, that belong to the next step of the epoch too.
        targets: how many targets (tokens) each sample has; default: one each.
        shuffled: whether each epoch has an order of its own; otherwise samples come as they are numbered.

    Attributes:
        global_batch: own samples of a full step, all ranks.
        sizes: samples of every step of the epoch, all ranks, those of the step before included.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        accumulate: int | None = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        blocks: Sequence[int] | None = None,
        by_block: bool = False,
        overlap: float = 0.0,
        targets: Sequence[int] | None = None,
        shuffled: bool = True,
    ) -> None:
        self._batch_size, self._rank, self._ranks, self._seed = batch_size, rank, ranks, seed
        self._blocks, self._by_block, self._overlap = list(blocks or [samples]), by_block, overlap
        self._targets, self._is_shuffled = targets, shuffled
        self._counted: tuple[int, list[int]] = (-1, [])
        self._epoch, self._first_step = 0, 0
        self._order_of: tuple[int, list[int]] = (-1, [])
        self.global_batch = samples if accumulate is None else batch_size * accumulate * ranks
        if by_block:
            self.global_batch = max(self._blocks)
            if min(self._blocks) < ranks:
                raise SettingError(f"a file of {min(self._blocks)} samples cannot be shared by {ranks} ranks")
            self._set_own(self._block_sizes())
        else:
            self._set_own(step_sizes(samples, self.global_batch, ranks))

    @property
    def epoch(self) -> int:
        """Returns the epoch, from 0, of the next iteration."""
        return self._epoch

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of global steps in an epoch."""
        return len(self.sizes)

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Sets where the next iteration begins: epoch from 0, step within the epoch from 0."""
        self._epoch, self._first_step = epoch, step
        if self._by_block:
            self._set_own(self._block_sizes())

    def micro_batches_in(self, step: int) -> int:
        """Returns the number of micro-batches of a step within the epoch."""
        return self._count(self.sizes[step])

    def batch(self, step: int) -> list[list[int]]:
        """Returns this rank's micro-batches of a step within the epoch."""
        stop = self._stops[step]
        return self._cut(stop - self.sizes[step], stop)

    def shared(self, step: int) -> list[list[int]]:
        """Returns this rank's micro-batches of those samples of a step that the next one has too."""
        return self._cut(self._stops[step] - self.shared_size(step), self._stops[step])

    def shared_size(self, step: int) -> int:
        """Returns how many samples a step shares with the next one, all ranks: if any, one each at least."""
        own = self._own[step]
        return min(own, max(self._ranks, round(self._overlap * own))) if self._overlap else 0

    def targets_in(self, step: int) -> int:
        """Returns the number of targets, of all ranks, of a step within the epoch; alike on every rank."""
        if self._targets is None:
            return self.sizes[step]
        if self._counted[0] != self._epoch:
            counts = (self._targets[index] for index in self._current_order())
            sums = [0, *itertools.accumulate(counts)]
            stops = zip(self.sizes, self._stops, strict=True)
            self._counted = (self._epoch, [sums[stop] - sums[stop - size] for size, stop in stops])
        return self._counted[1][step]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._first_step, self.steps_per_epoch):
            yield from self.batch(step)

    def _set_own(self, sizes: list[int]) -> None:
        self._own, self._stops = sizes, list(itertools.accumulate(sizes))
        earlier = [0, *(self.shared_size(step) for step in range(len(sizes) - 1))]
        self.sizes: Sequence[int] = [own + more for own, more in zip(sizes, earlier, strict=True)]

    def _count(self, size: int) -> int:
        return micro_batch_count(size, self._batch_size, self._ranks)

    def _cut(self, start: int, stop: int) -> list[list[int]]:
        """Returns this rank's micro-batches of a stretch of the epoch's order."""
        order, shares = self._current_order(), even_parts(stop - start, self._ranks)
        place, parts = start + sum(shares[: self._rank]), []
        for part in even_parts(shares[self._rank], self._count(stop - start)):
            parts.append(order[place : place + part])
            place += part
        return parts

    def _current_order(self) -> list[int]:
        if self._order_of[0] != self._epoch:
            self._order_of = (self._epoch, self.order(self._epoch))
        return self._order_of[1]

    def order(self, epoch: int) -> list[int]:
        """Returns all samples in the order of an epoch, counted from 0."""
        if not self._is_shuffled:
            return list(range(sum(self._blocks)))
        generator = self._generator(epoch)
        if len(self._blocks) == 1:
            whole: list[int] = torch.randperm(self._blocks[0], generator=generator).tolist()
            return whole
        starts = [0, *itertools.accumulate(self._blocks)]
        order: list[int] = []
        for block in self._block_order(generator):
            order += (torch.randperm(self._blocks[block], generator=generator) + starts[block]).tolist()
        return order

    def _block_sizes(self) -> list[int]:
        return [self._blocks[block] for block in self._block_order(self._generator(self._epoch))]

    def _generator(self, epoch: int) -> torch.Generator:
        return seeds.generator(self._seed, "order", epoch)

    def _block_order(self, generator: torch.Generator) -> list[int]:
        """Returns the blocks in the order of an epoch."""
        blocks: list[int] = torch.randperm(len(self._blocks), generator=generator).tolist()
        return blocks


class EvaluationSampler(Sampler[list[int]]):
    """Yields this rank's batches of an evaluation: every ranks-th sample, each sample on exactly one rank.

    Args:
        samples: size of the set.
        batch_size: samples per batch.
        rank: this rank.
        ranks: number of ranks.
        groups: sizes of consecutive groups that must not be parted; then every ranks-th group instead.
    """

    def __init__(
        self, samples: int, batch_size: int, *, rank: int = 0, ranks: int = 1, groups: Sequence[int] = ()
    ) -> None:
        starts = [0, *itertools.accumulate(groups)]
        self._mine: Sequence[int] = range(rank, samples, ranks)
        if groups:
            mine = range(rank, len(groups), ranks)
            self._mine = [index for group in mine for index in range(starts[group], starts[group + 1])]
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._mine), self._batch_size):
            yield list(self._mine[start : start + self._batch_size])


class StreamSampler(Sampler[list[int]]):
    """Yields this rank's batches of streams: all of its streams at one moment, then at the next one.

    Args:
        samples: size of the set, a multiple of ``streams``; sample ``t * streams + s`` is stream s at time t.
        streams: how many there are; each is on one rank.
        rank: this rank.
        ranks: number of ranks.
    """

    def __init__(self, samples: int, streams: int, *, rank: int = 0, ranks: int = 1) -> None:
        parts = even_parts(streams, ranks)
        first = sum(parts[:rank])
        self._mine = range(first, first + parts[rank])
        self._starts = range(0, samples, streams)

    def __iter__(self) -> Iterator[list[int]]:
        if self._mine:
            yield from ([start + stream for stream in self._mine] for start in self._starts)
