"""Approximate against exact on one batch, through the same curvature code that trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from hpcsngd.optim.curvature import SampleCurvature
from hpcsngd.optim.sketches import Batch, Plain


class Comparison:
    """The exact curvature of the latest refresh, and that of methods which were not used in it."""

    def __init__(self) -> None:
        self._exact: dict[str, SampleCurvature] = {}
        self._others: dict[tuple[str, Plain], SampleCurvature] = {}

    def refresh(
        self,
        batch: Batch,
        others: Collection[Plain],
        build: Callable[[str, Plain], SampleCurvature | None],
    ) -> None:
        """Replaces everything by the curvature of a new batch.

        Args:
            batch: with all rows.
            others: methods to compare with the exact one, besides the one in use.
            build: (layer, method) -> its curvature, None where that fails.
        """
        self.clear()
        for name in batch.everything:
            if (exact := build(name, "sngd")) is not None:
                self._exact[name] = exact
            for method in others:
                if (other := build(name, method)) is not None:
                    self._others[name, method] = other

    def clear(self) -> None:
        """Forgets the batch: nothing is compared until the next refresh."""
        self._exact, self._others = {}, {}

    def curvatures(self) -> list[SampleCurvature]:
        """Returns everything that is held."""
        return [*self._exact.values(), *self._others.values()]

    def exact(self, layer: str, grad: Tensor) -> Tensor | None:
        """Returns the exact result for a layer's gradient; None where there is nothing to compare with."""
        return self._exact[layer].solve(grad) if layer in self._exact else None

    def results(self, layer: str, grad: Tensor) -> Iterator[tuple[Plain, Tensor]]:
        """Yields the other methods' results for a layer's gradient."""
        for (name, method), other in self._others.items():
            if name == layer:
                yield method, other.solve(grad)
