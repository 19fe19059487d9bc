"""Sums K-FAC's factors over the ranks while the backward pass still runs.

Gradients reach the last layer first. So buckets hold the layers in reverse order, and each is sent as soon as
all its layers have their statistics: its time on the wire passes beside the rest of the backward pass. The
order is the same on every rank, and so are the sums: terms are added in rank order whenever they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kaisa import Role
from hpcsngd.optim.kfac_exchange import Item, buckets
from hpcsngd.optim.kfac_layers import CoveredLayer, Statistic
from hpcsngd.optim.kfac_watch import Found
from hpcsngd.optim.packing import pack


class EarlySums:
    """Sums of the factors of one step at a time, each at its holder.

    Args:
        communicator: does and counts the exchange.
        roles: who holds which factor.
        dtype: layer -> dtype of its statistics.
    """

    def __init__(
        self,
        communicator: Communicator,
        roles: Mapping[str, Role],
        dtype: Callable[[CoveredLayer], torch.dtype],
    ) -> None:
        self._communicator, self._roles, self._dtype = communicator, roles, dtype
        # A group of their own: beside them DistributedDataParallel sends gradients.
        self._team = communicator.apart()
        self._layers: dict[str, CoveredLayer] = {}
        self._waiting: list[list[Item]] = []
        self._ready: dict[Item, Tensor] = {}
        self._begun: list[tuple[list[Item], Callable[[], list[Tensor | None]]]] = []

    def expect(self, layers: Sequence[CoveredLayer]) -> None:
        """Starts over with the layers whose statistics will come, the same on every rank."""
        for _, finish in self._begun:
            finish()
        self._begun, self._ready = [], {}
        self._layers = {layer.name: layer for layer in layers}
        shapes = {
            (layer.name, side): shape
            for layer in reversed(layers)
            for side, shape in enumerate(layer.factor_shapes())
        }
        self._waiting = list(buckets(list(shapes), list(shapes.values())))

    def add(self, name: str, found: Found, *, op: str = "all_to_all_async") -> None:
        """Takes a layer's statistic and sends what is full by now; of calls that do not align, zeros."""
        layer = self._layers[name]
        statistic = found if isinstance(found, Statistic) else layer.no_statistic(self._dtype(layer))
        for side, tensor in enumerate(statistic.tensors):
            self._ready[name, side] = pack(tensor)
        while self._waiting and all(item in self._ready for item in self._waiting[0]):
            items = self._waiting.pop(0)
            flat = [self._ready.pop(item) for item in items]
            owners = [self._roles[layer].holders[side] for layer, side in items]
            finish = self._communicator.begin_sum_at_owners("reduce", flat, owners, op=op, team=self._team)
            self._begun.append((items, finish))

    def finish(self, local: Mapping[str, Found], grad_scale: float) -> dict[Item, Tensor]:
        """Returns the sums that this rank holds, packed, when all have come.

        Args:
            local: the statistics of all layers that were expected; those that did not come early go now.
            grad_scale: what gradients in them are to be divided by.
        """
        gone = {name for items, _ in self._begun for name, _ in items} | {name for name, _ in self._ready}
        for name in self._layers:
            if name not in gone:
                self.add(name, local[name], op="all_to_all")
        begun, self._begun = self._begun, []
        sums = {
            item: total
            for items, finish in begun
            for item, total in zip(items, finish(), strict=True)
            if total is not None
        }
        return {item: self._unscaled(item, total, grad_scale) for item, total in sums.items()}

    def _unscaled(self, item: Item, total: Tensor, grad_scale: float) -> Tensor:
        """Returns a sum with the scale of its gradients undone; gradients make a layer's last factor."""
        is_of_gradients = item[1] == len(self._layers[item[0]].factor_shapes()) - 1
        return total / grad_scale**2 if is_of_gradients else total
