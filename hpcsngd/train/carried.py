"""What recurrent models carry from one batch to the next: the state in which each stream ended.

It belongs to this rank's streams, is no part of the weights, and starts at zero with every pass over a set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Carrying(nn.Module):
    """A module that goes on where its last call ended.

    Attributes:
        carried: states of the streams, without their graph; empty at the beginning of a pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.carried: list[Tensor] = []


def is_carrying(model: nn.Module) -> bool:
    """Returns whether a model has such a module."""
    return any(True for _ in _carrying(model))


def reset(model: nn.Module) -> None:
    """Lets a model begin anew."""
    for _, module in _carrying(model):
        module.carried = []


def states(model: nn.Module) -> dict[str, list[Tensor]]:
    """Returns module name -> what it carries."""
    return {name: [state.clone() for state in module.carried] for name, module in _carrying(model)}


def restore(model: nn.Module, found: Mapping[str, list[Tensor]]) -> None:
    """Lets a model go on from what `states` returned."""
    for name, module in _carrying(model):
        like = next(module.parameters())
        module.carried = [state.to(like.device) for state in found[name]]


def _carrying(model: nn.Module) -> Iterator[tuple[str, Carrying]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Carrying))
