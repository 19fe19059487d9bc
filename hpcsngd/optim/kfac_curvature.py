"""The factors and inverses of all layers, between updates, each on the ranks that have to do with it.

Who holds, inverts, preconditions and receives: `hpcsngd.optim.kaisa`. Every rank uses what it was sent even
of its own, so that all replicas compute with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.gradients import Solved
from hpcsngd.optim.kaisa import Grid, Role
from hpcsngd.optim.kfac_exchange import Item
from hpcsngd.optim.kfac_factors import Factor
from hpcsngd.optim.kfac_inverse import Inverse, inverse_from_state
from hpcsngd.optim.kfac_inverter import Inverter
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_parts import PHASE, PartExchange
from hpcsngd.optim.kfac_stacks import InverseStacks
from hpcsngd.optim.owners import portable
from hpcsngd.optim.packing import packed_numbers
from hpcsngd.optim.stopwatch import Stopwatch


class Curvature:
    """Keeps each layer's running factors and the inverse that is in use.

    Args:
        layers: covered layers.
        inverter: makes the inverses.
        communicator: does and counts the exchange.
        grid: of the ranks.
        roles: of every layer.
        stopwatch: counts what a refresh sends as phase ``broadcast``.
        dtype: of the statistics; None: that of the weights, at least float32.
        factor_dtype: of the running factors; None: that of the statistics.
        is_corrected: whether the running average is corrected for its start.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        inverter: Inverter,
        communicator: Communicator,
        grid: Grid,
        roles: Mapping[str, Role],
        *,
        stopwatch: Stopwatch,
        dtype: torch.dtype | None,
        factor_dtype: torch.dtype | None,
        is_corrected: bool,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._inverter, self._communicator = inverter, communicator
        self._roles, self._column = roles, grid.column_of(communicator.rank)
        self._column_team = communicator.team(grid.columns)
        self._exchange = PartExchange(communicator, inverter, roles, self._column_team)
        self._stopwatch = stopwatch
        self._row_team = communicator.team(grid.rows)
        self._dtype, self._factor_dtype, self._is_corrected = dtype, factor_dtype, is_corrected
        self._factors: dict[Item, Factor] = {}  # of those that this rank holds
        self._inverses: dict[str, Inverse] = {}  # of the layers of this rank's column
        self._stacks = InverseStacks()
        # Alike on every rank: layers with factors; the damping of layers with an inverse; mean eigenvalues.
        self._known: set[str] = set()
        self._damping: dict[str, float] = {}
        self._means: dict[str, list[Tensor]] = {}

    @property
    def known(self) -> set[str]:
        """Returns the layers that have factors on some rank."""
        return self._known

    def has_inverse(self, name: str) -> bool:
        """Returns whether a layer has an inverse on some rank."""
        return name in self._damping

    def update(self, names: Sequence[str], means: Mapping[Item, Tensor], decay: float) -> None:
        """Adds new statistics to the running averages.

        Args:
            names: of the layers that have new statistics, the same on every rank.
            means: those of the factors that this rank holds, packed (`hpcsngd.optim.packing`).
            decay: weight of what is already there.
        """
        self._known.update(names)
        for item, mean in means.items():
            old = self._factors.get(item)
            if old is not None:
                self._factors[item] = old.updated(mean, decay)
            else:
                dtype = self._factor_dtype or mean.dtype
                self._factors[item] = Factor.first(mean, decay, dtype, is_corrected=self._is_corrected)

    def refresh(self, names: Sequence[str], damping: float) -> dict[str, str]:
        """Computes the inverses of layers that have factors; returns where that failed, and why.

        A layer where it failed, on whatever rank, keeps the inverse that it had.
        """
        shapes = self._item_shapes([name for name in names if name in self._known])
        averages = {
            item: self._factors[item].average(shape, self._work_dtype(item[0]))
            for item, shape in shapes.items()
            if item in self._factors
        }
        with self._stopwatch.phase(PHASE):
            means = self._exchange.means(shapes, averages)
        for name, of_layer in means.items():
            self._means[name] = [mean.to(self._layers[name].weight.device) for mean in of_layer]
        found = self._inverter.decompose(
            list(averages.values()),
            [self._means[name] for name, _ in averages],
            [side for _, side in averages],
            damping,
        )
        parts = dict(zip(averages, found, strict=True))
        with self._stopwatch.phase(PHASE):
            failed, jitters = self._exchange.failures(list(shapes), parts)
            good = [name for name in means if name not in failed]
            column = self._item_shapes([name for name in good if self._roles[name].column == self._column])
            mine = self._exchange.share(column, parts, jitters, self._like(column))
        self._inverses |= {name: self._inverter.assemble(of, damping) for name, of in mine.items()}
        self._damping |= dict.fromkeys(good, damping)
        self._stack()
        return dict.fromkeys(failed, "its factors cannot be inverted")

    def mean_eigenvalue(self, name: str) -> float:
        """Returns the mean eigenvalue of a layer's curvature, over all its blocks, at its last refresh."""
        return float(torch.stack(self._means[name]).prod(0).mean())

    def solve(self, grads: Mapping[str, Tensor]) -> Iterator[Solved]:
        """Yields the preconditioned gradients of all layers that have an inverse; see `InverseStacks`.

        Args:
            grads: blocks ``(groups, d_out, d_in)``, of the same layers and alike on all ranks.
        """
        here = {name: grad for name, grad in grads.items() if name in self._inverses}
        solved = self._stacks.solve(here)
        if len(self._row_team.ranks) == 1:
            yield from solved
            return
        results = {
            name: result for group in solved for name, result in zip(group.names, group.results, strict=True)
        }
        columns = [
            [name for name in grads if self.has_inverse(name) and self._roles[name].column == column]
            for column in range(len(self._row_team.ranks))
        ]
        sizes = [sum(grads[name].numel() for name in names) for names in columns]
        kept = next(iter(grads.values())).new_empty(0) if grads else torch.empty(0)
        flat = torch.cat([kept, *(results[name].reshape(-1) for name in columns[self._column])])
        gathered = self._communicator.gather_in("precondition", self._row_team, flat, sizes)
        received: dict[str, Tensor] = {}
        for names, part in zip(columns, gathered, strict=True):
            pieces = torch.split(part, [grads[name].numel() for name in names])
            received.update(zip(names, pieces, strict=True))
        for name, grad in grads.items():
            if name in received:
                result = received[name].reshape(grad.shape)
                yield Solved([name], grad[None], result[None], self._damping[name])

    @property
    def size_bytes(self) -> dict[str, int]:
        """Returns the bytes on this rank by kind."""
        return {
            "factors": sum(factor.total.nbytes for factor in self._factors.values()),
            "inverses": sum(inverse.size_bytes for inverse in self._inverses.values()),
        }

    @property
    def jittered(self) -> int:
        """Returns how many layers' inverses on this rank needed jitter."""
        return sum(inverse.jitter > 0 for inverse in self._inverses.values())

    def clear(self) -> None:
        """Forgets everything."""
        self._factors, self._inverses, self._known, self._damping, self._means = {}, {}, set(), {}, {}
        self._stack()

    def state_dict(self) -> dict[str, Any]:
        """Returns the factors and inverse, as far as there are any, of each layer.

        Every rank must call it: each gives what it holds.
        """
        mine: dict[str, dict[str, Any]] = {}
        for (name, side), held in self._factors.items():
            mine.setdefault(name, {})[f"factor {side}"] = {"sum": held.total, "weight": held.weight}
        if self._communicator.rank == self._column_team.ranks[0]:
            for name, inverse in self._inverses.items():
                mine.setdefault(name, {})["inverse"] = inverse.state_dict()
        merged: dict[str, dict[str, Any]] = {name: {} for name in self._layers if name in self._known}
        for rank in range(self._communicator.world_size):
            is_alone = self._communicator.world_size == 1
            for name, parts in self._communicator.object_from(
                rank, mine if is_alone else portable(mine)
            ).items():
                merged[name].update(parts)
        return {name: self._layer_state(name, parts) for name, parts in merged.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, of which this rank keeps what it has to do with.

        Raises:
            ValueError: layers that are not covered here, or not in this shape.
        """
        unknown = sorted(set(state) - set(self._layers))
        if unknown:
            raise ValueError(f"state has layers that are not covered here: {', '.join(unknown)}")
        self.clear()
        for name in (name for name in self._layers if name in state):
            try:
                self._load_layer(name, state[name])
            except ValueError as error:
                raise ValueError(f"state of layer {name}: {error}") from error
        self._stack()

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return self._layers[name].factor_shapes()

    def _item_shapes(self, names: Sequence[str]) -> dict[Item, tuple[int, ...]]:
        """Returns the shapes of the factors of some layers."""
        return {(name, side): shape for name in names for side, shape in enumerate(self._shapes(name))}

    def _like(self, shapes: Mapping[Item, Sequence[int]]) -> Tensor | None:
        """Returns an empty tensor on the device and in the dtype of an inverse of some of these layers."""
        for name, _ in shapes:
            dtype = self._inverter.dtype or self._work_dtype(name)
            return torch.empty(0, device=self._layers[name].weight.device, dtype=dtype)
        return None

    def _layer_state(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        factors = [parts[f"factor {side}"] for side in range(len(self._shapes(name)))]
        sums = [factor["sum"] for factor in factors]
        state: dict[str, Any] = {"factors": {"sums": sums, "weight": factors[0]["weight"]}}
        if "inverse" in parts:
            state |= {"inverse": parts["inverse"], "means": self._means[name]}
        return state

    def _load_layer(self, name: str, state: Mapping[str, Any]) -> None:
        """Keeps of a layer's state what this rank has to do with."""
        device, shapes, role = self._layers[name].weight.device, self._shapes(name), self._roles[name]
        sums, weight = state["factors"]["sums"], state["factors"]["weight"]
        found, wanted = [len(total) for total in sums], [packed_numbers(shape) for shape in shapes]
        if found != wanted:
            raise ValueError(f"factors have {found} numbers, the layer wants {wanted}")
        self._known.add(name)
        for side, total in enumerate(sums):
            if role.holders[side] == self._communicator.rank:
                kept = total.to(device, self._factor_dtype or total.dtype)
                self._factors[name, side] = Factor(kept, weight)
        if "inverse" in state:
            inverse = inverse_from_state(state["inverse"], self._inverter.kind, device, shapes)
            self._means[name] = [mean.to(device) for mean in state["means"]]
            self._damping[name] = inverse.damping
            if role.column == self._column:
                self._inverses[name] = inverse

    def _work_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which a layer's factors are decomposed."""
        wide = torch.promote_types(self._layers[name].weight.dtype, torch.float32)
        return torch.promote_types(self._factor_dtype or self._dtype or wide, wide)

    def _stack(self) -> None:
        """Joins the inverses, always in the order of the layers."""
        order = [name for name in self._layers if name in self._inverses]
        self._inverses = self._stacks.update({name: self._inverses[name] for name in order})
