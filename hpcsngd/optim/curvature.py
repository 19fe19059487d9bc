"""One layer's curvature in sample space: what a refresh computes and every step applies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.linalg import jittered_cholesky, sample_space_solve
from hpcsngd.optim.rows import Rows, rows_from


@dataclass(frozen=True)
class SampleCurvature:
    """``F = 1/n sum_i u_i u_i^T`` of the rows given, with its damping; tensors are never changed in place.

    Attributes:
        rows: of n samples.
        factor: lower Cholesky factor of ``K/n + (damping + jitter) I``, shape ``(n, n)``.
        damping: in units of F's eigenvalues. It stays the refresh's until the next one, so that the factor
            and the division by it always agree.
        jitter: what rounding made necessary in addition; 0.0 normally.
    """

    rows: Rows
    factor: Tensor
    damping: float
    jitter: float

    @classmethod
    def build(cls, rows: Rows, kernel: Tensor, damping: float) -> SampleCurvature | None:
        """Returns the curvature of ``rows``; None if it cannot be factorized.

        Args:
            rows: of the joined batch, or those of it that a method keeps.
            kernel: `kernel_of` these rows.
            damping: positive.
        """
        identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        factorized = jittered_cholesky(kernel + damping * identity)
        if factorized is None:
            return None
        factor, jitter = factorized
        return cls(rows, factor, damping, jitter)

    def solve(self, grad: Tensor) -> Tensor:
        """Returns ``(F + damping I)^-1 grad`` for a layer matrix of shape ``(d_out, d_in)``."""
        return sample_space_solve(self.rows, self.factor, self.damping, grad)

    @property
    def size_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the rows and of the factor."""
        return self.rows.size_bytes, self.factor.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Returns the curvature as tensors and numbers."""
        return {
            "rows": list(self.rows.tensors),
            "factor": self.factor,
            "damping": self.damping,
            "jitter": self.jitter,
        }

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], sizes: tuple[int, int], groups: int, like: Tensor
    ) -> SampleCurvature:
        """Returns the curvature saved in ``state``, on the device and in the dtype of ``like``.

        Args:
            state: from `state_dict`.
            sizes: ``(d_in, d_out)`` of the layer.
            groups: of the layer.
            like: an empty tensor.

        Raises:
            ValueError: the shapes are not those of the layer.
        """
        rows, factor = rows_from(state["rows"], sizes, groups), state["factor"]
        if tuple(factor.shape) != (len(rows), len(rows)):
            raise ValueError(f"factor of {len(rows)} rows has shape {tuple(factor.shape)}")
        return cls(rows.to(like), factor.to(like), float(state["damping"]), float(state["jitter"]))


def kernel_of(rows: Rows) -> Tensor:
    """Returns ``K/n``, shape ``(n, n)``: it has the nonzero eigenvalues of F."""
    return rows.gram() / len(rows)
