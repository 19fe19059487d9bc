"""Inverses of equal shape joined, so that a step applies them together.

A network repeats its layers; what an application costs is then paid once for a shape and not once for a
layer. What is joined depends on what the inverses are, never on how they came about, so a resumed run joins
alike and stays bitwise equal. Joined inverses are in memory once: their layers hold views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.gradients import Solved
from hpcsngd.optim.kfac_inverse import Inverse, joined
from hpcsngd.optim.threads import MOST_MULTIPLICATIONS, one_thread_if

#: Larger inverses are applied by themselves: products bound them, not overhead.
MOST_NUMBERS = 2**20


@dataclass(frozen=True)
class _Stack:
    names: tuple[str, ...]
    members: tuple[Inverse, ...]
    whole: Inverse


class InverseStacks:
    """Every layer's inverse, joined where that is possible."""

    def __init__(self) -> None:
        self._stacks: list[_Stack] = []

    def update(self, inverses: Mapping[str, Inverse]) -> dict[str, Inverse]:
        """Joins anew what has changed; returns the inverses, those that are joined as views.

        Args:
            inverses: by layer, in the order in which they are joined; all that there are.
        """
        groups: dict[Any, list[str]] = {}
        for name, inverse in inverses.items():
            is_small = sum(tensor.numel() for tensor in inverse.present) <= MOST_NUMBERS
            groups.setdefault((inverse.key, inverse.blocks) if is_small else name, []).append(name)
        old = {stack.names: stack for stack in self._stacks}
        self._stacks = []
        for names in groups.values():
            members = tuple(inverses[name] for name in names)
            known = old.get(tuple(names))
            is_known = known and all(a is b for a, b in zip(known.members, members, strict=True))
            self._stacks.append(known if known and is_known else _stacked(tuple(names), members))
        found = {name: member for s in self._stacks for name, member in zip(s.names, s.members, strict=True)}
        return {name: found[name] for name in inverses}

    def solve(self, grads: Mapping[str, Tensor]) -> Iterator[Solved]:
        """Yields the preconditioned gradients of all layers that have an inverse.

        Args:
            grads: blocks ``(groups, d_out, d_in)`` by layer.
        """
        for stack in self._stacks:
            names = [name for name in stack.names if name in grads]
            if len(names) == len(stack.names):
                yield _solved(names, stack.whole, grads)
            else:
                members = dict(zip(stack.names, stack.members, strict=True))
                yield from (_solved([name], members[name], grads) for name in names)


def _stacked(names: tuple[str, ...], members: Sequence[Inverse]) -> _Stack:
    if len(members) == 1:
        return _Stack(names, tuple(members), members[0])
    whole, blocks = joined(members), members[0].blocks
    views = [
        tuple(None if t is None else t[start : start + blocks] for t in whole.tensors)
        for start in range(0, whole.blocks, blocks)
    ]
    parts = tuple(replace(member, tensors=view) for member, view in zip(members, views, strict=True))
    return _Stack(names, parts, whole)


def _solved(names: list[str], inverse: Inverse, grads: Mapping[str, Tensor]) -> Solved:
    stacked = torch.stack([grads[name] for name in names])
    blocks = stacked.flatten(0, 1).to(inverse.dtype)
    is_small = inverse.multiplications(*blocks.shape[1:]) <= MOST_MULTIPLICATIONS
    with one_thread_if(is_small and blocks.device.type == "cpu"):
        results = inverse.solve(blocks).to(stacked.dtype).reshape(stacked.shape)
    return Solved(names, stacked, results, inverse.damping)
