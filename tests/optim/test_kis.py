"""Importance sampling: what is drawn, and that the kept samples are treated as the batch."""

from __future__ import annotations

import pytest
import torch

from hpcsngd.optim import HyLo
from hpcsngd.optim.selection import draw_rows, rows_to_keep
from tests.optim import models, oracle

DAMPING = 0.05


def step(**options: object) -> tuple[list[torch.Tensor], HyLo]:
    model = models.conv_net(kernel_size=3)
    hylo = HyLo(model, damping=DAMPING, **options)
    oracle.mean_loss(model, *oracle.batch(models.conv_net(kernel_size=3), (10, 3, 8, 7))).backward()
    hylo.step()
    return [p.grad for p in model.parameters()], hylo


def test_ratio_one_is_sngd() -> None:
    for left, right in zip(step(method="kis", ratio=1.0)[0], step()[0], strict=True):
        assert torch.equal(left, right)


def test_kept_samples_are_the_batch() -> None:
    data = oracle.batch(models.mlp(), (10, 5))
    model = models.mlp()
    hylo = HyLo(model, method="kis", ratio=0.3, damping=DAMPING)
    oracle.mean_loss(model, *data).backward()
    plain = oracle.layer_gradients(model, ["0", "2"])
    hylo.step()
    hylo.close()
    for name, layer in hylo_layers(model, data).items():
        rows, kept = layer
        assert len(kept) == 3
        expected = oracle.dense_solution(rows[kept], plain[name], DAMPING)
        found = oracle.layer_gradients(model, [name])[name]
        assert oracle.relative_error(found, expected) < 1e-10


def hylo_layers(
    model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns true per-sample gradients and the documented draw of step 0, seed 0, by layer."""
    layers = {}
    for name in ("0", "2"):
        rows = oracle.true_gradients(model, dict(model.named_modules())[name], *data)
        layers[name] = rows, draw_rows(rows.square().sum(1), 3, seed=0, step=0, layer=name).rows
    return layers


def test_every_refresh_draws_anew() -> None:
    data = oracle.batch(models.mlp(), (40, 5))
    model = models.mlp()
    hylo = HyLo(model, method="kis", ratio=0.5, damping=DAMPING)
    kept = []
    for _ in range(2):
        oracle.mean_loss(model, *data).backward()
        hylo.step()
        kept.append(hylo.state_dict()["layers"]["0"]["rows"][0])
    assert not torch.equal(*kept)


@pytest.mark.parametrize(
    ("count", "ratio", "expected"), [(10, 0.3, 3), (10, 0.01, 1), (10, 1.0, 10), (0, 0.5, 0), (1, 0.1, 1)]
)
def test_rows_to_keep(count: int, ratio: float, expected: int) -> None:
    assert rows_to_keep(count, ratio) == expected


def test_draws_are_different_samples_in_order() -> None:
    kept = draw_rows(torch.ones(50), 20, seed=1, step=2, layer="x").rows
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 20


def test_draws_depend_on_seed_step_and_layer_only() -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    base = {"seed": 1, "step": 2, "layer": "x"}
    drawn = draw_rows(scores, 20, **base).rows
    torch.manual_seed(7)
    assert torch.equal(draw_rows(scores.double(), 20, **base).rows, drawn)
    for change in ({"seed": 2}, {"step": 3}, {"layer": "y"}):
        assert not torch.equal(draw_rows(scores, 20, **{**base, **change}).rows, drawn)


def test_first_draw_is_in_proportion_to_the_scores() -> None:
    scores = torch.tensor([1.0, 2.0, 0.0, 5.0])
    count = 4000
    drawn = torch.cat([draw_rows(scores, 1, seed=0, step=s, layer="x").rows for s in range(count)])
    share = torch.bincount(drawn, minlength=4) / count
    # Four standard deviations of a share of one half.
    assert torch.allclose(share, scores / scores.sum(), atol=4 * 0.5 / count**0.5)
    assert share[2] == 0


def test_samples_of_score_zero_come_last() -> None:
    scores = torch.tensor([0.0, 3.0, 0.0, 1.0])
    for s in range(20):
        assert {1, 3} <= set(draw_rows(scores, 3, seed=0, step=s, layer="x").rows.tolist())


def test_all_scores_zero_still_draws() -> None:
    assert len(draw_rows(torch.zeros(5), 3, seed=0, step=0, layer="x").rows) == 3


def test_error_falls_with_the_ratio() -> None:
    exact, _ = step()
    errors = []
    for ratio in (0.1, 0.5, 0.9):
        trials = [step(method="kis", ratio=ratio, seed=seed)[0] for seed in range(10)]
        errors.append(sum(float((trial[0] - exact[0]).norm()) for trial in trials))
    assert errors[0] > errors[1] > errors[2] > 0
