"""Measurements that a preconditioner makes on request: spectra, gradient norms, errors of an approximation.

Nothing is computed for what was not asked for. Numbers stay on the device until they are taken, so that a
step is not interrupted once per layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hpcsngd import dist
from hpcsngd.optim.linalg import spectrum_summary
from hpcsngd.optim.records import GradError, GradNorm, RankAnalysis

Observable = Literal["rank_analysis", "grad_norm", "grad_error"]

#: Shares of the sum of singular values whose matrix rank is told (HyLo's figure on the rank of K: 90 %).
SHARES = (0.9,)


class Observer:
    """Collects what was asked for during one step.

    Args:
        what: any of ``rank_analysis``, ``grad_norm``, ``grad_error``.
        rank_shares: of ``rank_analysis``, each in (0, 1].

    Raises:
        ValueError: an unknown name in ``what``, or a share out of its range.
    """

    def __init__(self, what: Collection[str], rank_shares: Sequence[float] = SHARES) -> None:
        unknown = sorted(set(what) - set(get_args(Observable)))
        if unknown:
            raise ValueError(f"observe={unknown}: allowed are {', '.join(get_args(Observable))}")
        if not rank_shares or not all(0 < share <= 1 for share in rank_shares):
            raise ValueError(f"rank_shares={list(rank_shares)}: give one or more, each in (0, 1]")
        self._what = frozenset(what)
        self._shares = tuple(rank_shares)
        self._spectra: list[tuple[str, Tensor, float]] = []
        self._norms: dict[str, Tensor] = {}
        self._errors: dict[tuple[str, str], Tensor] = {}

    @property
    def wants_exact(self) -> bool:
        """Returns whether the exact result is needed beside the approximate one."""
        return "grad_error" in self._what

    def kernel(self, layer: str, kernel: Tensor, damping: float) -> None:
        """Notes the spectrum of ``K/n`` at a refresh; on rank 0, since every rank has the same kernel."""
        if "rank_analysis" in self._what and dist.rank() == 0:
            self._spectra.append((layer, torch.linalg.eigvalsh(kernel), damping))

    def gradient(self, layer: str, grad: Tensor) -> None:
        """Notes the norm of a gradient before preconditioning."""
        if "grad_norm" in self._what:
            self._norms[layer] = grad.norm()

    def error(self, layer: str, method: str, result: Tensor, exact: Tensor) -> None:
        """Notes how far a method's preconditioned gradient is from the exact one."""
        relative = (result - exact).norm() / exact.norm()
        cosine = (result * exact).sum() / (result.norm() * exact.norm())
        self._errors[layer, method] = torch.stack([relative, cosine])

    def take_rank_analysis(self, step: int) -> tuple[RankAnalysis, ...]:
        """Returns what is asked of the spectra noted since the last call."""
        spectra, self._spectra = self._spectra, []
        return tuple(
            RankAnalysis(step, layer, len(values), share, *spectrum_summary(values, share), damping)
            for layer, values, damping in spectra
            for share in self._shares
        )

    def take_grad_norm(self, step: int) -> tuple[GradNorm, ...]:
        """Returns the norms noted since the last call."""
        norms, self._norms = self._norms, {}
        values = torch.stack(list(norms.values())).tolist() if norms else []
        return tuple(GradNorm(step, layer, norm) for layer, norm in zip(norms, values, strict=True))

    def take_grad_error(self, step: int) -> tuple[GradError, ...]:
        """Returns the errors noted since the last call."""
        errors, self._errors = self._errors, {}
        values = torch.stack(list(errors.values())).tolist() if errors else []
        return tuple(GradError(step, *which, *pair) for which, pair in zip(errors, values, strict=True))
