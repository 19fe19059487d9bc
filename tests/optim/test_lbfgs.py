"""L-BFGS: against the explicit BFGS matrix, against one process, and on objectives that misbehave."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.optim import wolfe
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.lbfgs import LBFGS
from hpcsngd.optim.secant import SecantPairs
from tests.ranks import run_on_ranks


def vector(*numbers: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def closure_of(function: Callable[[Tensor], Tensor], x: nn.Parameter) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x.grad = None
        loss = function(x)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


# Pairs


def explicit_inverse(pairs: list[tuple[Tensor, Tensor]], metric: Tensor) -> Tensor:
    """Returns H by the update of BFGS, from gamma D."""
    s, y = pairs[-1]
    h = torch.diag(metric) * ((s @ y) / (y @ (metric * y)))
    one = torch.eye(len(s), dtype=torch.float64)
    for s, y in pairs:
        rho = 1 / (y @ s)
        h = (one - rho * torch.outer(s, y)) @ h @ (one - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    return h


def random_pairs(count: int, d: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    hessian = a @ a.T + torch.eye(d, dtype=torch.float64)
    steps = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return [(s, hessian @ s) for s in steps]


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_two_loops_are_the_explicit_matrix(count: int, is_scaled: bool) -> None:
    given_pairs, metric = random_pairs(count, 6), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    pairs = SecantPairs(4)
    pairs.metric = metric if is_scaled else None
    for s, y in given_pairs:
        assert pairs.add(s, y) == "kept"
    kept = given_pairs[-4:]
    assert len(pairs) == len(kept)
    h = explicit_inverse(kept, metric if is_scaled else torch.ones(6, dtype=torch.float64))
    x = torch.arange(6, dtype=torch.float64) - 2
    torch.testing.assert_close(pairs.multiply(x), h @ x, rtol=1e-10, atol=1e-10)
    # the secant equation, which is what a quasi-Newton matrix is for
    torch.testing.assert_close(pairs.multiply(kept[-1][1]), kept[-1][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 1e-12, math.nan, math.inf])
def test_a_pair_without_curvature_is_skipped(factor: float) -> None:
    pairs = SecantPairs(4)
    [(s, y)] = random_pairs(1, 5)
    pairs.add(s, y)
    before = pairs.multiply(y)
    skewed = factor * s + (y - (y @ s) / (s @ s) * s)
    assert pairs.add(s, skewed) == "skipped"
    assert torch.equal(pairs.multiply(y), before)


def test_powells_damping_leaves_just_enough_curvature() -> None:
    pairs = SecantPairs(4, powell=0.2)
    [(s, y)] = random_pairs(1, 5)
    assert pairs.add(s, y) == "kept"
    gamma = float(s @ y / (y @ y))
    assert pairs.add(s, -y) == "damped"
    stored = pairs.state_dict()["y"][-1]
    assert float(s @ stored) == pytest.approx(0.2 * float(s @ s) / gamma, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"most": 0}, "history=0"), ({"most": 1, "eps": -1.0}, "eps"), ({"most": 1, "powell": 1.0}, "powell")],
)
def test_pairs_refuse(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SecantPairs(**options)


# Line search


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.01, 50),
    st.floats(1e-3, 1e3),
    st.floats(0, 3),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_what_is_accepted_satisfies_both_conditions(
    curvature: float, first: float, wiggle: float, c2: float
) -> None:
    def phi(t: float) -> tuple[float, float]:
        value = 0.5 * curvature * (t - 1) ** 2 + wiggle * math.cos(3 * t)
        return value, curvature * (t - 1) - 3 * wiggle * math.sin(3 * t)

    value, slope = phi(0.0)
    found = wolfe.search(phi, value, slope, first, wolfe.Rule(1e-4, c2, 60))
    there = phi(found.t)
    assert there[0] <= value
    assert found.evaluations <= 60
    assert found.is_wolfe
    assert there[0] <= value + 1e-4 * found.t * slope
    assert abs(there[1]) <= c2 * abs(slope)


def test_a_search_keeps_out_of_where_there_is_no_value() -> None:
    def phi(t: float) -> tuple[float, float]:
        return (math.nan, math.nan) if t > 0.5 else (-math.log(1 - t) - 3 * t, 1 / (1 - t) - 3)

    found = wolfe.search(phi, 0.0, -2.0, 1.0, wolfe.Rule())
    assert found.is_wolfe
    assert 0 < found.t <= 0.5


def test_a_search_without_a_minimum_returns_the_lowest_point() -> None:
    found = wolfe.search(lambda t: (-t, -1.0), 0.0, -1.0, 1.0, wolfe.Rule(max_evaluations=4))
    assert (found.is_wolfe, found.evaluations) == (False, 4)
    assert found.t >= 1.1**3
    assert wolfe.search(lambda t: (t, 1.0), 0.0, -1.0, 1.0, wolfe.Rule(max_evaluations=5)).t == 0.0


# The optimizer


def test_it_reaches_the_minimum_of_rosenbrocks_function() -> None:
    x = vector(-1.2, 1.0, -0.5, 2.0)
    optimizer = LBFGS([x], iterations=100, tolerance=1e-9)
    optimizer.step(closure_of(rosenbrock, x))
    assert torch.allclose(x, torch.ones_like(x), atol=1e-8)
    assert optimizer.counts.kept == optimizer.counts.iterations > 10
    assert optimizer.counts.evaluations < 2 * optimizer.counts.iterations + 5


def test_its_second_order_part_is_what_makes_it_fast() -> None:
    """On a quadratic of condition 1000 it needs far fewer iterations than steepest descent may."""
    scales = torch.logspace(0, 3, 8, dtype=torch.float64)
    x = vector(*[1.0] * 8)
    optimizer = LBFGS([x], iterations=60, tolerance=1e-8, c2=0.5)
    optimizer.step(closure_of(lambda x: 0.5 * (scales * x * x).sum(), x))
    assert float(x.detach().abs().max()) < 1e-7
    assert optimizer.counts.iterations < 50
    plain = torch.ones(8, dtype=torch.float64)
    for _ in range(60):
        # the best fixed step: error times (k - 1) / (k + 1) per step
        plain -= 2 / 1001 * scales * plain
    assert float(plain.abs().max()) > 0.5


@pytest.mark.parametrize("line_search", ["strong_wolfe", "none"])
def test_a_group_of_another_rate_is_a_change_of_variables(line_search: Any) -> None:
    """With H_0 = gamma D, the iterates are those of f(D^(1/2) z) in z."""
    root = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    x = [vector(-1.2, 1.0), vector(0.3)]
    groups = [{"params": [x[0]], "lr": 0.01}, {"params": [x[1]], "lr": 0.0025}]
    z = nn.Parameter(torch.tensor([-1.2, 1.0, 0.6], dtype=torch.float64))
    # the first step is shortened by |g|_1, which is not the same in z: start it where it is not shortened
    small = 1e-3
    first = LBFGS(groups, line_search=line_search)
    second = LBFGS([z], lr=0.01, line_search=line_search)

    def grouped() -> Tensor:
        loss = small * rosenbrock(torch.cat(x))
        for each in x:
            each.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(6):
        first.step(grouped)
        second.step(closure_of(lambda z: small * rosenbrock(root * z), z))
        torch.testing.assert_close(torch.cat(x), root * z, rtol=1e-9, atol=1e-12)


def test_weight_decay_is_part_of_the_objective() -> None:
    x, same = vector(-1.2, 1.0), vector(-1.2, 1.0)
    with_decay = LBFGS([x], iterations=5, weight_decay=0.3)
    plain = LBFGS([same], iterations=5)
    value = with_decay.step(closure_of(rosenbrock, x))
    other = plain.step(closure_of(lambda x: rosenbrock(x) + 0.15 * x.square().sum(), same))
    assert value == pytest.approx(other, rel=1e-14)
    torch.testing.assert_close(x, same, rtol=1e-12, atol=1e-12)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    x = vector(-1.2, 1.0)
    optimizer = LBFGS([x], iterations=3)
    optimizer.step(closure_of(rosenbrock, x))
    assert optimizer.counts.kept > 0
    before = x.detach().clone()
    assert math.isnan(optimizer.step(closure_of(lambda x: rosenbrock(x) * math.nan, x)))
    assert torch.equal(x, before)
    assert optimizer.counts.resets == 1
    assert optimizer.state_dict()["pairs"] == {}
    optimizer.step(closure_of(rosenbrock, x))
    assert float(rosenbrock(x.detach())) < float(rosenbrock(before))


def test_a_step_that_overshoots_is_undone() -> None:
    x = vector(1.0)
    optimizer = LBFGS([x], lr=0.5, line_search="none")

    def barrier(x: Tensor) -> Tensor:
        return (-x.log() - 0.1 * x + x).sum() if float(x.detach()) < 1.05 else (x * math.nan).sum()

    value = optimizer.step(closure_of(barrier, x))
    assert value == pytest.approx(0.9)
    assert 0 < float(x.detach()) < 1.05
    assert optimizer.counts.resets == 0


def test_the_same_batch_is_not_evaluated_twice() -> None:
    x, other = vector(-1.2, 1.0), vector(-1.2, 1.0)
    saving, plain = LBFGS([x]), LBFGS([other])
    for _ in range(5):
        saving.step(closure_of(rosenbrock, x), same_batch=True)
        plain.step(closure_of(rosenbrock, other))
    assert torch.equal(x, other)
    assert saving.counts.evaluations == plain.counts.evaluations - 4
    with torch.no_grad():
        x += 1  # somebody else's change is noticed
    calls, now = saving.counts.evaluations, float(rosenbrock(x.detach()))
    assert saving.step(closure_of(rosenbrock, x), same_batch=True) == now
    assert saving.counts.evaluations > calls


def test_pairs_come_from_the_overlap_where_there_is_one() -> None:
    """The change of gradient between two batches is no curvature: with an overlap it does not occur."""
    x = vector(2.0, -3.0)
    scales = torch.tensor([3.0, 0.5], dtype=torch.float64)
    optimizer = LBFGS([x])
    noise = torch.tensor([5.0, -7.0], dtype=torch.float64)
    optimizer.step(
        closure_of(lambda x: 0.5 * (scales * x * x).sum() + noise @ x, x),
        pair_closure=closure_of(lambda x: 0.5 * (2 * scales * x * x).sum(), x),
    )
    pairs = optimizer.state_dict()["pairs"]
    torch.testing.assert_close(pairs["y"][0], 2 * scales * pairs["s"][0])


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    def run(steps: int, stop_after: int | None) -> Tensor:
        x = vector(-1.2, 1.0, 0.7)
        optimizer = LBFGS([x], history=3, powell=0.1)
        for step in range(steps):
            if step == stop_after:
                buffer = io.BytesIO()
                torch.save({"x": x.detach(), "optimizer": optimizer.state_dict()}, buffer)
                buffer.seek(0)
                saved = torch.load(buffer, weights_only=True)
                x = nn.Parameter(saved["x"])
                optimizer = LBFGS([x], history=3, powell=0.1)
                optimizer.load_state_dict(saved["optimizer"])
            optimizer.step(closure_of(rosenbrock, x), same_batch=True)
        return x.detach()

    for stop_after in range(8):
        assert torch.equal(run(8, None), run(8, stop_after))


def test_restored_pairs_are_the_same_to_the_last_bit() -> None:
    """In float32, with a length whose rows begin at any address."""
    generator = torch.Generator().manual_seed(0)
    pairs, again = SecantPairs(8), SecantPairs(8)
    for _ in range(8):
        s = torch.randn(9391, generator=generator)
        assert pairs.add(s, s + 0.1 * torch.randn(9391, generator=generator)) == "kept"
    again.load_state_dict(pairs.state_dict(), torch.zeros(9391))
    vector = torch.randn(9391, generator=generator)
    assert torch.equal(pairs.multiply(vector), again.multiply(vector))


def test_foreign_states_are_refused() -> None:
    optimizer = LBFGS([vector(1.0, 2.0)])
    with pytest.raises(ValueError, match="no counts and no pairs: it is not of L-BFGS"):
        optimizer.load_state_dict(torch.optim.SGD([vector(1.0, 2.0)], lr=1.0).state_dict())
    longer = vector(1.0, 2.0, 3.0)
    other = LBFGS([longer])
    other.step(closure_of(rosenbrock, longer))
    with pytest.raises(ValueError, match="parameters have 2 numbers"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"c1": 0.95}, "c1 < c2"),
        ({"line_search": "armijo"}, "allowed are strong_wolfe, none"),
        ({"reduction": "max"}, "allowed are sum, mean"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LBFGS([vector(1.0)], **options)


# Ranks

STEPS = 6


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (12,), generator=generator)


def train(parts: list[slice], options: dict[str, Any], broken_rank: int = -1) -> dict[str, Any]:
    """Trains a small net, this rank on its part of the data; NaN on one rank in the third step, if asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    traffic = Communicator()
    optimizer = LBFGS(groups, weight_decay=0.01, communicator=traffic, **options)
    x, target = (each[parts[dist.rank()]] for each in data())
    losses = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / 12
            if step == 2 and dist.rank() == broken_rank:
                loss = loss * math.nan
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
    weights = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    return {
        "weights": weights,
        "losses": losses,
        "counts": optimizer.counts,
        "traffic": traffic.take_traffic(),
    }


