"""When K-FAC's factors and inverses are due, at once and staggered."""

from __future__ import annotations

import pytest

from hpcsngd.optim.kfac_timetable import Timetable

LAYERS = ["a", "b", "c", "d", "e"]
COSTS = {"a": 9, "b": 4, "c": 3, "d": 2, "e": 1}


def run(table: Timetable, steps: range) -> list[tuple[list[str], list[str]]]:
    """Returns what is due at every step, each of them done."""
    seen = []
    for step in steps:
        seen.append((table.factors_due(step), table.inverses_due(step)))
        table.factors_done(step)
        if table.wants_costs:
            table.set_costs(COSTS)
        table.inverses_done(step)
    return seen


def test_staggered_layers_have_one_step_of_the_period_each() -> None:
    first, *later = run(Timetable(LAYERS, 3, 3, stagger=True), range(7))
    assert first == (LAYERS, LAYERS)
    for period in (later[:3], later[3:]):
        assert sorted(name for _, inverses in period for name in inverses) == LAYERS
        assert all(factors == inverses for factors, inverses in period)
        loads = [sum(COSTS[name] for name in inverses) for _, inverses in period]
        assert max(loads) <= sum(COSTS.values()) / 3 + max(COSTS.values())
    assert later[:3] == later[3:]


def test_staggered_factors_may_be_updated_more_often_and_with_their_inverse() -> None:
    _, *later = run(Timetable(LAYERS, 2, 4, stagger=True), range(9))
    for factors, inverses in later:
        assert set(inverses) <= set(factors)
    for name in LAYERS:
        assert sum(name in factors for factors, _ in later) == 4
        assert sum(name in inverses for _, inverses in later) == 2


def test_a_resumed_timetable_goes_on() -> None:
    whole = run(Timetable(LAYERS, 3, 3, stagger=True), range(9))
    first, second = Timetable(LAYERS, 3, 3, stagger=True), Timetable(LAYERS, 3, 3, stagger=True)
    run(first, range(5))
    second.load_state_dict(first.state_dict())
    assert run(second, range(5, 9)) == whole[5:]


@pytest.mark.parametrize(("factors", "inverses"), [(0, 2), (2, 3), (1.5, 3), (lambda step: 1, 2)])
def test_stagger_refuses_periods_that_do_not_fit(factors: float, inverses: int) -> None:
    with pytest.raises(ValueError, match=r"factor_every=.*inverse_every"):
        Timetable(LAYERS, factors, inverses, stagger=True)
