"""A ring of the last m gradients with their Gram matrix, and the two functions of it that precondition.

With ``G`` the gradients as rows, ``K = G G^T``, and ``a`` the coefficients of the vector to precondition in
the window (``x = G^T a``), both methods come down to m x m algebra followed by one pass over the window:

    M-FAC   (damping I + 1/s G^T G)^-1 G^T a    = s G^T (K + s damping I)^-1 a
    GGT     ((G^T W G)^(1/2) + eps I)^-1 G^T a  = G^T w V 1/(S + eps) V^T (a / w),   w K w = V S^2 V^T

where ``w`` are the roots of the weights ``W``. Written like this nothing cancels: the textbook form
``(x - G^T c) / damping`` subtracts two vectors that agree to many digits when the damping is small. For ``x``
outside the window M-FAC needs that form:

    (damping I + 1/s G^T G)^-1 x   = (x - G^T (K + s damping I)^-1 G x) / damping

Cost of a step: one pass over the window for the new row of ``K``, one to combine, and O(m^3) for the
factorization. Sources: Frantar, Kurtic & Alistarh, "M-FAC", NeurIPS 2021 (whose recursions the Cholesky
factorization replaces); Agarwal et al., "Efficient full-matrix adaptive regularization" (GGT), ICML 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.linalg import jittered_cholesky


class Ring:
    """Slots written in turn, and the Gram matrix of what is in them, in float64.

    Args:
        capacity: m, at least 1.
        device: of the Gram matrix.

    Attributes:
        count: slots written so far, at most m; slots ``0..count-1`` are in use.
        newest: slot written last; -1 before the first.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.count = 0
        self.newest = -1
        self._gram = torch.zeros(capacity, capacity, dtype=torch.float64, device=device)

    @property
    def gram(self) -> Tensor:
        """Returns ``K``, shape ``(count, count)``, a view."""
        return self._gram[: self.count, : self.count]

    def advance(self) -> int:
        """Moves on to the next slot, that of the oldest gradient once the ring is full, and returns it."""
        self.newest = (self.newest + 1) % self.capacity
        self.count = max(self.count, self.newest + 1)
        return self.newest

    def set_row(self, products: Tensor) -> None:
        """Sets the row and column of the newest slot.

        Args:
            products: of the newest gradient with every slot in use, shape ``(count,)``.
        """
        row = products.to(self._gram)
        self._gram[self.newest, : self.count] = row
        self._gram[: self.count, self.newest] = row

    def ages(self) -> Tensor:
        """Returns how many steps ago each slot in use was written, 0 for the newest, shape ``(count,)``."""
        slots = torch.arange(self.count, device=self._gram.device)
        return (self.newest - slots) % self.capacity

    def unit(self) -> Tensor:
        """Returns the coefficients of the newest gradient."""
        unit = self._gram.new_zeros(self.count)
        unit[self.newest] = 1
        return unit

    def memory_bytes(self) -> int:
        """Returns the bytes of the Gram matrix."""
        return self._gram.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Returns position and Gram matrix."""
        return {"count": self.count, "newest": self.newest, "gram": self._gram.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`."""
        self.count, self.newest = int(state["count"]), int(state["newest"])
        self._gram.copy_(state["gram"])


def solve_shifted(gram: Tensor, shift: float, vector: Tensor) -> tuple[Tensor, float] | None:
    """Returns ``(K + shift I)^-1 vector`` and the jitter that the factorization needed.

    The factor is computed anew at each call, with jitter where it needs some; `hpcsngd.optim.factor` keeps
    what it can from step to step.

    Returns:
        None if K is not finite or not even nearly positive semidefinite.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    found = jittered_cholesky(shifted)
    if found is None:
        return None
    factor, jitter = found
    return torch.cholesky_solve(vector[:, None], factor)[:, 0], jitter


def inverse_root(gram: Tensor, weights: Tensor, eps: float, coefficients: Tensor) -> Tensor | None:
    """Returns the coefficients of ``((G^T W G)^(1/2) + eps I)^-1 G^T a`` in the window.

    Directions in which the weighted Gram matrix has nothing but rounding are left out: they stand for the
    zero vector, which ``1/eps`` would blow up.

    Args:
        gram: ``K``, shape ``(count, count)``.
        weights: ``w``, the square roots of W, shape ``(count,)``, positive.
        eps: added to the singular values.
        coefficients: ``a / w``, shape ``(count,)``.

    Returns:
        None if K is not finite.
    """
    scaled = weights[:, None] * gram * weights
    if not bool(scaled.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(scaled)
    noise = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(values > noise, 1 / (roots + eps), torch.zeros_like(roots))
    found: Tensor = weights * (vectors @ (inverse * (vectors.mT @ coefficients)))
    return found
