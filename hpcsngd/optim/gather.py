"""Joins what the ranks captured into one batch, the same on every rank.

First one collective in which the ranks agree on what is usable and how many terms (`hpcsngd.optim.rows`)
its rows have: they are padded to the most on any rank, and summed up everywhere where one rank has done so.
Then one or two more, all layers in one buffer each, for what a method needs: all rows; the scores of all
rows and the rows drawn by them; or rows that each rank has chosen itself. The order of the joined batch is
rank by rank, within a rank as captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.placement import Load, Placer
from hpcsngd.optim.rows import Rows, common_terms

_NOT_FINITE, _MISALIGNED = -1, -2


@dataclass(frozen=True)
class Usable:
    """This rank's rows, without layers that have no sample or a fault on some rank.

    Attributes:
        rows: layer -> rows, the same layers on every rank.
        counts: for every rank, its samples of each of these layers.
        faults: layer -> what made the rows of some rank unusable, naming the ranks.
    """

    rows: dict[str, Rows]
    counts: list[list[int]]
    faults: dict[str, str]

    def samples(self) -> dict[str, int]:
        """Returns the samples of the joined batch by layer."""
        columns = zip(*self.counts, strict=True)
        return {name: sum(column) for name, column in zip(self.rows, columns, strict=True)}


def agree(communicator: Communicator, local: Mapping[str, Rows | MisalignedError]) -> Usable:
    """Returns what can be used on all ranks.

    Args:
        communicator: does and counts the exchange.
        local: this rank's rows by layer; every rank has the same layers in the same order.
    """
    table = communicator.gather_numbers("gather", [*_usable_rows(local), *_terms(local)])
    columns = dict(zip(local, zip(*(numbers[: len(local)] for numbers in table), strict=True), strict=True))
    terms = dict(zip(local, zip(*(numbers[len(local) :] for numbers in table), strict=True), strict=True))
    faults = {name: text for name, column in columns.items() if (text := _fault(local[name], column))}
    names = [name for name, column in columns.items() if name not in faults and sum(column) > 0]
    rows = {
        name: found.with_terms(common_terms(terms[name]))
        for name in names
        if isinstance(found := local[name], Rows)
    }
    return Usable(rows, [[columns[name][rank] for name in names] for rank in range(len(table))], faults)


@dataclass(frozen=True)
class Joined:
    """Rows of all ranks.

    Attributes:
        rows: of the layers that are here.
        owners: layer -> the only rank that has its rows; other layers are on every rank.
    """

    rows: dict[str, Rows]
    owners: dict[str, int]


def join_all(communicator: Communicator, usable: Usable, placer: Placer) -> Joined:
    """Returns the rows of all ranks by layer."""
    return _join(communicator, usable.rows, usable.counts, placer)


def join_scores(communicator: Communicator, usable: Usable) -> dict[str, Tensor]:
    """Returns the scores of the samples of all ranks by layer, float64."""
    local = [rows.scores() for rows in usable.rows.values()]
    return dict(zip(usable.rows, communicator.join_rows("gather", local, usable.counts), strict=True))


def join_chosen(
    communicator: Communicator, usable: Usable, chosen: Mapping[str, Tensor], placer: Placer
) -> Joined:
    """Returns chosen rows by layer: each rank sends those that it has.

    Args:
        communicator: does and counts the exchange.
        usable: from `agree`.
        chosen: ascending indices into the joined batch by layer.
        placer: says who gets them.
    """
    mine = {}
    chosen_counts: list[list[int]] = [[] for _ in usable.counts]
    for layer, (name, rows) in enumerate(usable.rows.items()):
        parts = _by_rank(chosen[name], [of_rank[layer] for of_rank in usable.counts])
        for of_rank, part in zip(chosen_counts, parts, strict=True):
            of_rank.append(len(part))
        mine[name] = rows.take(parts[communicator.rank])
    return _join(communicator, mine, chosen_counts, placer)


@dataclass(frozen=True)
class Block:
    """What one rank keeps of its own rows.

    Attributes:
        rows: the kept ones.
        mixing: how they stand for all rows of the rank, shape ``(r, r)``.
        left_out: a number to be summed over the ranks, shape ``(1,)``.
    """

    rows: Rows
    mixing: Tensor
    left_out: Tensor


def join_blocks(
    communicator: Communicator, local: Mapping[str, Block | None]
) -> tuple[dict[str, Block], dict[str, str]]:
    """Joins what every rank has kept: rows one after the other, mixing as a block diagonal, numbers summed.

    Args:
        communicator: does and counts the exchange.
        local: this rank's blocks by layer, the same layers on every rank; None where it failed.

    Returns:
        The joined blocks, and for the other layers which ranks failed.
    """
    sizes = [_NOT_FINITE if block is None else len(block.rows) for block in local.values()]
    table = communicator.gather_numbers("gather", sizes)
    columns = dict(zip(local, zip(*table, strict=True), strict=True))
    good = {name: block for name, block in local.items() if block is not None and min(columns[name]) >= 0}
    tensors = [
        t for block in good.values() for t in (*block.rows.tensors, block.mixing.flatten(), block.left_out)
    ]
    counts = [
        [
            count
            for name, block in good.items()
            for r in [columns[name][rank]]
            for count in (*(r for _ in block.rows.tensors), r * r, 1)
        ]
        for rank in range(len(table))
    ]
    parts = iter(communicator.join_rows("gather", tensors, counts))
    joined = {
        name: Block(
            block.rows.replaced([next(parts) for _ in block.rows.tensors]),
            _block_diagonal(next(parts), columns[name]),
            next(parts),
        )
        for name, block in good.items()
    }
    failed = {name: [rank for rank, r in enumerate(column) if r < 0] for name, column in columns.items()}
    return joined, {
        name: f"kernel is not finite on rank {', '.join(map(str, ranks))}"
        for name, ranks in failed.items()
        if ranks
    }


def _block_diagonal(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    blocks = torch.split(flat, [size * size for size in sizes])
    squares = [block.reshape(size, size) for block, size in zip(blocks, sizes, strict=True)]
    diagonal: Tensor = torch.block_diag(*squares)  # type: ignore[no-untyped-call]
    return diagonal


def _usable_rows(local: Mapping[str, Rows | MisalignedError]) -> list[int]:
    """Returns for each layer its number of rows, or a negative code for a fault."""
    finite = [rows.is_finite() for rows in local.values() if isinstance(rows, Rows)]
    # One transfer from the device for all layers.
    answers = iter(torch.stack(finite).tolist() if finite else [])
    return [
        _MISALIGNED if isinstance(rows, MisalignedError) else len(rows) if next(answers) else _NOT_FINITE
        for rows in local.values()
    ]


def _terms(local: Mapping[str, Rows | MisalignedError]) -> list[int]:
    """Returns for each layer its terms per sample; a layer with a fault is not joined, whatever this says."""
    return [rows.terms if isinstance(rows, Rows) else 1 for rows in local.values()]


def _fault(rows: Rows | MisalignedError, column: Sequence[int]) -> str:
    """Returns what is wrong with a layer's rows, naming the ranks, or an empty string."""
    bad = [rank for rank, count in enumerate(column) if count < 0]
    if not bad:
        return ""
    text = "rows are not finite" if column[bad[0]] == _NOT_FINITE else "calls in one forward do not align"
    detail = f" ({rows})" if isinstance(rows, MisalignedError) else ""
    return f"{text} on rank {', '.join(map(str, bad))}{detail}"


