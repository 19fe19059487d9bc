"""Second-order preconditioners that stand beside any torch optimizer. They know no files."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpcsngd.optim.base import Preconditioner as Preconditioner
from hpcsngd.optim.base import Schedule as Schedule
from hpcsngd.optim.decay import DecoupledSGD as DecoupledSGD
from hpcsngd.optim.dropin import PreconditionedSGD as PreconditionedSGD
from hpcsngd.optim.ggt import GGT as GGT
from hpcsngd.optim.hybrid import SwitchRule as SwitchRule
from hpcsngd.optim.hylo import HyLo as HyLo
from hpcsngd.optim.kfac import KFAC as KFAC
from hpcsngd.optim.kfac_variants import get_kfac as get_kfac
from hpcsngd.optim.lbfgs import LBFGS as LBFGS
from hpcsngd.optim.mfac import MFAC as MFAC
from hpcsngd.optim.records import LayerCheck as LayerCheck
from hpcsngd.optim.records import StepRecord as StepRecord
from hpcsngd.optim.schedules import DampingDecay as DampingDecay
from hpcsngd.optim.schedules import DampingSteps as DampingSteps
from hpcsngd.optim.sparsified import TopKFeedback as TopKFeedback

#: Every preconditioner by the name that experiments use.
PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "hylo": HyLo,
    "kfac": KFAC,
    "mfac": MFAC,
    "ggt": GGT,
}


def get(name: str) -> type[Preconditioner]:
    """Returns the preconditioner class called ``name``.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    if name not in PRECONDITIONERS:
        raise ValueError(f"unknown preconditioner {name!r}; known: {', '.join(PRECONDITIONERS)}")
    return PRECONDITIONERS[name]


def optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    **options: Any,
) -> PreconditionedSGD:
    """Returns the preconditioner called ``name`` and SGD as one torch optimizer.

    Args:
        name: key of `PRECONDITIONERS`.
        model: the model, or its DistributedDataParallel wrapper.
        lr: learning rate.
        momentum: heavy-ball momentum.
        weight_decay: coupled, added after preconditioning.
        nesterov: Nesterov's form of momentum.
        options: of the preconditioner.

    Raises:
        ValueError: an unknown name, or what the preconditioner refuses.
    """
    build: Any = get(name)
    return PreconditionedSGD(
        model,
        build(model, **options),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
