"""What K-FAC's layers cost, for whoever evens it out over ranks or steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from hpcsngd.optim.kaisa import inversion_cost
from hpcsngd.optim.kfac_inverse import InverseKind
from hpcsngd.optim.kfac_layers import CoveredLayer
from hpcsngd.optim.kfac_options import Options

#: Multiplications of a matrix product that take as long as a decomposition, in side^3.
DECOMPOSITION: dict[InverseKind, int] = {"eigen": 20, "cholesky": 2}


def placement_costs(layers: Sequence[CoveredLayer], options: Options) -> dict[str, list[int]]:
    """Returns what each factor of each layer costs the rank that holds it."""
    cost = options.inverter().kept_numbers if options.placement_cost == "memory" else inversion_cost
    return {layer.name: [cost(shape) for shape in layer.factor_shapes()] for layer in layers}


def update_costs(
    layers: Sequence[CoveredLayer], inverse: InverseKind, inputs: Mapping[str, int]
) -> dict[str, int]:
    """Returns about how many multiplications an update of each layer's factors and inverse takes.

    Args:
        layers: covered layers.
        inverse: what is computed of the factors.
        inputs: layer -> vectors that its factors were last made of.
    """
    decompose = DECOMPOSITION[inverse]
    return {
        layer.name: sum(
            prod(shape) * (inputs.get(layer.name, 0) + decompose * shape[-1] if len(shape) == 3 else 1)
            for shape in layer.factor_shapes()
        )
        for layer in layers
    }
