"""KFAC's arguments: what each means, and what they may be, alone and together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hpcsngd.optim.base import Schedule, value_at
from hpcsngd.optim.checks import check_choice, positive
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.fisher import Fisher, LossKind
from hpcsngd.optim.gradients import Rescale
from hpcsngd.optim.kaisa import Cost
from hpcsngd.optim.kfac_exchange import Scope
from hpcsngd.optim.kfac_inverse import InverseKind
from hpcsngd.optim.kfac_inverter import Inverter
from hpcsngd.optim.kfac_layers import Sharing
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping, epoch_damping

Observable = Literal["strength"]
DtypeName = Literal["float64", "float32", "bfloat16", "float16"]

_CHOICES: dict[str, Any] = {
    "inverse": InverseKind,
    "sharing": Sharing,
    "fisher": Fisher,
    "loss": LossKind,
    "loss_reduction": LossReduction,
    "rescale": Rescale,
    "factors": Scope,
    "placement_cost": Cost,
}
#: What a KFAC on a copy of the model has in common with this one, besides damping.
_SHARED = (
    "inverse",
    "pi_split",
    "sharing",
    "fisher",
    "loss",
    "mc_samples",
    "skip",
    "largest_factor",
    "loss_reduction",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `KFAC` under their own names.

    The Fisher matrix. ``fisher="empirical"`` takes the gradients of the loss's own backward pass and needs
    nothing from the user. ``"type-2"`` and ``"mc"`` send gradients of their own through the graph, between
    the forward and the backward pass of every micro-batch::

        outputs = model(inputs)
        preconditioner.before_backward(outputs)
        criterion(outputs, targets).backward()
        preconditioner.step()

    They need to know the loss (``loss``), and are in its units whatever the scale of the backward pass.

    Attributes:
        inverse: ``"eigen"`` or ``"cholesky"``; see `hpcsngd.optim.kfac_inverse`.
        pi_split: whether Cholesky's damping is split between A and G by their mean eigenvalues; True
            for eigen, which splits nothing.
        sharing: ``"expand"`` or ``"reduce"``; see `hpcsngd.optim.kfac_layers`.
        fisher: see above and `hpcsngd.optim.fisher`.
        loss: read where ``fisher`` is not empirical.
        mc_samples: draws per sample; only for ``fisher="mc"``.
        damping: positive; a function of the step; or one by epochs (`DampingDecay`, `DampingSteps`, or a
            mapping of the fields of either). Evaluated when inverses are computed, used until the next time.
        factor_every: steps between updates of the running factors, or a function of the step; 0: none.
        inverse_every: the same for inverses. Without inverses gradients stay plain, so 0 from the start
            switches K-FAC off.
        factor_decay: weight of the old factors in the running average, in [0, 1); or a function of the step.
        bias_correction: whether the running average is corrected for its start.
        kl_clip: bound on ``lr^2 sum v . g`` over the covered layers: all v are multiplied by
            ``min(1, sqrt(kl_clip / that))`` (Ba et al., ICLR 2017, section 5). After ``rescale``. A number or
            a function of the step; None: no bound. Needs `set_progress`, as a damping by epochs does.
        skip: layers to leave to the optimizer: regular expressions found anywhere in a module's name, names
            of module classes, or module classes; what is inside a skipped module is skipped as well.
        largest_factor: layers with a factor of more rows are left to the optimizer; None: none.
        loss_reduction: of the loss given to ``backward()``.
        accumulation_steps: micro-batches per step.
        rescale: ``"none"``; ``"damping"``: damping * v; ``"norm"``: v with the plain gradient's norm.
        dtype: in which statistics are computed; default: float32, or float64 for float64 weights.
        factor_dtype: of the running factors, as a dtype or its name; default: ``dtype``.
        inverse_dtype: in which inverses are kept and applied; default: float32, or float64 for float64
            weights. They are computed in at least float32 whatever it is.
        seed: of the draws of ``fisher="mc"``.
        factors: ``"all"``: of the samples of all ranks. ``"local"``: of one rank's samples, that which holds
            the layer's factors: an estimate from 1/P of the batch that takes no communication and spreads
            even the work of capturing over the ranks (DP-KFAC, Zhang et al., IEEE TCC 2022).
        grad_worker_fraction: share of the ranks that precondition a layer: 1 (all of them), 0 (one of them),
            or what divides their number evenly (`hpcsngd.optim.kaisa` states memory and bytes). Results do
            not depend on it beyond rounding. Below 1, layers must have their gradients on all ranks alike,
            as DistributedDataParallel leaves them.
        placement_cost: what is evened out over the ranks: ``"compute"`` or ``"memory"``.
        colocate: whether the same rank holds A and G of a layer; otherwise they are placed one by one.
        stagger: whether to update some layers at each step instead of all of them every ``inverse_every``
            steps (a whole multiple of ``factor_every``), so that no step but the first is slow
            (`hpcsngd.optim.kfac_timetable`).
        overlap: whether factors are summed over the ranks while the backward pass runs, in steps that
            `begin_step` announces. Results are the same bit for bit.

    Raises:
        ValueError: an argument out of its range.
    """

    inverse: InverseKind
    pi_split: bool
    sharing: Sharing
    fisher: Fisher
    loss: LossKind
    mc_samples: int
    damping: Schedule | EpochDamping | Mapping[str, float]
    factor_every: Schedule
    inverse_every: Schedule
    factor_decay: Schedule
    bias_correction: bool
    kl_clip: Schedule | None
    skip: Sequence[Skip]
    largest_factor: int | None
    loss_reduction: LossReduction
    accumulation_steps: int
    rescale: Rescale
    dtype: torch.dtype | None
    factor_dtype: torch.dtype | DtypeName | None
    inverse_dtype: torch.dtype | DtypeName | None
    seed: int
    factors: Scope
    grad_worker_fraction: float
    placement_cost: Cost
    colocate: bool
    stagger: bool
    overlap: bool

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(allowed))
        if self.mc_samples < 1:
            raise ValueError(f"mc_samples={self.mc_samples}: must be at least 1")
        if self.mc_samples != 1 and self.fisher != "mc":
            raise ValueError(f"mc_samples={self.mc_samples}: fisher={self.fisher!r} draws nothing")
        if not self.pi_split and self.inverse != "cholesky":
            raise ValueError(f"pi_split=False: inverse={self.inverse!r} has nothing to split")
        if self.largest_factor is not None and self.largest_factor < 1:
            raise ValueError(f"largest_factor={self.largest_factor}: must be at least 1")
        for name in ("dtype", "factor_dtype", "inverse_dtype"):
            as_dtype(name, getattr(self, name))
        if self.factors == "local" and not self.colocate:
            raise ValueError("factors='local' needs colocate=True: A and G must be of the same samples")
        self.damping_at(0.0, 0)
        self.decay_at(0)
        period("factor_every", self.factor_every, 0)
        period("inverse_every", self.inverse_every, 0)

    def inverter(self) -> Inverter:
        """Returns what makes inverses."""
        return Inverter(self.inverse, self.pi_split, as_dtype("inverse_dtype", self.inverse_dtype))

    def damping_at(self, epoch: float | None, step: int) -> float:
        """Returns the damping of a refresh; ``epoch`` is read where damping follows epochs."""
        damping = epoch_damping(self.damping) if isinstance(self.damping, Mapping) else self.damping
        if isinstance(damping, EpochDamping):
            return damping.at_epoch(epoch or 0.0)
        return positive("damping", damping, step)

    def decay_at(self, step: int) -> float:
        """Returns the weight of the old factors; raises ValueError unless it is in [0, 1)."""
        decay = value_at(self.factor_decay, step)
        if not 0 <= decay < 1:
            raise ValueError(f"factor_decay={decay} at step {step}: must be in [0, 1)")
        return decay

    def needs_progress(self) -> str:
        """Returns which settings need `KFAC.set_progress`; an empty text if none does."""
        settings = {
            "a damping by epochs": isinstance(self.damping, EpochDamping | Mapping),
            "kl_clip": self.kl_clip is not None,
        }
        return " and ".join(name for name, needs in settings.items() if needs)

    def on_a_copy(self, damping: float) -> dict[str, Any]:
        """Returns the arguments of a KFAC that shows on a copy of the model what this one does now."""
        return {"damping": damping} | {name: getattr(self, name) for name in _SHARED}


def check_observed(names: Collection[str]) -> None:
    """Raises ValueError for what K-FAC cannot observe."""
    unknown = sorted(set(names) - set(get_args(Observable)))
    if unknown:
        raise ValueError(f"observe={unknown}: KFAC knows {', '.join(get_args(Observable))}")


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the floating-point dtype that is meant; raises ValueError where none is."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{name}={dtype}: must be a floating-point dtype")
    return found


def period(name: str, every: Schedule, step: int) -> float:
    """Returns the steps between updates at ``step``, or 0; raises ValueError for anything else below 1."""
    value = value_at(every, step)
    if not (value == 0 or value >= 1):
        raise ValueError(f"{name}={value} at step {step}: must be 0 (off) or at least 1")
    return value


class Interval:
    """Says at which steps something is due: the first time at once, then a period after the last time.

    Args:
        name: of the argument.
        every: steps between, or a function of the step; 0: not now.
    """

    def __init__(self, name: str, every: Schedule) -> None:
        self._name, self._every = name, every
        self.last: int | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether it is due at ``step``, 0 for the first.

        Raises:
            ValueError: the period is neither 0 nor at least 1.
        """
        steps = period(self._name, self._every, step)
        return steps > 0 and (self.last is None or step - self.last >= steps)
