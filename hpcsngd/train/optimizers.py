"""Builds torch's optimizers and our preconditioners from the experiment's fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpcsngd import optim
from hpcsngd.config import experiment as schema
from hpcsngd.config.fields import Strict
from hpcsngd.optim.decay import DecoupledSGD
from hpcsngd.optim.lbfgs import LBFGS, LineSearch
from hpcsngd.train import seeds
from hpcsngd.train.faults import SettingError
from hpcsngd.train.groups import check_coverage, parameter_groups


def sgd(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str],
    momentum: float,
    dampening: float,
    nesterov: bool,
    decoupled: bool,
) -> list[Optimizer]:
    """Returns SGD for all parameters: torch's, or the one whose weight decay is decoupled."""
    build = DecoupledSGD if decoupled else torch.optim.SGD
    groups = parameter_groups(model, weight_decay, no_decay)
    return [build(groups, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)]


def adam(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str],
    betas: tuple[float, float],
    eps: float,
) -> list[Optimizer]:
    """Returns torch.optim.Adam for all parameters."""
    return [torch.optim.Adam(parameter_groups(model, weight_decay, no_decay), lr=lr, betas=betas, eps=eps)]


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str],
    betas: tuple[float, float],
    eps: float,
) -> list[Optimizer]:
    """Returns torch.optim.AdamW for all parameters."""
    return [torch.optim.AdamW(parameter_groups(model, weight_decay, no_decay), lr=lr, betas=betas, eps=eps)]


def muon(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str],
    momentum: float,
    nesterov: bool,
    adamw_lr: float,
) -> list[Optimizer]:
    """Returns torch.optim.Muon for the matrices, which it is defined for, and AdamW for everything else.

    Raises:
        SettingError: this torch has no Muon, or the model no matrix.
    """
    build = getattr(torch.optim, "Muon", None)
    if build is None:
        raise SettingError(f"optimizer muon needs torch >= 2.9; this is torch {torch.__version__}")
    matrices = parameter_groups(model, weight_decay, no_decay, lambda parameter: parameter.ndim == 2)
    others = parameter_groups(model, weight_decay, no_decay, lambda parameter: parameter.ndim != 2)
    if not matrices:
        raise SettingError("optimizer muon: the model has no matrix for it; use adamw")
    built: list[Optimizer] = [build(matrices, lr=lr, momentum=momentum, nesterov=nesterov)]
    if others:
        built.append(torch.optim.AdamW(others, lr=adamw_lr))
    return built


def lbfgs(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str],
    history: int,
    iterations: int,
    line_search: LineSearch,
    c1: float,
    c2: float,
    max_evaluations: int,
    tolerance: float,
    eps: float,
    powell: float,
) -> list[Optimizer]:
    """Returns our L-BFGS for all parameters, for gradients that strategies have reduced already."""
    return [
        LBFGS(
            parameter_groups(model, weight_decay, no_decay),
            lr,
            history=history,
            iterations=iterations,
            line_search=line_search,
            c1=c1,
            c2=c2,
            max_evaluations=max_evaluations,
            tolerance=tolerance,
            eps=eps,
            powell=powell,
            gradients_reduced=True,
        )
    ]


OPTIMIZERS: dict[str, Callable[..., list[Optimizer]]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "muon": muon,
    "lbfgs": lbfgs,
}


#: Fields of an optimizer that say what its steps are made of: for the sampler.
STEP_FIELDS = {"batches", "overlap"}


def build_optimizers(model: nn.Module, config: schema.Optimizer) -> list[Optimizer]:
    """Returns the optimizers of an experiment: one, or several that share the parameters among them.

    Each parameter group remembers its peak learning rate as ``initial_lr``.

    Raises:
        SettingError: what the optimizer refuses, or a parameter that is not in exactly one group.
    """
    fields = {name: value for name, value in _fields(config).items() if name not in STEP_FIELDS}
    built = OPTIMIZERS[config.name](model, **fields)
    check_coverage(model, built)
    for optimizer in built:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return built


def set_multiplier(optimizers: list[Optimizer], factor: float) -> None:
    """Sets every group's learning rate to ``factor`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


#: Which preconditioner a diagnostic is about.
_MEASURED_BY = {"rank_analysis": "hylo", "grad_error": "hylo", "strength": "kfac"}


def build_preconditioner(
    model: nn.Module, config: schema.Experiment, *, seed: int
) -> optim.Preconditioner | None:
    """Returns the experiment's preconditioner, attached to the model; None if it has none.

    Args:
        model: the model or its DDP wrapper.
        config: the experiment; its diagnostics decide what the preconditioner measures.
        seed: the run's seed.

    Raises:
        SettingError: a diagnostic that needs a preconditioner, or another one.
    """
    wanted = {name for name in _MEASURED_BY if getattr(config.diagnostics, name)}
    if config.preconditioner is None:
        if wanted:
            names = " and ".join(f"diagnostics.{name}" for name in sorted(wanted))
            raise SettingError(f"{names} measure a preconditioner, but preconditioner is null")
        return None
    name = config.preconditioner.name
    for each in sorted(wanted):
        if _MEASURED_BY[each] != name:
            raise SettingError(
                f"diagnostics.{each} measures what {_MEASURED_BY[each]} has and {name} has not"
            )
    given: dict[str, dict[str, Any]] = {
        "hylo": {"observe": wanted, "rank_shares": config.diagnostics.rank_shares},
        "kfac": {"observe": wanted, **_kfac_loss(config.loss)},
    }
    if name != "ggt":  # draws nothing
        given.setdefault(name, {})["seed"] = seeds.derive(seed, "preconditioner")
    build: Callable[..., optim.Preconditioner] = optim.get(name)
    fields = _fields(config.preconditioner)
    return build(model, **fields, **given.get(name, {}), profile=config.diagnostics.profiling)


def _kfac_loss(loss: schema.Loss) -> dict[str, str]:
    """Returns K-FAC's argument ``loss``; none for Dice: its only Fisher matrix, the empirical, reads none."""
    return {"loss": loss.name} if loss.name != "dice" else {}


def _fields(config: Strict) -> dict[str, Any]:
    fields: dict[str, Any] = config.model_dump()
    del fields["name"]
    return fields