def _join(
    communicator: Communicator, local: Mapping[str, Rows], counts: Sequence[Sequence[int]], placer: Placer
) -> Joined:
    totals = dict(zip(local, map(sum, zip(*counts, strict=True)), strict=True))
    owners = placer.owners(
        {name: Load(totals[name], rows.numbers, rows.entries) for name, rows in local.items()}
    )
    shared = [name for name in local if name not in owners]
    owned = list(owners)
    joined = iter(communicator.join_rows("gather", *_tensors(local, counts, shared)))
    rows = {name: local[name].replaced([next(joined) for _ in local[name].tensors]) for name in shared}
    ranks = [owners[name] for name in owned for _ in local[name].tensors]
    sent = iter(communicator.send_rows("gather", *_tensors(local, counts, owned), ranks))
    for name in owned:
        tensors = [tensor for _ in local[name].tensors if (tensor := next(sent)) is not None]
        if tensors:
            rows[name] = local[name].replaced(tensors)
    return Joined({name: rows[name] for name in local if name in rows}, owners)


def _tensors(
    local: Mapping[str, Rows], counts: Sequence[Sequence[int]], names: Sequence[str]
) -> tuple[list[Tensor], list[list[int]]]:
    """Returns all tensors of some layers, and how many rows every rank has of each tensor."""
    tensors = [tensor for name in names for tensor in local[name].tensors]
    by_name = [dict(zip(local, of_rank, strict=True)) for of_rank in counts]
    return tensors, [[of_rank[name] for name in names for _ in local[name].tensors] for of_rank in by_name]


def _by_rank(chosen: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Splits ascending indices into the joined batch into each rank's own indices."""
    parts, start = [], 0
    for count in counts:
        parts.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return parts
