"""Curvature pairs and the product of their inverse Hessian with a vector, for L-BFGS.

A pair is a step ``s`` and the change ``y`` of the gradient of one and the same function over it. With
``rho = 1 / y^T s`` every pair updates the inverse Hessian

    H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T

from ``H_0 = gamma D``, with ``gamma = s^T y / y^T D y`` of the newest pair. H is never formed: Nocedal, Math.
of Computation 1980; the two loops: Nocedal and Wright, 2nd ed., algorithm 7.4 and equation 7.20.

Cost with p pairs of d numbers: 4 p d multiply-adds per product, 2 p d numbers in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

#: What became of a pair.
Fate = Literal["kept", "damped", "skipped"]


class SecantPairs:
    """The newest pairs.

    Args:
        most: pairs kept, at least 1.
        eps: a pair is skipped unless ``y^T s > eps |s| |y|``.
        powell: damping in [0, 1): where ``s^T y < powell s^T B_0 s``, ``y`` becomes the mean of ``y`` and
            ``B_0 s`` that makes them equal (Powell 1978, with ``B_0 = H_0^-1`` of the pair before); 0 damps
            nothing.

    Attributes:
        metric: D, the diagonal of ``H_0`` up to its factor, shape ``(d,)``; None: ones.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, most: int, *, eps: float = 1e-10, powell: float = 0.0) -> None:
        if most < 1:
            raise ValueError(f"history={most}: must be at least 1")
        if not eps >= 0:
            raise ValueError(f"eps={eps}: must not be negative")
        if not 0 <= powell < 1:
            raise ValueError(f"powell={powell}: must be in [0, 1)")
        self._eps, self._powell = eps, powell
        self.metric: Tensor | None = None
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=most)

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, s: Tensor, y: Tensor) -> Fate:
        """Takes in a pair; a skipped one leaves everything as it was.

        Args:
            s: step, shape ``(d,)``.
            y: change of the gradient, the same shape.
        """
        fate: Fate = "kept"
        if self._powell > 0 and self._pairs:
            y, is_damped = self._damped(s, y)
            fate = "damped" if is_damped else fate
        product = float(s @ y)
        bound = self._eps * float(s.norm()) * float(y.norm())
        # Not "<=": NaN must be skipped as well.
        if not (product > bound and product < float("inf")):
            return "skipped"
        self._pairs.append((s, y, 1 / product))
        return fate

    def multiply(self, vector: Tensor) -> Tensor:
        """Returns ``H vector``, shape ``(d,)``; without pairs, ``D vector``."""
        q, alphas = vector.clone(), []
        for s, y, rho in reversed(self._pairs):
            alphas.append(rho * (s @ q))
            q -= alphas[-1] * y
        r = self._scaled(q) * self._gamma()
        for (s, y, rho), alpha in zip(self._pairs, reversed(alphas), strict=True):
            r += (alpha - rho * (y @ r)) * s
        return r

    def clear(self) -> None:
        """Forgets all pairs."""
        self._pairs.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the pairs, oldest first, each of shape ``(pairs, d)``; nothing without pairs."""
        if not self._pairs:
            return {}
        return {
            "s": torch.stack([s for s, _, _ in self._pairs]),
            "y": torch.stack([y for _, y, _ in self._pairs]),
        }

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Continues from `state_dict`'s result.

        Args:
            state: the pairs.
            like: a vector of the parameters' length, dtype and device.

        Raises:
            ValueError: pairs of another length.
        """
        self.clear()
        if not state:
            return
        if state["s"].shape[1:] != like.shape or state["y"].shape != state["s"].shape:
            shapes = tuple(state["s"].shape), tuple(state["y"].shape)
            raise ValueError(f"pairs have shapes {shapes}; the parameters have {len(like)} numbers")
        for row, other in zip(state["s"].to(like), state["y"].to(like), strict=True):
            # clones first: the last bit of a product depends on where in memory a row begins
            s, y = row.clone(), other.clone()
            self._pairs.append((s, y, 1 / float(s @ y)))

    def _gamma(self) -> float:
        if not self._pairs:
            return 1.0
        _, y, rho = self._pairs[-1]
        return 1 / (rho * float(y @ self._scaled(y)))

    def _scaled(self, vector: Tensor) -> Tensor:
        return vector if self.metric is None else vector * self.metric

    def _damped(self, s: Tensor, y: Tensor) -> tuple[Tensor, bool]:
        initial = (s if self.metric is None else s / self.metric) / self._gamma()
        curvature, product = float(s @ initial), float(s @ y)
        if not product < self._powell * curvature:
            return y, False
        share = (1 - self._powell) * curvature / (curvature - product)
        return share * y + (1 - share) * initial, True
