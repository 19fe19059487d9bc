"""Who solves for a layer never changes the result, and costs the bytes that the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpcsngd.optim import HyLo
from hpcsngd.optim.placement import Load, Placer
from tests.optim import models, oracle, training
from tests.ranks import run_on_ranks

# As in test_ranks: rounding of sums in another order, amplified by the kernel's condition number.
TOLERANCE = 1e-9

METHODS: dict[str, dict[str, Any]] = {
    "sngd": {"damping": 0.05, "rescale": "norm"},
    "kis": {"damping": 0.05, "method": "kis", "ratio": 0.4, "seed": 3},
    "kid": {"damping": 0.05, "method": "kid", "ratio": 0.5, "complement": "residual"},
    "exact": {"damping": 0.05, "conv_mode": "exact", "refresh_every": 2, "stagger": True},
}
# d_in and d_out of training's mlp, in the order of its layers.
SIZES = [(6, 6), (7, 3)]


def test_the_choice_is_the_one_with_fewer_bytes() -> None:
    """Both sides of the inequality as they stand in the module's text."""
    for ranks in (2, 3, 8):
        for period in (1, 10, 100):
            for samples in (8, 64, 512):
                load = Load(samples, row=30, entries=200)
                replicated = (ranks - 1) * samples * load.row
                owned = (ranks - 1) / ranks * samples * load.row + period * (ranks - 1) * load.entries
                assert load.has_owner(ranks, period) == (owned < replicated), (ranks, period, samples)


def test_owners_share_the_work() -> None:
    loads = {f"layer{index}": Load(64, 30, 20 * (index + 1)) for index in range(8)}
    owners = Placer("owner", 3, 10).owners(loads)
    assert set(owners) == set(loads)
    work = [sum(loads[name].work(10) for name in loads if owners[name] == rank) for rank in range(3)]
    assert max(work) <= sum(work) / 3 + max(load.work(10) for load in loads.values())
    assert Placer("replicate", 3, 10).owners(loads) == {}
    assert Placer("owner", 1, 10).owners(loads) == {}
    few, many = Placer("auto", 3, 1).owners(loads), Placer("auto", 3, 1000).owners(loads)
    assert set(few) == set(loads)
    assert many == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "owners"}, "placement='owners': allowed are auto, replicate, owner"),
        ({"placement": "owner", "method": "kid", "kid_scope": "local"}, "kid_scope 'local' keeps its few"),
        ({"placement": "owner", "observe": ["grad_error"]}, "needs kernels on every rank"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyLo(models.mlp(), **options)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("sizes", "method"),
    [
        ([12], "kid"),
        ([6, 6], "kid"),
        ([5, 7], "exact"),
        ([3, 7, 2], "sngd"),
        ([3, 7, 2], "kis"),
        ([5, 0, 6, 1], "kid"),
        ([5, 0, 6, 1], "exact"),
    ],
    ids=str,
)
def test_results_do_not_depend_on_placement(sizes: list[int], method: str) -> None:
    expected = training.train("conv", [sum(sizes)], 4, METHODS[method])["gradients"]
    for placement in ("replicate", "owner", "auto"):
        options = {**METHODS[method], "placement": placement}
        results = run_on_ranks(training.train, len(sizes), "conv", sizes, 4, options)
        for result in results:
            for left, right, first in zip(
                result["gradients"], expected, results[0]["gradients"], strict=True
            ):
                assert oracle.relative_error(left, right) < TOLERANCE
                assert torch.equal(left, first)


@pytest.mark.dist
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_bytes_of_owners_equal_their_formula(refresh_every: int) -> None:
    sizes, steps = [3, 7, 2], 3
    options = {"damping": 0.05, "placement": "owner", "refresh_every": refresh_every, "profile": True}
    results = run_on_ranks(training.train, 3, "mlp", sizes, steps, options)
    owners = results[0]["state"]["hylo"]["owners"]
    assert len(set(owners.values())) == 2
    entries = {name: d_in * d_out for name, (d_in, d_out) in zip(owners, SIZES, strict=True)}
    rows = {name: d_in + d_out for name, (d_in, d_out) in zip(owners, SIZES, strict=True)}
    owned = [sum(entries[name] for name in owners if owners[name] == rank) for rank in range(3)]
    for rank, result in enumerate(results):
        elsewhere = sum(rows[name] for name in owners if owners[name] != rank)
        for index, record in enumerate(result["records"]):
            found = {(x.phase, x.op): (x.calls, x.size_bytes) for x in record.communication}
            assert found.pop(("broadcast", "all_gather")) == (1, 8 * max(owned))
            if index % refresh_every == 0:
                assert found.pop(("gather", "all_to_all")) == (1, 8 * sizes[rank] * elsewhere)
                assert found.pop(("gather", "all_gather")) == (1, 16 * len(owners))
                # Failures of every layer and rows kept of every owned one.
                assert found.pop(("factorise", "all_reduce")) == (1, 16 * len(owners))
            assert found == {}
        # Rows and factors are with their owners only.
        held = {x.kind: x.size_bytes for x in result["records"][-1].memory}
        here = sum(rows[name] for name in owners if owners[name] == rank)
        assert held["rows"] == 8 * sum(sizes) * here


@pytest.mark.dist
@pytest.mark.parametrize("saved_after", [1, 2, 4])
def test_resume_with_owners(saved_after: int) -> None:
    """Bit for bit on as many ranks; to rounding on another number, where owners are chosen anew."""
    options = {**METHODS["kid"], "refresh_every": 3, "placement": "owner"}
    uninterrupted = run_on_ranks(training.train, 2, "conv", [4, 4], 6, options)[0]
    first, second = run_on_ranks(training.train, 2, "conv", [4, 4], saved_after, options)
    state = first["state"]
    assert set(state["hylo"]["owners"].values()) == {0, 1}
    for name, layer in second["state"]["hylo"]["layers"].items():
        assert torch.equal(layer["factor"], state["hylo"]["layers"][name]["factor"])
    alike = run_on_ranks(training.train, 2, "conv", [4, 4], 6, options, state)[1]
    other = training.train("conv", [8], 6, options, state)
    for left, right, expected in zip(
        alike["gradients"], other["gradients"], uninterrupted["gradients"], strict=True
    ):
        assert torch.equal(left, expected)
        assert oracle.relative_error(right, expected) < TOLERANCE


@pytest.mark.dist
@pytest.mark.parametrize(("fault", "layers"), [("rows", 1), ("kernel", 1)])
def test_an_owners_fault_is_everybodys(fault: str, layers: int) -> None:
    """The last rank owns one of two layers: only that kernel can fail there."""
    results = run_on_ranks(training.train_through_a_fault, 2, 3, fault, "owner")
    assert [result["failures"] for result in results] == [layers, layers]
    for left, right in zip(results[0]["gradients"], results[1]["gradients"], strict=True):
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)
            assert bool(one.isfinite().all())
