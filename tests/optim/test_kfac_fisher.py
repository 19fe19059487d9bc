"""Whose gradients make up the Fisher matrix, and where K-FAC equals its block exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import KFAC
from hpcsngd.optim.fisher import columns, draws
from tests.optim import models, oracle
from tests.optim.kfac_tools import kept_factors

TOLERANCE = 1e-10
DAMPING = 0.05
#: Draws for a comparison in expectation, and four standard errors of a mean of so many.
DRAWS, SPREAD = 3_000, 4 / math.sqrt(3_000)

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, target)


def mse(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, target)


def bce(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, target)


def targets(kind: str, outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "cross_entropy":
        shape = (outputs.shape[0], *outputs.shape[2:])
        return torch.randint(outputs.shape[1], shape, generator=generator)
    noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
    return (noise > 0).double() if kind == "bce_with_logits" else noise


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mse, "bce_with_logits": bce}


def random_outputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hessian(loss: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """Returns the Hessian of one sample's own loss by its outputs."""
    found: Any = torch.autograd.functional.hessian(lambda y: loss(y, target), outputs)
    return found.reshape(outputs.numel(), outputs.numel())


SHAPES = [("cross_entropy", (3, 4)), ("cross_entropy", (3, 4, 2)), ("mse", (3, 4)), ("mse", (3, 2, 2))]
SHAPES += [("bce_with_logits", (3, 4)), ("bce_with_logits", (3, 1))]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=str)
def test_columns_are_a_root_of_the_hessian(kind: Any, shape: tuple[int, ...], reduction: Any) -> None:
    outputs = random_outputs(shape)
    target = targets(kind, outputs)
    stacked = torch.stack(list(columns(kind, outputs, reduction))).flatten(2)
    terms = {"cross_entropy": outputs.shape[2:].numel()}.get(kind, outputs.shape[1:].numel())
    for n in range(len(outputs)):
        expected = hessian(LOSSES[kind], outputs[n : n + 1], target[n : n + 1])
        expected = expected * (1 if reduction == "mean" else terms)
        torch.testing.assert_close(stacked[:, n].T @ stacked[:, n], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=str)
def test_draws_have_the_hessian_as_covariance(kind: Any, shape: tuple[int, ...]) -> None:
    outputs = random_outputs(shape)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(list(draws(kind, outputs, "mean", DRAWS, generator))).flatten(2)
    stacked = torch.stack(list(columns(kind, outputs, "mean"))).flatten(2)
    for n in range(len(outputs)):
        expected = stacked[:, n].T @ stacked[:, n]
        # An entry's standard deviation is at most sqrt(3) times the largest variance.
        bound = math.sqrt(3) * SPREAD * float(expected.diagonal().max())
        assert float((drawn[:, n].T @ drawn[:, n] - expected).abs().max()) < bound
        assert float(drawn[:, n].sum(0).abs().max()) < SPREAD * DRAWS**0.5 * float(expected.max()) ** 0.5


def gauss_newton(model: nn.Module, layer: nn.Module, x: Tensor, kind: str) -> Tensor:
    """Returns ``1/N sum_n J_n^T H_n J_n`` for weight and bias as rows of one matrix per output channel."""
    total: Any = 0.0
    for n in range(len(x)):
        outputs = model(x[n : n + 1])
        jacobian = []
        for entry in outputs.flatten():
            grads = torch.autograd.grad(entry, list(layer.parameters()), retain_graph=True)
            jacobian.append(torch.cat([g if g.dim() == 2 else g.unsqueeze(1) for g in grads], 1).flatten())
        j = torch.stack(jacobian)
        h = hessian(LOSSES[kind], outputs.detach(), targets(kind, outputs))
        total = total + j.T @ h @ j
    return total / len(x)


