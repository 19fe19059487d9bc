"""GGT: full-matrix adaptive preconditioning from the last r gradients, dense or sparse with error feedback.

Source: Agarwal et al., "Efficient full-matrix adaptive regularization", ICML 2019; sparse: EFCP (Modoranu et
al., ICML 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hpcsngd.optim.checks import check_choice
from hpcsngd.optim.chosen import Parameters
from hpcsngd.optim.clipping import Clip
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.stored import EntryFormat, StoreRule
from hpcsngd.optim.topk import MAX_BLOCK, Scope
from hpcsngd.optim.window import inverse_root
from hpcsngd.optim.windowed import Windowed

#: How GGT stores gradients.
GGTStorage = Literal["dense", "sparse"]


class GGT(Windowed):
    """Preconditions by ``((G^T W G)^(1/2) + eps I)^-1`` over the last r gradients, the rows of G.

    The weights are ``W = diag(beta2^(2 age))``, age 0 for the newest gradient; they enter the Gram matrix and
    the combination alike. What is preconditioned is ``sum_i (1 - beta1) beta1^age_i g_i`` over the window
    (``beta1 = 0``: the newest gradient): the running mean cut off where the window ends, so that it lies in
    the window and ``1/eps`` does not blow up what is left of gradients that are gone.

    Cost: two passes over the window and one eigendecomposition of r x r; U of d x r is never formed.

    Args:
        parameters: a model or its DistributedDataParallel wrapper, or parameters.
        num_grads: r.
        beta1: of the running mean, in [0, 1).
        beta2: of the window, in (0, 1]; at least ``beta1``.
        eps: added to the singular values, in units of a gradient's norm.
        storage: ``dense`` or ``sparse``.
        density: share of the entries that sparse storage sends per step.
        entries: format of sparse storage.
        scope: where entries compete for being sent.
        block_size: of scope ``block``.
        feedback: False drops what is not sent.
        weight_decay: coupled: stored and preconditioned with the gradient; see `hpcsngd.optim.decay`.
        clip_norm: largest norm of the result.
        clip_value: largest absolute entry of the result.
        skip: modules by class or regular expression, such as ``["BatchNorm2d"]``, whose parameters train with
            their plain gradient; needs a model.
        dtype: of window and products; default: the parameters', at least float32.
        profile: whether to time the phases.

    Raises:
        ValueError: an argument out of its range, named with what is allowed.
    """

    format = "ggt/1"

    def __init__(
        self,
        parameters: Parameters,
        num_grads: int = 100,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-4,
        storage: GGTStorage = "dense",
        density: float = 0.01,
        entries: EntryFormat = "fp32+int32",
        scope: Scope = "block",
        block_size: int = MAX_BLOCK,
        feedback: bool = True,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        skip: Sequence[Skip] = (),
        dtype: torch.dtype | None = None,
        profile: bool = False,
    ) -> None:
        check_choice("storage", storage, ("dense", "sparse"))
        if not 0 <= beta1 < 1:
            raise ValueError(f"beta1={beta1}: must be in [0, 1)")
        if not beta1 <= beta2 <= 1 or beta2 == 0:
            raise ValueError(f"beta2={beta2}: must be in (0, 1] and at least beta1={beta1}")
        if not eps > 0:
            raise ValueError(f"eps={eps}: must be positive")

        rule = StoreRule(storage, density, entries, scope, block_size, feedback)
        super().__init__(
            parameters,
            num_grads,
            rule,
            dtype=dtype,
            skip=skip,
            scale=1.0,
            weight_decay=weight_decay,
            clip=Clip(clip_norm, clip_value),
            profile=profile,
        )
        self._beta1, self._beta2, self._eps = beta1, beta2, eps

    def _read(self) -> Tensor:
        gradient = super()._read()
        if self._weight_decay:
            gradient.add_(self._flat.read_weights(self._dtype), alpha=self._weight_decay)
        return gradient

    def _damping(self) -> float:
        return self._eps

    def _weights(self) -> Tensor:
        """Returns w, the square roots of W."""
        return self._beta2 ** self._ring.ages().double()

    def _mean(self) -> Tensor:
        """Returns the coefficients of the running mean over the window."""
        if self._beta1 == 0:
            return self._ring.unit()
        return (1 - self._beta1) * self._beta1 ** self._ring.ages().double()

    def _direction(self, gradient: Tensor) -> Tensor | None:
        weights = self._weights()
        with self._stopwatch.phase("factorise"):
            # beta1 <= beta2 keeps this quotient at most 1, however old a gradient is
            found = inverse_root(self._ring.gram, weights, self._eps, self._quotient())
        if found is None:
            return None
        return self._combine(found)

    def _quotient(self) -> Tensor:
        if self._beta1 == 0:
            return self._ring.unit()
        return (1 - self._beta1) * (self._beta1 / self._beta2) ** self._ring.ages().double()

    def _checked(self, newest: Tensor) -> tuple[float, float] | None:
        # From the singular values of the weighted window itself: no Gram matrix, no eigenvalues squared.
        result = self._direction(newest)
        if result is None:
            return None
        window = torch.stack([self._row(slot).double() for slot in range(self._ring.count)])
        x, u = self._mean() @ window, result.double()
        _, values, basis = torch.linalg.svd(self._weights()[:, None] * window, full_matrices=False)
        is_used = values > len(values) * torch.finfo(values.dtype).eps * values[0]
        inverse = torch.where(is_used, 1 / (values + self._eps), torch.zeros_like(values))
        exact = basis.mT @ (inverse * (basis @ x))
        size = float(x.norm())
        return float((u - exact).norm() / exact.norm()), float((self._eps * u - x).norm()) / size
