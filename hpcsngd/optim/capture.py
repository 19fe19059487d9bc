"""Hooks that turn forward and backward passes into per-sample rows.

The rows of a layer (shape contract: `hpcsngd.optim.layers`; positions reduced) are

    a   (n, d_in)    mean over the positions of the inputs; a trailing 1 where the layer has a bias
    g   (n, d_out)   sum over the positions of the output gradients, times the scale that makes them gradients
                     of the sample's own loss

so that sample i's gradient is ``g_i a_i^T``. Rows are at least float32, whatever autocast computes in.

Calls of one layer in one forward pass count as more positions of the same samples. A forward pass after a
backward pass begins a new micro-batch: its rows are more samples. Rows appear only where a gradient arrives:
forwards in ``no_grad`` or without backward leave nothing behind. Gradients are watched by hooks on the output
*tensor*, which survive in-place activations after the layer; full backward hooks do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpcsngd.optim.layers import Layer
from hpcsngd.optim.stopwatch import Stopwatch


class Rows(NamedTuple):
    """One layer's rows, ``a`` of shape ``(n, d_in)`` and ``g`` of shape ``(n, d_out)``."""

    a: Tensor
    g: Tensor


class MisalignedError(ValueError):
    """Calls of one layer in one forward pass carry different numbers of samples."""


class _Call:
    """One forward call of a layer that a gradient has reached."""

    def __init__(self, micro_batch: int, input_sums: Tensor, positions: int) -> None:
        self.micro_batch = micro_batch
        self.input_sums = input_sums
        self.positions = positions
        self.output_sums: Tensor | None = None


class Capture:
    """Watches layers and collects their rows while ``enabled``.

    Args:
        layers: the layers to watch.
        dtype: of the rows; default: float64 for float64 weights, otherwise float32.
        stopwatch: counts the time spent in hooks as phase ``capture``.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype | None, stopwatch: Stopwatch) -> None:
        self.enabled = True
        self._dtype = dtype
        self._stopwatch = stopwatch
        self._calls: dict[str, list[_Call]] = {layer.name: [] for layer in layers}
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
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forgets what was captured."""
        for calls in self._calls.values():
            calls.clear()
        self._micro_batch, self._gradient_seen = 0, False

    @property
    def micro_batches(self) -> int:
        """Returns how many micro-batches have rows."""
        return len({call.micro_batch for calls in self._calls.values() for call in calls})

    def rows_dtype(self, layer: Layer) -> torch.dtype:
        """Returns the dtype of ``layer``'s rows."""
        return self._dtype or torch.promote_types(layer.module.weight.dtype, torch.float32)

    def take(self, scale: Callable[[int], float]) -> Mapping[str, Rows | MisalignedError]:
        """Returns the rows of every layer (none of them: 0 rows) and forgets them.

        Args:
            scale: number of rows in a micro-batch -> factor for its output gradients.
        """
        rows = {name: self._join(self._layers[name], calls, scale) for name, calls in self._calls.items()}
        self.clear()
        return rows

    def _join(
        self, layer: Layer, calls: Sequence[_Call], scale: Callable[[int], float]
    ) -> Rows | MisalignedError:
        micro_batches: dict[int, list[_Call]] = {}
        for call in calls:
            micro_batches.setdefault(call.micro_batch, []).append(call)
        try:
            parts = [_join_calls(micro_batches[index], scale) for index in sorted(micro_batches)]
        except MisalignedError as error:
            return error
        if not parts:
            weight, (d_in, d_out) = layer.module.weight, layer.row_sizes
            empty = partial(torch.zeros, device=weight.device, dtype=self.rows_dtype(layer))
            return Rows(empty(0, d_in), empty(0, d_out))
        a, g = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Rows(torch.cat([a, a.new_ones(len(a), 1)], 1) if layer.has_bias else a, g)

    def _on_forward(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not (self.enabled and torch.is_grad_enabled() and output.requires_grad):
            return
        if self._gradient_seen:
            self._micro_batch, self._gradient_seen = self._micro_batch + 1, False
        x: Tensor = args[0] if args else kwargs["input"]
        with self._stopwatch.phase("capture"), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            sums, positions = layer.input_sums(x, output, self.rows_dtype(layer))
        call = _Call(self._micro_batch, sums, positions)
        output.register_hook(partial(self._on_gradient, layer, call))  # type: ignore[no-untyped-call]

    def _on_gradient(self, layer: Layer, call: _Call, grad: Tensor) -> None:
        if not self.enabled:
            return
        self._gradient_seen = True
        with self._stopwatch.phase("capture"), torch.no_grad():
            sums = layer.output_sums(grad.detach(), self.rows_dtype(layer))
        if call.output_sums is None:
            call.output_sums = sums
            self._calls[layer.name].append(call)
        else:  # A second backward through the same forward pass: gradients add up, inputs are the same.
            call.output_sums = call.output_sums + sums


def _idle() -> Capture:
    capture = Capture([], None, Stopwatch(enabled=False))
    capture.close()
    return capture


def _join_calls(calls: Sequence[_Call], scale: Callable[[int], float]) -> Rows:
    """Returns the rows of one layer in one micro-batch, without the bias column."""
    gradients = [call.output_sums for call in calls if call.output_sums is not None]
    sizes = {len(gradient) for gradient in gradients}
    if len(sizes) > 1:
        raise MisalignedError(f"called with {sorted(sizes)} samples in one forward pass; add it to skip")
    a = torch.stack([call.input_sums for call in calls]).sum(0) / sum(call.positions for call in calls)
    return Rows(a, torch.stack(gradients).sum(0) * scale(len(gradients[0])))