def check_against_gauss_newton(
    model: nn.Module, x: Tensor, kind: Any, names: list[str], **options: Any
) -> float:
    """Returns the largest relative error of a step against the dense Gauss-Newton blocks."""
    modules = dict(model.named_modules())
    kfac = KFAC(model, damping=DAMPING, loss=kind, **options)
    outputs = model(x)
    kfac.before_backward(outputs)
    LOSSES[kind](outputs, targets(kind, outputs)).backward()
    plain = {name: matrix_gradient(modules[name]) for name in names}
    kfac.step()
    kfac.close()
    errors = []
    for name in names:
        block = gauss_newton(model, modules[name], x, kind)
        matrix = block + DAMPING * torch.eye(len(block)).double()
        expected = torch.linalg.solve(matrix, plain[name].flatten()).reshape(plain[name].shape)
        errors.append(oracle.relative_error(matrix_gradient(modules[name]), expected))
    return max(errors)


def matrix_gradient(layer: nn.Module) -> Tensor:
    parts = [p.grad if p.dim() == 2 else p.grad.unsqueeze(1) for p in layer.parameters()]
    return torch.cat(parts, 1)


def deep_linear(*, bias: bool = True) -> nn.Module:
    return models.seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 5, bias=bias), nn.Linear(5, 3, bias=bias), nn.Linear(3, 2, bias=bias)
        )
    )


class Pooled(nn.Module):
    """A deep linear net on tokens, averaged before the last layer: the reduce setting."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean(1))


class PooledConv(nn.Module):
    """A linear convolution, averaged over its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_deep_linear_nets_are_exact(bias: bool, sharing: str) -> None:
    """With squared errors G is the same for every sample, so the mean of products is that of the means."""
    model = deep_linear(bias=bias)
    x = random_outputs((6, 4))
    error = check_against_gauss_newton(model, x, "mse", ["0", "1", "2"], fisher="type-2", sharing=sharing)
    assert error < TOLERANCE


@pytest.mark.parametrize("kind", LOSSES)
def test_one_sample_is_exact_for_any_net(kind: str) -> None:
    """Of one sample A is one outer product, whatever the layers in between and the loss."""
    x = random_outputs((1, 5))
    assert check_against_gauss_newton(models.mlp(), x, kind, ["0", "2"], fisher="type-2") < TOLERANCE


def test_tokens_with_losses_of_their_own_are_exact_with_expand() -> None:
    """A deep linear net applied to each token, with an error for each: N S independent samples."""
    model = deep_linear()
    x = random_outputs((4, 3, 4))
    names = ["0", "1", "2"]
    assert check_against_gauss_newton(model, x, "mse", names, fisher="type-2") < TOLERANCE
    assert check_against_gauss_newton(model, x, "mse", names, fisher="type-2", sharing="reduce") > 0.01


@pytest.mark.parametrize(
    ("build", "shape", "names"),
    [(Pooled, (4, 3, 4), ["first", "second", "last"]), (PooledConv, (4, 2, 5, 4), ["last"])],
)
def test_averaged_tokens_are_exact_with_reduce(build: Any, shape: tuple[int, ...], names: list[str]) -> None:
    model = models.seeded(build)
    x = random_outputs(shape)
    assert check_against_gauss_newton(model, x, "mse", names, fisher="type-2", sharing="reduce") < TOLERANCE


def stepped(kind: Any, scale: float = 1.0, **options: Any) -> dict[str, list[Tensor]]:
    """Returns the factors after a step on six samples, with the loss multiplied by ``scale``."""
    model = models.mlp()
    kfac = KFAC(model, loss=kind, **options)
    outputs = model(random_outputs((6, 5)))
    kfac.before_backward(outputs)
    (scale * LOSSES[kind](outputs, targets(kind, outputs))).backward()
    kfac.step()
    return kept_factors(kfac)


@pytest.mark.parametrize("kind", LOSSES)
def test_monte_carlo_tends_to_type_2(kind: str) -> None:
    exact, few, many = (
        stepped(kind, fisher="type-2"),
        stepped(kind, fisher="mc", mc_samples=4),
        stepped(kind, fisher="mc", mc_samples=500),
    )
    for name, (a, g) in exact.items():
        assert torch.equal(many[name][0], a)
        error = oracle.relative_error(many[name][1], g)
        # 6 samples with 500 draws each: the error of a mean of 3,000, four times for safety.
        assert error < 4 * math.sqrt(len(g[0]) / 3_000)
        assert oracle.relative_error(few[name][1], g) > error


