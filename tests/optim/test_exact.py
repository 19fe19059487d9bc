"""SNGD against the dense solve in float64: layers, convolution geometry, reductions, accumulation, scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import HyLo
from tests.optim import models, oracle

DAMPING = 0.05
# The kernel's condition number is below 1e5 here, so float64 leaves 1e-11.
TOLERANCE = 1e-10

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 3, "dilation": (1, 2), "padding": (1, 2), "stride": (2, 1)},
    {"kernel_size": 5, "stride": 3, "padding": 4},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": (8, 7), "padding": 0},
]


def check(
    model: nn.Module,
    layers: dict[str, nn.Module],
    data: tuple[Tensor, Tensor],
    rows: Any = oracle.reduced_gradients,
    loss: oracle.Loss = oracle.mean_loss,
    **options: Any,
) -> None:
    """Compares one step with the dense solution, layer by layer."""
    preconditioner = HyLo(model, damping=DAMPING, **options)
    loss(model, *data).backward()
    plain = {name: oracle.layer_gradient(layer) for name, layer in layers.items()}
    preconditioner.step()
    found = {name: oracle.layer_gradient(layer) for name, layer in layers.items()}
    preconditioner.close()
    for name, layer in layers.items():
        expected = oracle.dense_solution(rows(model, layer, *data), plain[name], DAMPING)
        assert oracle.relative_error(found[name], expected) < TOLERANCE, name
        # The case says something: curvature changes this layer's direction.
        assert oracle.relative_error(DAMPING * expected, plain[name]) > 0.01, name


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("loss", "reduction"), [(oracle.mean_loss, "mean"), (oracle.sum_loss, "sum")])
def test_linear_is_exact(bias: bool, loss: oracle.Loss, reduction: str) -> None:
    model = models.mlp(bias=bias)
    data = oracle.batch(model, (9, 5))
    check(model, linears(model), data, oracle.true_gradients, loss, loss_reduction=reduction)


# torch tells that "same" with an even kernel copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_in_reduce_mode(conv: dict[str, Any]) -> None:
    model = models.conv_net(**conv)
    check(model, linears(model), oracle.batch(model, (6, 3, 8, 7)))


def test_convolution_with_one_position_is_exact() -> None:
    model = models.conv_net(kernel_size=(8, 7))
    check(model, linears(model), oracle.batch(model, (6, 3, 8, 7)), oracle.true_gradients)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_tiny_batches(batch_size: int) -> None:
    model = models.mlp()
    check(model, linears(model), oracle.batch(model, (batch_size, 5)), oracle.true_gradients)


@pytest.mark.parametrize(
    ("build", "shape"),
    [(models.Shared, (7, 5)), (models.InPlace, (7, 3, 6, 6)), (models.Tokens, (7, 4, 5))],
)
def test_unusual_layers(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = models.seeded(build)
    check(model, linears(model), oracle.batch(model, shape))


def test_frozen_bias_is_no_column() -> None:
    model = models.mlp()
    model[0].bias.requires_grad_(False)
    check(model, linears(model), oracle.batch(model, (9, 5)), oracle.true_gradients)
    assert model[0].bias.grad is None


def preconditioned(
    parts: list[tuple[Tensor, Tensor]],
    weights: list[float],
    sample_scale: float | None = None,
    **options: Any,
) -> list[Tensor]:
    """Returns the preconditioned gradient after micro-batches whose summed losses are weighted."""
    model = models.mlp()
    preconditioner = HyLo(model, damping=DAMPING, **options)
    for part, weight in zip(parts, weights, strict=True):
        (weight * oracle.own_losses(model, *part).sum()).backward()
    preconditioner.step(sample_scale=sample_scale)
    return [p.grad for p in model.parameters()]


def split(data: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(sizes), data[1].split(sizes), strict=True))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert oracle.relative_error(left, right) < TOLERANCE


def test_micro_batches_equal_one_batch() -> None:
    data = oracle.batch(models.mlp(), (12, 5))
    whole = preconditioned([data], [1 / 12])
    parts = split(data, [4, 4, 4])
    same(preconditioned(parts, [1 / 12] * 3, accumulation_steps=3), whole)


def test_uneven_micro_batches_with_sample_scale() -> None:
    data = oracle.batch(models.mlp(), (12, 5))
    whole = preconditioned([data], [1 / 12])
    same(preconditioned(split(data, [7, 4, 1]), [1 / 12] * 3, sample_scale=12), whole)


def test_sum_reduction_over_micro_batches() -> None:
    data = oracle.batch(models.mlp(), (12, 5))
    whole = preconditioned([data], [1.0], loss_reduction="sum")
    same(preconditioned(split(data, [7, 5]), [1.0] * 2, loss_reduction="sum", accumulation_steps=2), whole)


def test_sum_and_mean_have_the_same_curvature() -> None:
    data = oracle.batch(models.mlp(), (12, 5))
    mean = preconditioned([data], [1 / 12])
    same(preconditioned([data], [1.0], loss_reduction="sum"), [12 * v for v in mean])


def test_repeating_every_sample_changes_nothing() -> None:
    data = oracle.batch(models.mlp(), (12, 5))
    twice = (torch.cat([data[0]] * 2), torch.cat([data[1]] * 2))
    same(preconditioned([twice], [1 / 24]), preconditioned([data], [1 / 12]))


def test_smaller_last_batch_has_its_own_scale() -> None:
    model = models.mlp()
    preconditioner = HyLo(model, damping=DAMPING)
    for size in (9, 9, 2):
        data = oracle.batch(model, (size, 5), seed=size)
        model.zero_grad()
        oracle.mean_loss(model, *data).backward()
        plain = oracle.layer_gradient(model[0])
        preconditioner.step()
        # A copy of the model is not watched: the oracle's backward passes are no samples.
        unwatched = copy.deepcopy(model)
        rows = oracle.true_gradients(unwatched, unwatched[0], *data)
        expected = oracle.dense_solution(rows, plain, DAMPING)
        assert oracle.relative_error(oracle.layer_gradient(model[0]), expected) < TOLERANCE


def test_gradient_scaler() -> None:
    data = oracle.batch(models.mlp(), (9, 5))
    expected = preconditioned([data], [1 / 9])
    model = models.mlp()
    preconditioner = HyLo(model, damping=DAMPING)
    (1024 * oracle.mean_loss(model, *data)).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024
    preconditioner.step(grad_scale=1024)
    same([p.grad for p in model.parameters()], expected)


def test_gradients_of_uncovered_parameters_stay() -> None:
    model = models.seeded(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=True), nn.Linear(3, 3))
    )
    preconditioner = HyLo(model, damping=DAMPING, skip=["^3$"])
    oracle.mean_loss(model, *oracle.batch(model, (9, 5))).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    changed = {
        name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])
    }
    assert changed == {"0", "2"}
    assert set(preconditioner.skipped) == {"1", "3"}
