"""The scale of samples: from captured output gradients to gradients of each sample's own loss.

Captured output gradients are those of the loss given to ``backward()``. Without a ``sample_scale`` of the
caller's they are multiplied as follows.

* ``"mean"``: the loss is the mean over the micro-batch, divided by ``accumulation_steps``; the factor is
  rows in the micro-batch times ``accumulation_steps``. DistributedDataParallel averages parameter
  gradients and leaves output gradients alone, so the number of ranks does not enter.
* ``"sum"``: the loss is the sum over the samples; the factor is 1. The gradient is then a sum as well and
  its preconditioned form grows with the number of samples.
* A loop that weighs samples exactly over uneven ranks, ``loss = sum(own losses) * ranks / N`` for every
  micro-batch, says ``sample_scale = N / ranks``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal, get_args

from hpcsngd.optim.checks import check_choice

logger = logging.getLogger(__name__)

LossReduction = Literal["mean", "sum"]


class SampleScale:
    """Knows how the loss was reduced.

    Args:
        loss_reduction: see the module.
        accumulation_steps: micro-batches per step.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, loss_reduction: LossReduction, accumulation_steps: int) -> None:
        check_choice("loss_reduction", loss_reduction, get_args(LossReduction))
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps}: must be at least 1")
        self._is_mean, self._accumulation_steps = loss_reduction == "mean", accumulation_steps
        self._told_accumulation = False

    @staticmethod
    def check(sample_scale: float | None, grad_scale: float) -> None:
        """Raises ValueError unless both are positive, or ``sample_scale`` is None."""
        for name, scale in (("sample_scale", sample_scale), ("grad_scale", grad_scale)):
            if scale is not None and not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name}={scale}: must be positive")

    def factor(self, sample_scale: float | None, grad_scale: float) -> Callable[[int], float]:
        """Returns the function from rows in a micro-batch to the factor for its output gradients.

        Args:
            sample_scale: the caller's; None for the loss reduction's.
            grad_scale: of a gradient scaler, which output gradients still carry.
        """

        def factor(rows: int) -> float:
            own = float(rows * self._accumulation_steps) if self._is_mean else 1.0
            return (own if sample_scale is None else sample_scale) / grad_scale

        return factor

    def check_accumulation(self, sample_scale: float | None, micro_batches: int) -> None:
        """Tells once about more micro-batches than announced: their scale, hence damping, would be wrong."""
        if sample_scale is not None or not self._is_mean or self._told_accumulation:
            return
        if micro_batches > self._accumulation_steps:
            self._told_accumulation = True
            logger.warning(
                "captured %d micro-batches, but accumulation_steps=%d",
                micro_batches,
                self._accumulation_steps,
            )
