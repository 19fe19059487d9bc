"""Planes in the space of a model's weights: through checkpoints, or along random directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plane:
    """A plane: all ``origin + a first + b second``.

    Attributes:
        origin: weights, ``(parameters,)``.
        first: direction, ``(parameters,)``.
        second: direction, ``(parameters,)``; orthogonal to ``first`` on a plane of `through`.
        share_first: variance of the checkpoints along ``first`` over all of theirs; NaN if random.
        share_second: the same along ``second``.
    """

    origin: Tensor
    first: Tensor
    second: Tensor
    share_first: float = math.nan
    share_second: float = math.nan

    def at(self, a: float, b: float) -> Tensor:
        """Returns the weights at coordinates."""
        return torch.add(self.origin + a * self.first, self.second, alpha=b)

    def place(self, weights: Tensor) -> tuple[float, float, float]:
        """Returns the coordinates of the nearest point of the plane, and the distance from it."""
        offset = (weights - self.origin).double()
        axes = torch.stack([self.first, self.second]).double()
        # the directions need be neither orthogonal nor of length one
        a, b = torch.linalg.lstsq(axes @ axes.T, (axes @ offset)[:, None]).solution[:, 0].tolist()
        residual = offset - a * axes[0] - b * axes[1]
        return a, b, float(residual.norm())


def through(snapshots: Sequence[Tensor]) -> Plane:
    """Returns the plane of the first two principal components of snapshots, around their mean.

    The axes have length one and point from the first snapshot towards the last.

    Args:
        snapshots: each ``(parameters,)``, in the order of training; of several runs one after the other.

    Raises:
        ValueError: fewer than three snapshots, or all on one line.
    """
    if len(snapshots) < 3:
        raise ValueError(f"a plane needs at least three checkpoints, there are {len(snapshots)}")
    stacked = torch.stack(list(snapshots))
    origin = stacked.mean(dim=0)
    centered = stacked - origin
    # by the small matrix of products: there are few snapshots of very many parameters
    products = torch.stack([torch.stack([_dot(row, other) for other in centered]) for row in centered])
    values, vectors = torch.linalg.eigh(products)
    largest = values.flip(0).clamp_min(0)
    if largest[1] <= 1e-12 * largest[0] or largest[0] <= 0:
        raise ValueError("all checkpoints lie on one line")
    axes = []
    for place in (1, 2):
        axis = centered.T @ vectors[:, -place].to(centered.dtype)
        axis = axis / axis.norm()
        towards = torch.dot(axis, centered[-1] - centered[0])
        axes.append(-axis if towards < 0 else axis)
    shares = (largest[:2] / largest.sum()).tolist()
    return Plane(origin, axes[0], axes[1], *shares)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns a product of vectors, summed in float64 without a copy of all of them at once."""
    return torch.dot(left.double(), right.double())


def filter_normalised(parameters: Sequence[Tensor], generator: torch.Generator) -> Plane:
    """Returns a plane around weights along two random directions that are scaled filter by filter.

    Each row of a direction's weight (one output's filter) gets the length of the same row of the weights, so
    that landscapes of differently scaled weights compare. Biases and the parameters of norms, which have one
    dimension, do not move (Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, section
    4).

    Args:
        parameters: of the model, in its order.
        generator: source of randomness, on the CPU.
    """
    origin = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    first, second = _direction(parameters, generator), _direction(parameters, generator)
    return Plane(origin, first, second)


def _direction(parameters: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    parts = []
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() < 2:
            parts.append(torch.zeros_like(drawn).reshape(-1))
            continue
        rows, wanted = drawn.flatten(1), parameter.detach().flatten(1).norm(dim=1, keepdim=True)
        parts.append((rows / rows.norm(dim=1, keepdim=True) * wanted).reshape(-1))
    return torch.cat(parts)
