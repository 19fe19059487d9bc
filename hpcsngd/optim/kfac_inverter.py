"""Makes K-FAC's damped inverses: decomposes factors, stores the parts, and packs them for sending.

Formulas: `hpcsngd.optim.kfac_inverse`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsngd.optim.kfac_decompose import eigh_each, inverse_each
from hpcsngd.optim.kfac_halves import keep, kept_shape
from hpcsngd.optim.kfac_inverse import FORMS, KINDS, Inverse, InverseKind
from hpcsngd.optim.packing import pack, packed_numbers, unpack
from hpcsngd.optim.threads import one_thread_each, runs_alone


@dataclass(frozen=True)
class Part:
    """What one factor contributes to a layer's inverse.

    Attributes:
        tensors: eigenvectors (None of a diagonal) and eigenvalues; or the damped inverse.
        jitter: the most that was added besides.
    """

    tensors: tuple[Tensor | None, ...]
    jitter: float


@dataclass(frozen=True)
class Inverter:
    """Makes inverses of one kind.

    Attributes:
        kind: see `hpcsngd.optim.kfac_inverse`.
        pi_split: whether Cholesky's damping is split by pi.
        dtype: of what is kept; None: that of the factors.
    """

    kind: InverseKind
    pi_split: bool
    dtype: torch.dtype | None

    def decompose(
        self,
        factors: Sequence[Tensor],
        means: Sequence[Sequence[Tensor]],
        sides: Sequence[int],
        damping: float,
    ) -> list[Part | None]:
        """Returns what becomes of each factor; None where it is not finite or cannot be decomposed.

        Args:
            factors: of any layers, in at least float32.
            means: of each factor's layer: `mean_eigenvalues` of A and, where there is one, G.
            sides: 0 for an A, 1 for a G.
            damping: lambda.
        """
        if self.kind == "eigen":
            found = eigh_each(factors)
            stored = iter(self._all_stored([pair for pair in found if pair is not None]))
            return [None if pair is None else Part(next(stored), 0.0) for pair in found]
        shifted = [
            _shifted(factor, self._shift(of_layer, side, damping).to(factor))
            for factor, of_layer, side in zip(factors, means, sides, strict=True)
        ]
        return [
            None if found is None else Part(self._stored(found[:1]), found[1])
            for found in inverse_each(shifted)
        ]

    def assemble(self, parts: Sequence[Part], damping: float) -> Inverse:
        """Returns a layer's inverse from the parts of A and, where there is one, G."""
        count = len(parts[0].tensors)
        tensors = [tensor for part in parts for tensor in part.tensors] + [None] * count
        return KINDS[self.kind](tuple(tensors[: 2 * count]), damping, max(part.jitter for part in parts))

    def part_shapes(self, shape: Sequence[int]) -> list[Sequence[int] | None]:
        """Returns the shapes of a part's tensors, for a factor of this shape; None for one that is not."""
        matrix = None if len(shape) == 2 else kept_shape(FORMS[self.kind], shape, self.dtype)
        if self.kind == "cholesky":
            return [matrix or shape]
        return [matrix, (shape[0], shape[-1])]

    def kept_numbers(self, shape: Sequence[int]) -> int:
        """Returns how many numbers a running factor of this shape and its part take."""
        parts = (math.prod(part) for part in self.part_shapes(shape) if part is not None)
        return packed_numbers(shape) + sum(parts)

    def sent_numbers(self, shape: Sequence[int]) -> int:
        """Returns how many numbers `sent` makes of the part of a factor of this shape."""
        return sum(self._count(part) for part in self.part_shapes(shape) if part is not None)

    def sent(self, part: Part) -> list[Tensor]:
        """Returns a part's tensors in one row each; of a symmetric matrix that is kept whole the triangle."""
        return [self._row(tensor) for tensor in part.tensors if tensor is not None]

    def received(self, numbers: Tensor, shape: Sequence[int], jitter: float) -> Part:
        """Returns the part of a factor of this shape from what `sent` made of it, joined."""
        shapes = self.part_shapes(shape)
        rows = iter(torch.split(numbers, [self._count(part) for part in shapes if part is not None]))
        return Part(tuple(None if part is None else self._unrow(next(rows), part) for part in shapes), jitter)

    def _row(self, tensor: Tensor) -> Tensor:
        return pack(tensor) if self.kind == "cholesky" else tensor.reshape(-1)

    def _unrow(self, row: Tensor, shape: Sequence[int]) -> Tensor:
        # A copy: a view would keep all that was received.
        return (unpack(row, shape) if self.kind == "cholesky" else row.reshape(tuple(shape))).clone()

    def _count(self, shape: Sequence[int]) -> int:
        return packed_numbers(shape) if self.kind == "cholesky" else math.prod(shape)

    def _all_stored(self, pairs: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor | None, ...]]:
        """Returns `_stored` of everything: reflections are a decomposition of their own."""
        if all(t is None or t.dim() < 3 or runs_alone(t) for pair in pairs for t in pair):
            return one_thread_each(self._stored, pairs)
        return [self._stored(pair) for pair in pairs]

    def _stored(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        form = FORMS[self.kind]
        return tuple(
            None if t is None else keep(form, t, self.dtype) if t.dim() == 3 else t.to(self.dtype or t.dtype)
            for t in tensors
        )

    def _shift(self, means: Sequence[Tensor], side: int, damping: float) -> Tensor:
        """Returns what is added to the diagonal of a Cholesky factor, ``(blocks,)``."""
        if len(means) == 1:
            return torch.full_like(means[0], damping)
        root = torch.full_like(means[0], math.sqrt(damping))
        if not self.pi_split:
            return root
        # A layer without inputs or without gradients has nothing to balance.
        pi = torch.where((means[0] > 0) & (means[1] > 0), means[0] / means[1], 1.0).sqrt()
        return root / pi if side else root * pi


def mean_eigenvalues(factor: Tensor) -> Tensor:
    """Returns the mean eigenvalue of every block of a factor, ``(blocks,)``."""
    return _diagonal(factor).mean(1)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    """Returns a copy of the factor with a number for each block added to its diagonal."""
    result = factor.clone()
    _diagonal(result).add_(shift.unsqueeze(1))
    return result
