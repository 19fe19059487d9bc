"""When each layer's curvature is recomputed: all layers at once, or staggered so that no step is slow.

Staggered, the first step refreshes every layer (without curvature there is nothing to go on) and tells what
each costs. From then on every layer has one step of the period, by longest processing time first: the most
expensive layer goes to the step with the least to do, and so on. A step then does at most

    (all layers) / refresh_every + (most expensive layer)

so its overhead over a plain step is at most that of a full refresh times ``1 / refresh_every`` plus the
share of the most expensive layer. Costs are counted, not timed: the same on every rank and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.checks import at_least_one_step
from hpcsngd.optim.placement import spread


class Calendar:
    """Says which layers to refresh at which step.

    Args:
        layers: names.
        refresh_every: steps between refreshes; a whole number where ``stagger`` is set.
        stagger: whether to spread the layers over the period.

    Raises:
        ValueError: ``refresh_every`` is less than 1, or not a whole number with ``stagger``.
    """

    def __init__(self, layers: Sequence[str], refresh_every: Schedule, *, stagger: bool) -> None:
        at_least_one_step(refresh_every, 0)
        if stagger and not (isinstance(refresh_every, int | float) and float(refresh_every).is_integer()):
            raise ValueError(f"refresh_every={refresh_every}: must be a whole number with stagger=True")
        self._layers, self._refresh_every, self._stagger = list(layers), refresh_every, stagger
        self._last: int | None = None
        self._costs: dict[str, int] = {}
        self._slots: dict[str, int] = {}

    @property
    def wants_costs(self) -> bool:
        """Returns whether `set_costs` is still to come."""
        return self._stagger and not self._slots

    def due(self, step: int) -> list[str]:
        """Returns the layers to refresh at ``step`` (0 for the first), in their order."""
        if self._last is None or self.wants_costs:
            return list(self._layers)
        period = at_least_one_step(self._refresh_every, step)
        if not self._stagger:
            return list(self._layers) if step - self._last >= period else []
        return [name for name in self._layers if (step - self._last - 1 - self._slots[name]) % period == 0]

    def refreshed(self, step: int) -> None:
        """Notes that something was refreshed at ``step``; staggered, the first one begins the period."""
        if not self._stagger or self._last is None:
            self._last = step

    def set_costs(self, costs: Mapping[str, int]) -> None:
        """Spreads the layers over the period.

        Args:
            costs: of refreshing each layer, in any unit, alike on every rank.
        """
        self._costs = dict(costs)
        period = int(at_least_one_step(self._refresh_every, 0))
        self._slots = dict(zip(self._layers, spread([costs[n] for n in self._layers], period), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns what the calendar needs to go on."""
        return {"last": self._last, "costs": self._costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``, which may have had another period or none staggered."""
        self._last, self._costs, self._slots = state["last"], {}, {}
        if self._stagger and set(state["costs"]) == set(self._layers):
            self.set_costs(state["costs"])
