"""The sample-space identities, the factorization and the patch sums, on random shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpcsngd.optim.capture import Rows
from hpcsngd.optim.curvature import SampleCurvature, Sketch
from hpcsngd.optim.layers import patch_sums
from hpcsngd.optim.linalg import jittered_cholesky, khatri_rao_gram, row_scores, spectrum_summary
from tests.optim import oracle

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def random_rows(seed: int, n: int, d_in: int, d_out: int, scale: float = 1.0) -> tuple[Rows, Tensor, Tensor]:
    """Returns rows, the per-sample gradients as matrix rows, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    g = torch.randn(n, d_out, generator=generator, dtype=torch.float64)
    grad = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return Rows(a, g), torch.einsum("no,ni->noi", g, a).flatten(1), grad


def curvature(rows: Rows, damping: float) -> SampleCurvature:
    sketch = Sketch(rows, len(rows.a), len(rows.a))
    built = SampleCurvature.build(sketch, sketch.kernel(), damping)
    assert built is not None
    return built


@given(seeds, sizes, sizes, sizes)
@settings(deadline=None, max_examples=30)
def test_gram_and_scores_are_inner_products(seed: int, n: int, d_in: int, d_out: int) -> None:
    rows, u, _ = random_rows(seed, n, d_in, d_out)
    torch.testing.assert_close(khatri_rao_gram(*rows), u @ u.T)
    torch.testing.assert_close(row_scores(*rows), u.square().sum(1))


@given(seeds, st.integers(1, 12), sizes, sizes, st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=60)
def test_solve_equals_the_dense_solve(seed: int, n: int, d_in: int, d_out: int, damping: float) -> None:
    rows, u, grad = random_rows(seed, n, d_in, d_out)
    found = curvature(rows, damping).solve(grad)
    # Rounding grows with the condition number: up to 1e2 / 1e-3 here.
    assert oracle.relative_error(found, oracle.dense_solution(u, grad, damping)) < 1e-10


@given(seeds, st.integers(1, 12), sizes, sizes)
@settings(deadline=None, max_examples=30)
def test_large_damping_leaves_the_gradient(seed: int, n: int, d_in: int, d_out: int) -> None:
    rows, u, grad = random_rows(seed, n, d_in, d_out)
    top = float(torch.linalg.eigvalsh(u @ u.T / n)[-1])
    for factor in (1e3, 1e6):
        # |damping v - g| <= top / (top + damping) |g|
        found = curvature(rows, factor * top).solve(grad) * (factor * top)
        assert oracle.relative_error(found, grad) <= 1.01 / factor


@given(seeds, st.integers(2, 12), sizes, sizes)
@settings(deadline=None, max_examples=30)
def test_order_and_sign_of_samples_do_not_matter(seed: int, n: int, d_in: int, d_out: int) -> None:
    rows, _, grad = random_rows(seed, n, d_in, d_out)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(order % 2 == 0, 1.0, -1.0).unsqueeze(1)
    other = Rows(rows.a[order] * signs, rows.g[order])
    torch.testing.assert_close(curvature(other, 0.1).solve(grad), curvature(rows, 0.1).solve(grad))


def test_duplicate_samples_need_no_special_care() -> None:
    rows, u, grad = random_rows(0, 3, 4, 2)
    doubled = Rows(rows.a.repeat(4, 1), rows.g.repeat(4, 1))
    found = curvature(doubled, 1e-6).solve(grad)
    assert oracle.relative_error(found, oracle.dense_solution(u, grad, 1e-6)) < 1e-8


def test_cholesky_takes_no_jitter_where_none_is_needed() -> None:
    matrix = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    factor, jitter = jittered_cholesky(matrix)
    assert jitter == 0.0
    torch.testing.assert_close(factor @ factor.T, matrix)


def test_cholesky_escalates_jitter() -> None:
    vector = torch.tensor([[1.0], [1.0], [-2.0]], dtype=torch.float64)
    # Rank one, pushed below zero by a hundred rounding errors.
    matrix = vector @ vector.T - 1e-14 * torch.eye(3, dtype=torch.float64)
    factor, jitter = jittered_cholesky(matrix)
    assert 1e-14 < jitter < 1e-11
    torch.testing.assert_close(factor @ factor.T, matrix, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.0, 0.0], [0.0, -1.0]],
        [[-1.0, 0.0], [0.0, -1.0]],
        [[1.0, float("nan")], [float("nan"), 1.0]],
        [[float("inf"), 0.0], [0.0, 1.0]],
    ],
)
def test_cholesky_refuses_what_is_not_positive(matrix: list[list[float]]) -> None:
    assert jittered_cholesky(torch.tensor(matrix)) is None


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, (2, 1.0)),
        ([1.0, 1.0, 1.0, 1.0], 0.51, (3, 1.0)),
        ([0.0, 9.0, 1.0], 0.9, (1, 9.0)),
        ([0.1] * 10, 0.9, (9, 0.1)),
        ([5.0, -1e-18], 1.0, (1, 5.0)),
        ([0.0, 0.0], 0.9, (0, 0.0)),
    ],
)
def test_spectrum_summary(values: list[float], share: float, expected: tuple[int, float]) -> None:
    assert spectrum_summary(torch.tensor(values, dtype=torch.float64), share) == expected


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    seeds,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pairs,
    pairs,
    pairs,
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
@settings(deadline=None, max_examples=150)
def test_patch_sums_equal_unfold(
    seed: int,
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    image = tuple(
        max(size, d * (k - 1) + 1 - 2 * p)
        for size, k, d, p in zip(image, kernel, dilation, padding, strict=True)
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *image, generator=generator, dtype=torch.float64)
    conv = nn.Conv2d(3, 1, kernel, stride, padding, dilation).double()
    unfolded = F.unfold(x, kernel, dilation, padding, stride)
    found = patch_sums(x, conv, conv(x).shape[2:], torch.float64)
    torch.testing.assert_close(found, unfolded.sum(2), atol=1e-12, rtol=1e-12)
