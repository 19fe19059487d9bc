"""K-FAC's formula made dense, from factors that are made one sample at a time through autograd.

Shares no formula with `KFAC`: what a layer reads at a position is the gradient of its output there by its
weights, and the loss's Hessian is differentiated, not written down.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.optim.base import Preconditioner
from hpcsngd.optim.gradients import layer_gradients
from hpcsngd.optim.kfac_covering import find_covered
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_options import Options
from hpcsngd.optim.kfac_units import NormLayer
from hpcsngd.optim.records import LayerCheck
from hpcsngd.optim.reporting import tell_checks

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What K-FAC and the oracle both work on: model, batch, and the loss of outputs and targets."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Loss


@dataclass(frozen=True)
class Limits:
    """How many layers to compare, and the most weight and bias entries that they may have."""

    layers: int
    max_entries: int


def check_on_a_copy(
    problem: Problem, build: Callable[[nn.Module], Preconditioner], options: Options, limits: Limits
) -> tuple[LayerCheck, ...]:
    """Compares one step of K-FAC with the dense formula, and prints it; the user's model stays as it is.

    Args:
        problem: the user's.
        build: model -> K-FAC for it that keeps to this process.
        options: of that K-FAC.
        limits: of what is compared.
    """
    model = copy.deepcopy(problem.model).double().eval()
    model.zero_grad()
    inputs, targets = (part.double() if part.is_floating_point() else part for part in problem.batch)
    problem = Problem(model, (inputs, targets), problem.loss)
    layers, _ = find_covered(model, options.skip, options.sharing, options.largest_factor)
    with torch.random.fork_rng([inputs.device] if inputs.device.type == "cuda" else []):
        plain, found, damping = _one_step(problem, build(model), layers)
        reasons = _choose(layers, limits)
        checks = tuple(
            _check(problem, layer, options, damping, (plain[layer.name], found[layer.name]))
            if not reasons[layer.name] and plain[layer.name] is not None
            else _skipped(layer, reasons[layer.name] or "it has no gradient on this batch")
            for layer in layers
        )
    tell_checks("compared with the dense formula:", checks)
    return checks


def _one_step(
    problem: Problem, alike: Preconditioner, layers: Sequence[CoveredLayer]
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None], float]:
    outputs = problem.model(problem.batch[0])
    alike.before_backward(outputs)
    problem.loss(outputs, problem.batch[1]).backward()  # type: ignore[no-untyped-call]
    plain = {layer.name: _blocks(layer) for layer in layers}
    alike.step()
    found = {layer.name: _blocks(layer) for layer in layers}
    damping = alike.diagnostics().damping
    # Without hooks: the samples that follow are not the preconditioner's.
    alike.close()
    return plain, found, damping


def _blocks(layer: CoveredLayer) -> Tensor | None:
    gradients = layer_gradients(layer)
    return layer.to_blocks(gradients).clone() if gradients else None


def _choose(layers: Sequence[CoveredLayer], limits: Limits) -> dict[str, str]:
    entries = {layer.name: math.prod(layer.shape) for layer in layers}
    small = [name for name, size in entries.items() if size <= limits.max_entries]
    chosen = (
        {small[index * len(small) // limits.layers] for index in range(limits.layers)} if small else set()
    )
    return {
        name: f"{size} entries, more than max_entries={limits.max_entries}"
        if name not in small
        else ""
        if name in chosen
        else f"not among the {limits.layers} layers sampled"
        for name, size in entries.items()
    }


def _skipped(layer: CoveredLayer, reason: str) -> LayerCheck:
    return LayerCheck(layer.name, math.prod(layer.shape), math.nan, math.nan, reason)


def _check(
    problem: Problem, layer: CoveredLayer, options: Options, damping: float, pair: tuple[Any, Any]
) -> LayerCheck:
    grad, found = pair
    size = grad.norm()
    if float(size) == 0:
        return _skipped(layer, "its gradient is zero on this batch")
    factors = dense_factors(problem, layer, options)
    exact = dense_solution(factors, grad, damping, options)
    error = float((found - exact).norm() / exact.norm())
    return LayerCheck(layer.name, grad.numel(), error, float((damping * found - grad).norm() / size))


def dense_solution(
    factors: tuple[Tensor, Tensor | None], grad: Tensor, damping: float, options: Options
) -> Tensor:
    """Returns the formula's solution for blocks ``grad``, every block's matrix formed.

    Args:
        factors: A, ``(groups, d_in, d_in)``, and G, ``(groups, d_out, d_out)`` or None for a norm layer.
        grad: ``(groups, d_out, d_in)``.
        damping: lambda.
        options: kind of inverse and pi.
    """
    a, has_g = factors[0], factors[1] is not None
    g = a.new_ones(len(a), 1, 1) if factors[1] is None else factors[1]
    solutions = []
    for a_block, g_block, block in zip(a, g, grad, strict=True):
        eye_a, eye_g = (
            torch.eye(len(factor), dtype=a.dtype, device=a.device) for factor in (a_block, g_block)
        )
        if options.inverse == "eigen" or not has_g:
            matrix = torch.kron(g_block, a_block) + damping * torch.kron(eye_g, eye_a)
        else:
            ratio = (a_block.trace() / len(a_block)) / (g_block.trace() / len(g_block))
            pi = math.sqrt(float(ratio)) if options.pi_split else 1.0
            root = math.sqrt(damping)
            matrix = torch.kron(g_block + root / pi * eye_g, a_block + root * pi * eye_a)
        solutions.append(torch.linalg.solve(matrix, block.flatten()).reshape(block.shape))
    return torch.stack(solutions)


def dense_factors(problem: Problem, layer: CoveredLayer, options: Options) -> tuple[Tensor, Tensor | None]:
    """Returns A and G of `hpcsngd.optim.kfac_layers`."""
    own = [_own(problem, layer, options, index) for index in range(len(problem.batch[0]))]
    n = len(own)
    if isinstance(layer, NormLayer):
        units = torch.stack([column for _, columns in own for column in columns])
        return torch.einsum("nui,nuj->uij", units, units) / n, None
    inputs = [x for x, _ in own]
    if options.sharing == "reduce" and not layer.is_diagonal:
        inputs = [x.mean(0, keepdim=True) for x in inputs]
        columns = [column.sum(0, keepdim=True) for _, columns in own for column in columns]
    else:
        columns = [column for _, columns in own for column in columns]
    x, g = torch.cat(inputs), torch.cat(columns)
    a = torch.einsum("sgi,sgj->gij", x, x) / len(x)
    return a, torch.einsum("sgi,sgj->gij", g, g) / n


def _own(problem: Problem, layer: CoveredLayer, options: Options, index: int) -> tuple[Tensor, list[Tensor]]:
    """Returns one sample's inputs ``(positions, groups, d_in)`` and output gradients by column.

    Output gradients are ``(positions, groups, d_out)``; for a norm layer the gradients of its parameters,
    ``(units, d_in)``, and no inputs.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        calls.append((args[0].detach(), output))
        # The model goes on with a copy, which may be written to.
        return output.clone()

    handle = layer.module.register_forward_hook(keep)
    outputs = problem.model(problem.batch[0][index : index + 1])
    handle.remove()
    target = problem.batch[1][index : index + 1]
    cotangents = _cotangents(problem.loss, outputs, target, options)
    wanted = layer.parameters if isinstance(layer, NormLayer) else [output for _, output in calls]
    columns = []
    for cotangent in cotangents:
        grads = torch.autograd.grad(outputs, wanted, cotangent, retain_graph=True)
        if isinstance(layer, NormLayer):
            columns.append(layer.to_blocks(grads)[:, 0])
        else:
            columns.append(torch.cat([_by_position(layer, grad) for grad in grads]))
    if isinstance(layer, NormLayer):
        return outputs.new_empty(0), columns
    x = torch.cat([_read(layer, *call) for call in calls])
    # Nothing is read where an embedding pads; such positions are left out.
    used = (x != 0).any(2).any(1) if layer.is_diagonal else slice(None)
    return x[used], [column[used] for column in columns]


