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
solves. They come from Cholesky factors, which tell whether a matrix is positive definite. Large ones, and
large eigenvectors, are kept in fewer numbers (`hpcsngd.optim.kfac_halves`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hpcsngd.optim.kfac_halves import Form, fits, times_orthogonal, times_symmetric

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

    @abstractmethod
    def multiplications(self, rows: int, columns: int) -> int:
        """Returns about how many `solve` takes for blocks ``(rows, columns)``, all blocks together."""

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
        rotated = blocks if vectors_g is None else times_orthogonal(blocks.mT, vectors_g).mT
        rotated = rotated if vectors_a is None else times_orthogonal(rotated, vectors_a)
        rotated = rotated / (_outer(values_g, values_a) + self.damping)
        if vectors_g is not None:
            rotated = times_orthogonal(rotated.mT, vectors_g, transposed=True).mT
        return rotated if vectors_a is None else times_orthogonal(rotated, vectors_a, transposed=True)

    def multiplications(self, rows: int, columns: int) -> int:
        """See `Inverse.multiplications`."""
        vectors_a, _, vectors_g, _ = self.tensors
        return 2 * (_numbers(vectors_a) * rows + _numbers(vectors_g) * columns)


@dataclass(frozen=True)
class CholeskyInverse(Inverse):
    """The inverses of A (its diagonal, where it is one) and G (None where there is none), damped."""

    def solve(self, blocks: Tensor) -> Tensor:
        """See `Inverse.solve`."""
        a, g = self.present[0], self.tensors[1]
        result = blocks if g is None else times_symmetric(blocks.mT, g).mT
        # A diagonal is as long as a row; a matrix in panels has more numbers than that.
        is_diagonal = a.shape[1:] == blocks.shape[2:]
        return result * a.unsqueeze(1) if is_diagonal else times_symmetric(result, a)

    def multiplications(self, rows: int, columns: int) -> int:
        """See `Inverse.multiplications`."""
        return _numbers(self.tensors[0]) * rows + _numbers(self.tensors[1]) * columns


def _numbers(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _outer(values_g: Tensor | None, values_a: Tensor | None) -> Tensor:
    if values_a is None:
        raise ValueError("an eigen inverse needs the eigenvalues of A")
    return values_a.unsqueeze(1) if values_g is None else values_g.unsqueeze(2) * values_a.unsqueeze(1)


KINDS: dict[InverseKind, type[Inverse]] = {"eigen": EigenInverse, "cholesky": CholeskyInverse}
FORMS: dict[InverseKind, Form] = {"eigen": "orthogonal", "cholesky": "symmetric"}


def inverse_from_state(
    state: Mapping[str, Any], kind: InverseKind, device: torch.device, shapes: Sequence[Sequence[int]]
) -> Inverse:
    """Returns the inverse saved in ``state``.

    Args:
        state: of `Inverse.state_dict`.
        kind: which it is.
        device: where to keep it.
        shapes: of A and, where there is one, G.

    Raises:
        ValueError: it does not belong to factors of these shapes.
    """
    count = 2 if kind == "eigen" else 1
    tensors = [state["tensors"].get(str(index)) for index in range(2 * count)]
    for index, tensor in enumerate(tensors):
        wanted = shapes[index // count] if index // count < len(shapes) else None
        is_matrix = index % count == 0
        if not _is_of(tensor, wanted, FORMS[kind] if is_matrix else None, can_miss=count == 2 and is_matrix):
            found = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
            raise ValueError(f"inverse of shapes {found}, the factors have {list(shapes)}")
    moved = tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
    return KINDS[kind](moved, state["damping"], state["jitter"])


def _is_of(tensor: Tensor | None, factor: Sequence[int] | None, form: Form | None, *, can_miss: bool) -> bool:
    """Returns whether a tensor of an inverse can belong to a factor of this shape.

    Args:
        tensor: None where there is none.
        factor: None where there is none.
        form: of the matrix that it is; None for eigenvalues.
        can_miss: whether there is none for a diagonal.
    """
    is_diagonal = factor is not None and len(factor) == 2
    if factor is None or (is_diagonal and can_miss):
        return tensor is None
    if tensor is None or len(tensor) != factor[0]:
        return False
    if form is None or is_diagonal:
        return tuple(tensor.shape) == (factor[0], factor[-1])
    return fits(form, tensor, factor[-1])


def joined(inverses: Sequence[Inverse]) -> Inverse:
    """Returns the inverse of all the blocks of inverses with equal keys, one layer after the other."""
    columns = zip(*(inverse.tensors for inverse in inverses), strict=True)
    tensors = tuple(
        torch.cat(present) if (present := [t for t in column if t is not None]) else None
        for column in columns
    )
    return replace(inverses[0], tensors=tensors)
