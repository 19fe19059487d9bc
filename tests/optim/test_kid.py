"""KID: its algebra against dense projections, exactness at full rank, error against rank, hard kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim import HyLo
from hpcsngd.optim.curvature import SampleCurvature, Sketch
from hpcsngd.optim.kid import interpolate_each, interpolate_rows
from hpcsngd.optim.linalg import pivoted_cholesky
from hpcsngd.optim.rows import FactoredRows, Rows
from hpcsngd.optim.selection import RankRule
from hpcsngd.optim.sketches import Compression
from tests.optim import models, oracle

DAMPING = 0.05
seeds = st.integers(0, 2**31)


def problem(
    seed: int, n: int, *, decay: float = 0.0, d_in: int = 7, d_out: int = 5
) -> tuple[FactoredRows, Tensor]:
    """Returns rows whose features shrink like ``1 / index^decay``, and their mean gradient."""
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    a, g = (rows / torch.arange(1, rows.shape[1] + 1).double() ** decay for rows in (a, g))
    return one_term(a, g), g.T @ a / n


def one_term(a: Tensor, g: Tensor) -> FactoredRows:
    """Returns rows of the outer products of ``a`` of shape ``(n, d_in)`` and ``g`` of ``(n, d_out)``."""
    return FactoredRows(a[:, None, None], g[:, None, None])


def factors(rows: FactoredRows) -> tuple[Tensor, Tensor]:
    """Returns what `one_term` was given."""
    return rows.a[:, 0, 0], rows.g[:, 0, 0]


def gradients(rows: FactoredRows) -> Tensor:
    return torch.einsum("nxyo,nxyi->noi", rows.g, rows.a).flatten(1)


def sketch(rows: Rows, rank: int, *, residual: bool = False, damping: float = DAMPING) -> Sketch:
    compression = Compression(RankRule(low_rank=rank), residual, False, "joined", 0)
    found = compression.sketch("kid", "layer", rows, 0, damping)
    assert found is not None
    return found


def solve(rows: Rows, grad: Tensor, rank: int, *, damping: float = DAMPING, residual: bool = False) -> Tensor:
    found = sketch(rows, rank, residual=residual, damping=damping)
    curvature = SampleCurvature.build(found, found.kernel(), damping)
    assert curvature is not None
    return curvature.solve(grad)


def projection(rows: Tensor) -> Tensor:
    """Returns the orthogonal projection on the span of the rows, ``(d, d)``."""
    return torch.linalg.pinv(rows) @ rows


def error(rows: Rows, grad: Tensor, rank: int, *, residual: bool = False) -> float:
    exact = oracle.dense_solution(gradients(rows), grad, DAMPING)
    return oracle.relative_error(solve(rows, grad, rank, residual=residual), exact)


@given(seeds, st.integers(1, 24), st.booleans())
@settings(deadline=None, max_examples=40)
def test_equals_its_dense_formula(seed: int, rank: int, residual: bool) -> None:
    """Compression of F (without residual) or of F (F + damping I)^-1 (with it) to the kept rows' span."""
    rows, _ = problem(seed, 24)
    grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, identity = gradients(rows), torch.eye(35, dtype=torch.float64)
    q, fisher = projection(gradients(sketch(rows, rank).rows)), u.T @ u / 24
    if residual:
        inside = q @ fisher @ torch.linalg.inv(fisher + DAMPING * identity) @ q
        expected = (identity - inside) @ grad.flatten() / DAMPING
    else:
        expected = torch.linalg.solve(q @ fisher @ q + DAMPING * identity, grad.flatten())
    found = solve(rows, grad, rank, residual=residual)
    # Condition number of K up to 1e4: the projection is that much less exact than rounding.
    assert oracle.relative_error(found.flatten(), expected) < 1e-9


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n", [5, 24, 60])
def test_full_rank_is_sngd(n: int, residual: bool) -> None:
    """Also with more samples than directions (60 > 35), where the kernel is singular."""
    rows, grad = problem(3, n)
    assert error(rows, grad, n, residual=residual) < 1e-9
    assert len(sketch(rows, n).rows) == min(n, 35)


