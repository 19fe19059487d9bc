"""Turns the calls of layers (`hpcsngd.optim.watching`), and the gradients at their outputs, into statistics.

Gradients come from the loss's own backward pass, or, for matrices that need others, from `Watch.push`: it
runs from the model's outputs to the layers' outputs only, so that neither ``.grad`` nor the hooks of
DistributedDataParallel notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.kfac_layers import Call, CoveredLayer, Statistic
from hpcsngd.optim.stopwatch import Stopwatch
from hpcsngd.optim.watching import Watching

Calls: TypeAlias = Mapping[int, Sequence[Call]]
Found: TypeAlias = "Statistic | MisalignedError"


@dataclass(frozen=True)
class Announcement:
    """What is known of a step before it begins.

    Attributes:
        micro_batches: in the step.
        scale: number of samples in a micro-batch -> factor for its output gradients.
        report: called with every layer, as soon as all gradients of its calls in the last micro-batch came.
    """

    micro_batches: int
    scale: Callable[[int], float]
    report: Callable[[str, Found], None]


class Watch(Watching[CoveredLayer, Call]):
    """Watches layers and keeps the calls of those that are due.

    Args:
        layers: the layers to watch.
        stopwatch: counts the time spent in hooks as phase ``capture``.
        dtype: of what is kept; default: float64 for float64 weights, otherwise float32.
        pushes: whether gradients come from `push` only.

    Attributes:
        due: names of the layers to keep calls of: all of them at first.
        announced: set it before a step to have statistics reported early; None: they wait for `take`.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        stopwatch: Stopwatch,
        dtype: torch.dtype | None = None,
        *,
        pushes: bool = False,
    ) -> None:
        super().__init__(layers, stopwatch)
        self._dtype, self._pushes = dtype, pushes
        self._pending: list[tuple[CoveredLayer, Call, GradientEdge]] = []
        self.announced: Announcement | None = None
        self._reported: dict[str, Found] = {}
        self._open_calls: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Returns an idle watch: a copy of the model (an average of weights, say) is not watched."""
        return Watch([], Stopwatch(enabled=False))

    def clear(self) -> None:
        """Forgets all calls."""
        super().clear()
        self._pending.clear()
        self._reported.clear()
        self._open_calls.clear()
        self.announced = None

    @property
    def is_waiting(self) -> bool:
        """Returns whether there are calls that wait for `push`."""
        return bool(self._pending)

    def dtype(self, layer: CoveredLayer) -> torch.dtype:
        """Returns the dtype in which a layer's calls are kept."""
        return self._dtype or torch.promote_types(layer.weight.dtype, torch.float32)

    def take(self, scale: Callable[[int], float]) -> dict[str, Found]:
        """Returns the statistic of every layer that is due, maybe of no sample, and forgets the calls.

        Args:
            scale: number of samples in a micro-batch -> factor for its output gradients.
        """
        found = {
            name: self._reported[name]
            if name in self._reported
            else self._join(self._layers[name], self._calls[name], scale)
            for name in self._in_order()
        }
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
        for layer, _, _ in reversed(pending):
            self._close_call(layer, self._micro_batch)

    def _in_order(self) -> list[str]:
        return [name for name in self._layers if name in self.due]

    def _join(self, layer: CoveredLayer, calls: Calls, scale: Callable[[int], float]) -> Found:
        total = layer.no_statistic(self.dtype(layer))
        try:
            for micro_batch in sorted(calls):
                part = layer.statistic(calls[micro_batch])
                total = total + part.scaled(scale(part.samples))
        except MisalignedError as error:
            return error
        return total

    def _open(self, layer: CoveredLayer, x: Tensor, output: Tensor) -> Call:
        return layer.open_call(x.detach(), output.detach(), self.dtype(layer))

    def _await(self, layer: CoveredLayer, call: Call, output: Tensor) -> None:
        self._open_calls[layer.name] += 1
        if self._pushes:
            self._pending.append((layer, call, get_gradient_edge(output)))
        else:
            super()._await(layer, call, output)

    def _on_gradient(self, layer: CoveredLayer, micro_batch: int, call: Call, grad: Tensor) -> None:
        if layer.name not in self.due:
            return
        if call.gradients:
            raise RuntimeError(
                f"layer {layer.name}: second backward pass through one forward pass; add it to skip"
            )
        if layer.name in self._reported:
            raise RuntimeError(
                f"layer {layer.name}: a gradient after its factors were sent; "
                "tell begin_step of all micro-batches, or set overlap=False"
            )
        super()._on_gradient(layer, micro_batch, call, grad)
        self._close_call(layer, micro_batch)

    def _close_call(self, layer: CoveredLayer, micro_batch: int) -> None:
        """Notes that a call has all its gradients; reports the layer if it was the last one."""
        self._open_calls[layer.name] -= 1
        announced, name = self.announced, layer.name
        if announced is None or micro_batch + 1 < announced.micro_batches or self._open_calls[name] > 0:
            return
        with self._capturing(layer.weight.device.type):
            self._reported[name] = self._join(layer, self._calls[name], announced.scale)
        with torch.no_grad():
            announced.report(name, self._reported[name])
