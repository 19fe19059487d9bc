"""Decompositions of K-FAC's factors, those of equal size in one batch; a failure concerns one layer only.

Factors are ``(blocks, d, d)``, or ``(blocks, d)`` where they are diagonals, which need no decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.linalg import jittered_cholesky
from hpcsngd.optim.threads import one_thread_each, one_thread_if, runs_alone

#: Rows from which on Cholesky's inverses are worth a thread for each matrix: 9 with 576 rows take 0.8 times
#: as long as by one thread, 11 with 144 rows 1.7 times and 10 with 64 rows 8 times (2 CPU threads).
LEAST_EACH = 256


def eigh_each(factors: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor] | None]:
    """Returns eigenvectors ``(blocks, d, d)`` and eigenvalues ``(blocks, d)``, not negative, of every factor.

    A diagonal has no eigenvectors. A factor that did not converge in single precision is decomposed in double
    precision; None stands for one that is not finite or did not converge even so.
    """
    return _by_size(factors, _eigh_batch, lambda diagonal: (None, diagonal.clamp(min=0)))


def inverse_each(factors: Sequence[Tensor]) -> list[tuple[Tensor, float] | None]:
    """Returns the inverse of every factor, and the jitter that it took.

    None stands for a factor that is not finite, or not positive definite with any jitter
    (`hpcsngd.optim.linalg.jittered_cholesky`).
    """
    return _by_size(factors, _inverse_batch, lambda diagonal: (diagonal.reciprocal(), 0.0))


def _by_size(
    factors: Sequence[Tensor],
    decompose: Callable[[Tensor, Sequence[int]], list[Any]],
    of_diagonal: Callable[[Tensor], Any],
) -> list[Any]:
    """Decomposes factors of equal size together.

    Args:
        factors: of all layers.
        decompose: matrices of several factors, and how many blocks each has -> a result or None for each.
        of_diagonal: a finite diagonal -> its result.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    found: list[Any] = [None] * len(factors)
    for index, factor in enumerate(factors):
        if factor.dim() == 3:
            alike.setdefault((factor.shape[-1], factor.dtype, factor.device), []).append(index)
        elif bool(factor.isfinite().all()):
            found[index] = of_diagonal(factor)
    for members in alike.values():
        counts = [len(factors[index]) for index in members]
        results = decompose(torch.cat([factors[index] for index in members]), counts)
        for index, result in zip(members, results, strict=True):
            found[index] = result
    return found


def _eigh_batch(matrices: Tensor, counts: Sequence[int]) -> list[Any]:
    try:
        values, vectors = _alone(lambda part: tuple(torch.linalg.eigh(part)), matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(counts) > 1:
            # Somebody in the batch fails: find out who, the others go on.
            return [_eigh_batch(part, [len(part)])[0] for part in torch.split(matrices, list(counts))]
        if matrices.dtype == torch.float64:
            return [None]
        # LAPACK may not get on with many equal eigenvalues in single precision, such as the zeros of inputs
        # that are padding only (a 3 x 3 convolution of one pixel).
        found = _eigh_batch(matrices.double(), counts)[0]
        return [found and tuple(part.to(matrices.dtype) for part in found)]
    # Eigenvalues carry NaN and infinity of any entry.
    good = _all_of_each(values.isfinite().all(1), counts)
    parts = zip(
        torch.split(vectors, list(counts)), torch.split(values.clamp(min=0), list(counts)), good, strict=True
    )
    return [(vector, value) if is_good else None for vector, value, is_good in parts]


def _inverse_batch(matrices: Tensor, counts: Sequence[int]) -> list[Any]:
    factors, info = _alone(lambda part: tuple(torch.linalg.cholesky_ex(part)), matrices, LEAST_EACH)
    good = _all_of_each((info == 0) & factors.diagonal(dim1=1, dim2=2).isfinite().all(1), counts)
    inverses: Sequence[Tensor] = ()
    if any(good):
        (whole,) = _alone(lambda part: (torch.cholesky_inverse(part),), factors, LEAST_EACH)
        inverses = torch.split(whole, list(counts))
    results: list[Any] = []
    for position, (part, is_good) in enumerate(zip(torch.split(matrices, list(counts)), good, strict=True)):
        results.append((inverses[position], 0.0) if is_good else _helped_inverse(part))
    return results


def _alone(
    function: Callable[[Tensor], tuple[Tensor, ...]], matrices: Tensor, least: int = 0
) -> tuple[Tensor, ...]:
    """Returns a function of a batch, on the threads that suit it.

    Args:
        function: of a batch, result by result.
        matrices: the batch.
        least: rows from which on each matrix has a thread; smaller ones share one.
    """
    if not runs_alone(matrices):
        return function(matrices)
    if matrices.shape[-1] < least:
        with one_thread_if(True):
            return function(matrices)
    parts = one_thread_each(function, torch.split(matrices, 1))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _helped_inverse(matrices: Tensor) -> tuple[Tensor, float] | None:
    """Returns the inverses of a layer's matrices, each with the jitter that it needs, and the largest."""
    found = [jittered_cholesky(matrix) for matrix in matrices]
    good = [pair for pair in found if pair is not None]
    if len(good) < len(found):
        return None
    inverses = torch.cholesky_inverse(torch.stack([factor for factor, _ in good]))
    return inverses, max(jitter for _, jitter in good)


def _all_of_each(good: Tensor, counts: Sequence[int]) -> list[bool]:
    """Returns for every factor whether all its blocks are good; one transfer from the device."""
    flags, answers, start = good.tolist(), [], 0
    for count in counts:
        answers.append(all(flags[start : start + count]))
        start += count
    return answers
