"""What work costs, and which rank does it.

Preconditioning on P ranks. A layer's curvature is either *replicated*, every rank gathers the rows and solves
for itself, or it has an *owner*, which alone gathers them, solves at every step and sends the preconditioned
gradient. With N rows of R numbers, a gradient of D numbers and f steps between refreshes, all ranks together
receive in one period

    replicated    (P - 1) N R                            rows, to everybody else
    owned         (P - 1) / P N R  +  f (P - 1) D        rows, to the owner; gradients, to everybody else

so that a layer is owned where ``f D < (P - 1) / P N R``. The other candidates never win. A kernel (N^2
numbers) or the solution ``y`` (N numbers a step) sent by an owner would come on top of the rows, which every
rank needs for ``U M`` and ``U^T y``, and to factorize again takes no bytes at all. Layers with an owner are
spread over the ranks by their work.

Bytes that a rank hands to collectives, e bytes a number (the tables of `hpcsngd.optim.sketches` on top):

    refresh     replicated layers    e max over ranks of (sum of n_p R)           one all_gather
                owned layers         e (sum of n_p R over layers owned elsewhere) one all_to_all
    step        owned layers         e max over ranks of (sum of D it owns)       one all_gather

Results do not depend on the choice beyond rounding. The rows in these formulas are those that travel: all of
them for SNGD and KID, the drawn ones for KIS. KID with scope "local" is always replicated: it sends little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcsngd.optim.layers import Layer

Placement = Literal["auto", "replicate", "owner"]

#: Reading one number of an activation costs as much as this many multiplications in a matrix product.
READ = 8


def spread(costs: Sequence[int], bins: int) -> list[int]:
    """Returns a bin for each cost, by longest processing time first.

    The costliest goes to the emptiest bin, and so on: no bin gets more than the mean plus the largest cost,
    or than 4/3 of what is possible (Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: of the tasks.
        bins: how many there are, at least 1. Of equal ones the first is taken.
    """
    loads = [0] * bins
    result = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda index: -costs[index]):
        emptiest = loads.index(min(loads))
        result[task] = emptiest
        loads[emptiest] += costs[task]
    return result


def refresh_cost(layer: Layer, samples: int, inputs: int, outputs: int, *, exact: bool) -> int:
    """Returns about how many multiplications it takes to capture a layer's rows and factorize their kernel.

    Args:
        layer: which one.
        samples: n.
        inputs: numbers in the layer's inputs, all samples together.
        outputs: the same of its outputs.
        exact: whether rows are the true gradients (`hpcsngd.optim.calls`); otherwise their sums are.
    """
    d_in, d_out = layer.row_sizes
    positions = outputs // max(1, samples * d_out)
    taps = d_in * d_out * samples * positions if exact else READ * (inputs + outputs)
    small = not exact or layer.factors_are_cheaper(positions)
    row = (d_in + d_out) * (max(1, positions) ** 2 if exact else 1) if small else d_in * d_out
    return taps + samples**2 * row + samples**3 // 3


@dataclass(frozen=True)
class Load:
    """What travels and is solved for one layer.

    Attributes:
        samples: N, rows that travel, of all ranks.
        row: R, numbers in a row.
        entries: D, numbers in the layer's gradient.
    """

    samples: int
    row: int
    entries: int

    def has_owner(self, ranks: int, period: float) -> bool:
        """Returns whether an owner takes fewer bytes, see above."""
        return period * self.entries * ranks < (ranks - 1) * self.samples * self.row

    def work(self, period: float) -> int:
        """Returns about how many multiplications an owner does in a period: Gram, Cholesky, solves."""
        n = self.samples
        return n**2 * self.row + n**3 // 3 + int(2 * period * (n * self.entries + n**2))


@dataclass(frozen=True)
class Placer:
    """Decides who owns what.

    Attributes:
        placement: ``"auto"`` by bytes; ``"replicate"`` nobody anything; ``"owner"`` every layer by somebody.
        ranks: that take part.
        period: steps between refreshes.
    """

    placement: Placement
    ranks: int
    period: float

    def owners(self, loads: Mapping[str, Load]) -> dict[str, int]:
        """Returns the rank of each layer that has an owner."""
        if self.placement == "replicate" or self.ranks == 1:
            return {}
        owned = {
            name: load.work(self.period)
            for name, load in loads.items()
            if self.placement == "owner" or load.has_owner(self.ranks, self.period)
        }
        return dict(zip(owned, spread(list(owned.values()), self.ranks), strict=True))
