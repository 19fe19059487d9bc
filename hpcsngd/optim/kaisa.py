"""Which rank holds and inverts which factor, and which ranks precondition, receive, and share results.

Source: Pauloski et al., "KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural Networks", SC
2021, sections 3.1 and 3.2. The P ranks form a grid of w rows and P / w columns, ``w = P * fraction``:

    row k       the ranks k P/w ... (k + 1) P/w - 1: they share one copy of all inverses
    column c    the ranks c, c + P/w, c + 2 P/w, ...: each of them has the inverses of the column's layers

Each layer has one column, whose ranks precondition it; within the column one rank holds the running A, sums
it over the ranks and inverts it, and one does so with G (the same one where they are colocated). Layers go to
columns, and factors to the ranks of a column, by longest processing time first. ``fraction = 1`` is KAISA's
COMM-OPT (every rank preconditions every layer), ``1 / P`` its MEM-OPT, what lies between HYBRID-OPT.

Bytes that a rank hands to collectives, with e bytes a number, L layers, n factors, of T numbers in the
triangle of a factor's matrix or in its diagonal, of which I are sent of its inverse (Cholesky: T; eigen:
``d^2 + d``, or d of a diagonal; large ones as they are kept, `hpcsngd.optim.kfac_halves`), B blocks; and D
numbers in a layer's gradient:

    factor update     e (sum of T over the factors held elsewhere)                    all_to_all
                      24 L + 8 n: counts and faults                                   2 all_reduces
    inverse update    e max over its column of (sum of I that a rank holds)           all_gather in the column
                      8 sum of B + 16 n: mean eigenvalues, failures                   2 all_reduces
    step              e max over its row of (sum of D of a rank's column)             all_gather in the row

Where `KFAC.begin_step` announces the step, the all_to_alls are begun in the backward pass and counted as
all_to_all_async, as far as the layers' gradients come there; layers without samples then send zeros.

A group of one rank sends nothing, so there is no inverse to send with ``fraction = 1 / P`` and no gradient
with 1. With factors of one rank's own samples (``"local"``) the first line is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from hpcsngd.optim.placement import spread

Cost = Literal["compute", "memory"]


@dataclass(frozen=True)
class Grid:
    """P ranks in rows and columns.

    Attributes:
        ranks: P.
        workers: w, ranks in a column, a divisor of P.
    """

    ranks: int
    workers: int

    @classmethod
    def of_fraction(cls, ranks: int, fraction: float) -> Grid:
        """Returns the grid where a layer is preconditioned by this share of the ranks, by one at least.

        Raises:
            ValueError: the share is not in [0, 1], or is no divisor of the ranks.
        """
        workers = max(1, round(ranks * fraction))
        if (
            not 0 <= fraction <= 1
            or ranks % workers
            or abs(workers - max(1.0, ranks * fraction)) > 1e-6 * ranks
        ):
            allowed = ", ".join(f"{w / ranks:.4g}" for w in range(1, ranks + 1) if ranks % w == 0)
            raise ValueError(
                f"grad_worker_fraction={fraction}: on {ranks} ranks it may be {allowed}, or 0 for one"
            )
        return cls(ranks, workers)

    @property
    def columns(self) -> list[list[int]]:
        """Returns the ranks of every column."""
        width = self.ranks // self.workers
        return [list(range(column, self.ranks, width)) for column in range(width)]

    @property
    def rows(self) -> list[list[int]]:
        """Returns the ranks of every row."""
        width = self.ranks // self.workers
        return [list(range(first, first + width)) for first in range(0, self.ranks, width)]

    def column_of(self, rank: int) -> int:
        """Returns the column that a rank is in."""
        return rank % (self.ranks // self.workers)


@dataclass(frozen=True)
class Role:
    """Who does what for a layer.

    Attributes:
        column: its ranks precondition.
        holders: for each factor the rank that holds and inverts it.
    """

    column: int
    holders: tuple[int, ...]


def inversion_cost(shape: Sequence[int]) -> int:
    """Returns what it takes to invert a factor, ``(blocks, d, d)`` or ``(blocks, d)``, in products."""
    return prod(shape) * (shape[-1] if len(shape) == 3 else 1)


def place(costs: Mapping[str, Sequence[int]], grid: Grid, *, colocate: bool) -> dict[str, Role]:
    """Returns every layer's role.

    Args:
        costs: layer -> cost of each of its factors, alike on every rank.
        grid: of the ranks.
        colocate: whether all factors of a layer have the same holder.
    """
    columns = spread([sum(factors) for factors in costs.values()], len(grid.columns))
    column_of = dict(zip(costs, columns, strict=True))
    roles: dict[str, Role] = {}
    for column, members in enumerate(grid.columns):
        names = [name for name in costs if column_of[name] == column]
        tasks = [[sum(costs[name])] if colocate else list(costs[name]) for name in names]
        bins = iter(spread([task for of_layer in tasks for task in of_layer], len(members)))
        for name, of_layer in zip(names, tasks, strict=True):
            ranks = [members[next(bins)] for _ in of_layer]
            roles[name] = Role(column, tuple(ranks * len(costs[name]) if colocate else ranks))
    return {name: roles[name] for name in costs}
