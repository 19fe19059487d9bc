"""Sums K-FAC's statistics over the ranks, and agrees on what cannot be used.

Statistics are sums with counts, so the sum over the ranks is that of the joined batch, however uneven the
ranks' shares are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.kfac_layers import Statistic


@dataclass(frozen=True)
class Summed:
    """The same on every rank.

    Attributes:
        statistics: of the layers that some sample used and that have no fault.
        faults: layer -> what made its statistic unusable.
    """

    statistics: dict[str, Statistic]
    faults: dict[str, str]


def sum_over_ranks(communicator: Communicator, local: Mapping[str, Statistic | MisalignedError]) -> Summed:
    """Returns the statistics of all ranks together.

    Args:
        communicator: does and counts the exchange.
        local: this rank's statistics by layer; every rank has the same layers in the same order.
    """
    counts = [
        number
        for found in local.values()
        for number in ((0, 0, 1) if isinstance(found, MisalignedError) else (found.inputs, found.samples, 0))
    ]
    sums = iter(communicator.sum_numbers("reduce", counts))
    totals = {name: (next(sums), next(sums), next(sums)) for name in local}
    faults = {
        name: f"calls in one forward do not align on {bad} rank(s){_detail(local[name])}"
        for name, (_, _, bad) in totals.items()
        if bad
    }
    usable = {
        name: found
        for name, found in local.items()
        if isinstance(found, Statistic) and totals[name][1] and name not in faults
    }
    tensors = [tensor for found in usable.values() for tensor in found.tensors]
    parts = iter(communicator.sum_tensors("reduce", tensors))
    statistics = {
        name: found.with_tensors([next(parts) for _ in found.tensors], *totals[name][:2])
        for name, found in usable.items()
    }
    return _without_faulty(statistics, faults)


def _detail(found: Statistic | MisalignedError) -> str:
    return f" ({found})" if isinstance(found, MisalignedError) else ""


def _without_faulty(statistics: dict[str, Statistic], faults: dict[str, str]) -> Summed:
    """Leaves out what is not finite: one such entry would stay in the running average for good."""
    if not statistics:
        return Summed({}, faults)
    # A sum over the ranks is as finite as its parts, so all ranks judge alike; one transfer for all layers.
    finite = [
        torch.stack([extreme for tensor in found.tensors for extreme in tensor.aminmax()]).isfinite().all()
        for found in statistics.values()
    ]
    good = dict(zip(statistics, torch.stack(finite).tolist(), strict=True))
    faults = faults | {name: "its statistic is not finite" for name, is_good in good.items() if not is_good}
    return Summed({name: found for name, found in statistics.items() if good[name]}, faults)
