"""Decides which modules of a model a preconditioner covers, and says why it leaves the others alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias, get_args

from torch import nn

from hpcsngd import dist
from hpcsngd.optim.layers import CoveredModule, Layer

#: A regular expression for module names, the name of a module class, or a module class.
Skip: TypeAlias = "str | type[nn.Module]"


def find_layers(model: nn.Module, skip: Sequence[Skip] = ()) -> tuple[list[Layer], dict[str, str]]:
    """Returns the layers made of a matrix in module order, and why every other module is not covered.

    Arguments and errors are those of `find_modules`.
    """
    modules, skipped = find_modules(model, skip, get_args(CoveredModule))
    layers = [
        Layer(name, module, has_trained_bias(module))
        for name, module in modules.items()
        if isinstance(module, CoveredModule)
    ]
    return layers, skipped


def has_trained_bias(module: nn.Module) -> bool:
    """Returns whether the module has a bias that is not frozen."""
    bias = getattr(module, "bias", None)
    return isinstance(bias, nn.Parameter) and bias.requires_grad


def find_modules(
    model: nn.Module, skip: Sequence[Skip], kinds: Collection[type[nn.Module]]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the covered modules in module order, and for every other one with parameters why it is not.

    Args:
        model: the model, not wrapped.
        skip: what not to cover. A string is a regular expression that is found anywhere in a module's name,
            or exactly the name of its class; a class stands for its instances. Modules inside a skipped
            one are skipped as well.
        kinds: exact classes of the modules that can be covered.

    Raises:
        ValueError: an entry matches no module, or no module is left to cover.
    """
    modules = dict(model.named_modules())
    _check_skip(skip, modules, "skip")
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    covered, skipped = {}, {}
    for name, module in modules.items():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = _reason_to_skip(name, modules, skip, owners, kinds)
        if reason is None:
            covered[name] = module
        else:
            skipped[name] = reason
    if not covered:
        raise ValueError(f"no layer to precondition; skipped: {skipped}")
    return covered, skipped


def matching_modules(model: nn.Module, skip: Sequence[Skip], *, argument: str = "skip") -> dict[str, str]:
    """Returns for every module inside what ``skip`` names, or named itself, the entry that matched.

    Args:
        model: the model.
        skip: as for `find_modules`.
        argument: what the caller's users call ``skip``, for the message.

    Raises:
        ValueError: an entry matches no module.
    """
    modules = dict(model.named_modules())
    _check_skip(skip, modules, argument)
    found = {}
    for name in modules:
        lineage = [(part, modules[part]) for part in _lineage(name)]
        matching = [_shown(entry) for entry in skip if any(_matches(entry, *item) for item in lineage)]
        if matching:
            found[name] = matching[0]
    return found


def _check_skip(skip: Sequence[Skip], modules: Mapping[str, nn.Module], argument: str) -> None:
    for entry in skip:
        if not any(_matches(entry, name, module) for name, module in modules.items()):
            names = ", ".join(filter(None, modules))
            kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()}))
            raise ValueError(
                f"{argument}={_shown(entry)!r} matches no module; modules: {names}; classes: {kinds}"
            )


def _matches(entry: Skip, name: str, module: nn.Module) -> bool:
    if isinstance(entry, str):
        return re.search(entry, name) is not None or entry == type(module).__name__
    return isinstance(module, entry)


def _shown(entry: Skip) -> str:
    return entry if isinstance(entry, str) else entry.__name__


def _reason_to_skip(
    name: str,
    modules: Mapping[str, nn.Module],
    skip: Sequence[Skip],
    owners: dict[int, list[str]],
    kinds: Collection[type[nn.Module]],
) -> str | None:
    """Returns why the module called ``name`` is left to the base optimizer; None if it is covered."""
    module = modules[name]
    # A subclass may compute something else in its forward (or never be called, as inside attention).
    if type(module) not in kinds:
        return f"{type(module).__name__} is not supported"
    lineage = {part: modules[part] for part in _lineage(name)}
    matching = [_shown(entry) for entry in skip if any(_matches(entry, *item) for item in lineage.items())]
    own = dict(module.named_parameters(recurse=False))
    others = [owner for parameter in own.values() for owner in owners[id(parameter)] if owner != name]
    mode = getattr(module, "padding_mode", "zeros")
    reasons = {
        f"matches skip={matching[:1]}": bool(matching),
        "its weight is computed from other parameters": "weight" not in own,
        "frozen weight": "weight" in own and not own["weight"].requires_grad,
        f"shares a parameter with {others[:1]}": bool(others),
        f"padding_mode={mode!r} is not supported": mode != "zeros",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _lineage(name: str) -> list[str]:
    """Returns the names of the model, of every module around the one called ``name``, and its own."""
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def tell_skipped(logger: logging.Logger, skipped: Mapping[str, str]) -> None:
    """Logs what a preconditioner leaves to the optimizer, and why, on rank 0."""
    if skipped and dist.rank() == 0:
        text = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        logger.info("left to the base optimizer: %s", text)
