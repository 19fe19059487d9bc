"""Overwrites gradients by what HyLo's curvatures make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hpcsngd.optim.compare import Comparison
from hpcsngd.optim.gradients import KlClip, Rescale, Solved, layer_gradients, overwrite, rescaled
from hpcsngd.optim.held import Curvatures
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.observe import Observer
from hpcsngd.optim.sketches import Plain
from hpcsngd.optim.stopwatch import Stopwatch
from hpcsngd.optim.threads import MOST_MULTIPLICATIONS, one_thread_if


class Applier:
    """Preconditions the gradients of all layers that have a curvature and all their gradients.

    Args:
        layers: covered layers.
        curvatures: of the layers.
        rows_dtype: layer -> dtype in which it is preconditioned.
        stopwatch: counts phases ``precondition`` and ``observe``.
        observer: is shown gradients and errors.
        comparison: what results are compared with.
        rescale: see `hpcsngd.optim.gradients.Rescale`.
        kl_clip: bounds the step.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curvatures: Curvatures,
        rows_dtype: Callable[[Layer], torch.dtype],
        *,
        stopwatch: Stopwatch,
        observer: Observer,
        comparison: Comparison,
        rescale: Rescale,
        kl_clip: KlClip,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._curvatures, self._rows_dtype, self._stopwatch = curvatures, rows_dtype, stopwatch
        self._observer, self._comparison = observer, comparison
        self._rescale, self._kl_clip = rescale, kl_clip

    def apply(
        self, lr: float | None, step: int, method: Plain, watch: Callable[[str, Tensor], None] | None
    ) -> None:
        """Overwrites the gradients.

        Args:
            lr: learning rate of the coming step, if it is known.
            step: steps done before it.
            method: that made the curvatures.
            watch: is shown every layer's plain gradient as a matrix ``(d_out, d_in)``.
        """
        with one_thread_if(self._curvatures.multiplications <= MOST_MULTIPLICATIONS):
            self._apply(lr, step, method, watch)

    def _apply(
        self, lr: float | None, step: int, method: Plain, watch: Callable[[str, Tensor], None] | None
    ) -> None:
        with self._stopwatch.phase("precondition"):
            gradients = {
                name: found for name, layer in self._layers.items() if (found := layer_gradients(layer))
            }
            grads = {name: self._matrix(name, found) for name, found in gradients.items()}
            if watch is not None:
                for name, grad in grads.items():
                    watch(name, grad)
            solved = self._curvatures.solve(grads)
        # Before anything is overwritten: results are rescaled in place, and matrices may be views.
        with self._stopwatch.phase("observe"):
            self._observe(grads, solved, method)
        with self._stopwatch.phase("precondition"):
            results = self._results(grads, solved)
            targets = [gradient for name in results for gradient in gradients[name]]
            pieces = [
                piece for name, matrix in results.items() for piece in self._layers[name].from_matrix(matrix)
            ]
            overwrite(targets, pieces)
            self._kl_clip.apply(targets, lr, step)

    def _matrix(self, name: str, gradients: Sequence[Tensor]) -> Tensor:
        layer = self._layers[name]
        return layer.to_matrix(gradients).to(self._rows_dtype(layer))

    def _observe(self, grads: Mapping[str, Tensor], solved: Sequence[Solved], method: Plain) -> None:
        results = dict(grads)
        for group in solved:
            results.update(zip(group.names, group.results, strict=True))
        for name, grad in grads.items():
            self._observer.gradient(name, grad)
            exact = self._comparison.exact(name, grad)
            if exact is not None:
                self._observer.error(name, method, results[name], exact)
                for other, result in self._comparison.results(name, grad):
                    self._observer.error(name, other, result, exact)

    def _results(self, grads: Mapping[str, Tensor], solved: Sequence[Solved]) -> dict[str, Tensor]:
        """Returns every layer's rescaled result, those of other ranks' layers from there."""
        results: dict[str, Tensor] = {}
        for group in solved:
            matrices = rescaled(self._rescale, group)
            results.update(zip(group.names, matrices, strict=True))
            self._kl_clip.add(matrices, group.grads)
        sent = self._curvatures.from_owners(grads, lambda group: rescaled(self._rescale, group))
        for name, matrix in sent.items():
            self._kl_clip.add(matrix, grads[name])
        return results | sent
