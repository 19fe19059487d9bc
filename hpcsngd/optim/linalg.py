"""Damped natural gradient in sample space: pure functions on small matrices.

Notation as in `hpcsngd.optim.rows`: ``n`` samples, ``U`` with rows ``u_i``, ``F = 1/n U^T U``, ``K = U U^T``
and, by the push-through identity,

    (F + damping I)^-1 vec(M) = (vec(M) - 1/n U^T y) / damping,   (K/n + damping I) y = U vec(M).

Source: HyLo (Mu et al., SC 2022), the SNGD preconditioner; the identity is Sherman-Morrison-Woodbury.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def jittered_cholesky_each(matrices: Sequence[Tensor]) -> list[tuple[Tensor, float] | None]:
    """Returns `jittered_cholesky` of every matrix; those of equal size are factorized in one batch.

    A matrix that does not succeed at once is factorized again by itself, with a jitter of its own. One number
    per matrix leaves the device, for all of a size together.
    """
    alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        alike.setdefault((len(matrix), matrix.dtype, matrix.device), []).append(index)
    found: list[tuple[Tensor, float] | None] = [None] * len(matrices)
    for members in alike.values():
        factors, info = torch.linalg.cholesky_ex(torch.stack([matrices[index] for index in members]))
        succeeded = (info == 0) & factors.diagonal(dim1=1, dim2=2).isfinite().all(1)
        for index, factor, is_good in zip(members, factors, succeeded.tolist(), strict=True):
            found[index] = (factor, 0.0) if is_good else jittered_cholesky(matrices[index])
    return found


def pivoted_cholesky(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorizes a positive semidefinite matrix by its largest remaining diagonal entry, ``rank`` times.

    The pivots are those of a pivoted QR of the per-sample gradients, found without ever forming them. Stops
    early where what remains is rounding, so a singular kernel is no special case.

    Args:
        kernel: shape ``(n, n)``; its diagonal must be finite.
        rank: how many pivots at most, in 0..n.

    Returns:
        The pivots, int64, shape ``(r,)`` with ``r <= rank``, largest first, and ``R``, shape ``(r, n)``, with
        ``R[:, pivots]`` upper triangular and ``R^T R`` equal to ``kernel`` in the rows and columns of the
        pivots; what it lacks elsewhere is positive semidefinite.
    """
    pivots, factors, counts = pivoted_cholesky_batch(kernel[None], rank)
    return pivots[0, : counts[0]], factors[0, : counts[0]]


def pivoted_cholesky_batch(kernels: Tensor, rank: int) -> tuple[Tensor, Tensor, list[int]]:
    """Factorizes kernels of equal size as `pivoted_cholesky` does, all in one loop over the pivots.

    Args:
        kernels: shape ``(b, n, n)``.
        rank: as there.

    Returns:
        Pivots ``(b, rank)``, factors ``(b, rank, n)``, and how many of them count for each kernel.
    """
    batch, n = kernels.shape[:2]
    left = kernels.diagonal(dim1=1, dim2=2).clone()
    info = torch.finfo(kernels.dtype)
    noise = n * info.eps * left.amax(1) if n else left.sum(1)
    factors = kernels.new_zeros(batch, rank, n)
    pivots = torch.zeros(batch, rank, dtype=torch.int64, device=kernels.device)
    found = torch.zeros(batch, rank, dtype=torch.bool, device=kernels.device)
    # No number leaves the device in this loop: rows after the first worthless pivot are cut off at the end.
    for i in range(rank):
        pivot = left.argmax(1, keepdim=True)
        value = left.gather(1, pivot)
        chosen = pivot[:, :, None].expand(-1, i, 1)
        done = (factors[:, :i].gather(2, chosen).mT @ factors[:, :i])[:, 0]
        row = kernels.gather(1, pivot[:, :, None].expand(-1, 1, n))[:, 0] - done
        row = row / value.clamp_min(info.tiny).sqrt()
        # In exact arithmetic earlier pivots have nothing left: without this, rounding would enter T.
        row.scatter_(1, pivots[:, :i], 0)
        factors[:, i], pivots[:, i], found[:, i] = row, pivot[:, 0], value[:, 0] > noise
        left = (left - row.square()).scatter_(1, pivots[:, : i + 1], 0)
    counts: list[int] = found.long().cumprod(1).sum(1).tolist()
    return pivots, factors, counts


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
