"""Low-rank compression with error feedback, tensor by tensor.

Per tensor, reshaped to ``M`` of ``n_1 x n_2``: one step of subspace iteration from the previous step's ``Q``,

    P = orthonormal basis of M Q,   Q = M^T P,   sent: P Q^T,   error: M - P Q^T

and the error is added to the next gradient. Tensors that a rank does not make smaller are stored in full.
Source: Vogels et al., "PowerSGD", NeurIPS 2019, Algorithm 1; inside M-FAC: EFCP (Modoranu et al., ICML 2024).
Flops: ``4 n_1 n_2 rank`` plus the QR, ``2 n_1 rank^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_shape(shape: Sequence[int], rank: int) -> tuple[int, int, int]:
    """Returns ``(n_1, n_2, rank)`` of a tensor; ``(numel, 1, 1)`` where factors would not be smaller.

    The first dimension stays, the others are joined: a convolution becomes outputs x (inputs, offsets).
    """
    rows = int(shape[0]) if shape else 1
    columns = 1
    for length in shape[1:]:
        columns *= int(length)
    if rank * (rows + columns) >= rows * columns:
        return rows * columns, 1, 1
    return rows, columns, rank


class LowRankFeedback:
    """Compresses a stream of vectors, tensor by tensor, with what was lost added to the next.

    Args:
        shapes: ``(n_1, n_2, rank)`` of each tensor, from `matrix_shape`.
        dtype: of error and factors.
        device: of error and factors.
        seeds: of the first ``Q`` of each tensor.

    Attributes:
        error: what was not sent yet, shape ``(sum of n_1 n_2,)``.
        right: ``Q`` of each tensor, which the next step begins with.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        seeds: Sequence[int],
    ) -> None:
        self._shapes = tuple(shapes)
        size = sum(n1 * n2 for n1, n2, _ in shapes)
        self.error = torch.zeros(size, dtype=dtype, device=device)
        self._start = [
            _normal((n2, rank), seed).to(device, dtype)
            for (_, n2, rank), seed in zip(shapes, seeds, strict=True)
        ]
        self.right = [start.clone() for start in self._start]

    def send(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the factors ``(n_1, rank)`` and ``(n_2, rank)`` of each tensor.

        Args:
            vector: shape ``(sum of n_1 n_2,)``.
        """
        self.error.add_(vector)
        factors = []
        for index, ((n1, n2, _), part) in enumerate(zip(self._shapes, self._parts(), strict=True)):
            matrix = part.view(n1, n2)
            left, right = self._factorize(index, matrix)
            matrix.sub_(left @ right.mT)
            factors.append((left, right))
        return factors

    def _factorize(self, index: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.shape[1] == 1:
            return matrix.clone(), torch.ones_like(matrix[:1])
        left = torch.linalg.qr(matrix @ self.right[index]).Q
        right = matrix.mT @ left
        # a column that vanished (a zero gradient, a rank that is not there) would stay zero for ever
        is_lost = right.norm(dim=0) <= torch.finfo(right.dtype).tiny
        self.right[index] = torch.where(is_lost, self._start[index], right)
        return left, right

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.split(self.error, [n1 * n2 for n1, n2, _ in self._shapes])


def _normal(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
