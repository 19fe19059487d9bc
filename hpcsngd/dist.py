"""Collectives for 1..N ranks.

Without a process group every function works on one rank and communicates nothing, so callers need no
``if distributed``. All ranks must call a collective in the same order. Tensors travel on the device that the
backend can reach (gloo: CPU, nccl: the current GPU) and come back on the device they were given on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init(
    backend: str | None = None,
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = 1800.0,
    init_method: str = "env://",
) -> bool:
    """Joins the process group that the environment describes; returns whether there is one.

    Args:
        backend: ``"gloo"``, ``"nccl"``, ...; default: nccl for a CUDA device, gloo otherwise.
        device: where this rank computes. A CUDA device becomes the current one.
        timeout_s: seconds after which a collective fails because a rank is missing.
        init_method: where the ranks meet; ``"env://"`` reads MASTER_ADDR and MASTER_PORT, a ``file://`` path
            on a shared file system needs neither.

    Raises:
        ValueError: some of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set and others are missing.
    """
    needed = _ENVIRONMENT if init_method.startswith("env://") else _ENVIRONMENT[:2]
    missing = [name for name in needed if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return False
    if missing:
        raise ValueError(f"cannot join the process group: {', '.join(missing)} not set in the environment")
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch_dist.init_process_group(
        backend or ("nccl" if device.type == "cuda" else "gloo"),
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
    )
    return True


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if is_initialized():
        torch_dist.destroy_process_group()


def is_initialized() -> bool:
    """Returns whether this process belongs to a process group."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """Returns this process's rank; 0 without a process group."""
    return torch_dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks; 1 without a process group."""
    return torch_dist.get_world_size() if is_initialized() else 1


def barrier() -> None:
    """Returns once every rank has called it."""
    if not is_initialized():
        return
    on_gpu = torch_dist.get_backend() == "nccl"
    torch_dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over the ranks, in place, and returns it."""
    if is_initialized():
        carrier = _to_wire(tensor)
        torch_dist.all_reduce(carrier)
        _from_wire(carrier, tensor)
    return tensor


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrites ``tensor`` on every rank by that of rank ``src`` and returns it."""
    if is_initialized():
        carrier = _to_wire(tensor)
        torch_dist.broadcast(carrier, src)
        _from_wire(carrier, tensor)
    return tensor


@dataclass(frozen=True)
class Team:
    """Some of the ranks, this one among them.

    Attributes:
        ranks: ascending.
        group: of the backend; None where nobody communicates, and for all ranks.
    """

    ranks: tuple[int, ...]
    group: Any = None


def make_team(teams: Sequence[Sequence[int]]) -> Team:
    """Returns the team that this rank is in; every rank must call it with the same disjoint teams.

    Raises:
        ValueError: this rank is in none of them.
    """
    mine: Team | None = None
    for ranks in teams:
        needs_group = 1 < len(ranks) < world_size()
        # Every rank takes part in making every group.
        group = torch_dist.new_group(list(ranks)) if needs_group else None
        if rank() in ranks:
            mine = Team(tuple(ranks), group)
    if mine is None:
        raise ValueError(f"rank {rank()} is in none of the teams {teams}")
    return mine


def all_ranks_apart() -> Team:
    """Returns all ranks in a group of their own; every rank must call it."""
    ranks = tuple(range(world_size()))
    return Team(ranks, torch_dist.new_group(list(ranks)) if len(ranks) > 1 else None)


def all_gather_rows(
    tensor: Tensor, sizes: Sequence[int] | None = None, team: Team | None = None
) -> list[Tensor]:
    """Returns the tensors of all ranks, in rank order; the number of rows may differ between ranks.

    Args:
        tensor: shape ``(rows, ...)``; equal dtype and equal trailing dimensions on every rank.
        sizes: rows of every rank, where the caller knows them; otherwise one more collective finds out.
        team: the ranks that take part; default: all. A team of one communicates nothing.

    Raises:
        ValueError: ``sizes`` does not fit this rank's tensor or the number of ranks.
    """
    ranks = tuple(range(world_size())) if team is None else team.ranks
    place, group = ranks.index(rank()), None if team is None else team.group
    if sizes is not None and (len(sizes) != len(ranks) or sizes[place] != len(tensor)):
        raise ValueError(f"rank {rank()} of {len(ranks)} has {len(tensor)} rows, sizes say {list(sizes)}")
    if not is_initialized() or (team is not None and len(ranks) == 1):
        return [tensor]
    if sizes is None:
        sizes = _gather_equal(torch.tensor([len(tensor)]), len(ranks), group)[:, 0].tolist()
    # Collectives want equal shapes on every rank: pad to the longest, cut afterwards.
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = _gather_equal(padded, len(ranks), group)
    return [gathered[source, :size] for source, size in enumerate(sizes)]


def begin_all_to_all(
    parts: Sequence[Tensor], sizes: Sequence[int], team: Team | None = None
) -> Callable[[], list[Tensor]]:
    """Begins to send ``parts[r]`` to rank r; what it returns waits for what every rank sent here.

    Args:
        parts: one for each rank, of one dimension and one dtype; lengths may differ.
        sizes: how many numbers each rank sends here.
        team: of all ranks; one with a group of its own (`all_ranks_apart`) lets other collectives begin and
            end in between, in another order on every rank. Default: the group of everything else.
    """
    if not is_initialized():
        return lambda: list(parts)
    carrier = _to_wire(torch.cat(list(parts)))
    received, lengths = carrier.new_empty(sum(sizes)), [len(part) for part in parts]
    group = None if team is None else team.group
    work = torch_dist.all_to_all_single(received, carrier, list(sizes), lengths, group=group, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()
        return list(torch.split(received.to(parts[0].device), list(sizes)))

    return finish


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Sends ``parts[r]`` to rank r and returns what every rank sent here; see `begin_all_to_all`."""
    return begin_all_to_all(parts, sizes)()


def broadcast_object(value: T | None, src: int = 0) -> T:
    """Returns rank ``src``'s ``value`` on every rank (pickled: small objects from our own ranks only)."""
    box: list[T | None] = [value]
    if is_initialized():
        torch_dist.broadcast_object_list(box, src)
    return box[0]  # type: ignore[return-value]  # rank src's value, which is a T


def gather_objects(value: T, dst: int = 0) -> list[T] | None:
    """Returns the values of all ranks in rank order on rank ``dst``, None elsewhere (pickled, small)."""
    if not is_initialized():
        return [value]
    box: list[T] | None = [value] * world_size() if rank() == dst else None
    torch_dist.gather_object(value, box, dst)
    return box


def _gather_equal(tensor: Tensor, ranks: int, group: Any) -> Tensor:
    """Returns ``(ranks, *tensor.shape)`` on ``tensor``'s device; shapes must agree over the ranks."""
    carrier = _to_wire(tensor)
    parts = [torch.empty_like(carrier) for _ in range(ranks)]
    torch_dist.all_gather(parts, carrier, group=group)
    return torch.stack(parts).to(tensor.device)


def _to_wire(tensor: Tensor) -> Tensor:
    """Returns a contiguous ``tensor`` on the device that the backend communicates from."""
    device = torch.device("cuda") if torch_dist.get_backend() == "nccl" else torch.device("cpu")
    return tensor.detach().to(device).contiguous()


def _from_wire(carrier: Tensor, tensor: Tensor) -> None:
    """Copies a collective's result into ``tensor`` unless both share their memory."""
    if carrier.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(carrier)
