"""The last m gradients, stored in full, sparse or as factors of low rank.

A history answers two questions, both over its first ``count`` slots; G has one row per slot:

    products   G x         (``x``: d entries, the answer: ``count``)
    combine    G^T c       (``c``: ``count`` entries, the answer: d)

Bytes moved by either, with k entries kept per gradient: dense ``4 m d``; sparse ``m k`` times the bytes per
entry, plus ``4 d``; low rank ``4 m rank (n_1 + n_2)`` per ``n_1 x n_2`` tensor. Rows are written round a ring
(`hpcsngd.optim.window`); an unwritten row is never read.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Entries of a sparse history that are widened and go through a product at once, which bounds its temporary
#: memory: of 2^18 to 2^23 the fastest on a CPU at m = 1024 (each adds a vector of its own), on a GPU for few
#: launches.
CPU_CHUNK, GPU_CHUNK = 1 << 21, 1 << 22
#: Entries that a sparse matrix can count with its positions' own 32 bits.
MOST_ENTRIES = 2**31 - 1


class History(ABC):
    """Stored gradients; what a row is made from differs by storage."""

    capacity: int

    @abstractmethod
    def products(self, vector: Tensor, count: int) -> Tensor:
        """Returns ``G x`` over the first ``count`` slots."""

    @abstractmethod
    def inner(self, slot: int, count: int) -> Tensor:
        """Returns the products of one stored row with the first ``count`` rows."""

    @abstractmethod
    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns ``G^T c`` over as many slots as there are coefficients."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns everything stored, by name."""

    def row(self, slot: int) -> Tensor:
        """Returns one stored row as a dense vector."""
        unit = torch.zeros(slot + 1, dtype=torch.float64)
        unit[slot] = 1
        return self.combine(unit)

    def memory_bytes(self) -> int:
        """Returns the bytes stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class DenseHistory(History):
    """Gradients in full: ``m d`` numbers.

    Args:
        capacity: m, the number of slots.
        size: d.
        dtype: of the numbers.
        device: where they are.
    """

    def __init__(self, capacity: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self._rows = torch.zeros(capacity, size, dtype=dtype, device=device)

    def write(self, slot: int, vector: Tensor) -> None:
        """Stores a gradient."""
        self._rows[slot] = vector

    def products(self, vector: Tensor, count: int) -> Tensor:
        """Returns ``G x``."""
        return self._rows[:count] @ vector

    def inner(self, slot: int, count: int) -> Tensor:
        """Returns the products of one stored row with the others."""
        return self._rows[:count] @ self._rows[slot]

    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns ``G^T c``."""
        return coefficients.to(self._rows) @ self._rows[: len(coefficients)]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the rows."""
        return {"rows": self._rows}


class SparseHistory(History):
    """Chosen entries of gradients: ``m k`` values and positions.

    Positions of 32 bits are absolute, those of 16 bits relative to the start of their block
    (`hpcsngd.optim.topk`): 8, 6 or, with bfloat16 values, 4 bytes per entry. EFCP's format takes 12.

    G is a sparse matrix by rows as it is stored. On a CPU its products are those of MKL and SciPy, which read
    every entry once and write nothing besides the result; elsewhere, and to compare with, plain torch's.

    Args:
        capacity: m, the number of slots.
        size: d.
        offsets: start of each kept entry's block, int32, shape ``(k,)``.
        value_dtype: of the values.
        is_short: whether positions have 16 bits.
        dtype: that products are computed in.

    Attributes:
        by_matrix: whether products are a sparse matrix's; on a CPU either way is possible.
    """

    def __init__(
        self,
        capacity: int,
        size: int,
        offsets: Tensor,
        *,
        value_dtype: torch.dtype,
        is_short: bool,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self._size = size
        self._dtype, self._is_short = dtype, is_short
        self._offsets = offsets
        shape, device = (capacity, len(offsets)), offsets.device
        self._values = torch.zeros(shape, dtype=value_dtype, device=device)
        index_dtype = torch.int16 if is_short else torch.int32
        self._positions = torch.zeros(shape, dtype=index_dtype, device=device)
        self.by_matrix = device.type == "cpu"

    def write(self, slot: int, values: Tensor, positions: Tensor) -> None:
        """Stores the chosen entries of a gradient; positions are absolute."""
        self._values[slot] = values
        kept = positions - self._offsets if self._is_short else positions
        self._positions[slot] = kept.to(self._positions.dtype)

    def products(self, vector: Tensor, count: int) -> Tensor:
        """Returns ``G x``."""
        times = _matrix_products if self.by_matrix else _plain_products
        return torch.cat([times(*chunk, vector) for chunk in self._chunks(count)])

    def inner(self, slot: int, count: int) -> Tensor:
        """Returns the products of one stored row with the others."""
        return self.products(self.row(slot), count)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns ``G^T c``."""
        combine = _matrix_combine if self.by_matrix else _plain_combine
        result, start = None, 0
        for values, positions in self._chunks(len(coefficients)):
            weights = coefficients[start : start + len(values)].to(values)
            part = combine(values, positions, weights, self._size)
            result = part if result is None else result.add_(part)
            start += len(values)
        return self._values.new_zeros(self._size, dtype=self._dtype) if result is None else result

    def row(self, slot: int) -> Tensor:
        """Returns one stored row as a dense vector."""
        vector = torch.zeros(self._size, dtype=self._dtype, device=self._values.device)
        vector[self._widened(slice(slot, slot + 1))[0].long()] = self._values[slot].to(self._dtype)
        return vector

    def tensors(self) -> dict[str, Tensor]:
        """Returns values and positions."""
        return {"values": self._values, "positions": self._positions}

    def _chunks(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields values and absolute positions of the first ``count`` rows, a few rows at a time."""
        entries = CPU_CHUNK if self._values.device.type == "cpu" else GPU_CHUNK
        if self.by_matrix and not self._is_short and self._values.dtype == self._dtype:
            entries = MOST_ENTRIES
        rows = max(1, entries // max(1, self._values.shape[1]))
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            yield self._values[part].to(self._dtype), self._widened(part)

    def _widened(self, rows: slice) -> Tensor:
        return self._positions[rows] + self._offsets if self._is_short else self._positions[rows]


def _plain_products(values: Tensor, positions: Tensor, vector: Tensor) -> Tensor:
    """Returns the products of sparse rows with a vector.

    Args:
        values: of the rows, ``(rows, k)``.
        positions: of the values, int32, alike.
        vector: ``(d,)``, of the values' dtype.
    """
    return vector.index_select(0, positions.view(-1)).view_as(values).mul_(values).sum(1)


def _plain_combine(values: Tensor, positions: Tensor, weights: Tensor, size: int) -> Tensor:
    """Returns the sum of sparse rows, each times its weight, ``(size,)``; rows may share positions."""
    result = values.new_zeros(size)
    return result.index_add_(0, positions.view(-1), (weights[:, None] * values).view(-1))


def _matrix_products(values: Tensor, positions: Tensor, vector: Tensor) -> Tensor:
    """Returns `_plain_products`: by MKL on all threads where torch has it."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return torch.from_numpy(_scipy_matrix(values, positions, len(vector)) @ vector.numpy())
    _warn_silently()
    size = (len(values), len(vector))
    starts = torch.from_numpy(_starts(values))
    matrix = torch.sparse_csr_tensor(
        starts, positions.view(-1), values.view(-1), size, check_invariants=False
    )
    return matrix @ vector


@functools.cache
def _warn_silently() -> None:
    """Has torch say unheard, once per process, that its sparse matrices are in beta: tests compare them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _matrix_combine(values: Tensor, positions: Tensor, weights: Tensor, size: int) -> Tensor:
    """Returns `_plain_combine`: by SciPy, because torch would sort the entries of a transposed matrix."""
    return torch.from_numpy(_scipy_matrix(values, positions, size).T @ weights.numpy())


def _scipy_matrix(values: Tensor, positions: Tensor, size: int) -> Any:
    """Returns sparse rows as a matrix ``(rows, size)`` over the same memory."""
    from scipy.sparse import csr_matrix

    parts = (values.view(-1).numpy(), positions.view(-1).numpy(), _starts(values))
    return csr_matrix(parts, shape=(len(values), size))


def _starts(values: Tensor) -> npt.NDArray[np.int32]:
    """Returns where rows begin, and the end of the last one."""
    rows, kept = values.shape
    return kept * np.arange(rows + 1, dtype=np.int32)


class LowRankHistory(History):
    """Gradients as products ``P Q^T``, tensor by tensor: ``m rank (n_1 + n_2)`` numbers for ``n_1 x n_2``.

    Args:
        capacity: m, the number of slots.
        shapes: ``(n_1, n_2, rank)`` of each tensor; ``n_2 = rank = 1`` stores it in full.
        dtype: of the numbers.
        device: where they are.
    """

    def __init__(
        self,
        capacity: int,
        shapes: Sequence[tuple[int, int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        empty = self._empty = torch.zeros(0, dtype=dtype, device=device)
        # (slots, rank, n): slots and ranks join to one dimension without a copy
        self._left = [empty.new_zeros(capacity, rank, n1) for n1, _, rank in shapes]
        self._right = [empty.new_zeros(capacity, rank, n2) for _, n2, rank in shapes]

    def write(self, slot: int, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Stores the factors of every tensor, ``(n_1, rank)`` and ``(n_2, rank)``."""
        for left, right, (p, q) in zip(self._left, self._right, factors, strict=True):
            left[slot], right[slot] = p.mT, q.mT

    def products(self, vector: Tensor, count: int) -> Tensor:
        """Returns ``G x``: the sum over tensors of ``<P_i Q_i^T, X> = sum((X Q_i) * P_i)``."""
        total = self._empty.new_zeros(count)
        for (left, right), part in zip(self._pairs(), self._split(vector), strict=True):
            applied = right[:count].flatten(0, 1) @ part.mT
            total += (applied * left[:count].flatten(0, 1)).view(count, -1).sum(1)
        return total

    def inner(self, slot: int, count: int) -> Tensor:
        """Returns ``<P_i Q_i^T, P_j Q_j^T> = sum((P_i^T P_j) * (Q_i^T Q_j))``, summed over tensors."""
        total = self._empty.new_zeros(count)
        for left, right in self._pairs():
            p = left[:count].flatten(0, 1) @ left[slot].mT
            q = right[:count].flatten(0, 1) @ right[slot].mT
            total += (p * q).view(count, -1).sum(1)
        return total

    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns ``G^T c``: per tensor one product of ``(n_1, m rank)`` and ``(m rank, n_2)``."""
        count, parts = len(coefficients), []
        for left, right in self._pairs():
            weighted = left[:count] * coefficients.to(left)[:, None, None]
            parts.append((weighted.flatten(0, 1).mT @ right[:count].flatten(0, 1)).reshape(-1))
        return torch.cat([self._empty, *parts])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the factors, by place of the tensor."""
        left = {f"left.{index}": tensor for index, tensor in enumerate(self._left)}
        return left | {f"right.{index}": tensor for index, tensor in enumerate(self._right)}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._left, self._right, strict=True))

    def _split(self, vector: Tensor) -> list[Tensor]:
        shapes = [(left.shape[2], right.shape[2]) for left, right in self._pairs()]
        parts = torch.split(vector, [n1 * n2 for n1, n2 in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
