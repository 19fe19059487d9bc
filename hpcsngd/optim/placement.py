"""What work costs, and who does it."""

from __future__ import annotations

from collections.abc import Sequence

from hpcsngd.optim.layers import Layer

#: Reading one number of an activation costs as much as this many multiplications in a matrix product.
READ = 8


def spread(costs: Sequence[int], bins: int) -> list[int]:
    """Returns a bin for each cost, by longest processing time first.

    The costliest goes to the emptiest bin, and so on: no bin gets more than the mean plus the largest cost,
    or than 4/3 of what is possible (Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: of the tasks.
        bins: how many there are, at least 1. Of equal ones the first is taken.
    """
    loads = [0] * bins
    result = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda index: -costs[index]):
        emptiest = loads.index(min(loads))
        result[task] = emptiest
        loads[emptiest] += costs[task]
    return result


def refresh_cost(layer: Layer, samples: int, inputs: int, outputs: int, *, exact: bool) -> int:
    """Returns about how many multiplications it takes to capture a layer's rows and factorize their kernel.

    Args:
        layer: which one.
        samples: n.
        inputs: numbers in the layer's inputs, all samples together.
        outputs: the same of its outputs.
        exact: whether rows are the true gradients (`hpcsngd.optim.calls`); otherwise their sums are.
    """
    d_in, d_out = layer.row_sizes
    positions = outputs // max(1, samples * d_out)
    taps = d_in * d_out * samples * positions if exact else READ * (inputs + outputs)
    small = not exact or layer.factors_are_cheaper(positions)
    row = (d_in + d_out) * (max(1, positions) ** 2 if exact else 1) if small else d_in * d_out
    return taps + samples**2 * row + samples**3 // 3
