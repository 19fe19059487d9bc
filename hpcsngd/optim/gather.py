"""Joins the rows that the ranks captured into one batch, the same on every rank.

Two collectives, or three for a method that keeps a part of the samples: how many usable rows each rank has
and their terms, the scores of all rows, the (kept) rows of all layers in one buffer. The order of the joined
batch is rank by rank, within a rank as captured.

Bytes that a rank hands to a collective, L layers, n (kept) rows on the rank that has most, e bytes a number:

    table    16 L
    scores   8 n_all L                              only where a part is kept
    rows     e n sum over layers of the row         (terms * (groups * d_in + d_out)) as factors,
                                                    d_in * d_out as matrices (`hpcsngd.optim.rows`)

One sequence may be longer than another: terms are padded to the longest on any rank, and summed up on all
ranks where one rank has done so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.rows import Rows, common_terms

#: (layer, float64 scores of the joined batch) -> ascending indices of the samples to keep.
Choice = Callable[[str, Tensor], Tensor]

_NOT_FINITE, _MISALIGNED = -1, -2


@dataclass(frozen=True)
class JoinedBatch:
    """The rows of all ranks.

    Attributes:
        kept: layer -> the rows that the method keeps; layers without samples or with a fault are missing.
        everything: layer -> all rows, where they were asked for; otherwise empty.
        faults: layer -> what made the rows of some rank unusable, naming the ranks.
    """

    kept: dict[str, Rows]
    everything: dict[str, Rows]
    faults: dict[str, str]


def join_batch(
    communicator: Communicator,
    local: Mapping[str, Rows | MisalignedError],
    choose: Choice | None = None,
    *,
    everything: bool = False,
) -> JoinedBatch:
    """Gathers the rows of all ranks.

    Args:
        communicator: does and counts the exchange.
        local: this rank's rows by layer; every rank has the same layers in the same order.
        choose: which samples of a layer to keep; default: all.
        everything: whether to gather the rows that are not kept as well.
    """
    table = communicator.gather_numbers("gather", [*_usable_rows(local), *_terms(local)])
    columns = dict(zip(local, zip(*(of_rank[: len(local)] for of_rank in table), strict=True), strict=True))
    terms = dict(zip(local, zip(*(of_rank[len(local) :] for of_rank in table), strict=True), strict=True))
    faults = {name: text for name, column in columns.items() if (text := _fault(local[name], column))}
    names = [name for name, column in columns.items() if name not in faults and sum(column) > 0]
    usable = {
        name: rows.with_terms(common_terms(terms[name]))
        for name in names
        if isinstance(rows := local[name], Rows)
    }
    counts = [[columns[name][rank] for name in names] for rank in range(len(table))]
    if choose is None:
        joined = _join(communicator, usable, counts)
        return JoinedBatch(joined, joined if everything else {}, faults)
    scores = communicator.join_rows("gather", [rows.scores() for rows in usable.values()], counts)
    chosen = {name: choose(name, score) for name, score in zip(names, scores, strict=True)}
    if everything:
        joined = _join(communicator, usable, counts)
        kept = {name: joined[name].take(chosen[name]) for name in names}
        return JoinedBatch(kept, joined, faults)
    return JoinedBatch(_join_chosen(communicator, usable, counts, chosen), {}, faults)


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
    communicator: Communicator, local: Mapping[str, Rows], counts: Sequence[Sequence[int]]
) -> dict[str, Rows]:
    widths = [len(rows.tensors) for rows in local.values()]
    tensors = [tensor for rows in local.values() for tensor in rows.tensors]
    repeated = [
        [count for count, width in zip(of_rank, widths, strict=True) for _ in range(width)]
        for of_rank in counts
    ]
    joined = iter(communicator.join_rows("gather", tensors, repeated))
    return {name: rows.replaced(list(islice(joined, len(rows.tensors)))) for name, rows in local.items()}


def _join_chosen(
    communicator: Communicator,
    local: Mapping[str, Rows],
    counts: Sequence[Sequence[int]],
    chosen: Mapping[str, Tensor],
) -> dict[str, Rows]:
    """Returns the chosen rows: each rank sends those that it has."""
    mine = {}
    chosen_counts: list[list[int]] = [[] for _ in counts]
    for layer, (name, rows) in enumerate(local.items()):
        parts = _by_rank(chosen[name], [of_rank[layer] for of_rank in counts])
        for of_rank, part in zip(chosen_counts, parts, strict=True):
            of_rank.append(len(part))
        mine[name] = rows.take(parts[communicator.rank])
    return _join(communicator, mine, chosen_counts)


def _by_rank(chosen: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Splits ascending indices into the joined batch into each rank's own indices."""
    parts, start = [], 0
    for count in counts:
        parts.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return parts
