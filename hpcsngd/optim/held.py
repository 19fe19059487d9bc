"""Every layer's curvature in sample space that this rank holds between refreshes, and who has the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.curvature import SampleCurvature
from hpcsngd.optim.gradients import Solved
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.owners import Owners
from hpcsngd.optim.stacks import Stacks
from hpcsngd.optim.stopwatch import Stopwatch


class Curvatures(Mapping[str, SampleCurvature]):
    """The curvatures solved here, by layer; those solved here for all ranks are stacked by themselves.

    Args:
        layers: covered layers, in the order in which curvatures are stacked.
        communicator: exchanges what owners compute.
        rows_dtype: layer -> dtype of its rows.
        stopwatch: counts projections and what owners send.

    Attributes:
        multiplications: of the projections of one step, of all layers that are solved here.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        communicator: Communicator,
        rows_dtype: Callable[[Layer], torch.dtype],
        stopwatch: Stopwatch,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._rows_dtype, self._communicator = rows_dtype, communicator
        self._owners = Owners(communicator)
        self._curvature: dict[str, SampleCurvature] = {}
        self._stopwatch = stopwatch
        self.multiplications = 0
        self._stacks, self._owned_stacks = Stacks(stopwatch), Stacks(stopwatch)

    def __getitem__(self, name: str) -> SampleCurvature:
        return self._curvature[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curvature)

    def __len__(self) -> int:
        return len(self._curvature)

    def is_covered(self, name: str) -> bool:
        """Returns whether some rank has a curvature of the layer."""
        return name in self._curvature or name in self._owners.ranks

    def replace(self, new: Mapping[str, SampleCurvature | None], owners: Mapping[str, int]) -> None:
        """Takes over new curvatures.

        Args:
            new: by layer; None where its owner has it.
            owners: layer -> its only rank; all other layers are every rank's.
        """
        for name, curvature in new.items():
            self._owners.assign(name, owners.get(name))
            if curvature is None:
                self._curvature.pop(name, None)
            else:
                self._curvature[name] = curvature
        self._stack()

    def solve(self, grads: Mapping[str, Tensor]) -> list[Solved]:
        """Returns the preconditioned gradients of the layers that every rank solves for."""
        return self._stacks.solve(grads)

    def from_owners(
        self, grads: Mapping[str, Tensor], finish: Callable[[Solved], Tensor]
    ) -> dict[str, Tensor]:
        """Returns the preconditioned gradients of the layers that have an owner, as the owner finished them.

        Args:
            grads: plain gradients, of the same layers on every rank.
            finish: what the owner does with its result before it sends it.
        """
        mine: dict[str, Tensor] = {}
        for group in self._owned_stacks.solve(grads):
            mine.update(zip(group.names, finish(group), strict=True))
        with self._stopwatch.phase("broadcast"):
            return self._owners.exchange(mine, grads)

    def clear(self) -> None:
        """Forgets everything."""
        self._curvature, self._owners.ranks = {}, {}
        self._stack()

    def like(self, name: str) -> Tensor:
        """Returns an empty tensor on the device and in the dtype of the layer's rows."""
        layer = self._layers[name]
        return torch.empty(0, device=layer.module.weight.device, dtype=self._rows_dtype(layer))

    def state_dict(self) -> dict[str, Any]:
        """Returns every layer's rows and factors; every rank must call it."""
        states = self._owners.all_states({name: c.state_dict() for name, c in self._curvature.items()})
        return {
            "ranks": self._communicator.world_size,
            "owners": dict(self._owners.ranks),
            "layers": {name: states[name] for name in self._layers if name in states},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that any number of ranks may have saved.

        Raises:
            ValueError: layers that are not covered here or have another shape.
        """
        unknown = sorted(set(state["layers"]) - set(self._layers))
        if unknown:
            raise ValueError(f"state has layers that are not covered here: {', '.join(unknown)}")
        loaded = {name: self._load(name, saved) for name, saved in state["layers"].items()}
        # On as many ranks as before, owners go on; on any other number every rank has everything for now.
        is_alike = state["ranks"] == self._communicator.world_size
        ranks = self._owners.ranks = dict(state["owners"]) if is_alike else {}
        self._curvature = {
            name: found for name, found in loaded.items() if name not in ranks or self._owners.is_here(name)
        }
        self._stack()

    def _load(self, name: str, saved: Mapping[str, Any]) -> SampleCurvature:
        layer = self._layers[name]
        try:
            return SampleCurvature.from_state(saved, layer.row_sizes, layer.groups, self.like(name))
        except ValueError as error:
            raise ValueError(f"state of layer {name}: {error}") from error

    def _stack(self) -> None:
        """Stacks the curvatures, always in the order of the layers."""
        rows = [curvature.rows for curvature in self._curvature.values()]
        self.multiplications = sum(len(of_layer) * of_layer.entries for of_layer in rows)
        names = [name for name in self._layers if name in self._curvature]
        owned = [name for name in names if self._owners.is_here(name)]
        shared = [name for name in names if name not in owned]
        self._curvature = {
            **self._stacks.update({name: self._curvature[name] for name in shared}),
            **self._owned_stacks.update({name: self._curvature[name] for name in owned}),
        }
