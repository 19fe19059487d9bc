"""Halved matrices act as the whole ones do."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import KFAC
from hpcsngd.optim.kfac_halves import (
    Form,
    fits,
    keep,
    kept_shape,
    times_orthogonal,
    times_symmetric,
)
from tests.optim import models, oracle
from tests.optim.kfac_tools import backward, gradients
from tests.ranks import run_on_ranks

# Just above the rule, and no multiple of a panel's width.
SIDES = (384, 400)


def symmetric(side: int, blocks: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(blocks, side, side + 1, generator=generator, dtype=torch.float64)
    return root @ root.mT / side


def inputs(side: int) -> Tensor:
    return torch.randn(2, 3, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("side", SIDES)
def test_symmetric_products(side: int) -> None:
    whole, x = symmetric(side), inputs(side)
    kept = keep("symmetric", whole, None)
    assert kept.shape == kept_shape("symmetric", whole.shape, None)
    assert kept[0].numel() <= 0.75 * side**2
    assert fits("symmetric", kept, side)
    assert not fits("orthogonal", kept, side)
    assert oracle.relative_error(times_symmetric(x, kept), x @ whole) < 1e-14


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["eigenvectors", "identity", "reflected"])
def test_orthogonal_products(side: int, kind: str) -> None:
    """``X Q`` up to the columns' signs, ``X Q D Q^T`` exactly; the identity reflects nothing."""
    q = torch.linalg.eigh(symmetric(side)).eigenvectors
    if kind != "eigenvectors":
        q = torch.eye(side).double().expand(2, side, side) * (-1 if kind == "reflected" else 1)
    x, values = inputs(side), torch.rand(side, generator=torch.Generator().manual_seed(2)).double()
    kept = keep("orthogonal", q, None)
    assert kept.shape == kept_shape("orthogonal", q.shape, None)
    assert kept[0].numel() <= 0.82 * side**2
    rotated = times_orthogonal(x, kept)
    assert oracle.relative_error(rotated.abs(), (x @ q).abs()) < 1e-13
    found = times_orthogonal(values * rotated, kept, transposed=True)
    assert oracle.relative_error(found, (values * (x @ q)) @ q.mT) < 1e-13


@pytest.mark.parametrize(("form", "side"), [("symmetric", 383), ("orthogonal", 383)])
def test_small_ones_are_kept_whole(form: Form, side: int) -> None:
    whole = torch.linalg.qr(symmetric(side)).Q if form == "orthogonal" else symmetric(side)
    kept = keep(form, whole, None)
    assert torch.equal(kept, whole)
    product = times_orthogonal if form == "orthogonal" else times_symmetric
    assert oracle.relative_error(product(inputs(side), kept), inputs(side) @ whole) < 1e-14


def test_half_precision_keeps_orthogonal_matrices_whole() -> None:
    """Eight digits of reflections do not multiply up to something orthogonal."""
    q = torch.linalg.qr(symmetric(384)).Q
    assert keep("orthogonal", q, torch.bfloat16).shape == q.shape
    assert keep("symmetric", q, torch.bfloat16).dim() == 2


def wide() -> nn.Module:
    """Returns a net whose factors A have 385 and 8, and G 7 and 3 rows."""
    return models.seeded(lambda: nn.Sequential(nn.Linear(384, 7), nn.Tanh(), nn.Linear(7, 3)))


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_kfac_is_the_dense_formula(inverse: Any) -> None:
    """Compared with solving ``(G (x) A + damping I) v = g``, or the factored damping, through autograd."""
    kfac = KFAC(model := wide(), inverse=inverse, damping=0.05)
    batch = oracle.batch(model, (5, 384))
    checks = kfac.verify(batch, lambda y, t: 0.5 * (y - t).square().sum(1).mean(), max_entries=3000)
    assert [check.skipped for check in checks] == ["", ""]
    assert max(check.error for check in checks) < 1e-10


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_halves_are_saved_and_continued(inverse: Any) -> None:
    kfac, file = KFAC(model := wide(), inverse=inverse, inverse_every=5), io.BytesIO()
    backward(model, 0, shape=(384,))
    kfac.step()
    torch.save(kfac.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["layers"]["0"]["inverse"]["tensors"]["0"].dim() == 2
    other = KFAC(twin := wide(), inverse=inverse, inverse_every=5)
    other.load_state_dict(copy.deepcopy(state))
    for net, method in ((model, kfac), (twin, other)):
        backward(net, 1, shape=(384,))
        method.step()
    for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
        assert torch.equal(mine, theirs)
    state["layers"]["0"]["inverse"]["tensors"]["0"] = torch.zeros(1, 99)
    with pytest.raises(ValueError, match=r"state of layer 0: inverse of shapes \[\(1, 99\)"):
        other.load_state_dict(state)


def step_of(inverse: Any) -> tuple[list[Tensor], int]:
    """Returns the gradients after a step on all ranks' joined batch, and the bytes sent of inverses."""
    kfac = KFAC(model := wide(), inverse=inverse)
    backward(model, 0, shape=(384,))
    kfac.step()
    sent = {(item.phase, item.op): item.size_bytes for item in kfac.diagnostics().communication}
    return gradients(model), sent.get(("broadcast", "all_gather"), 0)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("inverse", "numbers"),
    [
        # What is kept of A: 2 panels of reflections and what they leave, or 7 panels; its values; of G 7 x 7
        # and 7, or the triangle.
        ("eigen", (385 + 64) * 64 + (321 + 64) * 64 + 257**2 + 385 + 49 + 7),
        ("cholesky", sum((385 - 64 * j) * 64 for j in range(6)) + 1 + 28),
    ],
)
def test_halves_travel_as_they_are(inverse: Any, numbers: int) -> None:
    alone, _ = step_of(inverse)
    for found, sent in run_on_ranks(step_of, 2, inverse):
        assert sent == 8 * numbers
        for mine, theirs in zip(found, alone, strict=True):
            assert oracle.relative_error(mine, theirs) < 1e-10