@pytest.mark.dist
@pytest.mark.parametrize("bounds", [[0, 6, 12], [0, 1, 5, 12], [0, 3, 6, 9, 12]])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "none"])
def test_ranks_are_one_process_on_the_joined_batch(bounds: list[int], line_search: str) -> None:
    options = {"line_search": line_search, "lr": 0.3, "history": 4}
    alone = train([slice(0, 12)], options)
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    found = run_on_ranks(train, len(parts), parts, options)
    assert alone["losses"][-1] < alone["losses"][0]
    for each in found:
        torch.testing.assert_close(each["weights"], alone["weights"], rtol=1e-10, atol=1e-10)
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-10)
        assert each["counts"] == alone["counts"]
        assert torch.equal(each["weights"], found[0]["weights"])


@pytest.mark.dist
def test_bytes_are_those_of_the_formula() -> None:
    results = run_on_ranks(train, 2, [slice(0, 5), slice(5, 12)], {})
    d, counts = len(results[0]["weights"]), results[0]["counts"]
    traffic = results[0]["traffic"]
    assert traffic["objective", "all_reduce"] == (counts.evaluations, counts.evaluations * (d + 1) * 8)
    assert traffic["direction", "broadcast"] == (counts.iterations, counts.iterations * d * 8)


@pytest.mark.dist
def test_no_rank_hangs_when_one_has_no_finite_loss() -> None:
    results = run_on_ranks(train, 3, [slice(0, 4), slice(4, 8), slice(8, 12)], {}, 1)
    for each in results:
        assert math.isnan(each["losses"][2])
        assert math.isfinite(each["losses"][-1])
        assert each["counts"].resets == 1
        assert torch.equal(each["weights"], results[0]["weights"])
