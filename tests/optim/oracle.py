"""Dense float64 truth: one sample at a time through autograd, the full matrix solved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def own_losses(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns each sample's own loss, shape ``(n,)``: half the squared distance to the target."""
    return 0.5 * (model(x).flatten(1) - target).square().sum(1)


def mean_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return own_losses(model, x, target).mean()


def sum_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return own_losses(model, x, target).sum()


def batch(model: nn.Module, shape: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns random inputs of ``shape`` and targets that fit the model's output, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        out = model(x).flatten(1)
    return x, torch.randn(out.shape, generator=generator, dtype=torch.float64)


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def true_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns ``(n, entries)``: gradients of each sample's own loss, weight and bias as one vector."""
    rows = []
    for i in range(len(x)):
        loss = own_losses(model, x[i : i + 1], target[i : i + 1]).sum()
        rows.append(flat(torch.autograd.grad(loss, trained(layer))))
    return torch.stack(rows)


def reduced_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns ``(n, entries)`` by mode reduce: the true gradients if every position had the mean gradient.

    That is ``sum_s (mean g) x_s^T = (sum g)(mean x)^T`` for whatever the layer reads at a position.
    """
    return torch.stack([_reduced(model, layer, *pair)[0] for pair in zip(x, target, strict=True)])


def paper_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns ``(n, entries)`` by mode paper: ``(mean g)(mean x)^T``."""
    pairs = [_reduced(model, layer, *pair) for pair in zip(x, target, strict=True)]
    return torch.stack([row / positions for row, positions in pairs])


#: Mode -> the rows that it documents.
ROWS = {"exact": true_gradients, "reduce": reduced_gradients, "paper": paper_gradients}


def _reduced(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Returns one sample's gradient if every position had the mean gradient, and the number of positions."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(partial(_record_call, calls))
    loss = own_losses(model, x.unsqueeze(0), target.unsqueeze(0)).sum()
    handle.remove()
    channels = -1 if isinstance(layer, nn.Linear) else 1
    # (channels, positions) of all calls together.
    gradients = torch.cat(
        [g.movedim(channels, 0).flatten(1) for g in torch.autograd.grad(loss, [out for _, out in calls])], 1
    )
    outputs = torch.cat([layer(inputs.detach()).movedim(channels, 0).flatten(1) for inputs, _ in calls], 1)
    everywhere = gradients.mean(1, keepdim=True).expand_as(outputs)
    return flat(torch.autograd.grad(outputs, trained(layer), everywhere)), outputs.shape[1]


def _record_call(
    calls: list[tuple[Tensor, Tensor]], _: nn.Module, args: tuple[Tensor], out: Tensor
) -> Tensor:
    calls.append((args[0], out))
    # The model goes on with a copy: an in-place activation would change the very tensor that is kept here.
    return out.clone()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def dense_solution(rows: Tensor, grad: Tensor, damping: float) -> Tensor:
    """Returns ``(1/n U^T U + damping I)^-1 grad`` with the matrix formed."""
    fisher = rows.T @ rows / len(rows)
    identity = torch.eye(len(fisher), dtype=fisher.dtype)
    return torch.linalg.solve(fisher + damping * identity, grad.flatten()).reshape(grad.shape)


def layer_gradient(layer: nn.Module) -> Tensor:
    """Returns the layer's ``.grad``, weight and bias as one vector."""
    return flat(p.grad for p in layer.parameters() if p.grad is not None)


def layer_gradients(model: nn.Module, names: Mapping[str, object] | list[str]) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    return {name: layer_gradient(modules[name]) for name in names}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
