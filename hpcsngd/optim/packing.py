"""Symmetric matrices as their upper triangles, for sending: half the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def packed_numbers(shape: Sequence[int]) -> int:
    """Returns how many numbers `pack` makes of a tensor of this shape."""
    return prod(shape[:-1]) * (shape[-1] + 1) // 2 if len(shape) == 3 else prod(shape)


def pack(matrices: Tensor) -> Tensor:
    """Returns the upper triangles of symmetric ``(blocks, d, d)`` in one row; all of a ``(blocks, d)``."""
    if matrices.dim() != 3:
        return matrices.reshape(-1)
    return matrices.masked_select(_upper(matrices.shape[-1], matrices.device))


def unpack(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns what `pack` made ``flat`` of, exactly symmetric.

    Args:
        flat: as many numbers as `packed_numbers` says.
        shape: of the result.
    """
    if len(shape) != 3:
        return flat.reshape(tuple(shape))
    upper = _upper(shape[-1], flat.device)
    result = flat.new_zeros(tuple(shape)).masked_scatter_(upper, flat)
    return result + result.triu(1).mT


def _upper(side: int, device: torch.device) -> Tensor:
    return torch.ones(side, side, dtype=torch.bool, device=device).triu()
