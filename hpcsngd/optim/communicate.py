"""Exchange of rows between ranks, fused into few collectives whose bytes are counted.

Bytes are the payload that one rank hands to a collective, padding included. On one rank nothing is exchanged
and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hpcsngd import dist

T = TypeVar("T")


class Communicator:
    """Collectives of a preconditioner, counted by phase and operation.

    Args:
        alone: whether this process keeps to itself, as if there were no others.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._alone = alone
        self._traffic: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def rank(self) -> int:
        """Returns this process's rank."""
        return 0 if self._alone else dist.rank()

    @property
    def world_size(self) -> int:
        """Returns the number of ranks that take part."""
        return 1 if self._alone else dist.world_size()

    def from_first(self, phase: str, number: float) -> float:
        """Returns rank 0's number on every rank."""
        if self.world_size == 1:
            return number
        local = torch.tensor([number], dtype=torch.float64)
        self._count(phase, "broadcast", local.nbytes)
        return float(dist.broadcast(local))

    def tensor_from_first(self, phase: str, tensor: Tensor) -> Tensor:
        """Returns rank 0's tensor on every rank; alike on all of them but for the numbers."""
        if self.world_size == 1:
            return tensor
        self._count(phase, "broadcast", tensor.nbytes)
        return dist.broadcast(tensor.clone())

    def object_from(self, rank: int, value: T) -> T:
        """Returns a rank's value on every rank (pickled, not counted: for checkpoints)."""
        return value if self.world_size == 1 else dist.broadcast_object(value, rank)

    def take_traffic(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Returns ``(phase, op) -> (calls, bytes)`` since the last call, and starts over."""
        traffic, self._traffic = self._traffic, {}
        return traffic

    def gather_numbers(self, phase: str, numbers: Sequence[int]) -> list[list[int]]:
        """Returns every rank's numbers, in rank order; equally many on every rank."""
        local = torch.tensor(numbers, dtype=torch.int64)
        return [part.tolist() for part in self._all_gather(phase, local, [len(numbers)] * self.world_size)]

    def sum_numbers(self, phase: str, numbers: Sequence[int]) -> list[int]:
        """Returns the element-wise sum over the ranks."""
        totals: list[int] = self.sum_tensor(phase, torch.tensor(numbers, dtype=torch.int64)).tolist()
        return totals

    def sum_floats(self, phase: str, numbers: Sequence[float]) -> list[float]:
        """Returns the element-wise sum over the ranks, in float64."""
        totals: list[float] = self.sum_tensor(phase, torch.tensor(numbers, dtype=torch.float64)).tolist()
        return totals

    def sum_tensor(self, phase: str, tensor: Tensor) -> Tensor:
        """Returns the sum over the ranks; of nothing, or on one rank, nothing travels."""
        if self.world_size == 1 or not tensor.numel():
            return tensor
        self._count(phase, "all_reduce", tensor.nbytes)
        return dist.all_reduce_sum(tensor.clone())

    def sum_at_owners(
        self, phase: str, tensors: Sequence[Tensor], owners: Sequence[int]
    ) -> list[Tensor | None]:
        """Returns the sum over the ranks of each tensor on its owner; see `begin_sum_at_owners`."""
        return self.begin_sum_at_owners(phase, tensors, owners)()

    def begin_sum_at_owners(
        self,
        phase: str,
        tensors: Sequence[Tensor],
        owners: Sequence[int],
        *,
        op: str = "all_to_all",
        team: dist.Team | None = None,
    ) -> Callable[[], list[Tensor | None]]:
        """Begins to sum tensors at their owners; what it returns waits for the sums, None elsewhere.

        Terms are added in rank order. What a rank has of its own does not travel and is not counted.

        Args:
            phase: what the bytes are counted for.
            tensors: this rank's, of one dimension and one dtype, alike on every rank but for the numbers.
            owners: the rank of each.
            op: what the bytes are counted as.
            team: see `dist.begin_all_to_all`.
        """
        if self.world_size == 1 or not tensors:
            return lambda: list(tensors)
        rank, empty = self.rank, tensors[0].new_empty(0)
        mine = [index for index, owner in enumerate(owners) if owner == rank]
        parts = [empty] * self.world_size
        for target in set(owners) - {rank}:
            parts[target] = torch.cat(
                [t for t, owner in zip(tensors, owners, strict=True) if owner == target]
            )
        lengths = [len(tensors[index]) for index in mine]
        sizes = [0 if source == rank else sum(lengths) for source in range(self.world_size)]
        self._count(phase, op, sum(part.nbytes for part in parts))
        own = torch.cat([empty, *(tensors[index] for index in mine)])
        receive = dist.begin_all_to_all(parts, sizes, team)

        def finish() -> list[Tensor | None]:
            total = torch.zeros_like(own)
            for source, part in enumerate(receive()):
                total += own if source == rank else part
            result: list[Tensor | None] = [None] * len(owners)
            for index, summed in zip(mine, torch.split(total, lengths), strict=True):
                result[index] = summed
            return result

        return finish

    def apart(self) -> dist.Team:
        """Returns the team of all ranks with a group of their own; every rank must call it."""
        return dist.Team((0,)) if self._alone else dist.all_ranks_apart()

    def team(self, teams: Sequence[Sequence[int]]) -> dist.Team:
        """Returns the team that this rank is in; every rank must call it with the same teams."""
        return dist.Team((0,)) if self._alone else dist.make_team(teams)

    def gather_in(self, phase: str, team: dist.Team, flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Returns what the ranks of a team have, in their order.

        Args:
            phase: what the bytes are counted for.
            team: who takes part.
            flat: this rank's, of one dimension; equal dtype on all of them.
            sizes: how many numbers each of them has.
        """
        if len(team.ranks) == 1 or not any(sizes):
            return [flat] * len(team.ranks)
        self._count(phase, "all_gather", max(sizes) * flat.element_size())
        return dist.all_gather_rows(flat, sizes, team)

    def join_rows(self, phase: str, tensors: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Returns each tensor joined along its first dimension over the ranks, in rank order.

        Args:
            phase: what the bytes are counted for.
            tensors: this rank's parts, shape ``(rows, ...)``, equal dtype; the same list on every rank apart
                from the number of rows. All travel in one collective.
            rows: for every rank, the rows of each of its parts.
        """
        if self.world_size == 1 or not tensors:
            return list(tensors)
        widths = [tensor.shape[1:].numel() for tensor in tensors]
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        counts = [[n * width for n, width in zip(of_rank, widths, strict=True)] for of_rank in rows]
        gathered = self._all_gather(phase, flat, [sum(of_rank) for of_rank in counts])
        split = [torch.split(part, of_rank) for part, of_rank in zip(gathered, counts, strict=True)]
        return [
            torch.cat([parts[index] for parts in split]).reshape(-1, *tensor.shape[1:])
            for index, tensor in enumerate(tensors)
        ]

    def send_rows(
        self, phase: str, tensors: Sequence[Tensor], rows: Sequence[Sequence[int]], owners: Sequence[int]
    ) -> list[Tensor | None]:
        """Returns each tensor joined as by `join_rows`, but on its owner only; None elsewhere.

        What a rank has of its own does not travel and is not counted.

        Args:
            phase: what the bytes are counted for.
            tensors: as for `join_rows`.
            rows: as for `join_rows`.
            owners: the rank of each tensor.
        """
        if self.world_size == 1 or not tensors:
            return list(tensors)
        widths = [tensor.shape[1:].numel() for tensor in tensors]
        mine = [index for index, owner in enumerate(owners) if owner == self.rank]
        parts = [tensors[0].new_empty(0)] * self.world_size
        for target in set(owners) - {self.rank}:
            flat = [t.reshape(-1) for t, owner in zip(tensors, owners, strict=True) if owner == target]
            parts[target] = torch.cat(flat)
        counts = [[of_rank[index] * widths[index] for index in mine] for of_rank in rows]
        sizes = [0 if source == self.rank else sum(of_rank) for source, of_rank in enumerate(counts)]
        self._count(phase, "all_to_all", sum(part.nbytes for part in parts))
        received = dist.all_to_all(parts, sizes)
        split = [
            [tensors[index].reshape(-1) for index in mine]
            if source == self.rank
            else list(torch.split(part, of_rank))
            for source, (part, of_rank) in enumerate(zip(received, counts, strict=True))
        ]
        result: list[Tensor | None] = [None] * len(tensors)
        for position, index in enumerate(mine):
            joined = torch.cat([pieces[position] for pieces in split])
            result[index] = joined.reshape(-1, *tensors[index].shape[1:])
        return result

    def _all_gather(self, phase: str, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if self.world_size == 1:
            return [tensor]
        self._count(phase, "all_gather", max(sizes) * tensor.element_size())
        return dist.all_gather_rows(tensor, sizes)

    def _count(self, phase: str, op: str, size_bytes: int) -> None:
        calls, total = self._traffic.get((phase, op), (0, 0))
        self._traffic[phase, op] = (calls + 1, total + size_bytes)
