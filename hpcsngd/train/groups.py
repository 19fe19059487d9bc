"""Which parameters decay: torch's parameter groups by module type or name, each parameter in exactly one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpcsngd.optim.covering import matching_modules
from hpcsngd.train.faults import SettingError


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    no_decay: Sequence[str],
    chosen: Callable[[nn.Parameter], bool] = lambda _: True,
) -> list[dict[str, Any]]:
    """Returns torch's parameter groups: those that decay, then those that do not; empty ones are left out.

    Each chosen parameter is in exactly one group. One that several modules share does not decay if any of
    them is named.

    Args:
        model: the model.
        weight_decay: of those that decay.
        no_decay: what does not: modules by class (``BatchNorm2d``) or regular expression, with everything
            inside them, or parameters by regular expression of their whole name (``bias$``).
        chosen: which parameters; default: all.

    Raises:
        SettingError: an entry of ``no_decay`` matches no module and no parameter.
    """
    exempt = {identity for entry in no_decay for identity in _matching(model, entry)}
    parameters = [parameter for parameter in model.parameters() if chosen(parameter)]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in parameters if id(each) not in exempt], "weight_decay": weight_decay},
        {"params": [each for each in parameters if id(each) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matching(model: nn.Module, entry: str) -> set[int]:
    """Returns the identities of the parameters that an entry of ``no_decay`` names."""
    named = model.named_parameters(remove_duplicate=False)
    found = {id(parameter) for name, parameter in named if re.search(entry, name)}
    try:
        inside = matching_modules(model, [entry], argument="optimizer.no_decay")
    except ValueError as error:
        if not found:
            raise SettingError(f"{error}; and no parameter's name") from error
        return found
    modules = dict(model.named_modules())
    return found | {id(own) for name in inside for own in modules[name].parameters(recurse=False)}


def check_coverage(model: nn.Module, built: Sequence[Optimizer]) -> None:
    """Raises SettingError unless each of the model's parameters is in exactly one group of one optimizer."""
    groups = [group for optimizer in built for group in optimizer.param_groups]
    times = Counter(id(parameter) for group in groups for parameter in group["params"])
    wrong = [
        f"{name} in {times[id(each)]}" for name, each in model.named_parameters() if times[id(each)] != 1
    ]
    if wrong:
        raise SettingError(f"each parameter must be in exactly one optimizer group: {', '.join(wrong)}")