def test_draws_depend_on_seed_and_step_alone() -> None:
    first, again, other = (stepped("mse", fisher="mc", seed=seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name][1], again[name][1])
        assert not torch.equal(first[name][1], other[name][1])


@pytest.mark.parametrize("fisher", ["type-2", "mc"])
def test_own_gradients_do_not_depend_on_the_scale_of_the_loss(fisher: str) -> None:
    plain, scaled = (stepped("mse", scale, fisher=fisher) for scale in (1.0, 1024.0))
    for name, tensors in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, scaled[name], strict=True))


@pytest.mark.parametrize("fisher", ["type-2", "mc"])
def test_gradients_are_not_touched(fisher: Any) -> None:
    """``.grad`` before, during and after is the plain one, bit for bit."""
    data = random_outputs((6, 5))
    model, bare = models.mlp(), models.mlp()
    kfac = KFAC(model, fisher=fisher, loss="mse", inverse_every=0)
    outputs = model(data)
    kfac.before_backward(outputs)
    assert all(parameter.grad is None for parameter in model.parameters())
    mse(outputs, targets("mse", outputs)).backward()
    mse(bare(data), targets("mse", outputs)).backward()
    kfac.step()
    assert set(kept_factors(kfac)) == {"0", "2"}
    for mine, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("build", [models.InPlace, models.SharedConv])
def test_in_place_activations_and_shared_layers(build: Any, sharing: Any) -> None:
    """Gradients are those at the layer's output, not of what the tensor became."""
    model = models.seeded(build)
    shape = (5, 3, 6, 6) if build is models.InPlace else (5, 4, 4, 5)
    x = random_outputs(shape)
    kfac = KFAC(model, fisher="type-2", loss="mse", damping=DAMPING, sharing=sharing)
    target = torch.zeros(5, 3).double()
    for check in kfac.verify((x, target), mse):
        assert check.error < TOLERANCE, check


@pytest.mark.parametrize("fisher", ["type-2", "mc"])
def test_a_forgotten_call_is_told(fisher: Any) -> None:
    model = models.mlp()
    kfac = KFAC(model, fisher=fisher, loss="mse")
    model(random_outputs((6, 5))).sum().backward()
    with pytest.raises(RuntimeError, match=f"fisher='{fisher}': call before_backward"):
        kfac.step()


def test_micro_batches_add_up() -> None:
    """Two halves, each shown before its own backward pass, are one batch."""
    x = random_outputs((6, 5))
    found = []
    for parts in (1, 2):
        model = models.mlp()
        kfac = KFAC(model, fisher="type-2", loss="mse")
        for part in x.chunk(parts):
            outputs = model(part)
            kfac.before_backward(outputs)
            mse(outputs, targets("mse", outputs)).backward()
        kfac.step()
        found.append(kept_factors(kfac))
    for name, tensors in found[0].items():
        for whole, halves in zip(tensors, found[1][name], strict=True):
            assert oracle.relative_error(halves, whole) < 1e-12


def test_evaluations_between_leave_nothing() -> None:
    """Forwards that are never shown, with and without gradients, are not samples."""
    expected = stepped("mse", fisher="type-2")
    model = models.mlp()
    kfac = KFAC(model, fisher="type-2", loss="mse")
    with torch.no_grad():
        model(random_outputs((9, 5)))
    model(random_outputs((9, 5)))
    outputs = model(random_outputs((6, 5)))
    kfac.before_backward(outputs)
    model(random_outputs((9, 5)))
    mse(outputs, targets("mse", outputs)).backward()
    kfac.step()
    assert not kfac._collector.watch.is_waiting
    for name, tensors in kept_factors(kfac).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[name], strict=True))