def test_full_rank_is_sngd_on_a_model() -> None:
    results = []
    for options in ({}, {"method": "kid"}, {"method": "kid", "residual": True}):
        model = models.conv_net(kernel_size=3)
        hylo = HyLo(model, damping=DAMPING, **options)
        oracle.mean_loss(model, *oracle.batch(models.conv_net(kernel_size=3), (10, 3, 8, 7))).backward()
        hylo.step()
        results.append([p.grad for p in model.parameters()])
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert oracle.relative_error(left, right) < 1e-9


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_error_falls_as_rank_grows(decay: float, residual: bool) -> None:
    """Mean over 20 problems at each rank: below the one before, down to rounding at full rank."""
    problems = [problem(seed, 32, decay=decay) for seed in range(20)]
    means = [
        sum(error(*each, rank, residual=residual) for each in problems) / 20 for rank in (1, 2, 4, 8, 16, 32)
    ]
    assert all(more < less for less, more in itertools.pairwise(means)), means
    assert means[-1] < 1e-9


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_more_accurate_than_sampling_and_than_nothing(decay: float) -> None:
    """At a quarter of the samples: g / damping, KIS, KID, from worst to best (mean of 20 problems)."""
    errors = []
    for seed in range(20):
        rows, grad = problem(seed, 32, decay=decay)
        exact = oracle.dense_solution(gradients(rows), grad, DAMPING)
        compression = Compression(RankRule(low_rank=8), False, False, "joined", seed)
        drawn = compression.sketch("kis", "layer", rows, 0, DAMPING)
        kis = SampleCurvature.build(drawn, drawn.kernel(), DAMPING).solve(grad)
        kid = solve(rows, grad, 8)
        errors.append([oracle.relative_error(found, exact) for found in (grad / DAMPING, kis, kid)])
    nothing, kis, kid = torch.tensor(errors).mean(0).tolist()
    assert nothing > 1.2 * kid
    assert kis > kid


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_the_residual_is_worth_nothing(decay: float, rank: int) -> None:
    """The number in the docstring of `hpcsngd.optim.kid`: relative change of the mean error, 20 problems."""
    problems = [problem(seed, 32, decay=decay) for seed in range(20)]
    without, carried = (
        sum(error(*each, rank, residual=residual) for each in problems) for residual in (False, True)
    )
    assert -1e-3 < carried / without - 1 < 0.01


@given(seeds, st.integers(1, 16), st.booleans())
@settings(deadline=None, max_examples=40)
def test_is_positive_definite(seed: int, rank: int, residual: bool) -> None:
    """Eigenvalues between 0 and 1 / damping, and symmetric, as (F + damping I)^-1 has them."""
    rows, _ = problem(seed, 16, d_in=4, d_out=3)
    units = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    matrix = torch.stack([solve(rows, unit, rank, residual=residual).flatten() for unit in units])
    torch.testing.assert_close(matrix, matrix.T, atol=1e-10, rtol=0)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values[0]) > 0
    assert float(values[-1]) <= (1 + 1e-10) / DAMPING


@given(seeds, st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=30)
def test_order_of_samples_does_not_matter(seed: int, rank: int, residual: bool) -> None:
    rows, grad = problem(seed, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    shuffled = rows.take(order)
    found = solve(shuffled, grad, rank, residual=residual)
    assert oracle.relative_error(found, solve(rows, grad, rank, residual=residual)) < 1e-9


def test_repeating_every_sample_changes_nothing() -> None:
    """One N everywhere: twice the samples with twice the N is the same F, kept rows and result."""
    rows, grad = problem(0, 12)
    twice = rows.take(torch.arange(12).repeat(2))
    for rank in (3, 8, 12):
        for residual in (False, True):
            found = solve(twice, grad, rank, residual=residual)
            assert oracle.relative_error(found, solve(rows, grad, rank, residual=residual)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-7, 1e-3])
def test_nearly_equal_samples(spread: float, residual: bool, dtype: torch.dtype) -> None:
    """Kernels of numerical rank 3 and more: fewer rows than asked, finite, close to SNGD.

    What the Gram matrix cannot tell from rounding, n eps of its largest entry, enters F by its square root.
    """
    base, _ = problem(1, 3)
    noise, _ = problem(2, 24)
    a, g = (x.repeat(8, 1) + spread * y for x, y in zip(factors(base), factors(noise), strict=True))
    rows, grad = one_term(a.to(dtype), g.to(dtype)), (g.T @ a / 24)
    found = solve(rows, grad.to(dtype), 24, residual=residual)
    exact = oracle.dense_solution(gradients(one_term(a, g)), grad, DAMPING)
    top = float(one_term(a, g).scores().max()) / DAMPING
    rounding = (24 * torch.finfo(torch.float64).eps) ** 0.5 + torch.finfo(dtype).eps
    assert oracle.relative_error(found.double(), exact) < rounding * top
    if spread < 1e-10 and dtype == torch.float64:
        assert oracle.relative_error(found, exact) < 1e-9
        assert len(sketch(rows, 24).rows) == 3


def test_zero_rows_are_never_kept() -> None:
    rows, grad = problem(0, 10)
    silent = rows.scaled((torch.arange(10) < 4).double())
    found = sketch(silent, 8)
    assert len(found.rows) == 4
    assert bool((found.rows.scores() > 0).all())
    nothing = sketch(rows.scaled(0.0), 8)
    assert len(nothing.rows) == 0
    everything_zero = SampleCurvature.build(nothing, nothing.kernel(), DAMPING)
    assert torch.equal(everything_zero.solve(grad), grad / DAMPING)


