"""Hooks that turn forward passes and the gradients at each layer's output into calls and their statistics.

Calls of one layer in one forward pass belong together. A forward pass after a backward pass begins a new
micro-batch. Calls count only once a gradient has arrived: forwards in ``no_grad`` or without backward leave
nothing behind. Gradients are watched by hooks on the output *tensor*, which survive in-place activations
after the layer; full backward hooks do not.

Gradients come from the loss's own backward pass, or, for matrices that need others, from `Watch.push`: it
runs from the model's outputs to the layers' outputs only, so that neither ``.grad`` nor the hooks of
DistributedDataParallel notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.kfac_layers import Call, CoveredLayer, Statistic
from hpcsngd.optim.stopwatch import Stopwatch

Calls: TypeAlias = Mapping[int, Sequence[Call]]


class Watch:
    """Watches layers and keeps the calls of those that are due.

    Args:
        layers: the layers to watch.
        stopwatch: counts the time spent in hooks as phase ``capture``.
        dtype: of what is kept; default: float64 for float64 weights, otherwise float32.
        pushes: whether gradients come from `push` only.

    Attributes:
        due: names of the layers to keep calls of: all of them at first.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        stopwatch: Stopwatch,
        dtype: torch.dtype | None = None,
        *,
        pushes: bool = False,
    ) -> None:
        self.due = frozenset(layer.name for layer in layers)
        self._layers = {layer.name: layer for layer in layers}
        self._stopwatch, self._dtype, self._pushes = stopwatch, dtype, pushes
        self._calls: dict[str, dict[int, list[Call]]] = {layer.name: {} for layer in layers}
        self._pending: list[tuple[CoveredLayer, Call, GradientEdge]] = []
        self._micro_batch = 0
        self._gradient_seen = False
        self._handles = [
            layer.module.register_forward_hook(partial(self._on_forward, layer), with_kwargs=True)
            for layer in layers
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Returns an idle watch: a copy of the model (an average of weights, say) is not watched."""
        return Watch([], Stopwatch(enabled=False))

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
        self._pending.clear()
        self._micro_batch, self._gradient_seen = 0, False

    @property
    def micro_batches(self) -> int:
        """Returns how many micro-batches have calls with gradients."""
        return len({micro_batch for calls in self._calls.values() for micro_batch in calls})

    @property
    def is_waiting(self) -> bool:
        """Returns whether there are calls that wait for `push`."""
        return bool(self._pending)

    def dtype(self, layer: CoveredLayer) -> torch.dtype:
        """Returns the dtype in which a layer's calls are kept."""
        return self._dtype or torch.promote_types(layer.weight.dtype, torch.float32)

    def take(self, scale: Callable[[int], float]) -> dict[str, Statistic | MisalignedError]:
        """Returns the statistic of every layer that is due, maybe of no sample, and forgets the calls.

        Args:
            scale: number of samples in a micro-batch -> factor for its output gradients.
        """
        found = {name: self._join(self._layers[name], self._calls[name], scale) for name in self._in_order()}
        self.clear()
        return found

    def push(self, outputs: Tensor, gradients: Iterable[Tensor]) -> None:
        """Sends gradients from the outputs of a forward pass back to the layers that it called.

        Args:
            outputs: of the model, with their graph, which stays as it is.
            gradients: shaped like the outputs.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        self._gradient_seen = True
        edges = [edge for _, _, edge in pending]
        for gradient in gradients:
            found = torch.autograd.grad(
                [outputs], edges, [gradient.to(outputs.dtype)], retain_graph=True, allow_unused=True
            )
            for (layer, call, _), grad in zip(pending, found, strict=True):
                if grad is not None:
                    self._add(layer, self._micro_batch, call, grad)

    def _in_order(self) -> list[str]:
        return [name for name in self._layers if name in self.due]

    def _join(
        self, layer: CoveredLayer, calls: Calls, scale: Callable[[int], float]
    ) -> Statistic | MisalignedError:
        total = layer.no_statistic(self.dtype(layer))
        try:
            for micro_batch in sorted(calls):
                part = layer.statistic(calls[micro_batch])
                total = total + part.scaled(scale(part.samples))
        except MisalignedError as error:
            return error
        return total

    def _on_forward(
        self,
        layer: CoveredLayer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if not (layer.name in self.due and torch.is_grad_enabled() and output.requires_grad):
            return
        if self._gradient_seen:
            self._micro_batch, self._gradient_seen = self._micro_batch + 1, False
        x: Tensor = args[0] if args else kwargs["input"]
        with self._stopwatch.phase("capture"), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            call = layer.open_call(x.detach(), output.detach(), self.dtype(layer))
        if self._pushes:
            self._pending.append((layer, call, get_gradient_edge(output)))
        else:
            hook = partial(self._on_gradient, layer, self._micro_batch, call)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _on_gradient(self, layer: CoveredLayer, micro_batch: int, call: Call, grad: Tensor) -> None:
        if layer.name not in self.due:
            return
        if call.gradients:
            raise RuntimeError(
                f"layer {layer.name}: second backward pass through one forward pass; add it to skip"
            )
        self._gradient_seen = True
        self._add(layer, micro_batch, call, grad)

    def _add(self, layer: CoveredLayer, micro_batch: int, call: Call, grad: Tensor) -> None:
        # Autocast is still on where backward() is called under it.
        with (
            self._stopwatch.phase("capture"),
            torch.no_grad(),
            torch.autocast(grad.device.type, enabled=False),
        ):
            call.add_gradient(grad.detach())
        calls = self._calls[layer.name].setdefault(micro_batch, [])
        if call not in calls:
            calls.append(call)
