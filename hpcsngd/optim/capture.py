"""Hooks that turn forward and backward passes into rows (`hpcsngd.optim.rows`) of each layer.

Rows are at least float32, whatever autocast computes in, and scaled so that they are gradients of each
sample's own loss. What stands for a sample with several positions is the mode's (`hpcsngd.optim.calls`).

Calls of one layer in one forward pass count as more positions of the same samples. A forward pass after a
backward pass begins a new micro-batch: its rows are more samples. Rows appear only where a gradient arrives:
forwards in ``no_grad`` or without backward leave nothing behind. Gradients are watched by hooks on the output
*tensor*, which survive in-place activations after the layer; full backward hooks do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.optim.calls import (
    Call,
    ConvMode,
    ExactCall,
    MisalignedError,
    ReducedCall,
    no_rows,
    rows_of_calls,
)
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.rows import Rows, join_rows
from hpcsngd.optim.stopwatch import Stopwatch


class Capture:
    """Watches layers and collects the rows of those that are due: all of them at first.

    Attributes:
        due: names of the layers to collect rows of.
        reads: layer -> numbers in all its inputs and outputs behind the rows taken last.

    Args:
        layers: the layers to watch.
        dtype: of the rows; default: float64 for float64 weights, otherwise float32.
        stopwatch: counts the time spent in hooks as phase ``capture``.
        mode: what stands for a sample with several positions.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: torch.dtype | None,
        stopwatch: Stopwatch,
        mode: ConvMode = "reduce",
    ) -> None:
        self.due = frozenset(layer.name for layer in layers)
        self.reads: dict[str, tuple[int, int]] = {}
        self._reads_now: dict[str, tuple[int, int]] = {}
        self._mode: ConvMode = mode
        self._dtype = dtype
        self._stopwatch = stopwatch
        self._calls: dict[str, dict[int, list[Call]]] = {layer.name: {} for layer in layers}
        self._layers = {layer.name: layer for layer in layers}
        self._micro_batch = 0
        self._gradient_seen = False
        self._handles = [
            layer.module.register_forward_hook(partial(self._on_forward, layer), with_kwargs=True)
            for layer in layers
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """Returns an idle capture: a copy of the model (an average of weights, say) is not watched."""
        return _idle()

    def close(self) -> None:
        """Removes every hook and forgets what was captured."""
        self.due = frozenset()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forgets what was captured."""
        for calls in self._calls.values():
            calls.clear()
        self._reads_now = {}
        self._micro_batch, self._gradient_seen = 0, False

    @property
    def enabled(self) -> bool:
        """Returns whether any layer is due."""
        return bool(self.due)

    @property
    def micro_batches(self) -> int:
        """Returns how many micro-batches have rows."""
        return len({micro_batch for calls in self._calls.values() for micro_batch in calls})

    def rows_dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype of ``layer``'s rows."""
        return self._dtype or torch.promote_types(layer.module.weight.dtype, torch.float32)

    def take(self, scale: Callable[[int], float]) -> Mapping[str, Rows | MisalignedError]:
        """Returns the rows of every layer that is due (none of them: 0 rows) and forgets them.

        Args:
            scale: number of rows in a micro-batch -> factor for its output gradients.
        """
        rows = {
            name: self._join(self._layers[name], calls, scale)
            for name, calls in self._calls.items()
            if name in self.due
        }
        self.reads = self._reads_now
        self.clear()
        return rows

    def _join(
        self, layer: Layer, calls: Mapping[int, Sequence[Call]], scale: Callable[[int], float]
    ) -> Rows | MisalignedError:
        try:
            parts = [rows_of_calls(layer, calls[micro_batch], self._mode) for micro_batch in sorted(calls)]
        except MisalignedError as error:
            return error
        if not parts:
            return no_rows(layer, self.rows_dtype(layer))
        return join_rows([part.scaled(scale(len(part))) for part in parts])

    def _on_forward(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not (layer.name in self.due and torch.is_grad_enabled() and output.requires_grad):
            return
        if self._gradient_seen:
            self._micro_batch, self._gradient_seen = self._micro_batch + 1, False
        x: Tensor = args[0] if args else kwargs["input"]
        inputs, outputs = self._reads_now.get(layer.name, (0, 0))
        self._reads_now[layer.name] = (inputs + x.numel(), outputs + output.numel())
        kind = ExactCall if self._mode == "exact" else ReducedCall
        with self._stopwatch.phase("capture"), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            call = kind(layer, x, output, self.rows_dtype(layer))
        hook = partial(self._on_gradient, layer, self._micro_batch, call)
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _on_gradient(self, layer: Layer, micro_batch: int, call: Call, grad: Tensor) -> None:
        if layer.name not in self.due:
            return
        self._gradient_seen = True
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


def _idle() -> Capture:
    capture = Capture([], None, Stopwatch(enabled=False))
    capture.close()
    return capture
