"""Stacked solves equal the solves of each layer, whatever the curvatures are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpcsngd.optim import HyLo, stacks
from hpcsngd.optim.curvature import SampleCurvature, Sketch, build_all
from hpcsngd.optim.rows import FactoredRows, GradientRows, Rows
from hpcsngd.optim.stacks import Stacks
from tests.optim import models, oracle

# The stack multiplies in another order than the rows do: rounding of float64 sums.
TOLERANCE = 1e-12


def rows_of(n: int, d_in: int, d_out: int, seed: int, groups: int = 1, terms: int = 1) -> FactoredRows:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, groups, terms, d_in, generator=generator, dtype=torch.float64)
    return FactoredRows(
        a, torch.randn(n, groups, terms, d_out // groups, generator=generator, dtype=torch.float64)
    )


def curvature(rows: Rows, damping: float = 0.1, *, mixed: bool = False, **options: Any) -> SampleCurvature:
    mixing = torch.eye(len(rows), dtype=torch.float64).add(0.1).tril() if mixed else None
    sketch = Sketch(rows, 20, 20, mixing, left_out=len(rows) / 7)
    (built,) = build_all([sketch], [sketch.kernel()], damping, **options)
    assert built is not None
    return built


@pytest.mark.parametrize(("d_in", "d_out"), [(9, 4), (4, 8)])
@pytest.mark.parametrize(("groups", "terms"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("complement", ["damped", "plain", "residual"])
def test_a_stack_equals_its_members(
    d_in: int, d_out: int, groups: int, terms: int, mixed: bool, complement: str
) -> None:
    alone = {
        f"layer{seed}": curvature(
            rows_of(6, d_in, d_out, seed, groups, terms), mixed=mixed, complement=complement
        )
        for seed in range(3)
    }
    stacked = Stacks()
    views = stacked.update(alone)
    generator = torch.Generator().manual_seed(9)
    grads = {name: torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) for name in alone}
    (solved,) = stacked.solve(grads)
    assert solved.names == list(alone)
    for name, result in zip(solved.names, solved.results, strict=True):
        expected = alone[name].solve(grads[name])
        assert oracle.relative_error(result, expected) < TOLERANCE
        # A view of the stack is as good as the curvature it came from, and takes no memory of its own.
        assert torch.equal(views[name].solve(grads[name]), expected)
        assert (
            views[name].factor.untyped_storage().data_ptr()
            == views["layer0"].factor.untyped_storage().data_ptr()
        )


def test_only_alike_curvatures_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "MOST_NUMBERS", 200)
    matrices = GradientRows(torch.ones(6, 4, 9, dtype=torch.float64))
    curvatures = {
        "a": curvature(rows_of(6, 9, 4, 0)),
        "wider": curvature(rows_of(6, 10, 4, 1)),
        "b": curvature(rows_of(6, 9, 4, 2)),
        "other damping": curvature(rows_of(6, 9, 4, 3), 0.2),
        "mixed": curvature(rows_of(6, 9, 4, 4), mixed=True),
        "matrices": curvature(matrices),
        "large": curvature(rows_of(6, 40, 4, 5)),
        "large as well": curvature(rows_of(6, 40, 4, 6)),
    }
    grads = {
        name: torch.ones(c.rows.matrices().shape[1:], dtype=torch.float64) for name, c in curvatures.items()
    }
    stacked = Stacks()
    stacked.update(curvatures)
    solved = stacked.solve(grads)
    assert sorted(group.names for group in solved if len(group.names) > 1) == [["a", "b"]]
    assert sorted(name for group in solved for name in group.names) == sorted(curvatures)
    # A layer without a gradient leaves its stack, and the others are solved all the same.
    del grads["b"]
    assert sorted(name for group in stacked.solve(grads) for name in group.names) == sorted(grads)


def test_what_did_not_change_stays() -> None:
    stacked = Stacks()
    first = stacked.update({str(seed): curvature(rows_of(6, 9, 4, seed)) for seed in range(2)})
    again = stacked.update(first)
    assert all(again[name] is first[name] for name in first)
    changed = stacked.update({**first, "1": curvature(rows_of(6, 9, 4, 7))})
    assert changed["0"] is not first["0"]
    assert torch.equal(changed["0"].factor, first["0"].factor)


@pytest.mark.parametrize("rescale", ["none", "damping", "norm"])
@pytest.mark.parametrize("method", ["sngd", "kis", "kid"])
def test_hylo_stacks_equal_layers(rescale: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve equal layers: with and without stacking, the same gradients."""

    def gradients() -> list[torch.Tensor]:
        model = models.seeded(lambda: torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(12)]))
        options: dict[str, Any] = {} if method == "sngd" else {"ratio": 0.5}
        hylo = HyLo(model, method=method, damping=0.01, rescale=rescale, refresh_every=2, **options)
        for seed in range(2):
            model.zero_grad()
            x, target = oracle.batch(model, (8, 5), seed=seed)
            oracle.mean_loss(model, x, target).backward()
            hylo.step()
        return [parameter.grad for parameter in model.parameters()]

    found = gradients()
    monkeypatch.setattr(stacks, "MOST_NUMBERS", 0)
    for left, right in zip(found, gradients(), strict=True):
        assert (
            oracle.relative_error(left, right) < 1e-10
        )  # small damping: the kernel's condition number multiplies rounding
