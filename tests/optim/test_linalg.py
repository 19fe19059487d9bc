"""The sample-space identities and the factorization, on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim.curvature import SampleCurvature, Sketch
from hpcsngd.optim.linalg import jittered_cholesky, jittered_cholesky_each, spectrum_summary
from hpcsngd.optim.rows import FactoredRows, Rows
from tests.optim import oracle

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def random_rows(seed: int, n: int, d_in: int, d_out: int) -> tuple[FactoredRows, Tensor, Tensor]:
    """Returns rows, the per-sample gradients as matrix rows, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, 1, 1, d_in, generator=generator, dtype=torch.float64)
    g = torch.randn(n, 1, 1, d_out, generator=generator, dtype=torch.float64)
    grad = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    return FactoredRows(a, g), torch.einsum("nxyo,nxyi->noi", g, a).flatten(1), grad


def curvature(rows: Rows, damping: float) -> SampleCurvature:
    sketch = Sketch(rows, len(rows), len(rows))
    built = SampleCurvature.build(sketch, sketch.kernel(), damping)
    assert built is not None
    return built


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
    signs = torch.where(order % 2 == 0, 1.0, -1.0).reshape(-1, 1, 1, 1)
    other = FactoredRows(rows.a[order] * signs, rows.g[order])
    torch.testing.assert_close(curvature(other, 0.1).solve(grad), curvature(rows, 0.1).solve(grad))


def test_duplicate_samples_need_no_special_care() -> None:
    rows, u, grad = random_rows(0, 3, 4, 2)
    doubled = rows.take(torch.arange(3).repeat(4))
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


def test_a_batch_is_factorized_like_its_matrices() -> None:
    """Bit for bit; singular, indefinite and broken matrices do not touch their neighbors."""
    generator = torch.Generator().manual_seed(0)

    def gram(n: int, rank: int) -> torch.Tensor:
        rows = torch.randn(n, rank, generator=generator, dtype=torch.float64)
        return rows @ rows.T

    matrices = [
        gram(6, 8),
        gram(6, 2),
        torch.full((6, 6), torch.nan, dtype=torch.float64),
        gram(4, 4),
        -gram(6, 6),
        gram(6, 6),
        gram(6, 8).float(),
    ]
    found = jittered_cholesky_each(matrices)
    expected = [jittered_cholesky(matrix) for matrix in matrices]
    assert [index for index, result in enumerate(found) if result is None] == [2, 4]
    jitters = [result[1] for result in found if result is not None]
    assert jitters[1] > 0
    assert jitters[0] == jitters[2] == 0
    for result, alone in zip(found, expected, strict=True):
        if result is not None:
            assert torch.equal(result[0], alone[0])
            assert result[1] == alone[1]


def test_nothing_to_factorize() -> None:
    assert jittered_cholesky_each([]) == []
