"""Both forms of rows against the matrices that they stand for, on random shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim.rows import FactoredRows, GradientRows, Rows, factors_are_cheaper, join_rows, rows_from

sizes = st.integers(1, 4)
shapes = st.tuples(st.integers(1, 5), sizes, sizes, sizes, sizes)
seeds = st.integers(0, 2**31)
Shape = tuple[int, int, int, int, int]


def factored(seed: int, shape: Shape) -> FactoredRows:
    """Returns random rows of shape (samples, groups, terms, d_in, rows of the matrix in a group)."""
    n, groups, terms, d_in, rows = shape
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(n, groups, terms, d_in, generator=random, dtype=torch.float64)
    return FactoredRows(a, torch.randn(n, groups, terms, rows, generator=random, dtype=torch.float64))


def matrices(rows: Rows) -> Tensor:
    """Returns every sample's matrix by the definition."""
    if isinstance(rows, FactoredRows):
        return torch.einsum("ngso,ngsi->ngoi", rows.g, rows.a).flatten(1, 2)
    return rows.tensors[0]


@pytest.mark.parametrize(
    "form", [lambda rows: rows, lambda rows: rows.with_terms(0)], ids=["factors", "matrices"]
)
@given(seed=seeds, shape=shapes)
@settings(deadline=None, max_examples=60)
def test_products_are_those_of_the_matrices(form: Callable[[Rows], Rows], seed: int, shape: Shape) -> None:
    rows = form(factored(seed, shape))
    u = matrices(factored(seed, shape))
    flat = u.flatten(1)
    random = torch.Generator().manual_seed(seed + 1)
    matrix = torch.randn(u.shape[1:], generator=random, dtype=torch.float64)
    weights = torch.randn(len(u), generator=random, dtype=torch.float64)
    close = torch.testing.assert_close
    assert len(rows) == len(u)
    close(rows.matrices(), u)
    close(rows.gram(), flat @ flat.T)
    close(rows.scores(), flat.square().sum(1))
    close(rows.project(matrix), flat @ matrix.flatten())
    close(rows.combine(weights), torch.einsum("n,noi->oi", weights, u))
    close(matrices(rows.scaled(3.0)), 3 * u)
    close(matrices(rows.scaled(weights)), weights.reshape(-1, 1, 1) * u)
    assert rows.entries == flat.shape[1]
    index = torch.tensor([len(u) - 1, 0])
    close(matrices(rows.take(index)), u[index])
    close(rows.take(index).products(rows), flat[index] @ flat.T)
    assert rows.size_bytes == sum(t.numel() for t in rows.tensors) * 8
    assert bool(rows.is_finite())
    for bad in (float("inf"), -float("inf"), float("nan")):
        index = seed % len(rows)
        assert not bool(
            rows.scaled(torch.ones(len(rows)).index_fill(0, torch.tensor(index), bad)).is_finite()
        )
    assert bool(rows.take(torch.arange(0)).is_finite())


@given(seed=seeds, shape=shapes, more=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_more_terms_change_nothing(seed: int, shape: Shape, more: int) -> None:
    rows = factored(seed, shape)
    padded = rows.with_terms(rows.terms + more)
    assert padded.terms == rows.terms + more
    torch.testing.assert_close(padded.gram(), rows.gram())
    torch.testing.assert_close(padded.matrices(), rows.matrices())


def test_matrices_cannot_become_factors() -> None:
    rows = factored(0, (2, 1, 1, 3, 4)).with_terms(0)
    assert rows.with_terms(0) is rows
    with pytest.raises(ValueError, match="terms=2: matrices cannot be taken apart"):
        rows.with_terms(2)


@pytest.mark.parametrize(("terms", "expected"), [([1, 3], 3), ([2, 2], 2), ([2, 0], 0), ([0, 0], 0)])
def test_joined_rows_share_one_form(terms: list[int], expected: int) -> None:
    parts: list[Rows] = []
    for seed, count in enumerate(terms):
        rows = factored(seed, (seed + 1, 2, max(count, 1), 3, 4))
        parts.append(rows if count else rows.with_terms(0))
    joined = join_rows(parts)
    assert joined.terms == expected
    torch.testing.assert_close(matrices(joined), torch.cat([matrices(part) for part in parts]))


def test_work_decides_the_form() -> None:
    # One outer product is less than the matrix, unless the matrix has a single row.
    assert factors_are_cheaper(1, 10, 3)
    assert not factors_are_cheaper(1, 10, 1)
    # 4^2 (576 + 64) < 576 * 64 < 8^2 (576 + 64)
    assert factors_are_cheaper(4, 576, 64)
    assert not factors_are_cheaper(8, 576, 64)


def test_saved_tensors_become_the_same_rows() -> None:
    rows = factored(0, (5, 2, 3, 4, 6))
    for form in (rows, rows.with_terms(0)):
        again = rows_from(list(form.tensors), (4, 12), 2)
        assert type(again) is type(form)
        assert all(torch.equal(*pair) for pair in zip(again.tensors, form.tensors, strict=True))


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.zeros(5)],
        [torch.zeros(5, 12, 5)],
        [torch.zeros(5, 2, 3, 4), torch.zeros(5, 2, 3, 5)],
        [torch.zeros(5, 2, 3, 4), torch.zeros(4, 2, 3, 6)],
        [torch.zeros(5, 1, 3, 4), torch.zeros(5, 1, 3, 12)],
    ],
    ids=lambda tensors: str([tuple(t.shape) for t in tensors]),
)
def test_foreign_tensors_are_refused(tensors: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="rows have shapes"):
        rows_from(tensors, (4, 12), 2)


def test_rows_follow_another_tensor() -> None:
    moved = factored(0, (2, 1, 1, 3, 4)).to(torch.empty(0, dtype=torch.float32))
    assert {t.dtype for t in moved.tensors} == {torch.float32}
    assert isinstance(GradientRows(moved.matrices()).to(torch.empty(0, dtype=torch.float64)).gram(), Tensor)
