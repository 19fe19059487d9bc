"""The factors and inverses of all layers, between updates, each on the ranks that have to do with it.

Who holds, inverts, preconditions and receives: `hpcsngd.optim.kaisa`. Every rank uses what it was sent even
of its own, so that all replicas compute with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kaisa import Grid, Role
from hpcsngd.optim.kfac_exchange import Item
from hpcsngd.optim.kfac_factors import Factors
from hpcsngd.optim.kfac_inverse import Inverse, Inverter, Part, inverse_from_state, mean_eigenvalues
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_stacks import InverseStacks, Solved
from hpcsngd.optim.owners import portable
from hpcsngd.optim.packing import pack, packed_numbers, unpack


class Curvature:
    """Keeps each layer's running factors and the inverse that is in use.

    Args:
        layers: covered layers.
        inverter: makes the inverses.
        communicator: does and counts the exchange.
        grid: of the ranks.
        roles: of every layer.
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
        dtype: torch.dtype | None,
        factor_dtype: torch.dtype | None,
        is_corrected: bool,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._inverter, self._communicator = inverter, communicator
        self._roles, self._column = roles, grid.column_of(communicator.rank)
        self._column_team = communicator.team(grid.columns)
        self._row_team = communicator.team(grid.rows)
        self._dtype, self._factor_dtype, self._is_corrected = dtype, factor_dtype, is_corrected
        self._factors: dict[Item, Factors] = {}  # of those that this rank holds
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
            means: those of the factors that this rank holds.
            decay: weight of what is already there.
        """
        self._known.update(names)
        for item, mean in means.items():
            old = self._factors.get(item)
            if old is not None:
                self._factors[item] = old.updated([mean], decay)
            else:
                dtype = self._factor_dtype or mean.dtype
                self._factors[item] = Factors.first([mean], decay, dtype, is_corrected=self._is_corrected)

    def refresh(self, names: Sequence[str], damping: float) -> dict[str, str]:
        """Computes the inverses of layers that have factors; returns where that failed, and why.

        A layer where it failed, on whatever rank, keeps the inverse that it had.
        """
        items = [
            (name, side) for name in names if name in self._known for side in range(len(self._shapes(name)))
        ]
        averages = {
            item: self._factors[item].averages(self._work_dtype(item[0]))[0]
            for item in items
            if item in self._factors
        }
        self._share_means(items, averages)
        found = self._inverter.decompose(
            list(averages.values()),
            [self._means[name] for name, _ in averages],
            [side for _, side in averages],
            damping,
        )
        parts = dict(zip(averages, found, strict=True))
        failed, jitters = self._agree_on_failures(items, parts)
        good = [item for item in items if item[0] not in failed]
        self._share_parts(good, parts, jitters, damping)
        self._damping.update({name: damping for name, _ in good})
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
            "factors": sum(factors.size_bytes for factors in self._factors.values()),
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
            mine.setdefault(name, {})[f"factor {side}"] = held.state_dict()
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
            layer = state[name]
            self._known.add(name)
            self._factors.update(self._load_factors(name, layer["factors"]))
            if "inverse" not in layer:
                continue
            device = self._layers[name].weight.device
            self._means[name] = [mean.to(device) for mean in layer["means"]]
            self._damping[name] = layer["inverse"]["damping"]
            inverse = self._load_inverse(name, layer["inverse"])
            if self._roles[name].column == self._column:
                self._inverses[name] = inverse
        self._stack()

    def _share_means(self, items: Sequence[Item], averages: Mapping[Item, Tensor]) -> None:
        """Tells every rank the mean eigenvalues of all blocks of the factors in ``items``."""
        counts = [self._shapes(name)[side][0] for name, side in items]
        numbers: list[float] = []
        for item, blocks in zip(items, counts, strict=True):
            average = averages.get(item)
            numbers += [0.0] * blocks if average is None else mean_eigenvalues(average).tolist()
        sums = iter(self._communicator.sum_floats("broadcast", numbers))
        found: dict[str, list[Tensor]] = {}
        for (name, _), blocks in zip(items, counts, strict=True):
            values = torch.tensor([next(sums) for _ in range(blocks)], dtype=torch.float64)
            found.setdefault(name, []).append(values.to(self._layers[name].weight.device))
        self._means.update(found)

    def _agree_on_failures(
        self, items: Sequence[Item], parts: Mapping[Item, Part | None]
    ) -> tuple[list[str], dict[Item, float]]:
        """Returns the layers that some rank failed to decompose, in order, and the jitter of all factors."""
        numbers: list[float] = []
        for item in items:
            part = parts.get(item)
            numbers += [float(item in parts and part is None), part.jitter if part else 0.0]
        sums = iter(self._communicator.sum_floats("broadcast", numbers))
        failed: list[str] = []
        jitters: dict[Item, float] = {}
        for item in items:
            if next(sums) and item[0] not in failed:
                failed.append(item[0])
            jitters[item] = next(sums)
        return failed, jitters

    def _share_parts(
        self,
        items: Sequence[Item],
        parts: Mapping[Item, Part | None],
        jitters: Mapping[Item, float],
        damping: float,
    ) -> None:
        """Sends what was decomposed here through the column, and makes the inverses of its layers."""
        column = [item for item in items if self._roles[item[0]].column == self._column]
        if len(self._column_team.ranks) > 1:
            parts = self._gather_parts(column, parts, jitters)
        by_layer: dict[str, list[Part]] = {}
        for item in column:
            part = parts[item]
            if part is not None:
                by_layer.setdefault(item[0], []).append(part)
        for name, of_layer in by_layer.items():
            self._inverses[name] = self._inverter.assemble(of_layer, damping)

    def _gather_parts(
        self, items: Sequence[Item], parts: Mapping[Item, Part | None], jitters: Mapping[Item, float]
    ) -> dict[Item, Part | None]:
        held = [
            [item for item in items if self._roles[item[0]].holders[item[1]] == rank]
            for rank in self._column_team.ranks
        ]
        sizes = [sum(self._numbers(item) for item in of_rank) for of_rank in held]
        tensors = [t for item in items if (part := parts.get(item)) for t in part.tensors if t is not None]
        if not items:
            return {}
        flat = torch.cat([self._like(items[0]), *(self._packed(tensor) for tensor in tensors)])
        gathered = self._communicator.gather_in("broadcast", self._column_team, flat, sizes)
        result: dict[Item, Part | None] = {}
        for of_rank, numbers in zip(held, gathered, strict=True):
            start = 0
            for item in of_rank:
                found: list[Tensor | None] = []
                for shape in self._part_shapes(item):
                    if shape is None:
                        found.append(None)
                        continue
                    count = self._count(shape)
                    found.append(self._unpacked(numbers[start : start + count], shape))
                    start += count
                result[item] = Part(tuple(found), jitters[item])
        return result

    # Eigenvectors are no symmetric matrices: they travel whole.
    def _packed(self, tensor: Tensor) -> Tensor:
        return pack(tensor) if self._inverter.kind == "cholesky" else tensor.reshape(-1)

    def _unpacked(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        if self._inverter.kind == "cholesky":
            return unpack(flat, shape)
        return flat.reshape(tuple(shape)).clone()

    def _count(self, shape: Sequence[int]) -> int:
        return packed_numbers(shape) if self._inverter.kind == "cholesky" else prod(shape)

    def _numbers(self, item: Item) -> int:
        """Returns how many numbers of a decomposed factor travel."""
        return sum(self._count(shape) for shape in self._part_shapes(item) if shape is not None)

    def _part_shapes(self, item: Item) -> list[Sequence[int] | None]:
        return self._inverter.part_shapes(self._shapes(item[0])[item[1]])

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return self._layers[name].factor_shapes()

    def _like(self, item: Item) -> Tensor:
        """Returns an empty tensor on the device and in the dtype of a factor's inverse."""
        dtype = self._inverter.dtype or self._work_dtype(item[0])
        return torch.empty(0, device=self._layers[item[0]].weight.device, dtype=dtype)

    def _layer_state(self, name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        factors = [parts[f"factor {side}"] for side in range(len(self._shapes(name)))]
        sums = [total for factor in factors for total in factor["sums"]]
        state: dict[str, Any] = {"factors": {"sums": sums, "weight": factors[0]["weight"]}}
        if "inverse" in parts:
            state |= {"inverse": parts["inverse"], "means": self._means[name]}
        return state

    def _load_factors(self, name: str, saved: Mapping[str, Any]) -> dict[Item, Factors]:
        layer = self._layers[name]
        try:
            whole = Factors.from_state(saved, layer.factor_shapes(), self._factor_dtype, layer.weight.device)
        except ValueError as error:
            raise ValueError(f"state of layer {name}: {error}") from error
        return {
            (name, side): Factors((total,), whole.weight)
            for side, total in enumerate(whole.sums)
            if self._roles[name].holders[side] == self._communicator.rank
        }

    def _load_inverse(self, name: str, saved: Mapping[str, Any]) -> Inverse:
        layer = self._layers[name]
        try:
            return inverse_from_state(saved, self._inverter.kind, layer.weight.device, layer.shape)
        except ValueError as error:
            raise ValueError(f"state of layer {name}: {error}") from error

    def _work_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which a layer's factors are decomposed."""
        wide = torch.promote_types(self._layers[name].weight.dtype, torch.float32)
        return torch.promote_types(self._factor_dtype or self._dtype or wide, wide)

    def _stack(self) -> None:
        """Joins the inverses, always in the order of the layers."""
        order = [name for name in self._layers if name in self._inverses]
        self._inverses = self._stacks.update({name: self._inverses[name] for name in order})
