"""Hooks on layers: which calls there were, in which micro-batch, and the gradients at their outputs.

Calls of one layer in one forward pass belong together. A forward pass after a backward pass begins a new
micro-batch. Calls count only once a gradient has arrived: forwards in ``no_grad`` or without backward leave
nothing behind. Gradients are watched by hooks on the output *tensor*, which survive in-place activations
after the layer; full backward hooks do not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hpcsngd.optim.stopwatch import Stopwatch


class Watched(Protocol):
    """A layer as hooks need it."""

    @property
    def name(self) -> str:
        """Returns the name of the module inside the model."""

    @property
    def module(self) -> nn.Module:
        """Returns the layer itself."""


class TakesGradients(Protocol):
    """A call of a layer, kept until the gradient at its output arrives."""

    def add_gradient(self, grad: Tensor) -> None:
        """Takes the gradient at the call's output."""


L = TypeVar("L", bound=Watched)
C = TypeVar("C", bound=TakesGradients)


class Watching(ABC, Generic[L, C]):
    """Watches layers and keeps the calls of those that are due.

    Args:
        layers: the layers to watch.
        stopwatch: counts the time spent in hooks as phase ``capture``.

    Attributes:
        due: names of the layers to keep calls of: all of them at first.
    """

    def __init__(self, layers: Sequence[L], stopwatch: Stopwatch) -> None:
        self.due = frozenset(layer.name for layer in layers)
        self._layers = {layer.name: layer for layer in layers}
        self._stopwatch = stopwatch
        self._calls: dict[str, dict[int, list[C]]] = {layer.name: {} for layer in layers}
        self._micro_batch = 0
        self._gradient_seen = False
        self._handles = [
            layer.module.register_forward_hook(partial(self._on_forward, layer), with_kwargs=True)
            for layer in layers
        ]

    def close(self) -> None:
        """Removes every hook and forgets all calls."""
        self.due = frozenset()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forgets all calls."""
        for calls in self._calls.values():
            calls.clear()
        self._micro_batch, self._gradient_seen = 0, False

    @property
    def micro_batches(self) -> int:
        """Returns how many micro-batches have calls with gradients."""
        return len({micro_batch for calls in self._calls.values() for micro_batch in calls})

    @abstractmethod
    def _open(self, layer: L, x: Tensor, output: Tensor) -> C:
        """Returns what is kept of a call."""

    def _await(self, layer: L, call: C, output: Tensor) -> None:
        """Has the gradient at a call's output reported."""
        hook = partial(self._on_gradient, layer, self._micro_batch, call)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _on_forward(
        self, layer: L, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not (layer.name in self.due and torch.is_grad_enabled() and output.requires_grad):
            return
        if self._gradient_seen:
            self._micro_batch, self._gradient_seen = self._micro_batch + 1, False
        x: Tensor = args[0] if args else kwargs["input"]
        with self._capturing(x.device.type):
            call = self._open(layer, x, output)
        self._await(layer, call, output)

    def _on_gradient(self, layer: L, micro_batch: int, call: C, grad: Tensor) -> None:
        if layer.name not in self.due:
            return
        self._gradient_seen = True
        self._add(layer, micro_batch, call, grad)

    def _add(self, layer: L, micro_batch: int, call: C, grad: Tensor) -> None:
        with self._capturing(grad.device.type):
            call.add_gradient(grad.detach())
        calls = self._calls[layer.name].setdefault(micro_batch, [])
        if call not in calls:
            calls.append(call)

    @contextmanager
    def _capturing(self, device_type: str) -> Iterator[None]:
        # autocast is on in forward passes, and still on where backward() is called under it
        with self._stopwatch.phase("capture"), torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
