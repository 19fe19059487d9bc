"""Curvatures of equal shape stacked, so that a step solves them together.

A network repeats its layers: the 32 of a ResNet-32 have 8 shapes. A solve is a dozen small operations, whose
overhead on either kind of device is then paid 8 times rather than 32 times. Which curvatures are stacked
depends on what they are, never on how they came about, so a resumed run stacks alike and stays bitwise equal.

Curvatures in a stack are views of it: their rows and factors are in memory once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular, vecdot

from hpcsngd.optim.curvature import SampleCurvature
from hpcsngd.optim.gradients import Solved
from hpcsngd.optim.rows import FactoredRows
from hpcsngd.optim.stopwatch import Stopwatch

#: Curvatures with more numbers in their rows are not stacked: memory bounds them, not overhead.
MOST_NUMBERS = 2**18


class Stack:
    """Curvatures with equal shapes and numbers.

    Args:
        curvatures: at least one, with equal and not None `stack_key`.
    """

    def __init__(self, curvatures: Sequence[SampleCurvature]) -> None:
        first = curvatures[0]
        self._samples, self._damping = first.samples, first.damping
        self._a, self._g = (
            torch.stack([tensor.transpose(0, 1) for tensor in tensors])
            for tensors in zip(*(curvature.rows.tensors for curvature in curvatures), strict=True)
        )
        # Solved by columns: a stack laid out by rows would be copied at every step.
        self._factor = torch.stack([curvature.factor.mT for curvature in curvatures]).mT
        self._mixing = _stacked([curvature.mixing for curvature in curvatures])
        self._span = _stacked([curvature.span for curvature in curvatures])
        scales = [curvature.scale or 0.0 for curvature in curvatures]
        self._scale = self._factor.new_tensor(scales)[:, None, None]
        # With the mixing L, L (factor factor^T)^-1 L^T is half^T half: two small products at every step.
        self._half = (
            None if self._mixing is None else solve_triangular(self._factor, self._mixing.mT, upper=False)
        )
        self.members = [self._member(index, curvature) for index, curvature in enumerate(curvatures)]

    def solve(self, grads: Tensor) -> Tensor:
        """Returns `SampleCurvature.solve` of every member, shape ``(members, d_out, d_in)``."""
        return self.apply(grads, self.project(grads))

    def project(self, grads: Tensor) -> Tensor:
        """Returns `SampleCurvature.project` of every member, shape ``(members, n, 1)``."""
        a, g, blocks = _matrices(self._a), _matrices(self._g), self._blocks(grads)
        # Both orders are the same product; the shorter side leaves fewer numbers to multiply and sum.
        of_terms: Tensor = vecdot(g @ blocks, a) if a.shape[2] < g.shape[2] else vecdot(a @ blocks.mT, g)
        return of_terms.reshape(self._a.shape[:4]).sum((1, 3)).unsqueeze(2)

    def apply(self, grads: Tensor, t: Tensor) -> Tensor:
        """Returns `solve` of the gradients, given their projections; always new memory."""
        y = self._inverse_times(t) / (self._samples * self._damping)
        base, of_base = grads, 1 / self._damping
        if self._span is not None:
            inside = _solved(self._span, t) / self._samples
            y += (self._scale - 1 / self._damping) * inside
            base, of_base = self._scale * grads, 1.0
        weighted = _matrices(self._g * y[:, None, :, :, None])
        return torch.baddbmm(
            self._blocks(base), weighted.mT, _matrices(self._a), beta=of_base, alpha=-1
        ).reshape(grads.shape)

    def _inverse_times(self, t: Tensor) -> Tensor:
        if self._half is None:
            return _solved(self._factor, t)
        half: Tensor = vecdot(self._half, t.mT)
        y: Tensor = vecdot(self._half.mT, half.unsqueeze(1))
        return y.unsqueeze(2)

    def _blocks(self, grads: Tensor) -> Tensor:
        """Returns ``(members * groups, d_out / groups, d_in)`` of ``(members, d_out, d_in)``."""
        return grads.reshape(-1, self._g.shape[4], grads.shape[2])

    def _member(self, index: int, curvature: SampleCurvature) -> SampleCurvature:
        return replace(
            curvature,
            rows=curvature.rows.replaced([self._a[index].transpose(0, 1), self._g[index].transpose(0, 1)]),
            factor=self._factor[index],
            mixing=None if self._mixing is None else self._mixing[index],
            span=None if self._span is None else self._span[index],
        )


class Stacks:
    """Every layer's curvature, stacked where that is possible.

    Args:
        stopwatch: counts projections as phase ``project``; default: nothing is timed.
    """

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self._stopwatch = stopwatch or Stopwatch(enabled=False)
        self._stacks: list[tuple[list[str], Stack]] = []
        self._single: dict[str, SampleCurvature] = {}

    def update(self, curvatures: Mapping[str, SampleCurvature]) -> dict[str, SampleCurvature]:
        """Stacks anew what has changed; returns the curvatures, those in stacks as views of them.

        Args:
            curvatures: by layer, in the order in which they are stacked; all that there are.
        """
        groups: dict[Any, list[str]] = {}
        for name, curvature in curvatures.items():
            groups.setdefault(stack_key(curvature) or name, []).append(name)
        old = {tuple(names): stack for names, stack in self._stacks}
        self._stacks, self._single = [], {}
        result = dict(curvatures)
        for names in groups.values():
            members = [curvatures[name] for name in names]
            if stack_key(members[0]) is None:
                self._single[names[0]] = members[0]
                continue
            stack = old.get(tuple(names))
            if stack is None or any(a is not b for a, b in zip(stack.members, members, strict=True)):
                stack = Stack(members)
            self._stacks.append((names, stack))
            result.update(zip(names, stack.members, strict=True))
        return result

    def solve(self, grads: Mapping[str, Tensor]) -> list[Solved]:
        """Returns the preconditioned gradients of all layers that have a curvature.

        Args:
            grads: matrices ``(d_out, d_in)`` by layer.
        """
        solved = []
        single = dict(self._single)
        for names, stack in self._stacks:
            if all(name in grads for name in names):
                stacked = torch.stack([grads[name] for name in names])
                result = self._solve(stack, stacked)
                solved.append(Solved(names, stacked, result, stack.members[0].damping))
            else:
                single.update(zip(names, stack.members, strict=True))
        for name, curvature in single.items():
            if name in grads:
                result = self._solve(curvature, grads[name])
                solved.append(Solved([name], grads[name][None], result[None], curvature.damping))
        return solved

    def _solve(self, curvature: Stack | SampleCurvature, grad: Tensor) -> Tensor:
        with self._stopwatch.phase("project"):
            t = curvature.project(grad)
        return curvature.apply(grad, t)


def stack_key(curvature: SampleCurvature) -> tuple[Any, ...] | None:
    """Returns what two curvatures must share to be stacked; None for one that is solved by itself."""
    rows = curvature.rows
    if not isinstance(rows, FactoredRows) or not 0 < rows.a.numel() + rows.g.numel() <= MOST_NUMBERS:
        return None
    has = (curvature.mixing is not None, curvature.span is not None)
    numbers = (curvature.samples, curvature.damping, *has)
    return (rows.a.shape, rows.g.shape, rows.a.dtype, rows.a.device, *numbers)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the tensors stacked, or None if they are None."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _matrices(tensor: Tensor) -> Tensor:
    """Returns ``(members * groups, n * terms, d)`` of ``(members, groups, n, terms, d)``."""
    return tensor.reshape(-1, tensor.shape[2] * tensor.shape[3], tensor.shape[4])


def _solved(factor: Tensor, t: Tensor) -> Tensor:
    """Returns ``(factor factor^T)^-1 t``; unlike ``cholesky_solve`` it makes no copy of the factor."""
    y: Tensor = solve_triangular(factor.mT, solve_triangular(factor, t, upper=False), upper=True)
    return y
