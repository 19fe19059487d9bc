"""What the ranks tell each other in a refresh of K-FAC's inverses: `hpcsngd.optim.kaisa` says who needs what.

Every rank uses what it was sent even of its own, so that all replicas compute with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hpcsngd import dist
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kaisa import Role
from hpcsngd.optim.kfac_exchange import Item
from hpcsngd.optim.kfac_inverter import Inverter, Part, mean_eigenvalues

#: What the bytes and the time are counted for.
PHASE = "broadcast"


class PartExchange:
    """Sends mean eigenvalues and failures to all ranks, and parts of inverses through a column.

    Args:
        communicator: does and counts the exchange.
        inverter: made the parts.
        roles: of every layer.
        team: the ranks of this rank's column.
    """

    def __init__(
        self, communicator: Communicator, inverter: Inverter, roles: Mapping[str, Role], team: dist.Team
    ) -> None:
        self._communicator, self._inverter, self._roles, self._team = communicator, inverter, roles, team

    def means(
        self, shapes: Mapping[Item, Sequence[int]], averages: Mapping[Item, Tensor]
    ) -> dict[str, list[Tensor]]:
        """Returns the mean eigenvalues of all blocks of A and, where there is one, G, by layer, on the CPU.

        Args:
            shapes: of factors, the same on every rank.
            averages: those that this rank holds.
        """
        numbers: list[float] = []
        for item, shape in shapes.items():
            average = averages.get(item)
            numbers += [0.0] * shape[0] if average is None else mean_eigenvalues(average).tolist()
        sums = iter(self._communicator.sum_floats(PHASE, numbers))
        found: dict[str, list[Tensor]] = {}
        for (name, _), shape in shapes.items():
            values = torch.tensor([next(sums) for _ in range(shape[0])], dtype=torch.float64)
            found.setdefault(name, []).append(values)
        return found

    def failures(
        self, items: Sequence[Item], parts: Mapping[Item, Part | None]
    ) -> tuple[list[str], dict[Item, float]]:
        """Returns the layers that some rank failed to decompose, in order, and the jitter of all factors."""
        numbers: list[float] = []
        for item in items:
            part = parts.get(item)
            numbers += [float(item in parts and part is None), part.jitter if part else 0.0]
        sums = iter(self._communicator.sum_floats(PHASE, numbers))
        failed: list[str] = []
        jitters: dict[Item, float] = {}
        for item in items:
            if next(sums) and item[0] not in failed:
                failed.append(item[0])
            jitters[item] = next(sums)
        return failed, jitters

    def share(
        self,
        shapes: Mapping[Item, Sequence[int]],
        parts: Mapping[Item, Part | None],
        jitters: Mapping[Item, float],
        like: Tensor | None,
    ) -> dict[str, list[Part]]:
        """Returns the parts of the layers of this rank's column, by layer.

        Args:
            shapes: of the column's factors, the same on all its ranks; none of them failed.
            parts: those that this rank made.
            jitters: of all factors.
            like: an empty tensor of the dtype and on the device of the parts; None if there are none.
        """
        if len(self._team.ranks) > 1 and like is not None:
            parts = self._gather(shapes, parts, jitters, like)
        by_layer: dict[str, list[Part]] = {}
        for item in shapes:
            part = parts[item]
            if part is not None:
                by_layer.setdefault(item[0], []).append(part)
        return by_layer

    def _gather(
        self,
        shapes: Mapping[Item, Sequence[int]],
        parts: Mapping[Item, Part | None],
        jitters: Mapping[Item, float],
        like: Tensor,
    ) -> dict[Item, Part | None]:
        held = [
            [item for item in shapes if self._roles[item[0]].holders[item[1]] == rank]
            for rank in self._team.ranks
        ]
        numbers = {item: self._inverter.sent_numbers(shape) for item, shape in shapes.items()}
        sizes = [sum(numbers[item] for item in of_rank) for of_rank in held]
        rows = [row for item in shapes if (part := parts.get(item)) for row in self._inverter.sent(part)]
        gathered = self._communicator.gather_in(PHASE, self._team, torch.cat([like, *rows]), sizes)
        return {
            item: self._inverter.received(row, shapes[item], jitters[item])
            for of_rank, flat in zip(held, gathered, strict=True)
            for item, row in zip(of_rank, torch.split(flat, [numbers[i] for i in of_rank]), strict=True)
        }
