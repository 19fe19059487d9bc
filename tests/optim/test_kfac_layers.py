"""Every layer and situation against K-FAC's formula made dense, one sample at a time through autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import KFAC
from hpcsngd.optim.kfac_verify import Problem, dense_factors, dense_solution
from tests.optim import models, oracle
from tests.optim.test_layers import LAYERS, TABLE

# Condition numbers are below 1e4 at this damping, so float64 leaves 1e-11.
TOLERANCE = 1e-10
DAMPING = 0.05

INVERSES: dict[str, dict[str, Any]] = {
    "eigen": {"inverse": "eigen"},
    "cholesky": {"inverse": "cholesky"},
    "cholesky, no split": {"inverse": "cholesky", "pi_split": False},
}


def half_squares(outputs: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (outputs.flatten(1) - target).square().sum(1).mean()


def mean_squares(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs.flatten(1), target)


def check_step(model: nn.Module, kfac: KFAC, data: tuple[Tensor, Tensor], names: set[str]) -> None:
    """Compares one step with the dense solution, layer by layer."""
    model.zero_grad()
    half_squares(model(data[0]), data[1]).backward()
    layers = {layer.name: layer for layer in kfac._layers if layer.name in names}
    copies = {name: [p.grad.clone() for p in layer.parameters] for name, layer in layers.items()}
    plain = {name: layer.to_blocks(copies[name]) for name, layer in layers.items()}
    kfac.step()
    found = {name: layer.to_blocks([p.grad for p in layer.parameters]) for name, layer in layers.items()}
    kfac.close()
    assert set(layers) == names
    for name, layer in layers.items():
        factors = dense_factors(Problem(model, data, half_squares), layer, kfac._options)
        expected = dense_solution(factors, plain[name], DAMPING, kfac._options)
        assert oracle.relative_error(found[name], expected) < TOLERANCE, name
        # The case says something: curvature changes this layer's direction.
        assert oracle.relative_error(DAMPING * expected, plain[name]) > 0.003, name


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str, inverse: str, sharing: Any) -> None:
    build, shape = LAYERS[case]
    model = build()
    kfac = KFAC(model, damping=DAMPING, sharing=sharing, **INVERSES[inverse])
    check_step(model, kfac, oracle.batch(model, (5, *shape)), {"0"})


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("case", TABLE)
def test_situation(case: str, inverse: str, sharing: Any) -> None:
    build, shape, rehearse, names = TABLE[case]
    model = build()
    # Without memory: what the rehearsal left behind is not in the factors.
    kfac = KFAC(model, damping=DAMPING, factor_decay=0.0, sharing=sharing, **INVERSES[inverse])
    rehearse(model, kfac)
    check_step(model, kfac, oracle.batch(build(), (7, *shape)), names)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", LAYERS)
def test_gauss_newton_factors(case: str, sharing: Any) -> None:
    """Type-2: the oracle differentiates the loss twice, K-FAC knows its Hessian."""
    build, shape = LAYERS[case]
    model = build()
    kfac = KFAC(model, damping=DAMPING, sharing=sharing, fisher="type-2", loss="mse")
    (check,) = kfac.verify(oracle.batch(model, (4, *shape)), mean_squares)
    assert check.error < TOLERANCE


class Words(nn.Module):
    """Tokens that are looked up, normalized and averaged."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4, **options)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.words(x))).mean(1))


WORDS = torch.tensor([[0, 1, 2], [2, 2, 5], [3, 0, 0], [5, 1, 4], [4, 4, 4]])


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=str)
def test_embedding_and_layer_norm(options: dict[str, Any], inverse: str) -> None:
    model = models.seeded(Words, **options)
    target = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kfac = KFAC(model, damping=0.01, **INVERSES[inverse])
    checks = {check.layer: check for check in kfac.verify((WORDS, target), half_squares)}
    assert set(checks) == {"words", "norm", "head"}
    for check in checks.values():
        assert check.error < TOLERANCE
        assert check.strength > 0.01


class Attention(nn.Module):
    """Self-attention of two heads whose projections are layers, with a residual and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        return (x + self.out(mixed.transpose(1, 2).flatten(2))).mean(1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("inverse", INVERSES)
def test_attention_projections(inverse: str, sharing: Any) -> None:
    model = models.seeded(Attention)
    kfac = KFAC(model, damping=0.001, sharing=sharing, **INVERSES[inverse])
    checks = {check.layer: check for check in kfac.verify(oracle.batch(model, (6, 3, 4)), half_squares)}
    assert set(checks) == {"query_key_value", "out"}
    for check in checks.values():
        assert check.error < TOLERANCE
        assert check.strength > 0.01


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without shift": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm_layers(case: str) -> None:
    """Unit by unit, the exact Fisher block of scale and shift; in eval mode, where samples are alone."""
    build, shape = NORMS[case]

    def net() -> nn.Module:
        return nn.Sequential(build(), nn.Tanh())

    model = models.seeded(net)
    data = oracle.batch(model, (6, *shape))
    if "without statistics" not in case:
        model.eval()
    damping = 1e-3
    own = own_unit_gradients(model, data)
    kfac = KFAC(model, damping=damping)
    half_squares(model(data[0]), data[1]).backward()
    parameters = list(model.parameters())
    grad = torch.stack([p.grad.flatten() for p in parameters], 1)
    kfac.step()
    found = torch.stack([p.grad.flatten() for p in parameters], 1)
    for unit in range(len(grad)):
        fisher = own[:, unit].T @ own[:, unit] / len(own) + damping * torch.eye(len(parameters)).double()
        expected = torch.linalg.solve(fisher, grad[unit])
        assert oracle.relative_error(found[unit], expected) < TOLERANCE


def own_unit_gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Returns ``(n, units, parameters)``: what each sample's gradient at the output is worth there."""
    outputs: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    losses = 0.5 * (model(data[0]).flatten(1) - data[1]).square().sum(1)
    handle.remove()
    (at_output,) = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
    rows = []
    for index in range(len(data[0])):
        only = torch.zeros_like(at_output)
        only[index] = at_output[index]
        grads = torch.autograd.grad(outputs, list(model.parameters()), [only], retain_graph=True)
        rows.append(torch.stack([grad.flatten() for grad in grads], 1))
    return torch.stack(rows)
