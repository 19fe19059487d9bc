"""Brings K-FAC's statistics to the ranks that hold the factors, and agrees on what cannot be used.

Statistics are sums with counts, so the sum over the ranks is that of the joined batch, however uneven the
ranks' shares are. Factors travel as triangles, to their holder only (`hpcsngd.optim.kaisa`), in buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kaisa import Role
from hpcsngd.optim.kfac_layers import CoveredLayer, Statistic
from hpcsngd.optim.packing import pack, packed_numbers

#: Whose samples a factor is of: all ranks'; or its holder's alone (DP-KFAC, Zhang et al., IEEE TCC 2022).
Scope = Literal["all", "local"]
#: A factor: the layer's name, and 0 for A, 1 for G.
Item: TypeAlias = tuple[str, int]

#: Numbers that travel at a time: the copies made for sending stay small, and the first can go early.
BUCKET_NUMBERS = 2**20


@dataclass(frozen=True)
class Reduced:
    """New statistics, divided by their counts.

    Attributes:
        names: of the layers that some sample used and that have no fault; the same on every rank.
        means: factor -> statistic, packed, of those layers' factors that this rank holds.
        inputs: layer -> how many inputs its A is the mean of.
        faults: layer -> what made its statistic unusable; the same on every rank.
    """

    names: list[str]
    means: dict[Item, Tensor]
    inputs: dict[str, int]
    faults: dict[str, str]


@dataclass(frozen=True)
class Reducer:
    """Knows where statistics go.

    Attributes:
        communicator: does and counts the exchange.
        layers: the layers that are due, alike on every rank.
        roles: who holds their factors.
        scope: whose samples count.
    """

    communicator: Communicator
    layers: Sequence[CoveredLayer]
    roles: Mapping[str, Role]
    scope: Scope

    def reduce(
        self, local: Mapping[str, Statistic | MisalignedError], early: Mapping[Item, Tensor] | None = None
    ) -> Reduced:
        """Returns the statistics of all ranks together.

        Args:
            local: this rank's by layer; with scope ``"local"`` of the layers that it holds.
            early: sums that are here already (`hpcsngd.optim.kfac_early`); None: they are still to be made.
        """
        totals, faults = self._agree_on_counts(local)
        layers = [layer for layer in self.layers if totals[layer.name][1] and layer.name not in faults]
        sums = self._sums(layers, local) if early is None else early.items()
        usable = {layer.name for layer in layers}
        means = {item: total / totals[item[0]][item[1]] for item, total in sums if item[0] in usable}
        bad = self._agree_on_faulty(layers, means)
        good = [layer.name for layer in layers if layer.name not in bad]
        faults = faults | dict.fromkeys(bad, "its statistic is not finite")
        kept = {item: mean for item, mean in means.items() if item[0] not in bad}
        return Reduced(good, kept, {name: totals[name][0] for name in good}, faults)

    def _agree_on_counts(
        self, local: Mapping[str, Statistic | MisalignedError]
    ) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """Returns every layer's inputs and samples on all ranks, and what does not align on some rank."""
        found = [local.get(layer.name) for layer in self.layers]
        counts = [number for statistic in found for number in _counts(statistic)]
        sums = iter(self.communicator.sum_numbers("reduce", counts))
        totals, faults = {}, {}
        for layer, statistic in zip(self.layers, found, strict=True):
            totals[layer.name] = (next(sums), next(sums))
            bad = next(sums)
            if bad:
                detail = f" ({statistic})" if isinstance(statistic, MisalignedError) else ""
                faults[layer.name] = f"calls in one forward do not align on {bad} rank(s){detail}"
        return totals, faults

    def _sums(
        self, layers: Sequence[CoveredLayer], local: Mapping[str, Statistic | MisalignedError]
    ) -> Iterator[tuple[Item, Tensor]]:
        """Yields the factors that this rank holds, packed, not yet divided by their counts."""
        rank = self.communicator.rank
        items = [(layer.name, side) for layer in layers for side in range(len(layer.factor_shapes()))]
        tensors = {
            (name, side): tensor
            for name, found in local.items()
            if isinstance(found, Statistic)
            for side, tensor in enumerate(found.tensors)
        }
        if self.communicator.world_size == 1 or self.scope == "local":
            yield from ((item, pack(tensors[item])) for item in items if self._holder(item) == rank)
            return
        for bucket in buckets(items, [tensors[item].shape for item in items]):
            flat = [pack(tensors[item]) for item in bucket]
            owners = [self._holder(item) for item in bucket]
            totals = self.communicator.sum_at_owners("reduce", flat, owners)
            yield from (
                (item, total) for item, total in zip(bucket, totals, strict=True) if total is not None
            )

    def _holder(self, item: Item) -> int:
        return self.roles[item[0]].holders[item[1]]

    def _agree_on_faulty(self, layers: Sequence[CoveredLayer], means: Mapping[Item, Tensor]) -> set[str]:
        """Returns the layers to leave out: an entry that is not finite would stay in the average for good."""
        extremes = [torch.stack(mean.aminmax()).isfinite().all() for mean in means.values()]
        # One transfer from the device for all factors.
        answers = torch.stack(extremes).tolist() if extremes else []
        finite = dict(zip(means, answers, strict=True))
        items = [(layer.name, side) for layer in layers for side in range(len(layer.factor_shapes()))]
        numbers = [int(not finite.get(item, True)) for item in items]
        sums = self.communicator.sum_numbers("reduce", numbers)
        return {name for (name, _), bad in zip(items, sums, strict=True) if bad}


def _counts(statistic: Statistic | MisalignedError | None) -> tuple[int, int, int]:
    """Returns inputs, samples, and whether calls do not align."""
    if isinstance(statistic, Statistic):
        return statistic.inputs, statistic.samples, 0
    return 0, 0, int(statistic is not None)


def buckets(items: Sequence[Item], shapes: Sequence[Sequence[int]]) -> Iterator[list[Item]]:
    """Yields the items in order, at most BUCKET_NUMBERS at a time, or one."""
    bucket: list[Item] = []
    filled = 0
    for item, shape in zip(items, shapes, strict=True):
        numbers = packed_numbers(shape)
        if bucket and filled + numbers > BUCKET_NUMBERS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += numbers
    if bucket:
        yield bucket
