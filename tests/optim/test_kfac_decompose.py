"""Decompositions in batches: one layer's failure is its own; equal shapes are applied together."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import KFAC
from hpcsngd.optim.kfac_decompose import eigh_each, inverse_each
from hpcsngd.optim.kfac_stacks import InverseStacks
from tests.optim import models, oracle
from tests.optim.kfac_tools import backward


def positive(blocks: int, side: int, seed: int) -> Tensor:
    root = torch.randn(
        blocks, side, side + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.mT


def spoilt(factor: Tensor, value: float) -> Tensor:
    result = factor.clone()
    result[-1, 0, 0] = value
    return result


FACTORS = [positive(1, 3, 0), positive(2, 3, 1), positive(1, 5, 2), torch.tensor([[2.0, 0.5, 1.0]]).double()]


def test_eigenvectors_of_every_size() -> None:
    for factor, found in zip(FACTORS, eigh_each(FACTORS), strict=True):
        assert found is not None
        vectors, values = found
        if vectors is None:
            assert torch.equal(values, factor)
        else:
            again = vectors @ torch.diag_embed(values) @ vectors.mT
            assert oracle.relative_error(again, factor) < 1e-13


def test_inverses_of_every_size() -> None:
    for factor, found in zip(FACTORS, inverse_each(FACTORS), strict=True):
        assert found is not None
        inverse, jitter = found
        full = torch.diag_embed(factor) if factor.dim() == 2 else factor
        identity = torch.eye(full.shape[-1]).double().expand_as(full)
        torch.testing.assert_close(
            (torch.diag_embed(inverse) if factor.dim() == 2 else inverse) @ full, identity
        )
        assert jitter == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("decompose", [eigh_each, inverse_each])
def test_a_factor_that_is_not_finite_fails_alone(decompose: Any, value: float) -> None:
    """It is in the middle of a batch; its neighbours get what they get without it."""
    batch = [FACTORS[0], spoilt(FACTORS[1], value), positive(1, 3, 7)]
    found = decompose(batch)
    assert [result is None for result in found] == [False, True, False]
    alone = decompose([batch[2]])[0]
    assert oracle.relative_error(found[2][0], alone[0]) < 1e-12
    assert decompose([torch.tensor([[1.0, value]])]) == [None]


def test_one_that_does_not_converge_is_found() -> None:
    """The batch raises as a whole; tried one by one, only the culprit fails."""
    real = torch.linalg.eigh
    culprit = positive(1, 3, 3)

    def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if any(torch.equal(matrix, culprit[0]) for matrix in matrices):
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = real(matrices)
        return values, vectors

    with mock.patch("torch.linalg.eigh", eigh):
        found = eigh_each([FACTORS[0], culprit, FACTORS[1]])
    assert [result is None for result in found] == [False, True, False]


def test_what_does_not_converge_in_single_precision_is_done_in_double() -> None:
    real = torch.linalg.eigh

    def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if matrices.dtype == torch.float32:
            raise torch.linalg.LinAlgError("too many repeated eigenvalues")
        values, vectors = real(matrices)
        return values, vectors

    factors = [FACTORS[0].float(), FACTORS[1].float()]
    with mock.patch("torch.linalg.eigh", eigh):
        found = eigh_each(factors)
    for factor, result in zip(factors, found, strict=True):
        assert result is not None
        vectors, values = result
        assert vectors.dtype == values.dtype == torch.float32
        assert oracle.relative_error((vectors * values[:, None]) @ vectors.mT, factor) < 1e-6


def test_inputs_that_are_padding_only_leave_zeros_that_do_not_harm() -> None:
    """A 3 x 3 convolution of one pixel: LAPACK alone has failed on these 256 zeros in single precision."""
    rows = torch.zeros(32, 9, 32)
    rows[:, 4] = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).relu()
    factor = (rows.reshape(32, -1).T @ rows.reshape(32, -1) / 32)[None]
    (found,) = eigh_each([factor])
    assert found is not None
    assert oracle.relative_error((found[0] * found[1][:, None]) @ found[0].mT, factor) < 1e-5
    assert int((found[1] > 1e-6).sum()) <= 32


def test_rounding_below_zero_is_no_eigenvalue() -> None:
    singular = torch.ones(1, 4, 4)
    (found,) = eigh_each([singular])
    assert found is not None
    assert float(found[1].min()) == 0.0


def test_jitter_helps_where_rounding_spoilt_it() -> None:
    nearly = positive(1, 3, 4)
    nearly[0] -= torch.eye(3).double() * (torch.linalg.eigvalsh(nearly[0])[0] + 1e-15)
    (found,) = inverse_each([nearly])
    assert found is not None
    assert 0 < found[1] < 1e-8
    assert inverse_each([-positive(1, 3, 4)]) == [None]


def deep() -> nn.Module:
    """Five layers of one shape, of which three have the same as the others but no bias."""
    widths = [6] * 6
    return nn.Sequential(
        *(nn.Linear(a, b, bias=i < 2) for i, (a, b) in enumerate(itertools.pairwise(widths)))
    )


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("frozen", [None, 0, 3])
def test_stacked_layers_are_solved_as_each_would_be(inverse: str, frozen: int | None) -> None:
    """Also where one of a stack has no gradient any more."""
    results = []
    for most in (2**20, 0):
        model = models.seeded(deep)
        with mock.patch("hpcsngd.optim.kfac_stacks.MOST_NUMBERS", most):
            kfac = KFAC(model, inverse=inverse, damping=0.05, inverse_every=2)
            backward(model, 0, shape=(6,))
            kfac.step()
            assert len(kfac._curvature._stacks._stacks) == (2 if most else 5)
            if frozen is not None:
                model[frozen].requires_grad_(requires_grad=False)
                model[frozen].zero_grad()
            backward(model, 1, shape=(6,))
            kfac.step()
            results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for stacked, single in zip(*results, strict=True):
        assert oracle.relative_error(stacked, single) < 1e-12


def test_no_inverses_are_no_stacks() -> None:
    stacks = InverseStacks()
    assert stacks.update({}) == {}
    assert list(stacks.solve({"x": torch.ones(1, 2, 2)})) == []
