"""Losses as sums over samples: what makes their gradients exact means over a step, whatever its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cross_entropy(outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the sum of the samples' cross-entropies, in float32 or float64.

    Args:
        outputs: logits, ``(n, classes)``.
        labels: ``(n,)``, int64.
        smoothing: share of the target that is spread over all classes. To spread it over the others alone, as
            HyLo's published code does, take ``smoothing * classes / (classes - 1)``.
    """
    # half precision is not enough for a sum
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels, reduction="sum", label_smoothing=smoothing)


def dice(outputs: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """Returns one minus the Dice coefficient of all pixels of a batch, times the number of its samples.

    The coefficient is ``(2 sum p t + smooth) / (sum p + sum t + smooth)`` with probabilities p and targets t
    (Milletari et al., 3DV 2016, section 3, without squares). It is one number for a batch, no sum over
    samples; times n, the mean over micro-batches by size is what a step minimizes.

    Args:
        outputs: logits, ``(n, 1, size, size)``.
        masks: 0 and 1, the same shape.
        smooth: keeps the coefficient of empty masks at 1.
    """
    probabilities = outputs.float().sigmoid()
    both, all_of_them = overlap(probabilities, masks)
    return len(masks) * (1 - (2 * both + smooth) / (all_of_them + smooth))


def overlap(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``sum p t`` and ``sum p + sum t`` over all pixels."""
    return (probabilities * masks).sum(), probabilities.sum() + masks.sum()


#: A target that is none: padding.
IGNORED = -100


def token_cross_entropy(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the sum of the cross-entropies of all tokens but padding, in float32.

    Args:
        outputs: logits, ``(n, length, words)``.
        targets: ``(n, length)``, int64; `IGNORED` where there is none.
        smoothing: as for `cross_entropy`.
    """
    return nn.functional.cross_entropy(
        outputs.flatten(0, 1).float(),
        targets.flatten(),
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
