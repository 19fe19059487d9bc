"""Gradients of covered layers as matrices, and their size after preconditioning, alike for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.checks import positive
from hpcsngd.optim.layers import Layer

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
    gradients = [parameter.grad for parameter in layer.parameters if parameter.grad is not None]
    return gradients if len(gradients) == len(layer.parameters) else []


def gradient_matrices(
    layers: Sequence[Layer], rows_dtype: Callable[[Layer], torch.dtype]
) -> dict[str, Tensor]:
    """Returns ``(d_out, d_in)`` by name for every layer that has its gradients, as views where that can be.

    Args:
        layers: covered layers.
        rows_dtype: layer -> dtype of what preconditions it.
    """
    gradients = {layer: found for layer in layers if (found := layer_gradients(layer))}
    return {layer.name: layer.to_matrix(found).to(rows_dtype(layer)) for layer, found in gradients.items()}


def write_gradients(layers: Sequence[Layer], matrices: Mapping[str, Tensor]) -> None:
    """Overwrites the gradients of the layers in ``matrices``, which came from `gradient_matrices`."""
    gradients: list[Tensor] = []
    pieces: list[Tensor] = []
    for layer in layers:
        if layer.name in matrices:
            gradients += layer_gradients(layer)
            pieces += layer.from_matrix(matrices[layer.name])
    if gradients:
        torch._foreach_copy_(gradients, pieces)


def rescaled(rescale: Rescale, results: Tensor, grads: Tensor, damping: float) -> Tensor:
    """Returns preconditioned gradients in the size asked for.

    Args:
        rescale: see `Rescale`.
        results: preconditioned gradients, shape ``(layers, d_out, d_in)``.
        grads: plain gradients, the same shape.
        damping: with which ``results`` were computed.
    """
    if rescale == "damping":
        return results * damping
    if rescale == "norm":
        norms = torch.linalg.vector_norm(results, dim=(1, 2), keepdim=True)
        plain = torch.linalg.vector_norm(grads, dim=(1, 2), keepdim=True)
        results = results * (plain / norms.clamp_min(torch.finfo(results.dtype).tiny))
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

    def apply(self, layers: Iterable[HasParameters], lr: float | None, step: int) -> None:
        """Bounds the step of all layers together and forgets what was added.

        Args:
            layers: those whose gradients were overwritten.
            lr: learning rate of the coming step.
            step: of the limit.
        """
        products, self._products = self._products, []
        if self._limit is None or lr is None or not products:
            return
        size = lr**2 * torch.stack(products).sum()
        limit = positive("kl_clip", self._limit, step)
        factor = (limit / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp_max(1)
        for layer in layers:
            for gradient in layer_gradients(layer):
                gradient.mul_(factor)
