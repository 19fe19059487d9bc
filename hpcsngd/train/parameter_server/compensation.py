"""Delay compensation (DC-ASGD): what a gradient would have been at the weights of now, to first order.

A worker computes ``g`` at weights ``w_bak`` that it pulled; when ``g`` arrives, the weights are ``w``. With
``g g^T``'s diagonal in the place of the Hessian,

    g' = g + lambda g * g * (w - w_bak)

Adaptive: ``lambda = lambda_0 / sqrt(MeanSquare + eps)`` entry by entry, where after every push
``MeanSquare <- m MeanSquare + (1 - m) g * g``, so that a large gradient is not compensated too much.

Source: Zheng et al., ICML 2017, equations 10 and 14 and algorithm 2. Cost per push with d parameters: 3 d
multiplications, adaptive 7 d; memory: d numbers per worker for ``w_bak``, adaptive d more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: Whether lambda is a constant or follows the size of the gradients.
Adaptation = Literal["constant", "adaptive"]


@dataclass(frozen=True)
class Rule:
    """How strongly delays are compensated.

    Attributes:
        strength: lambda, or lambda_0 if adaptive; 0 compensates nothing.
        adaptation: see above.
        momentum: m, in [0, 1).
        eps: below MeanSquare, positive.

    Raises:
        ValueError: a number is out of its range.
    """

    strength: float
    adaptation: Adaptation = "constant"
    momentum: float = 0.95
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"compensation strength {self.strength}: must not be negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"compensation momentum {self.momentum}: must be in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"compensation eps {self.eps}: must be positive")


class Compensation:
    """Compensates the pushes of all workers.

    Args:
        rule: how strongly.
        like: the parameters, for shapes and devices.
    """

    def __init__(self, rule: Rule, like: Sequence[Tensor]) -> None:
        self._rule = rule
        is_adaptive = rule.adaptation == "adaptive"
        self._mean_square = [torch.zeros_like(each) for each in like] if is_adaptive else []

    def apply(
        self, gradients: Sequence[Tensor], now: Sequence[Tensor], then: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns the compensated gradients.

        Args:
            gradients: of one push.
            now: the server's weights before the update.
            then: the weights that the gradients were computed at, as they were.
        """
        self._remember(gradients)
        if self._rule.strength == 0:
            return list(gradients)
        factors = self._factors(gradients)
        return [
            g + g * g * (w - w_bak) * factor
            for g, factor, w, w_bak in zip(gradients, factors, now, then, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the mean squares; nothing of a constant rule."""
        return {"mean_square": [each.clone() for each in self._mean_square]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`'s result."""
        for own, saved in zip(self._mean_square, state["mean_square"], strict=True):
            own.copy_(saved)

    def _remember(self, gradients: Sequence[Tensor]) -> None:
        m = self._rule.momentum
        if self._mean_square:
            for mean, gradient in zip(self._mean_square, gradients, strict=True):
                mean.mul_(m).addcmul_(gradient, gradient, value=1 - m)

    def _factors(self, gradients: Sequence[Tensor]) -> Sequence[float | Tensor]:
        if not self._mean_square:
            return [self._rule.strength] * len(gradients)
        return [self._rule.strength / (mean + self._rule.eps).sqrt() for mean in self._mean_square]
