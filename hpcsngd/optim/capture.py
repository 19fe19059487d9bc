"""Turns the calls of layers (`hpcsngd.optim.watching`) into rows (`hpcsngd.optim.rows`) of each layer.

Rows are at least float32, whatever autocast computes in, and scaled so that they are gradients of each
sample's own loss. What stands for a sample with several positions is the mode's (`hpcsngd.optim.calls`).
Calls of one layer in one forward pass count as more positions of the same samples; the rows of another
micro-batch are more samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
from hpcsngd.optim.watching import Watching


class Capture(Watching[Layer, Call]):
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
        super().__init__(layers, stopwatch)
        self.reads: dict[str, tuple[int, int]] = {}
        self._reads_now: dict[str, tuple[int, int]] = {}
        self._mode: ConvMode = mode
        self._dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """Returns an idle capture: a copy of the model (an average of weights, say) is not watched."""
        return _idle()

    def clear(self) -> None:
        """Forgets what was captured."""
        super().clear()
        self._reads_now = {}

    @property
    def enabled(self) -> bool:
        """Returns whether any layer is due."""
        return bool(self.due)

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

    def _open(self, layer: Layer, x: Tensor, output: Tensor) -> Call:
        inputs, outputs = self._reads_now.get(layer.name, (0, 0))
        self._reads_now[layer.name] = (inputs + x.numel(), outputs + output.numel())
        kind = ExactCall if self._mode == "exact" else ReducedCall
        return kind(layer, x, output, self.rows_dtype(layer))


def _idle() -> Capture:
    capture = Capture([], None, Stopwatch(enabled=False))
    capture.close()
    return capture
