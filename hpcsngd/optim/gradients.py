"""Gradients of covered layers as matrices, and their size after preconditioning, alike for every method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.checks import positive

#: What becomes of a preconditioned gradient v: nothing; damping * v; v with the plain gradient's norm.
Rescale = Literal["none", "damping", "norm"]


@dataclass(frozen=True)
class Solved:
    """Layers that were preconditioned together.

    Attributes:
        names: of the layers.
        grads: what was preconditioned, ``(layers, d_out, d_in)``, or ``(layers, groups, d_out, d_in)``.
        results: the same shape.
        damping: that all of them have.
    """

    names: list[str]
    grads: Tensor
    results: Tensor
    damping: float


class HasParameters(Protocol):
    """A covered layer of any method."""

    @property
    def parameters(self) -> list[Tensor]:
        """Returns the parameters that are preconditioned."""


def layer_gradients(layer: HasParameters) -> list[Tensor]:
    """Returns the gradients of all the layer's parameters, or none of them."""
    gradients = [parameter.grad for parameter in layer.parameters]
    present = [gradient for gradient in gradients if gradient is not None]
    return present if len(present) == len(gradients) else []


def overwrite(gradients: Iterable[Tensor], pieces: Iterable[Tensor]) -> None:
    """Copies pieces into the gradients that they have the shapes of, all at once."""
    targets = list(gradients)
    if targets:
        torch._foreach_copy_(targets, list(pieces))


def rescaled(rescale: Rescale, solved: Solved) -> Tensor:
    """Returns preconditioned gradients in the size asked for; they are overwritten where that changes.

    Args:
        rescale: see `Rescale`.
        solved: what was preconditioned together.
    """
    results = solved.results
    if rescale == "damping":
        return results.mul_(solved.damping)
    if rescale == "norm":
        others = list(range(1, results.dim()))
        norms = torch.linalg.vector_norm(results, dim=others, keepdim=True)
        plain = torch.linalg.vector_norm(solved.grads, dim=others, keepdim=True)
        results.mul_(plain.div_(norms.clamp_min_(torch.finfo(results.dtype).tiny)))
    return results


class KlClip:
    """Multiplies all preconditioned gradients by ``min(1, sqrt(limit / (lr^2 sum v . g)))``.

    Source: Ba et al., ICLR 2017, section 5, with ``v . g`` for ``v^T F v``.

    Args:
        limit: positive, or a function of the step; None: no bound, and nothing is computed.

    Raises:
        ValueError: the limit is out of its range.
    """

    def __init__(self, limit: Schedule | None) -> None:
        if limit is not None:
            positive("kl_clip", limit, 0)
        self._limit = limit
        self._products: list[Tensor] = []

    @property
    def enabled(self) -> bool:
        """Returns whether there is a bound."""
        return self._limit is not None

    def add(self, results: Tensor, grads: Tensor) -> None:
        """Adds ``v . g`` of one or several layers."""
        if self.enabled:
            self._products.append((results * grads).sum(dtype=torch.float64))

    def apply(self, gradients: Iterable[Tensor], lr: float | None, step: int) -> None:
        """Bounds the step of all layers together and forgets what was added.

        Args:
            gradients: those that were overwritten.
            lr: learning rate of the coming step.
            step: of the limit.
        """
        products, self._products = self._products, []
        if self._limit is None or lr is None or not products:
            return
        size = lr**2 * torch.stack(products).sum()
        limit = positive("kl_clip", self._limit, step)
        factor = (limit / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp_max(1)
        torch._foreach_mul_(list(gradients), factor)
