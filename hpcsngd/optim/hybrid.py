"""When the hybrid method is in a critical regime: by what gradients do, or in epochs named beforehand.

HyLo uses the better approximation (KID) while gradients change quickly, and the cheaper one (KIS) otherwise.
Its published code reads the epochs from the command line; the criterion here decides while training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcsngd import dist
from hpcsngd.optim.records import SwitchDecision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwitchRule:
    """How to tell critical regimes; Accordion's criterion (Agarwal et al., MLSys 2021), or fixed windows.

    The norm is that of the sum of the gradients of all steps since the last check, covered layers together,
    before preconditioning. At a check the regime is critical if

        |norm_before - norm_now| / norm_before >= eta,   or   lr <= lr_drop * (lr one epoch earlier).

    The first epochs are critical: there is nothing to compare with. Between checks, a drop of the learning
    rate makes the regime critical until the next check.

    Attributes:
        eta: relative change that counts as critical. Accordion uses 0.5.
        interval: epochs between checks. Accordion uses 10.
        lr_drop: a learning rate at most this share of the one an epoch earlier counts as a drop, so that
            milestones do and smooth schedules do not.
        windows: epochs ``(first, end)``, end excluded, that are critical instead of all the above; the
            published scripts' ``--adaptive a b c`` is ``[(0, a), (b, c)]``.

    Raises:
        ValueError: a number out of its range.
    """

    eta: float = 0.5
    interval: int = 1
    lr_drop: float = 0.5
    windows: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if not self.eta > 0 or self.interval < 1 or not 0 <= self.lr_drop < 1:
            raise ValueError(
                f"eta={self.eta}, interval={self.interval}, lr_drop={self.lr_drop}: "
                "must be positive, at least 1, and in [0, 1)"
            )
        for window in self.windows or ():
            if len(window) != 2 or not 0 <= window[0] < window[1]:
                raise ValueError(f"windows={list(self.windows or ())}: each is (first epoch, end), rising")


class _Verdict(NamedTuple):
    is_critical: bool
    reason: str
    change: float = math.nan


@dataclass
class Switch:
    """Follows a run epoch by epoch and keeps every decision.

    Attributes:
        rule: how to decide.
        is_critical: the regime now.
        history: every decision so far, oldest first.
    """

    rule: SwitchRule
    is_critical: bool = True
    history: list[SwitchDecision] = field(default_factory=list)
    _epoch: int | None = None
    _checked: int = 0
    _lr: float = 0.0
    _norm: float | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, layer: str, grad: Tensor) -> None:
        """Adds a step's gradient of one layer, unless epochs were named beforehand."""
        if self.rule.windows is None:
            total = self._sums.get(layer)
            self._sums[layer] = grad.clone() if total is None else total.add_(grad)

    def advance(self, step: int, epoch: float, lr: float, agree: Callable[[float], float]) -> None:
        """Decides anew if an epoch has begun.

        Args:
            step: steps done.
            epoch: epochs done; its integer part numbers the current one.
            lr: learning rate of the coming step.
            agree: returns rank 0's number on every rank.
        """
        number = math.floor(epoch)
        if self._epoch == number:
            return
        if self.rule.windows is not None:
            verdict: _Verdict | None = self._by_windows(number)
        elif self._epoch is None:
            self._checked, verdict = number, _Verdict(True, "first epoch")
        else:
            verdict = self._by_gradients(number, lr, agree)
        self._epoch, self._lr = number, lr
        if verdict is not None:
            self._decide(verdict, step)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the coming decisions depend on, and the history."""
        return {
            "is_critical": self.is_critical,
            "history": [asdict(decision) for decision in self.history],
            "epoch": self._epoch,
            "checked": self._checked,
            "lr": self._lr,
            "norm": self._norm,
            "sums": {name: total.clone() for name, total in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Continues from ``state``; sums move to the device and dtype of ``like``, by layer."""
        self.is_critical = state["is_critical"]
        self.history = [SwitchDecision(**decision) for decision in state["history"]]
        self._epoch, self._checked = state["epoch"], state["checked"]
        self._lr, self._norm = state["lr"], state["norm"]
        self._sums = {name: total.clone().to(like[name]) for name, total in state["sums"].items()}

    def _by_windows(self, epoch: int) -> _Verdict:
        inside = [window for window in self.rule.windows or () if window[0] <= epoch < window[1]]
        return _Verdict(bool(inside), f"window {tuple(inside[0])}" if inside else "no window")

    def _by_gradients(self, epoch: int, lr: float, agree: Callable[[float], float]) -> _Verdict | None:
        """Returns the verdict of a check or of a drop of the learning rate; None in an epoch without."""
        is_due, change = epoch - self._checked >= self.rule.interval, math.nan
        if is_due:
            self._checked, change = epoch, self._take_change(agree)
        if lr <= self.rule.lr_drop * self._lr:
            return _Verdict(True, f"lr dropped from {self._lr:g}", change)
        if math.isfinite(change):
            return _Verdict(change >= self.rule.eta, "norm", change)
        return _Verdict(self.is_critical, "no finite norms to compare") if is_due else None

    def _take_change(self, agree: Callable[[float], float]) -> float:
        """Returns the relative change of the norm since the previous check, and starts a new sum."""
        squares = [total.double().square().sum() for total in self._sums.values()]
        # Equal on all ranks up to the last bit; but one bit must not send ranks different ways.
        norm = agree(float(torch.stack(squares).sum().sqrt()) if squares else math.nan)
        before, self._sums = self._norm, {}
        if not math.isfinite(norm):
            return math.nan
        self._norm = norm
        return abs(before - norm) / before if before else math.nan

    def _decide(self, verdict: _Verdict, step: int) -> None:
        norm = math.nan if self._norm is None else self._norm
        method = "kid" if verdict.is_critical else "kis"
        decision = SwitchDecision(
            step, self._epoch or 0, method, verdict.reason, verdict.change, norm, self._lr
        )
        self.is_critical = verdict.is_critical
        self.history.append(decision)
        if dist.rank() == 0:
            logger.info(
                "epoch %d: %s (%s; change %.4g, norm %.4g, lr %.4g)",
                decision.epoch, method, decision.reason, decision.change, norm, decision.lr,
            )  # fmt: skip
