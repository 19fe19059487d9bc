"""Layers that one rank solves for all: `hpcsngd.optim.placement` says which and why.

Every rank gets the owner's result as it is, its own included, so that replicas do not drift apart by the
rounding of different machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator


class Owners:
    """Knows each owned layer's rank and exchanges what they compute.

    Args:
        communicator: does and counts the exchange.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.ranks: dict[str, int] = {}

    def is_here(self, layer: str) -> bool:
        """Returns whether this rank owns the layer."""
        return self.ranks.get(layer) == self._communicator.rank

    def assign(self, layer: str, rank: int | None) -> None:
        """Gives the layer to a rank, or to all of them (None)."""
        if rank is None:
            self.ranks.pop(layer, None)
        else:
            self.ranks[layer] = rank

    def exchange(self, mine: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns every owned layer's preconditioned gradient, from its owner.

        Args:
            mine: of the layers owned here.
            grads: the plain gradients, of the same layers on every rank.
        """
        # The order of names, not of assignment: the same on every rank, whatever failed where.
        names = sorted(name for name in self.ranks if name in grads)
        tensors = [mine[name][None] if self.is_here(name) else grads[name][None][:0] for name in names]
        ranks = range(self._communicator.world_size)
        counts = [[int(self.ranks[name] == rank) for name in names] for rank in ranks]
        joined = self._communicator.join_rows("broadcast", tensors, counts)
        return {name: matrix[0] for name, matrix in zip(names, joined, strict=True)}

    def all_states(self, mine: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns the states of all layers; every rank must call it where any layer is owned.

        Args:
            mine: of the layers that this rank has, owned or not.
        """
        states = dict(mine)
        for rank in sorted(set(self.ranks.values())):
            here = {name: portable(mine[name]) for name in mine if self.ranks.get(name) == rank}
            states.update(self._communicator.object_from(rank, here))
        return states


def portable(state: Any) -> Any:
    """Returns a state with its tensors on the CPU, in memory of their own: stacks are not sent along."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(state, dict):
        return {key: portable(value) for key, value in state.items()}
    return [portable(value) for value in state] if isinstance(state, list) else state
