"""Whose gradients make up the Fisher matrix: those of the true targets, of drawn ones, or of all there are.

Let ``l_n`` be sample n's own loss as a function of the model's outputs, ``J_n`` the Jacobian of the outputs
by a layer's weights, and ``H_n`` the Hessian of ``l_n`` by the outputs, which for the losses below does not
depend on the target. With ``R_n R_n^T = H_n``,

    empirical    1/N sum_n J_n^T (grad l_n)(grad l_n)^T J_n     with the true targets; costs no backward pass
    type-2       1/N sum_n J_n^T R_n R_n^T J_n                  the generalized Gauss-Newton matrix, and the
                                                                Fisher matrix of the model's own distribution;
                                                                one backward pass for each column of R
    mc           1/N sum_n 1/M sum_m J_n^T r_nm r_nm^T J_n      r drawn with covariance H: type-2 in
                                                                expectation; M backward passes

Losses by torch's names, with E outputs and T positions in a sample and its own loss their mean or sum:

    cross_entropy       outputs (n, classes, positions ...) are logits, p their softmax; at each position
                        H = diag(p) - p p^T                     1/T of it for the mean; no ignored index
    mse                 H = 2 I                                 1/E of it for the mean
    bce_with_logits     H = diag(p (1 - p)), p the sigmoid      1/E of it for the mean

Definitions: Dangel et al., "Kronecker-factored Approximate Curvature (KFAC) From Scratch", 2025; what the
empirical matrix lacks: Kunstner et al., NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Fisher = Literal["empirical", "mc", "type-2"]
LossKind = Literal["cross_entropy", "mse", "bce_with_logits"]
Reduction = Literal["mean", "sum"]


def columns(loss: LossKind, outputs: Tensor, reduction: Reduction) -> Iterator[Tensor]:
    """Yields the columns of ``R_n``, each for all n at once, shaped like ``outputs``, float32 or wider.

    There are classes times positions of them for cross entropy, as many as outputs for the others.

    Args:
        loss: see the module's docstring.
        outputs: of the model, samples first.
        reduction: whether a sample's own loss is a mean or a sum.
    """
    wide = _wide(outputs)
    scale = _hessian_scale(loss, outputs, reduction) ** 0.5
    if loss == "cross_entropy":
        yield from (scale * column for column in _categorical_columns(wide))
        return
    spread = torch.ones_like(wide) if loss == "mse" else _bernoulli_variance(wide).sqrt()
    flat = (scale * spread).flatten(1)
    for entry in range(flat.shape[1]):
        yield _only(flat, entry).reshape(outputs.shape)


def draws(
    loss: LossKind, outputs: Tensor, reduction: Reduction, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yields ``count`` tensors shaped like ``outputs`` that have mean 0 and covariance ``H_n / count``.

    Args:
        loss: see the module's docstring.
        outputs: of the model, samples first.
        reduction: whether a sample's own loss is a mean or a sum.
        count: M.
        generator: on the device of the outputs.
    """
    wide = _wide(outputs)
    scale = (_hessian_scale(loss, outputs, reduction) / count) ** 0.5
    for _ in range(count):
        if loss == "cross_entropy":
            yield scale * _categorical_draw(wide, generator)
        elif loss == "mse":
            yield scale * torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        else:
            p = wide.sigmoid()
            yield scale * (p - torch.bernoulli(p, generator=generator))


def _wide(outputs: Tensor) -> Tensor:
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def _hessian_scale(loss: LossKind, outputs: Tensor, reduction: Reduction) -> float:
    """Returns what is in front of the Hessian."""
    terms = outputs.shape[2:].numel() if loss == "cross_entropy" else outputs.shape[1:].numel()
    return (2.0 if loss == "mse" else 1.0) / (terms if reduction == "mean" else 1)


def _categorical_columns(logits: Tensor) -> Iterator[Tensor]:
    """Yields the columns of a root of ``diag(p) - p p^T``, ``diag(sqrt p) - p sqrt(p)^T``, by position."""
    p = logits.softmax(1).flatten(2) if logits.dim() > 2 else logits.softmax(1).unsqueeze(2)
    for label in range(p.shape[1]):
        root = p[:, label : label + 1].sqrt()
        column = -p * root
        column[:, label : label + 1] += root
        for position in range(p.shape[2]):
            yield _only(column, position).reshape(logits.shape)


def _categorical_draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Returns ``p - e`` with a unit vector e drawn by p at every position: its covariance is the Hessian."""
    p = logits.softmax(1).movedim(1, -1)
    labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    drawn = torch.zeros_like(p).reshape(-1, p.shape[-1]).scatter_(1, labels, 1.0)
    return (p - drawn.reshape(p.shape)).movedim(-1, 1)


def _bernoulli_variance(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return p * (1 - p)


def _only(values: Tensor, index: int) -> Tensor:
    """Returns the values at an index of the last dimension, and zero elsewhere."""
    result = torch.zeros_like(values)
    result[..., index] = values[..., index]
    return result
