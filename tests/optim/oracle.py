"""Dense float64 truth: one sample at a time through autograd, patches by unfold, the full matrix solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
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


def true_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns ``(n, d_out * d_in)``: gradients of each sample's own loss, weight and bias as one matrix."""
    rows = []
    for i in range(len(x)):
        loss = own_losses(model, x[i : i + 1], target[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad])
        rows.append(torch.cat([g.reshape(len(g), -1) for g in gradients], 1).flatten())
    return torch.stack(rows)


def reduced_gradients(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Returns ``(n, d_out * d_in)`` by the formula of mode reduce: (sum of gradients)(mean of inputs)^T."""
    rows = []
    for i in range(len(x)):
        calls: list[tuple[Tensor, Tensor]] = []
        handle = layer.register_forward_hook(partial(_record_call, calls))
        loss = own_losses(model, x[i : i + 1], target[i : i + 1]).sum()
        handle.remove()
        gradients = torch.autograd.grad(loss, [out for _, out in calls])
        positions = torch.cat([patches(layer, inputs, out) for inputs, out in calls])
        total = sum(
            g.reshape(layer.weight.shape[0], -1).sum(1) if g.dim() == 4 else g.reshape(-1, g.shape[-1]).sum(0)
            for g in gradients
        )
        bias = positions.new_ones(1 if layer.bias is not None and layer.bias.requires_grad else 0)
        rows.append(torch.outer(total, torch.cat([positions.mean(0), bias])).flatten())
    return torch.stack(rows)


def _record_call(
    calls: list[tuple[Tensor, Tensor]], _: nn.Module, args: tuple[Tensor], out: Tensor
) -> Tensor:
    calls.append((args[0], out))
    # The model goes on with a copy: an in-place activation would change the very tensor that is kept here.
    return out.clone()


def patches(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Returns what the layer reads at each position, ``(positions, d_in)``, for one sample."""
    if isinstance(layer, nn.Linear):
        return x.detach().reshape(-1, x.shape[-1])
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        top, left = (0, 0) if layer.padding == "valid" else layer.padding
        bottom, right = top, left
    padded = F.pad(x.detach(), (left, right, top, bottom))
    unfolded = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    assert unfolded.shape[2] == out.shape[2] * out.shape[3]
    return unfolded[0].T


def dense_solution(rows: Tensor, grad: Tensor, damping: float) -> Tensor:
    """Returns ``(1/n U^T U + damping I)^-1 grad`` with the matrix formed."""
    fisher = rows.T @ rows / len(rows)
    identity = torch.eye(len(fisher), dtype=fisher.dtype)
    return torch.linalg.solve(fisher + damping * identity, grad.flatten()).reshape(grad.shape)


def layer_gradient(layer: nn.Module) -> Tensor:
    """Returns the layer's ``.grad`` as one matrix, the bias as last column."""
    parts = [p.grad for p in layer.parameters() if p.grad is not None]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).clone()


def layer_gradients(model: nn.Module, names: Mapping[str, object] | list[str]) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    return {name: layer_gradient(modules[name]) for name in names}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
