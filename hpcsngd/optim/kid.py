"""Khatri-Rao interpolative decomposition (KID): every sample as a combination of the kept ones.

With the kept samples S (pivots of the kernel) and T = K_SS^-1 K_S,rest, the rows of the samples left out are
``T^T U_S`` plus a residual orthogonal to every kept row, so that with ``P = [I T]`` (kept samples first)

    K = P^T K_SS P + E,        E = K_rest,rest - K_rest,S K_SS^-1 K_S,rest   (zero for kept samples, PSD).

One N, the number of samples *before* truncation, scales kernel, residual and final mean alike:

    V = (M - 1/N U_S^T C U_S M) / damping,     C = P (K/N + damping I)^-1 P^T = (damping G^-1 + K_SS/N)^-1
    G = I + T T^T                                     without the residual (E dropped)
    G = I + damping T (E/N + damping I)^-1 T^T        with it

``G`` is at least the identity and ``C`` needs no inverse of a kernel: with ``G = L L^T`` it is
``L (damping I + L^T K_SS/N L)^-1 L^T``, a Cholesky factorization that rounding cannot break. Let Q project on
the span of the kept rows. Without the residual V is ``(Q F Q + damping I)^-1 M``; with it
``(I - Q F (F + damping I)^-1 Q) M / damping``. Both are positive definite, and equal to SNGD at full rank.

The residual is not worth its cost: on the 180 problems of ``tests/optim/test_kid.py`` (three spectra, ranks
4, 8 and 16 of 32 samples) it changes the mean error against SNGD by less than 1 %, and upwards. The reason is
in the formulas: it sharpens F inside the span, where KID is accurate already.

Source: HyLo (Mu et al., SC 2022), section on KID. Deviations: there, rows are ordered by their norms and QR
is not pivoted; here the kernel's pivoted Cholesky chooses them, which also bounds T on nearly equal samples.

Precision. What remains of a kernel after a few pivots is a difference of large numbers, whose rounding enters
F by its square root; so T and G are computed in float64 whatever the rows are. Pivots need less: from rows in
single precision they are chosen in single precision, and only the r rows of K that T needs are computed
again: ``n^2 d`` multiplications in single and ``r n d`` in double precision rather than ``n^2 d`` in double.
Where a pivot does not stand clear of single precision's rounding, the layer is done in double precision
altogether.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsngd.optim.linalg import jittered_cholesky, jittered_cholesky_each, pivoted_cholesky_batch
from hpcsngd.optim.rows import Rows
from hpcsngd.optim.threads import MOST_OF_EACH, one_thread_if


@dataclass(frozen=True)
class Interpolation:
    """Kept samples and how they stand for all.

    Attributes:
        kept: ascending indices of the kept samples, int64, shape ``(r,)``.
        mixing: lower triangular ``L`` with ``L L^T = G``, shape ``(r, r)``.
        left_out: trace of ``E``: the summed eigenvalues of the residual, not divided by N.
    """

    kept: Tensor
    mixing: Tensor
    left_out: Tensor

    def to(self, like: Tensor) -> Interpolation:
        """Returns it in the dtype of ``like``."""
        return Interpolation(self.kept, self.mixing.to(like), self.left_out.to(like))


def interpolate_rows(
    rows: Sequence[Rows], ranks: Sequence[int], *, samples: Sequence[int], damping: float, residual: bool
) -> list[Interpolation | None]:
    """Returns the interpolative decomposition of every layer's rows, float64.

    Args:
        rows: of each layer.
        ranks: how many samples to keep of each at most.
        samples: as for `interpolate_each`, and what follows too.
        damping: see there.
        residual: see there; with it the whole kernel is needed in double precision.
    """
    largest = max((len(each) ** 2 * each.numbers for each in rows), default=0)
    is_small = largest <= MOST_OF_EACH and all(each.tensors[0].device.type == "cpu" for each in rows)
    with one_thread_if(is_small):
        return _interpolated(rows, ranks, samples, damping, residual=residual)


def _interpolated(
    rows: Sequence[Rows], ranks: Sequence[int], samples: Sequence[int], damping: float, *, residual: bool
) -> list[Interpolation | None]:
    found: dict[int, Interpolation] = {}
    if not residual:
        found = _screened(
            {
                index: (each, rank)
                for index, (each, rank) in enumerate(zip(rows, ranks, strict=True))
                if each.tensors[0].dtype == torch.float32 and 0 < 2 * rank <= len(each)
            }
        )
    left = [index for index in range(len(rows)) if index not in found]
    whole = interpolate_each(
        [rows[index].double().gram() for index in left],
        [ranks[index] for index in left],
        samples=[samples[index] for index in left],
        damping=damping,
        residual=residual,
    )
    every = {**dict(zip(left, whole, strict=True)), **found}
    return [every[index] for index in range(len(rows))]


def _screened(layers: Mapping[int, tuple[Rows, int]]) -> dict[int, Interpolation]:
    """Returns interpolations whose pivots single precision can tell; other layers are missing.

    Args:
        layers: rows in single precision and the rank of each.
    """
    found: dict[int, Interpolation] = {}
    sizes = {index: (len(each), rank, each.tensors[0].device) for index, (each, rank) in layers.items()}
    for rank, members in _alike(sizes):
        pivots, _, counts = pivoted_cholesky_batch(
            torch.stack([layers[index][0].gram() for index in members]), rank
        )
        clear = [position for position, count in enumerate(counts) if count == rank]
        if clear:
            kept = pivots[clear].sort(1).values
            found.update(_by_rows({members[p]: layers[members[p]][0] for p in clear}, kept))
    return found


def _by_rows(rows: Mapping[int, Rows], kept: Tensor) -> dict[int, Interpolation]:
    """Returns interpolations from the kernels' rows of the samples kept.

    Args:
        rows: of layers with equally many samples.
        kept: of each, ascending, shape ``(layers, r)``.
    """
    doubles = [each.double() for each in rows.values()]
    chosen = torch.stack([each.take(index).products(each) for each, index in zip(doubles, kept, strict=True)])
    index = kept[:, None, :].expand(-1, kept.shape[1], -1)
    factors, info = torch.linalg.cholesky_ex(chosen.gather(2, index))
    # P = [I T], its columns in the order of the samples
    explained = torch.linalg.solve_triangular(factors, chosen, upper=False)
    p = torch.linalg.solve_triangular(factors.mT, explained, upper=True)
    lacking = torch.stack([each.scores() for each in doubles]) - explained.square().sum(1)
    traces = lacking.scatter(1, kept, 0).sum(1).clamp_min(0)
    mixing = jittered_cholesky_each((p @ p.mT).unbind())
    succeeded: list[bool] = (info == 0).tolist()
    return {
        layer: Interpolation(index, factorized[0], trace)
        for layer, index, factorized, trace, is_good in zip(
            rows, kept, mixing, traces, succeeded, strict=True
        )
        if factorized is not None and is_good
    }


def interpolate_each(
    kernels: Sequence[Tensor],
    ranks: Sequence[int],
    *,
    samples: Sequence[int],
    damping: float,
    residual: bool,
) -> list[Interpolation | None]:
    """Returns the interpolative decomposition of every kernel.

    Pivots of kernels with equal size and rank are found together; a kernel that is not finite comes to None.

    Args:
        kernels: ``K = U U^T``, not divided by anything, shape ``(n, n)``.
        ranks: how many samples to keep of each at most; a singular kernel keeps fewer.
        samples: N; more than n where other ranks have samples too.
        damping: positive; read with ``residual`` only.
        residual: whether ``E`` enters G.
    """
    found: list[Interpolation | None] = [None] * len(kernels)
    sizes = {
        index: (len(kernel), rank, kernel.device)
        for index, (kernel, rank) in enumerate(zip(kernels, ranks, strict=True))
    }
    for rank, members in _alike(sizes):
        stacked = torch.stack([kernels[index] for index in members])
        # A kernel that is not finite comes to nothing, without harm to its neighbours.
        # What is not finite stays so in a sum of absolute values.
        is_finite: list[bool] = stacked.abs().sum((1, 2)).isfinite().tolist()
        if not all(is_finite):
            stacked[[not good for good in is_finite]] = 0.0
        pivots, factors, counts = pivoted_cholesky_batch(stacked, rank)
        for position, (index, is_good, count) in enumerate(zip(members, is_finite, counts, strict=True)):
            if is_good:
                pair = (pivots[position, :count], factors[position, :count])
                shift = (samples[index], damping) if residual else None
                found[index] = _interpolation(kernels[index], *pair, shift)
    return found


def _alike(sizes: Mapping[int, tuple[int, int, torch.device]]) -> list[tuple[int, list[int]]]:
    """Returns the ranks and members of groups of equal size, rank and device, given these by index."""
    groups: dict[tuple[int, int, torch.device], list[int]] = {}
    for index, size in sizes.items():
        groups.setdefault(size, []).append(index)
    return [(rank, members) for (_, rank, _), members in groups.items()]


def _interpolation(
    kernel: Tensor, pivots: Tensor, factor: Tensor, residual: tuple[int, float] | None
) -> Interpolation | None:
    """Returns the interpolation from given pivots.

    Args:
        kernel: ``K``.
        pivots: from `pivoted_cholesky`.
        factor: from there.
        residual: N and damping, where the residual enters G.
    """
    is_rest = torch.ones(len(kernel), dtype=torch.bool, device=kernel.device)
    is_rest[pivots] = False
    rest = is_rest.nonzero()[:, 0]
    # T = R_SS^-1 R_S,rest, its rows put from the order of the pivots into ascending order.
    explained = factor[:, rest]
    t = torch.linalg.solve_triangular(factor[:, pivots], explained, upper=True)[pivots.argsort()]
    gram: Tensor | None = t @ t.T
    if residual is not None:
        lacking = kernel[rest][:, rest] - explained.T @ explained
        gram = _gram_with_residual(t, lacking / residual[0], residual[1])
    identity = torch.eye(len(pivots), dtype=kernel.dtype, device=kernel.device)
    factorized = None if gram is None else jittered_cholesky(identity + gram)
    if factorized is None:
        return None
    left_out = kernel.diagonal()[rest].sum() - explained.square().sum()
    return Interpolation(pivots.sort().values, factorized[0], left_out.clamp_min(0))


def _gram_with_residual(t: Tensor, residual: Tensor, damping: float) -> Tensor | None:
    """Returns ``damping T (E/N + damping I)^-1 T^T``."""
    shift = damping * torch.eye(len(residual), dtype=residual.dtype, device=residual.device)
    # Rounding may leave E slightly indefinite.
    factorized = jittered_cholesky(residual + shift)
    if factorized is None:
        return None
    half = torch.linalg.solve_triangular(factorized[0], t.T, upper=False)
    gram: Tensor = damping * half.T @ half
    return gram
