"""What HyLo refuses: choices, combinations and schedules out of their range, by name and value."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hpcsngd.optim.base import Schedule, value_at
from hpcsngd.optim.hybrid import SwitchRule
from hpcsngd.optim.selection import RankRule


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


def check_method(method: str, rule: RankRule, *, has_switch: bool) -> None:
    """Raises ValueError for a rule or a switch that the method would ignore."""
    if method == "sngd" and not rule.keeps_everything:
        raise ValueError(f"{rule.name}: method 'sngd' keeps every sample")
    if has_switch and method != "hybrid":
        raise ValueError(f"switch: method {method!r} does not switch; allowed with 'hybrid'")


def needs_every_kernel(observe: Collection[str]) -> bool:
    """Returns whether what is observed needs every layer's rows on every rank."""
    return bool({"rank_analysis", "grad_error"} & set(observe))


def check_placement(placement: str, kid_scope: str, observe: Collection[str]) -> None:
    """Raises ValueError where ``placement="owner"`` would be ignored."""
    if placement == "owner" and kid_scope == "local":
        raise ValueError("placement='owner': kid_scope 'local' keeps its few rows on every rank")
    if placement == "owner" and needs_every_kernel(observe):
        raise ValueError(f"placement='owner': observe={sorted(observe)} needs kernels on every rank")


def switch_rule(switch: SwitchRule | Mapping[str, Any] | None) -> SwitchRule:
    """Returns the rule that its fields describe, or the default one."""
    return SwitchRule(**(switch or {})) if isinstance(switch, Mapping | None) else switch


def positive(name: str, schedule: Schedule, step: int) -> float:
    """Returns the schedule's value at ``step``; raises ValueError unless it is positive and finite."""
    value = value_at(schedule, step)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} at step {step}: must be positive")
    return value


def at_least_one_step(schedule: Schedule, step: int) -> float:
    """Returns the refresh period at ``step``; raises ValueError unless it is at least 1."""
    value = value_at(schedule, step)
    if not value >= 1:
        raise ValueError(f"refresh_every={value} at step {step}: must be at least 1")
    return value
