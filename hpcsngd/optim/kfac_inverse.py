"""K-FAC's damped inverses of A (x) G, found for many layers at once and applied to many blocks at once.

With M a block of the gradient, ``(d_out, d_in)``, and damping lambda,

    eigen       A = Qa diag(da) Qa^T, G = Qg diag(dg) Qg^T, negative eigenvalues taken for 0:
                V = Qg [ (Qg^T M Qa) / (dg da^T + lambda) ] Qa^T,    exactly (A (x) G + lambda I)^-1 M
    cholesky    V = (G + sqrt(lambda) / pi I)^-1 M (A + sqrt(lambda) pi I)^-1
                pi = sqrt((tr A / d_in) / (tr G / d_out)) with the split, 1 without

Cholesky's damping is factored: it adds two terms more than lambda I to A (x) G, so it damps more than eigen
at the same lambda. An A kept as its diagonal is divided by. Where there is no G, lambda is added to A and
both are exact. Sources: Grosse and Martens, ICML 2016, appendix (eigen); Martens and Grosse, ICML 2015,
section 6.3 (factored Tikhonov damping and pi).

Inverses that are applied at every step are kept as matrices: two products take the place of four triangular
solves. They come from Cholesky factors, which tell whether a matrix is positive definite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hpcsngd.optim.kfac_decompose import eigh_each, inverse_each

InverseKind = Literal["eigen", "cholesky"]


@dataclass(frozen=True)
class Inverse(ABC):
    """The inverse of a layer's blocks, or of those of several layers one after the other.

    Attributes:
        tensors: what it consists of; the first dimension of each counts the blocks.
        damping: lambda.
        jitter: the most that was added besides to make a factor positive definite.
    """

    tensors: tuple[Tensor | None, ...]
    damping: float
    jitter: float

    @abstractmethod
    def solve(self, blocks: Tensor) -> Tensor:
        """Returns V for every M, ``(blocks, d_out, d_in)``."""

    @property
    def present(self) -> list[Tensor]:
        """Returns the tensors that there are."""
        return [tensor for tensor in self.tensors if tensor is not None]

    @property
    def blocks(self) -> int:
        """Returns how many blocks it is for."""
        return len(self.present[0])

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype in which it is kept and applied."""
        return self.present[0].dtype

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.present)

    @property
    def key(self) -> tuple[Any, ...]:
        """Returns what inverses must share to be joined."""
        shapes = tuple(None if t is None else (tuple(t.shape[1:]), t.dtype, t.device) for t in self.tensors)
        return (type(self), shapes, self.damping)

    def state_dict(self) -> dict[str, Any]:
        """Returns the inverse as tensors and numbers; what is None is left out."""
        tensors = {str(index): tensor for index, tensor in enumerate(self.tensors) if tensor is not None}
        return {"tensors": tensors, "damping": self.damping, "jitter": self.jitter}


@dataclass(frozen=True)
class EigenInverse(Inverse):
    """Eigenvectors of A (None for a diagonal), its eigenvalues, and both of G (None where there is no G)."""

    def solve(self, blocks: Tensor) -> Tensor:
        """See `Inverse.solve`."""
        vectors_a, values_a, vectors_g, values_g = self.tensors
        rotated = blocks if vectors_g is None else vectors_g.mT @ blocks
        rotated = rotated if vectors_a is None else rotated @ vectors_a
        rotated = rotated / (_outer(values_g, values_a) + self.damping)
        rotated = rotated if vectors_g is None else vectors_g @ rotated
        return rotated if vectors_a is None else rotated @ vectors_a.mT


@dataclass(frozen=True)
class CholeskyInverse(Inverse):
    """The inverses of A (its diagonal, where it is one) and G (None where there is none), damped."""

    def solve(self, blocks: Tensor) -> Tensor:
        """See `Inverse.solve`."""
        a, g = self.present[0], self.tensors[1]
        result = blocks if g is None else g @ blocks
        return result * a.unsqueeze(1) if a.dim() == 2 else result @ a


def _outer(values_g: Tensor | None, values_a: Tensor | None) -> Tensor:
    if values_a is None:
        raise ValueError("an eigen inverse needs the eigenvalues of A")
    return values_a.unsqueeze(1) if values_g is None else values_g.unsqueeze(2) * values_a.unsqueeze(1)


_KINDS: dict[InverseKind, type[Inverse]] = {"eigen": EigenInverse, "cholesky": CholeskyInverse}


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
        kind: see the module's docstring.
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
            return [None if found is None else Part(self._stored(found), 0.0) for found in eigh_each(factors)]
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
        return _KINDS[self.kind](tuple(tensors[: 2 * count]), damping, max(part.jitter for part in parts))

    def part_shapes(self, shape: Sequence[int]) -> list[Sequence[int] | None]:
        """Returns the shapes of a part's tensors, for a factor of this shape; None for one that is not."""
        if self.kind == "cholesky":
            return [shape]
        return [None if len(shape) == 2 else shape, (shape[0], shape[-1])]

    def _stored(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        # LAPACK's results lie by columns, loaded states by rows, and products round accordingly.
        return tuple(None if t is None else t.to(self.dtype or t.dtype).contiguous() for t in tensors)

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


def inverse_from_state(
    state: Mapping[str, Any], kind: InverseKind, device: torch.device, shape: tuple[int, int, int]
) -> Inverse:
    """Returns the inverse saved in ``state``.

    Args:
        state: of `Inverse.state_dict`.
        kind: which it is.
        device: where to keep it.
        shape: ``(groups, d_out, d_in)`` of the layer.

    Raises:
        ValueError: it does not fit blocks of this shape.
    """
    count = 4 if kind == "eigen" else 2
    tensors = [state["tensors"].get(str(index)) for index in range(count)]
    moved = tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
    inverse = _KINDS[kind](moved, state["damping"], state["jitter"])
    sizes = {len(tensor) for tensor in moved if tensor is not None}
    sides = {tensor.shape[-1] for tensor in moved if tensor is not None}
    if sizes != {shape[0]} or not sides <= set(shape[1:]):
        raise ValueError(
            f"inverse of {sorted(sizes)} blocks with sides {sorted(sides)}, the layer has {shape}"
        )
    return inverse


def joined(inverses: Sequence[Inverse]) -> Inverse:
    """Returns the inverse of all the blocks of inverses with equal keys, one layer after the other."""
    columns = zip(*(inverse.tensors for inverse in inverses), strict=True)
    tensors = tuple(
        torch.cat(present) if (present := [t for t in column if t is not None]) else None
        for column in columns
    )
    return replace(inverses[0], tensors=tensors)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    """Returns a copy of the factor with a number for each block added to its diagonal."""
    result = factor.clone()
    _diagonal(result).add_(shift.unsqueeze(1))
    return result
