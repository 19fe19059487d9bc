"""Overwrites gradients by what K-FAC's inverses make of them, and says how much that changes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpcsngd.optim.gradients import KlClip, Rescale, Solved, layer_gradients, overwrite, rescaled
from hpcsngd.optim.kfac_curvature import Curvature
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.records import LayerStrength


class Applier:
    """Preconditions the gradients of all layers that have an inverse and all their gradients.

    Args:
        layers: covered layers.
        curvature: has the inverses.
        dtype: layer -> dtype in which it is preconditioned.
        rescale: see `hpcsngd.optim.gradients.Rescale`.
        kl_clip: bounds the step.
        observes: whether to measure how much gradients change.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        curvature: Curvature,
        dtype: Callable[[CoveredLayer], torch.dtype],
        *,
        rescale: Rescale,
        kl_clip: KlClip,
        observes: bool,
    ) -> None:
        self._layers, self._curvature, self._dtype = layers, curvature, dtype
        self._rescale, self._kl_clip, self._observes = rescale, kl_clip, observes
        self._strengths: dict[str, tuple[Tensor, float]] = {}

    def apply(self, lr: float | None, step: int) -> None:
        """Overwrites the gradients.

        Args:
            lr: learning rate of the coming step, if it is known.
            step: steps done before it.
        """
        gradients = {
            layer.name: found
            for layer in self._layers
            if self._curvature.has_inverse(layer.name) and (found := layer_gradients(layer))
        }
        layers = {layer.name: layer for layer in self._layers if layer.name in gradients}
        grads = {
            name: layer.to_blocks(gradients[name]).to(self._dtype(layer)) for name, layer in layers.items()
        }
        targets: list[Tensor] = []
        pieces: list[Tensor] = []
        for group in self._curvature.solve(grads):
            self._observe(group)
            results = rescaled(self._rescale, group)
            self._kl_clip.add(results, group.grads)
            for name, blocks in zip(group.names, results, strict=True):
                targets += gradients[name]
                pieces += layers[name].from_blocks(blocks)
        overwrite(targets, pieces)
        self._kl_clip.apply(targets, lr, step)

    def take_strengths(self, step: int) -> tuple[LayerStrength, ...]:
        """Returns what was measured since the last call."""
        strengths, self._strengths = self._strengths, {}
        return tuple(
            LayerStrength(step, name, float(value), self._curvature.mean_eigenvalue(name), damping)
            for name, (value, damping) in strengths.items()
        )

    def _observe(self, group: Solved) -> None:
        if self._observes:
            change = torch.linalg.vector_norm(group.damping * group.results - group.grads, dim=(1, 2, 3))
            strengths = change / torch.linalg.vector_norm(group.grads, dim=(1, 2, 3))
            for name, strength in zip(group.names, strengths, strict=True):
                self._strengths[name] = (strength, group.damping)
