"""Orthogonal and symmetric matrices kept in half to four fifths of their numbers, and products with them.

Neither has more than about d^2 / 2 numbers of its own. From a certain size on they are kept as panels of
`WIDTH` columns, panel j as its rows from the diagonal on, and never put together again: a product goes panel
by panel.

    orthogonal  Q = B_1 ... B_p diag(+-1, Q') with B_j = I - V_j T_j V_j^T, products of Householder's
                reflections (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 1989) that clear the first
                third of the columns. A panel is V_j and, below it, T_j; Q' is whole, behind them: together
                0.72 to 0.82 d^2 numbers. Clearing every column would leave 0.5 to 0.67 d^2, and products take
                half as long again. The signs are dropped: eigenvectors are as good with either.
    symmetric   what stands above the diagonal is the transpose of what stands below it

A *kept* tensor is ``(blocks, d, d)`` where it is whole and ``(blocks, numbers)`` where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["orthogonal", "symmetric"]

#: Columns of a panel: narrower ones take less memory and more, smaller products.
WIDTH = 64
#: Rows from which on matrices are halved. Products with 576 rows and 64 outputs take half as long again as
#: with the whole matrix (2 CPU threads), with fewer rows longer.
LEAST = 384


def kept_shape(form: Form, shape: Sequence[int], dtype: torch.dtype | None) -> tuple[int, ...]:
    """Returns the shape of what is kept of matrices.

    Args:
        form: of the matrices.
        shape: theirs, ``(blocks, d, d)``.
        dtype: in which they are kept (None: at least float32). Reflections are not orthogonal any more in
            fewer digits, so there orthogonal matrices stay whole, at half the bytes as it is.
    """
    is_precise = dtype is None or torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps
    if shape[-1] < LEAST or (form == "orthogonal" and not is_precise):
        return tuple(shape)
    return shape[0], _numbers(form, shape[-1])


def fits(form: Form, kept: Tensor, side: int) -> bool:
    """Returns whether a tensor can be what is kept of matrices with ``side`` rows."""
    return kept.shape[1:] == (side, side) or kept.shape[1:] == (_numbers(form, side),)


def keep(form: Form, matrices: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns what is kept of matrices ``(blocks, d, d)``, in ``dtype`` (None: their own)."""
    dtype = dtype or matrices.dtype
    if len(kept_shape(form, matrices.shape, dtype)) == 2:
        parts = _reflections(matrices) if form == "orthogonal" else _columns(matrices)
        matrices = torch.cat([part.flatten(1) for part in parts], 1)
    # LAPACK's results lie by columns, loaded states by rows, and products round accordingly.
    return matrices.to(dtype).contiguous()


def times_orthogonal(x: Tensor, kept: Tensor, *, transposed: bool = False) -> Tensor:
    """Returns ``X Q`` for every X, ``(blocks, n, d)``; with ``transposed`` ``X Q^T``.

    Of a Q in panels all that is told is Q up to the signs of its columns, the same in both products.
    """
    if kept.dim() == 3:
        return x @ (kept.mT if transposed else kept)
    result, side = x.clone(), x.shape[-1]
    panels, left = list(_panels("orthogonal", kept, side)), side - _cleared(side)
    whole, rest = kept[:, -left * left :].view(-1, left, left), result[:, :, side - left :]
    if transposed:
        rest.copy_(rest @ whole.mT)
    for start, panel in reversed(panels) if transposed else panels:
        _reflect(result[:, :, start:], panel, transposed=transposed)
    if not transposed:
        rest.copy_(rest @ whole)
    return result


def _reflect(rows: Tensor, panel: Tensor, *, transposed: bool) -> None:
    """Multiplies rows ``(blocks, n, d)`` by B_j, or its transpose, in place."""
    v, t = panel[:, : rows.shape[2]], panel[:, rows.shape[2] :]
    rows.baddbmm_((rows @ v) @ (t.mT if transposed else t), v.mT, alpha=-1)


def times_symmetric(x: Tensor, kept: Tensor) -> Tensor:
    """Returns ``X S`` for every X, ``(blocks, n, d)``."""
    if kept.dim() == 3:
        return x @ kept
    result, side = torch.zeros_like(x), x.shape[-1]
    for start, panel in _panels("symmetric", kept, side):
        stop = start + panel.shape[2]
        result[:, :, start:stop] += x[:, :, start:] @ panel
        result[:, :, stop:] += x[:, :, start:stop] @ panel[:, stop - start :].mT
    return result


def _reflections(matrices: Tensor) -> Iterator[Tensor]:
    """Yields V_j above T_j = (I + D striu(V^T V))^-1 D, then Q'; D are the reflections' factors, also 0."""
    side = matrices.shape[-1]
    cleared = _cleared(side)
    below, factors = torch.geqrf(matrices[:, :, :cleared])
    turned = matrices.mT.clone()
    for start, stop in _ranges(cleared):
        v = below[:, start:, start:stop].tril(-1)
        v.diagonal(dim1=1, dim2=2).fill_(1)
        scale = torch.diag_embed(factors[:, start:stop])
        eye = torch.eye(stop - start, dtype=v.dtype, device=v.device)
        unit = eye + scale @ (v.mT @ v).triu(1)
        t = torch.linalg.solve_triangular(unit, scale, upper=True, unitriangular=True)
        panel = torch.cat([v, t], 1)
        _reflect(turned[:, :, start:], panel, transposed=False)
        yield panel
    yield turned[:, cleared:, cleared:].mT


def _columns(matrices: Tensor) -> Iterator[Tensor]:
    for start, stop in _ranges(matrices.shape[-1]):
        yield matrices[:, start:, start:stop]


def _panels(form: Form, kept: Tensor, side: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first column of every panel, and the panel."""
    offset = 0
    for start, shape in _shapes(form, side):
        end = offset + shape[0] * shape[1]
        yield start, kept[:, offset:end].view(-1, *shape)
        offset = end


def _shapes(form: Form, side: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields the first column and the shape of every panel."""
    if form == "orthogonal":
        for start, stop in _ranges(_cleared(side)):
            yield start, (side - start + (stop - start), stop - start)
    else:
        for start, stop in _ranges(side):
            yield start, (side - start, stop - start)


def _ranges(columns: int) -> Iterator[tuple[int, int]]:
    for start in range(0, columns, WIDTH):
        yield start, min(start + WIDTH, columns)


def _cleared(side: int) -> int:
    """Returns how many columns of an orthogonal matrix are cleared: about a third, in whole panels."""
    return WIDTH * max(1, round(side / 3 / WIDTH))


def _numbers(form: Form, side: int) -> int:
    """Returns the numbers of a matrix that is not whole."""
    panels = sum(rows * columns for _, (rows, columns) in _shapes(form, side))
    return panels + ((side - _cleared(side)) ** 2 if form == "orthogonal" else 0)
