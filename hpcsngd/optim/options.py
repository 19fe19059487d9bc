"""HyLo's arguments: what they may be, alone and together. What each means stands at `HyLo`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.calls import ConvMode
from hpcsngd.optim.checks import check_choice, positive
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.curvature import Complement
from hpcsngd.optim.gradients import Rescale
from hpcsngd.optim.hybrid import Switch, SwitchRule
from hpcsngd.optim.placement import Placement
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping, epoch_damping
from hpcsngd.optim.selection import RankRule
from hpcsngd.optim.sketches import Compression, Plain, Scope

Method = Literal["sngd", "kid", "kis", "hybrid"]

_CHOICES: dict[str, Any] = {
    "method": Method,
    "kid_scope": Scope,
    "complement": Complement,
    "conv_mode": ConvMode,
    "placement": Placement,
    "rescale": Rescale,
}
#: What a HyLo on a copy of the model has in common with this one, besides method and damping.
_SHARED = (
    "ratio",
    "low_rank",
    "share",
    "unbiased",
    "residual",
    "complement",
    "conv_mode",
    "skip",
    "loss_reduction",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `HyLo` under their own names.

    Raises:
        ValueError: an argument out of its range, or a combination in which one would be ignored.
    """

    method: Method
    damping: Schedule | EpochDamping | Mapping[str, float]
    refresh_every: Schedule
    stagger: bool
    ratio: float
    low_rank: int | None
    share: float | None
    unbiased: bool
    residual: bool
    kid_scope: Scope
    switch: SwitchRule | Mapping[str, Any] | None
    complement: Complement
    kl_clip: Schedule | None
    conv_mode: ConvMode
    skip: Sequence[Skip]
    loss_reduction: LossReduction
    accumulation_steps: int
    rescale: Rescale
    dtype: torch.dtype | None
    seed: int
    placement: Placement
    observe: Collection[str]

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(allowed))
        rule = RankRule(self.ratio, self.low_rank, self.share)
        if self.method == "sngd" and not rule.keeps_everything:
            raise ValueError(f"{rule.name}: method 'sngd' keeps every sample")
        if self.switch is not None and self.method != "hybrid":
            raise ValueError(f"switch: method {self.method!r} does not switch; allowed with 'hybrid'")
        if self.placement == "owner" and self.kid_scope == "local":
            raise ValueError("placement='owner': kid_scope 'local' keeps its few rows on every rank")
        if self.placement == "owner" and self._needs_every_kernel:
            wanted = sorted(self.observe)
            raise ValueError(f"placement='owner': observe={wanted} needs kernels on every rank")

    def compression(self) -> Compression:
        """Returns what makes sketches of a batch."""
        rule = RankRule(self.ratio, self.low_rank, self.share)
        return Compression(rule, self.residual, self.unbiased, self.kid_scope, self.seed)

    def new_switch(self) -> Switch | None:
        """Returns the hybrid method's switch at the start of a run; None for the other methods."""
        if self.method != "hybrid":
            return None
        rule = self.switch
        return Switch(SwitchRule(**(rule or {})) if isinstance(rule, Mapping | None) else rule)

    def damping_schedule(self) -> Schedule | EpochDamping:
        """Returns the damping, where a mapping stands for the decay of these fields."""
        return epoch_damping(self.damping) if isinstance(self.damping, Mapping) else self.damping

    def effective_placement(self) -> Placement:
        """Returns the placement, which is ``"replicate"`` where what is observed needs every rank's rows."""
        return "replicate" if self._needs_every_kernel else self.placement

    def on_a_copy(self, method: Plain, damping: float) -> dict[str, Any]:
        """Returns the arguments of a HyLo that shows on a copy of the model what this one does now."""
        return {"method": method, "damping": damping} | {name: getattr(self, name) for name in _SHARED}

    @property
    def _needs_every_kernel(self) -> bool:
        return bool({"rank_analysis", "grad_error"} & set(self.observe))


def damping_at(schedule: Schedule | EpochDamping, epoch: float | None, step: int) -> float:
    """Returns the damping of a refresh; ``epoch`` is read where damping follows epochs."""
    if isinstance(schedule, EpochDamping):
        return schedule.at_epoch(epoch or 0.0)
    return positive("damping", schedule, step)