def test_a_kernel_that_is_not_finite_gives_nothing() -> None:
    rows, _ = problem(0, 6)
    compression = Compression(RankRule(low_rank=3), False, False, "joined", 0)
    assert compression.sketch("kid", "x", rows.scaled(1e200), 0, DAMPING) is None


@given(seeds, st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_pivoted_cholesky(seed: int, rank: int) -> None:
    rows, _ = problem(seed, 12)
    kernel = rows.gram()
    pivots, factor = pivoted_cholesky(kernel, rank)
    assert len(set(pivots.tolist())) == len(pivots) == rank
    left = kernel - factor.T @ factor
    scale = float(kernel.diagonal().max())
    assert float(left[pivots].abs().max()) < 1e-12 * scale
    assert float(torch.linalg.eigvalsh(left)[0]) > -1e-12 * scale
    # The first pivot is the largest sample, and what is left only shrinks.
    assert int(pivots[0]) == int(kernel.diagonal().argmax())
    triangle = factor[:, pivots]
    assert torch.equal(triangle, triangle.triu())
    assert bool((triangle.diagonal()[1:] <= triangle.diagonal()[:-1] * (1 + 1e-12)).all())


def test_layers_together_equal_layers_alone() -> None:
    """Also where one of them is singular and one is not finite: neighbours do not notice."""
    rows = {str(seed): problem(seed, 12)[0] for seed in range(3)}
    rows["few"] = problem(3, 12)[0].scaled((torch.arange(12) < 2).double())
    rows["bad"] = problem(4, 12)[0].scaled(1e200)
    rows["small"] = problem(5, 7)[0]
    compression = Compression(RankRule(low_rank=4), False, False, "joined", 0)
    together = compression.sketches("kid", rows, 0, DAMPING)
    assert together["bad"] is None
    for name, found in together.items():
        alone = compression.sketch("kid", name, rows[name], 0, DAMPING)
        assert (alone is None) == (found is None)
        if alone is not None and found is not None:
            assert torch.equal(found.rows.scores(), alone.rows.scores())
            torch.testing.assert_close(found.mixing, alone.mixing, rtol=1e-12, atol=1e-12)
    assert len(together["few"].rows) == 2


def test_left_out_is_the_mean_of_the_residual_spectrum() -> None:
    rows, _ = problem(0, 24)
    found = sketch(rows, 6)
    u = gradients(rows)
    lacking = u - u @ projection(gradients(found.rows))
    expected = float(lacking.square().sum()) / 24 / (24 - 6)
    assert found.left_out == pytest.approx(expected, rel=1e-9)
    assert sketch(rows, 24).left_out == 0.0


@given(seeds, st.integers(1, 16), st.sampled_from([0.0, 1.0]))
@settings(deadline=None, max_examples=30)
def test_pivots_in_single_precision_give_a_double_precision_result(
    seed: int, rank: int, decay: float
) -> None:
    """For the samples that single precision chose, T and what is left out are those of double precision."""
    rows, _ = problem(seed, 32, decay=decay)
    single = rows.to(torch.zeros(1))
    (found,) = interpolate_rows([single], [rank], samples=[32], damping=DAMPING, residual=False)
    assert found is not None
    assert len(found.kept) == rank
    kernel = single.double().gram()
    p = torch.linalg.solve(kernel[found.kept][:, found.kept], kernel[found.kept])
    torch.testing.assert_close(found.mixing @ found.mixing.T, p @ p.T, rtol=1e-8, atol=1e-8)
    lacking = kernel.trace() - (kernel[found.kept] * p).sum()
    torch.testing.assert_close(found.left_out, lacking, rtol=1e-6, atol=1e-9 * float(kernel.trace()))
    # Greedy as double precision would be: what is left out is as good as with its own pivots.
    (own,) = interpolate_each([kernel], [rank], samples=[32], damping=DAMPING, residual=False)
    assert own is not None
    assert float(found.left_out) <= 1.2 * float(own.left_out) + 1e-9 * float(kernel.trace())


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4])
def test_what_single_precision_cannot_tell_is_done_in_double(spread: float) -> None:
    """Three samples eight times, nearly: the fourth pivot is rounding in single precision only."""
    base, noise = problem(1, 3)[0], problem(2, 24)[0]
    a, g = (x.repeat(8, 1) + spread * y for x, y in zip(factors(base), factors(noise), strict=True))
    rows = one_term(a.float(), g.float())
    (found,) = interpolate_rows([rows], [8], samples=[24], damping=DAMPING, residual=False)
    (whole,) = interpolate_each([rows.double().gram()], [8], samples=[24], damping=DAMPING, residual=False)
    assert found is not None
    assert whole is not None
    assert torch.equal(found.kept, whole.kept)
    assert torch.equal(found.mixing, whole.mixing)
    assert len(found.kept) == (8 if spread else 3)
