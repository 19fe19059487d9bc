"""Damped natural gradient in sample space: pure functions on the rows of one layer.

Notation as in `hpcsngd.optim.rows`: ``n`` samples, ``U`` with rows ``u_i``, ``F = 1/n U^T U``, ``K = U U^T``
and, by the push-through identity,

    (F + damping I)^-1 vec(M) = (vec(M) - 1/n U^T y) / damping,   (K/n + damping I) y = U vec(M).

Source: HyLo (Mu et al., SC 2022), the SNGD preconditioner; the identity is Sherman-Morrison-Woodbury.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcsngd.optim.rows import Rows

#: How often the Cholesky factorization is retried, each time with ten times the jitter.
JITTER_ATTEMPTS = 6


def jittered_cholesky(matrix: Tensor) -> tuple[Tensor, float] | None:
    """Factorizes a symmetric positive definite matrix, helping it with jitter where rounding spoilt it.

    Args:
        matrix: shape ``(n, n)``.

    Returns:
        The lower factor of ``matrix + jitter I`` and the jitter (0.0 where none was needed; otherwise from
        one rounding error of the mean diagonal entry upwards, in tenfold steps); None for a matrix that is
        not finite or that JITTER_ATTEMPTS increases did not make positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        # LAPACK reports success on NaN: the factor's last entry depends on every other one.
        return (factor, 0.0) if bool(factor.diagonal().isfinite().all()) else None
    scale = float(matrix.diagonal().mean())
    if not bool(matrix.isfinite().all()) or scale <= 0:
        return None
    jitter = torch.finfo(matrix.dtype).eps * scale
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(JITTER_ATTEMPTS):
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * identity)
        if int(info) == 0:
            return factor, jitter
        jitter *= 10
    return None


def sample_space_solve(rows: Rows, factor: Tensor, damping: float, grad: Tensor) -> Tensor:
    """Returns ``(F + damping I)^-1 grad``, shape ``(d_out, d_in)``.

    Args:
        rows: of n samples.
        factor: lower Cholesky factor of ``K/n + damping I``, shape ``(n, n)``.
        damping: the damping inside ``factor``, in the units of F's eigenvalues.
        grad: the matrix ``M`` to precondition, shape ``(d_out, d_in)``.
    """
    y = torch.cholesky_solve(rows.project(grad).unsqueeze(1), factor)
    return (grad - rows.combine(y.squeeze(1) / len(rows))) / damping


def spectrum_summary(eigenvalues: Tensor, share: float) -> tuple[int, float]:
    """Returns how many of the largest eigenvalues reach ``share`` of their sum, and the largest one.

    Args:
        eigenvalues: of a positive semidefinite matrix, any order; tiny negative ones count as zero.
        share: in (0, 1].
    """
    values = eigenvalues.clamp(min=0).sort(descending=True).values.double()
    total = values.sum()
    if float(total) == 0.0:
        return 0, 0.0
    # The smallest count whose share is reached; the tolerance forgives rounding of the running sum.
    short = values.cumsum(0) < share * total * (1 - 1e-12)
    return int(short.sum()) + 1, float(values[0])
