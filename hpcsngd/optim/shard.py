"""A vector cut over the ranks: each keeps the window of its own part, and products are summed.

Bytes that one rank hands to collectives per step, with d entries and ``count`` gradients in the window:

    8 count                the products that make the new row of the Gram matrix, float64
    8 count                once more for a vector outside the window (whole gradient, coupled weight decay)
    b max_p d_p            the parts of the result, b bytes each; d_p = d/P up to the cut's granularity

and nothing on one rank. The window itself never travels; every rank keeps 1/P of it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from hpcsngd.optim.communicate import Communicator


def cut_evenly(boundaries: Sequence[int], ranks: int) -> list[int]:
    """Returns ``ranks + 1`` places at which to cut, each the allowed one nearest to an even share.

    Args:
        boundaries: allowed places, ascending from 0 to the length.
        ranks: how many parts.
    """
    size, cuts = boundaries[-1], [0]
    for rank in range(1, ranks):
        wanted = rank * size / ranks
        above = bisect_left(boundaries, wanted)
        candidates = boundaries[max(0, above - 1) : above + 1]
        cuts.append(max(cuts[-1], min(candidates, key=lambda place: abs(place - wanted))))
    return [*cuts, size]


class Shard:
    """This rank's part of a vector.

    Args:
        communicator: sums and joins.
        cuts: where the parts begin and end, for all ranks.
    """

    def __init__(self, communicator: Communicator, cuts: Sequence[int]) -> None:
        self._communicator = communicator
        self._sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
        self.start, self.stop = cuts[communicator.rank], cuts[communicator.rank + 1]

    def cut(self, vector: Tensor) -> Tensor:
        """Returns this rank's part of a whole vector."""
        return vector[self.start : self.stop]

    def total(self, partial: Tensor) -> Tensor:
        """Returns the sum over the ranks of what each has from its part, in float64."""
        return self._communicator.sum_tensor("products", partial.double())

    def join(self, part: Tensor) -> Tensor:
        """Returns the whole vector from every rank's part."""
        rows = [[size] for size in self._sizes]
        return self._communicator.join_rows("update", [part], rows)[0]
