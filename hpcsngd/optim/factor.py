"""The Cholesky factor of ``K + shift I`` for a ring of which one row and column changes per step.

Slots are taken in blocks of b. While the ring writes a block, the m - b slots outside it rest: with those
first and the block last,

    K + shift I = [ A  B^T ]       A = L L^T once per block,   C + shift I - R R^T = T T^T at each step,
                  [ B  C   ]       R = B L^-T, of which a step changes one row,

so that a step costs two triangular solves, ``2 m^2`` operations, and ``b^2 m`` for the block, beside
``m^3 / 3`` once in b steps. It is the factorization itself in another order of the slots, made anew for each
block: nothing accumulates. Updating the factor by the two rank-1 changes of a replaced row needs m dependent
small steps and takes longer than factorizing (`benchmarks.mfac` measures all three).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsngd.optim.window import Ring

#: b, measured at m = 1024: 2.0 ms per step in the mean for 32 and 64, 2.6 ms for 96, 35 ms for all anew.
BLOCK = 32


@dataclass
class _Block:
    """The factor as far as it holds for a block; rows of slots that the ring has not reached are old ones."""

    start: int
    shift: float
    newest: int
    resting: Tensor
    lower: Tensor
    rows: Tensor


class RingFactor:
    """Solves with ``K + shift I`` for the Gram matrix of a ring, after every step of the ring.

    What it keeps follows from the ring alone, bit for bit, so it is in no state: call `reset` when the ring
    was changed by anything but one ``advance`` and ``set_row``.

    Args:
        ring: the ring.
        block: b.
    """

    def __init__(self, ring: Ring, block: int = BLOCK) -> None:
        self._ring, self._size = ring, block
        self._block: _Block | None = None

    def reset(self) -> None:
        """Forgets the factor."""
        self._block = None

    def memory_bytes(self) -> int:
        """Returns the bytes held."""
        return 0 if self._block is None else self._block.lower.nbytes + self._block.rows.nbytes

    def solve(self, shift: float, vector: Tensor) -> Tensor | None:
        """Returns ``(K + shift I)^-1 vector``, shape ``(count,)``; None if K is not positive definite."""
        block = self._followed(shift)
        if block is None:
            return None
        stop = min(block.start + self._size, self._ring.count)
        inside = slice(block.start, stop)
        rows = block.rows[: stop - block.start]
        corner = self._ring.gram[inside, inside] - rows @ rows.mT
        corner.diagonal().add_(shift)
        small, info = torch.linalg.cholesky_ex(corner)
        if bool(info):
            self.reset()
            return None
        above = vector[block.resting]
        if bool(above.any()):  # zero for the newest gradient, which is in the block
            above = _solved(block.lower, above)
        below = torch.cholesky_solve((vector[inside] - rows @ above)[:, None], small)[:, 0]
        result = torch.empty_like(vector)
        result[inside] = below
        result[block.resting] = _solved(block.lower, above - rows.mT @ below, is_transposed=True)
        return result

    def _followed(self, shift: float) -> _Block | None:
        """Returns the block of the newest slot, with that slot's row in it."""
        newest, block = self._ring.newest, self._block
        is_same = block is not None and block.start == newest // self._size * self._size
        if block is None or not is_same or block.shift != shift or newest - block.newest not in (0, 1):
            self._block = self._begun(shift)
        elif newest > block.newest:
            self._add_row(block, newest)
        return self._block

    def _begun(self, shift: float) -> _Block | None:
        """Returns the block of the newest slot from nothing, with the bits of one that was followed."""
        gram, newest = self._ring.gram, self._ring.newest
        start = newest // self._size * self._size
        stop = min(start + self._size, len(gram))
        slots = torch.arange(len(gram), device=gram.device)
        resting = torch.cat([slots[:start], slots[stop:]])
        shifted = gram[resting][:, resting]
        shifted.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if bool(info):
            return None
        rows = gram.new_zeros(self._size, len(resting))
        if newest + 1 < stop:
            # all but the first together, whatever is newest: their bits may depend on how many they are
            old = torch.linalg.solve_triangular(lower, gram[resting, start + 1 : stop], upper=False)
            rows[1 : stop - start] = old.mT
        block = _Block(start, shift, newest, resting, lower, rows)
        for slot in range(start, newest + 1):
            self._add_row(block, slot)
        return block

    def _add_row(self, block: _Block, slot: int) -> None:
        block.rows[slot - block.start] = _solved(block.lower, self._ring.gram[slot][block.resting])
        block.newest = slot


def _solved(lower: Tensor, vector: Tensor, *, is_transposed: bool = False) -> Tensor:
    """Returns ``L^-1 v``, or ``L^-T v``."""
    matrix = lower.mT if is_transposed else lower
    found: Tensor = torch.linalg.solve_triangular(matrix, vector[:, None], upper=is_transposed)
    return found[:, 0]
