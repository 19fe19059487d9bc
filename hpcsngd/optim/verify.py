"""The dense oracle: a layer's curvature from one sample at a time through autograd, formed and solved.

Shares no formula with the methods that it checks: no rows, no kernels, no sample space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.optim.base import Preconditioner
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.records import LayerCheck
from hpcsngd.optim.reporting import tell_checks

Loss = Callable[[Tensor, Tensor], Tensor]


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Returns weight and bias (or their gradients) as one vector; no solution depends on the order."""
    return torch.cat([part.flatten() for part in parts])


def choose_layers(layers: Sequence[Layer], count: int, max_entries: int) -> dict[str, str]:
    """Returns for each layer why it is not compared; an empty text for those that are.

    Args:
        layers: covered layers in module order.
        count: how many to compare, evenly over those that are small enough.
        max_entries: largest layer.
    """
    reasons = {}
    for layer in layers:
        entries = layer.row_sizes[0] * layer.row_sizes[1]
        is_large = entries > max_entries
        reasons[layer.name] = f"{entries} entries, more than max_entries={max_entries}" if is_large else ""
    small = [name for name, reason in reasons.items() if not reason]
    chosen = {small[index * len(small) // count] for index in range(count)} if len(small) > count else small
    return {
        name: reason or ("" if name in chosen else f"not among the {count} layers sampled")
        for name, reason in reasons.items()
    }


def own_gradients(
    model: nn.Module, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor], loss: Loss
) -> Tensor:
    """Returns ``(n, entries)``: the gradient of each sample's own loss; 0 where the model does not use it."""
    rows = []
    for i in range(len(batch[0])):
        value = loss(model(batch[0][i : i + 1]), batch[1][i : i + 1])
        gradients = torch.autograd.grad(value, list(parameters), materialize_grads=True)
        rows.append(flat(gradients))
    return torch.stack(rows)


def dense_solution(rows: Tensor, grad: Tensor, damping: float) -> Tensor:
    """Returns ``(1/n U^T U + damping I)^-1 grad`` with the matrix formed."""
    fisher = rows.T @ rows / len(rows)
    fisher.diagonal().add_(damping)
    solution: Tensor = torch.linalg.solve(fisher, grad.flatten()).reshape(grad.shape)
    return solution


def compare(layer: str, found: Tensor, grad: Tensor, rows: Tensor, damping: float) -> LayerCheck:
    """Returns how far ``found`` is from the dense solution, and from the plain gradient over damping."""
    exact = dense_solution(rows, grad, damping)
    size, reference = grad.norm(), exact.norm()
    if float(size) == 0:
        return LayerCheck(layer, grad.numel(), math.nan, math.nan, "its gradient is zero on this batch")
    error = float((found - exact).norm() / reference)
    return LayerCheck(layer, grad.numel(), error, float((damping * found - grad).norm() / size))


@dataclass(frozen=True)
class Problem:
    """A model that a preconditioner and the oracle both work on.

    Attributes:
        model: its parameters' gradients are what is compared.
        layers: its covered layers.
        batch: inputs and targets.
        loss: of outputs and targets.
    """

    model: nn.Module
    layers: Sequence[Layer]
    batch: tuple[Tensor, Tensor]
    loss: Loss


def check_on_a_copy(
    problem: Problem,
    build: Callable[[nn.Module], Preconditioner],
    choose: Callable[[Sequence[Layer]], Mapping[str, str]],
) -> tuple[LayerCheck, ...]:
    """Compares a preconditioner with the dense solution on a copy of the model; rank 0 prints it.

    Args:
        problem: the user's; model, gradients and random numbers stay as they are.
        build: model -> a preconditioner for it that keeps to this process.
        choose: `choose_layers` or alike.
    """
    model = copy.deepcopy(problem.model).double().eval()
    model.zero_grad()
    inputs, targets = (part.double() if part.is_floating_point() else part for part in problem.batch)
    modules: dict[str, Any] = dict(model.named_modules())
    copies = [replace(layer, module=modules[layer.name]) for layer in problem.layers]
    reasons = choose(copies)
    with torch.random.fork_rng([inputs.device] if inputs.device.type == "cuda" else []):
        checks = check(build(model), Problem(model, copies, (inputs, targets), problem.loss), reasons)
    tell_checks("compared with the dense oracle:", checks)
    return checks


def check(
    preconditioner: Preconditioner, problem: Problem, reasons: Mapping[str, str]
) -> tuple[LayerCheck, ...]:
    """Compares one step of a preconditioner with the dense solution.

    Args:
        preconditioner: attached to the problem's model, not used yet; closed afterwards.
        problem: with a model in float64 and evaluation mode, whose gradients are overwritten.
        reasons: from `choose_layers`.
    """
    model, batch, loss = problem.model, problem.batch, problem.loss
    loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    plain = {layer.name: _gradient(layer) for layer in problem.layers}
    preconditioner.step()
    damping = preconditioner.diagnostics().damping
    found = {layer.name: _gradient(layer) for layer in problem.layers}
    # Without hooks: the samples that follow are not the preconditioner's.
    preconditioner.close()
    checks = []
    for layer in problem.layers:
        grad, result, reason = plain[layer.name], found[layer.name], reasons[layer.name]
        if reason or grad is None or result is None:
            entries = layer.row_sizes[0] * layer.row_sizes[1]
            reason = reason or "it has no gradient on this batch"
            checks.append(LayerCheck(layer.name, entries, math.nan, math.nan, reason))
        else:
            rows = own_gradients(model, layer.parameters, batch, loss)
            checks.append(compare(layer.name, result, grad, rows, damping))
    return tuple(checks)


def _gradient(layer: Layer) -> Tensor | None:
    gradients = [parameter.grad for parameter in layer.parameters if parameter.grad is not None]
    return flat(gradients) if len(gradients) == len(layer.parameters) else None
