"""Which layers are refreshed when, and how much of the work falls on one step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hpcsngd.optim import HyLo
from hpcsngd.optim.calendar import Calendar
from hpcsngd.optim.placement import refresh_cost, spread
from tests.optim import models, oracle, training

LAYERS = [f"layer{index}" for index in range(7)]
COSTS = dict(zip(LAYERS, [90, 5, 40, 40, 10, 30, 25], strict=True))


def staggered(refresh_every: int, costs: dict[str, int] | None = None) -> Calendar:
    calendar = Calendar(LAYERS, refresh_every, stagger=True)
    if costs is not None:
        calendar.set_costs(costs)
        calendar.refreshed(0)
    return calendar


@pytest.mark.parametrize("refresh_every", [1, 2, 3, 10])
def test_every_layer_is_refreshed_once_in_a_period(refresh_every: int) -> None:
    calendar = staggered(refresh_every, COSTS)
    for start in (1, 2, 5):
        window = [name for step in range(start, start + refresh_every) for name in calendar.due(step)]
        assert sorted(window) == sorted(LAYERS)
    assert [calendar.due(step) for step in range(1, 30)] == [
        calendar.due(step + refresh_every) for step in range(1, 30)
    ]


@pytest.mark.parametrize("refresh_every", [2, 3, 10])
def test_no_step_does_more_than_the_ceiling(refresh_every: int) -> None:
    calendar = staggered(refresh_every, COSTS)
    work = [sum(COSTS[name] for name in calendar.due(step)) for step in range(1, refresh_every + 1)]
    assert max(work) <= sum(COSTS.values()) / refresh_every + max(COSTS.values())
    assert sum(work) == sum(COSTS.values())


def test_everything_is_due_until_the_costs_are_known() -> None:
    calendar = staggered(3)
    assert calendar.due(0) == calendar.due(1) == LAYERS
    calendar.set_costs(COSTS)
    calendar.refreshed(1)
    assert 0 < len(calendar.due(2)) < len(LAYERS)


def test_a_state_goes_on_where_it_was_saved() -> None:
    calendar, loaded = staggered(3, COSTS), staggered(3)
    loaded.load_state_dict(calendar.state_dict())
    assert [loaded.due(step) for step in range(1, 9)] == [calendar.due(step) for step in range(1, 9)]
    # A state without costs: from a run that did not stagger.
    loaded.load_state_dict({"last": 4, "costs": {}})
    assert loaded.due(5) == LAYERS


@pytest.mark.parametrize("refresh_every", [2.5, lambda step: 2])
def test_stagger_wants_a_whole_number(refresh_every: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number with stagger"):
        HyLo(models.mlp(), refresh_every=refresh_every, stagger=True)


def test_spread_stays_below_its_bound() -> None:
    generator = random.Random(0)
    for _ in range(200):
        costs = [generator.randrange(100) for _ in range(generator.randrange(1, 30))]
        bins = generator.randrange(1, 8)
        found = spread(costs, bins)
        loads = [sum(c for c, b in zip(costs, found, strict=True) if b == index) for index in range(bins)]
        assert max(loads) <= sum(costs) / bins + max(costs)
    assert spread([5, 5, 4, 3, 3], 2) == [0, 1, 0, 1, 1]


def test_costs_grow_with_positions_and_samples() -> None:
    hylo = HyLo(models.conv_net(kernel_size=3))
    conv, fc = hylo._layers
    hylo.close()
    small, large = 6 * 4 * 25, 6 * 4 * 100
    for exact in (False, True):
        costs = [refresh_cost(conv, 6, 3 * size, size, exact=exact) for size in (small, large)]
        assert costs[0] < costs[1]
        assert refresh_cost(fc, 6, 96, 18, exact=exact) < refresh_cost(fc, 12, 192, 36, exact=exact)
    # One product of n x positions x weights, n^2 inner products of matrices, one factorization.
    assert refresh_cost(conv, 6, 3 * large, large, exact=True) == 6 * 100 * 112 + 36 * 112 + 72


def test_staggered_steps_capture_only_what_is_due() -> None:
    model = models.seeded(lambda: torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(6)]))
    hylo = HyLo(model, damping=0.05, refresh_every=3, stagger=True)
    seen: list[list[str]] = []
    for seed in range(7):
        model.zero_grad()
        due = set(hylo._capture.due)
        oracle.mean_loss(model, *oracle.batch(model, (6, 5), seed=seed)).backward()
        assert {name for name, calls in hylo._capture._calls.items() if calls} == due
        before = dict(hylo._curvature)
        hylo.step()
        changed = {
            name
            for name, new in hylo._curvature.items()
            if name not in before or not torch.equal(new.factor, before[name].factor)
        }
        assert changed == due
        assert hylo.diagnostics().refresh
        seen.append(sorted(due))
    assert [len(due) for due in seen] == [6, 2, 2, 2, 2, 2, 2]
    assert sorted(seen[1] + seen[2] + seen[3]) == sorted("012345")
    assert seen[1:4] == seen[4:7]


@pytest.mark.parametrize("saved_after", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", ["sngd", "kis"])
def test_staggered_resume_is_bitwise(saved_after: int, method: str) -> None:
    options = {"damping": 0.05, "method": method, "refresh_every": 3, "stagger": True}
    options |= {} if method == "sngd" else {"ratio": 0.5}
    uninterrupted = training.train("conv", [8], 7, options)
    state = training.train("conv", [8], saved_after, options)["state"]
    resumed = training.train("conv", [8], 7, options, state)
    for left, right in zip(resumed["gradients"], uninterrupted["gradients"], strict=True):
        assert torch.equal(left, right)