def _cotangents(loss: Loss, outputs: Tensor, target: Tensor, options: Options) -> list[Tensor]:
    """Returns the gradient of the sample's loss by the outputs, or the columns of a root of its Hessian."""
    free = outputs.detach().requires_grad_()
    if options.fisher == "empirical":
        return list(torch.autograd.grad(loss(free, target), [free]))
    hessian: Any = torch.autograd.functional.hessian(lambda y: loss(y, target), free)  # type: ignore[no-untyped-call]
    values, vectors = torch.linalg.eigh(hessian.reshape(free.numel(), free.numel()))
    roots = vectors * values.clamp(min=0).sqrt()
    return [column.reshape(free.shape) for column in roots.T]


def _by_position(layer: CoveredLayer, grad: Tensor) -> Tensor:
    """Returns ``(positions, groups, d_out)`` of a gradient at the output for one sample."""
    channels = -1 if isinstance(layer.module, nn.Linear | nn.Embedding) else 1
    groups, d_out, _ = layer.shape
    return grad[0].movedim(channels if channels < 0 else 0, -1).reshape(-1, groups, d_out)


def _read(layer: CoveredLayer, x: Tensor, output: Tensor) -> Tensor:
    """Returns what the layer reads at each position, ``(positions, groups, d_in)``, bias included."""
    again = layer.module(x)
    positions = _by_position(layer, again)
    first = positions[:, :, 0].sum(1)
    rows = [
        layer.to_blocks(torch.autograd.grad(value, layer.parameters, retain_graph=True))[:, 0]
        for value in first
    ]
    return torch.stack(rows)
