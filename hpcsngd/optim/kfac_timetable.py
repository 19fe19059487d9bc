"""When K-FAC's factors and inverses are updated: all layers at once, or staggered so that no step is slow.

Staggered, the first step updates everything. From then on every layer has one step of the inverses' period,
by longest processing time first (`hpcsngd.optim.placement.spread`), at which its inverse is updated, and its
factors as well; where factors are updated more often, at every ``factor_every``-th step counted from there.
A step then does at most the work of a full update over ``inverse_every``, plus that of the costliest layer.
Costs are counted, not timed: the same on every rank and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.kfac_options import Interval
from hpcsngd.optim.placement import spread


class Timetable:
    """Says which layers' factors and inverses are due at a step.

    Args:
        layers: names.
        factor_every: steps between updates, or a function of the step; 0: none.
        inverse_every: the same for inverses.
        stagger: whether to spread the layers.

    Raises:
        ValueError: with ``stagger``, the periods are not whole numbers of which one divides the other.
    """

    def __init__(
        self, layers: Sequence[str], factor_every: Schedule, inverse_every: Schedule, *, stagger: bool
    ) -> None:
        self._layers, self._stagger = list(layers), stagger
        self._factors = Interval("factor_every", factor_every)
        self._inverses = Interval("inverse_every", inverse_every)
        self._periods = _whole(factor_every, inverse_every) if stagger else (1, 1)
        self._costs: dict[str, int] = {}
        self._slots: dict[str, int] = {}

    @property
    def wants_costs(self) -> bool:
        """Returns whether `set_costs` is still to come."""
        return self._stagger and not self._slots

    def set_costs(self, costs: Mapping[str, int]) -> None:
        """Spreads the layers.

        Args:
            costs: of updating each layer, in any unit, alike on every rank.
        """
        self._costs = dict(costs)
        slots = spread([costs[name] for name in self._layers], self._periods[1])
        self._slots = dict(zip(self._layers, slots, strict=True))

    def factors_due(self, step: int) -> list[str]:
        """Returns the layers whose factors are to be updated at ``step`` (0 for the first)."""
        return self._due(self._factors, self._periods[0], step)

    def inverses_due(self, step: int) -> list[str]:
        """Returns the layers whose inverses are to be updated at ``step``."""
        return self._due(self._inverses, self._periods[1], step)

    def factors_done(self, step: int) -> None:
        """Notes that factors were updated at ``step``; staggered, the first time begins the period."""
        _note(self._factors, step, once=self._stagger)

    def inverses_done(self, step: int) -> None:
        """Notes that inverses were updated at ``step``; staggered, the first time begins the period."""
        _note(self._inverses, step, once=self._stagger)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the timetable needs to go on."""
        return {"factors": self._factors.last, "inverses": self._inverses.last, "costs": self._costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``, which may have had other periods, or none staggered."""
        self._factors.last, self._inverses.last = state["factors"], state["inverses"]
        self._costs, self._slots = {}, {}
        if self._stagger and set(state["costs"]) == set(self._layers):
            self.set_costs(state["costs"])

    def _due(self, interval: Interval, period: int, step: int) -> list[str]:
        if not self._slots or interval.last is None:
            is_due = self._stagger or interval.is_due(step)
            return list(self._layers) if is_due else []
        since = step - interval.last - 1
        return [name for name in self._layers if (since - self._slots[name]) % period == 0]


def _note(interval: Interval, step: int, *, once: bool) -> None:
    if not once or interval.last is None:
        interval.last = step


def _whole(factor_every: Schedule, inverse_every: Schedule) -> tuple[int, int]:
    periods = [every for every in (factor_every, inverse_every) if isinstance(every, int | float)]
    if len(periods) < 2 or any(every < 1 or not float(every).is_integer() for every in periods):
        raise ValueError(
            f"factor_every={factor_every}, inverse_every={inverse_every}: stagger needs whole numbers"
        )
    if periods[1] % periods[0]:
        raise ValueError(
            f"factor_every={factor_every} must divide inverse_every={inverse_every} with stagger=True"
        )
    return int(periods[0]), int(periods[1])
