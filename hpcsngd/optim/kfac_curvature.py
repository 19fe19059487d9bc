"""The factors and inverses of all layers, between updates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kfac_factors import Factors
from hpcsngd.optim.kfac_inverse import Inverse, Inverter, inverse_from_state
from hpcsngd.optim.kfac_layers import CoveredLayer, Statistic
from hpcsngd.optim.kfac_stacks import InverseStacks, Solved


class Curvature:
    """Keeps each layer's running factors and the inverse that is in use.

    Args:
        layers: covered layers.
        inverter: makes the inverses.
        communicator: lets the ranks agree on failures.
        factor_dtype: of the running factors; None: that of the statistics.
        is_corrected: whether the running average is corrected for its start.
    """

    def __init__(
        self,
        layers: Sequence[CoveredLayer],
        inverter: Inverter,
        communicator: Communicator,
        factor_dtype: torch.dtype | None,
        *,
        is_corrected: bool,
    ) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._inverter, self._communicator = inverter, communicator
        self._factor_dtype, self._is_corrected = factor_dtype, is_corrected
        self._factors: dict[str, Factors] = {}
        self._inverses: dict[str, Inverse] = {}
        self._stacks = InverseStacks()

    @property
    def has_factors(self) -> bool:
        """Returns whether any layer has factors."""
        return bool(self._factors)

    def has_inverse(self, name: str) -> bool:
        """Returns whether a layer has an inverse."""
        return name in self._inverses

    def update(self, statistics: Mapping[str, Statistic], decay: float) -> None:
        """Adds new statistics to the running averages.

        Args:
            statistics: the same on every rank, each with at least one sample.
            decay: weight of what is already there.
        """
        for name, statistic in statistics.items():
            new, old = statistic.mean(), self._factors.get(name)
            if old is not None:
                self._factors[name] = old.updated(new, decay)
            else:
                dtype = self._factor_dtype or new[0].dtype
                self._factors[name] = Factors.first(new, decay, dtype, is_corrected=self._is_corrected)

    def refresh(self, names: Iterable[str], damping: float) -> dict[str, str]:
        """Computes the inverses of layers that have factors; returns where that failed, and why.

        A layer where it failed, on whatever rank, keeps the inverse that it had.
        """
        due = [name for name in names if name in self._factors]
        averages = [self._factors[name].averages(self._work_dtype(name)) for name in due]
        found = self._inverter.invert(averages, damping)
        failed = self._communicator.sum_numbers("invert", [int(x is None) for x in found])
        for name, inverse, failures in zip(due, found, failed, strict=True):
            if inverse is not None and not failures:
                self._inverses[name] = inverse
        self._stack()
        return {
            name: "its factors cannot be inverted"
            for name, failures in zip(due, failed, strict=True)
            if failures
        }

    def mean_eigenvalue(self, name: str) -> Tensor:
        """Returns the mean eigenvalue of a layer's curvature, over all its blocks."""
        averages = self._factors[name].averages(self._work_dtype(name))
        means = [
            (factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)).mean(1) for factor in averages
        ]
        return torch.stack(means).prod(0).mean()

    def solve(self, grads: Mapping[str, Tensor]) -> Iterator[Solved]:
        """Yields the preconditioned gradients of all layers that have an inverse; see `InverseStacks`."""
        return self._stacks.solve(grads)

    @property
    def size_bytes(self) -> dict[str, int]:
        """Returns the bytes on this rank by kind."""
        return {
            "factors": sum(factors.size_bytes for factors in self._factors.values()),
            "inverses": sum(inverse.size_bytes for inverse in self._inverses.values()),
        }

    @property
    def jittered(self) -> int:
        """Returns how many layers' inverses needed jitter."""
        return sum(inverse.jitter > 0 for inverse in self._inverses.values())

    def clear(self) -> None:
        """Forgets everything."""
        self._factors, self._inverses = {}, {}
        self._stack()

    def state_dict(self) -> dict[str, Any]:
        """Returns the factors and inverse, as far as there are any, of each layer."""
        layers: dict[str, Any] = {
            name: {"factors": held.state_dict()} for name, held in self._factors.items()
        }
        for name, inverse in self._inverses.items():
            layers.setdefault(name, {})["inverse"] = inverse.state_dict()
        return {name: layers[name] for name in self._layers if name in layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``.

        Raises:
            ValueError: layers that are not covered here, or not in this shape.
        """
        unknown = sorted(set(state) - set(self._layers))
        if unknown:
            raise ValueError(f"state has layers that are not covered here: {', '.join(unknown)}")
        saved = {name: state[name] for name in self._layers if name in state}
        self._factors = {
            name: self._load_factors(name, layer["factors"])
            for name, layer in saved.items()
            if "factors" in layer
        }
        self._inverses = {
            name: self._load_inverse(name, layer["inverse"])
            for name, layer in saved.items()
            if "inverse" in layer
        }
        self._stack()

    def _load_factors(self, name: str, saved: Mapping[str, Any]) -> Factors:
        layer = self._layers[name]
        try:
            return Factors.from_state(saved, layer.factor_shapes(), self._factor_dtype, layer.weight.device)
        except ValueError as error:
            raise ValueError(f"state of layer {name}: {error}") from error

    def _load_inverse(self, name: str, saved: Mapping[str, Any]) -> Inverse:
        layer = self._layers[name]
        try:
            return inverse_from_state(saved, self._inverter.kind, layer.weight.device, layer.shape)
        except ValueError as error:
            raise ValueError(f"state of layer {name}: {error}") from error

    def _work_dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which a layer's factors are decomposed."""
        wide = torch.promote_types(self._layers[name].weight.dtype, torch.float32)
        return torch.promote_types(self._factors[name].sums[0].dtype, wide)

    def _stack(self) -> None:
        """Joins the inverses, always in the order of the layers."""
        order = [name for name in self._layers if name in self._inverses]
        self._inverses = self._stacks.update({name: self._inverses[name] for name in order})
