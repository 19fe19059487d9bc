"""Partition, delays and compensation: exact rules, refusals, hand-computed values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hpcsngd.train.faults import SettingError
from hpcsngd.train.parameter_server import partition
from hpcsngd.train.parameter_server.compensation import Compensation, Rule
from hpcsngd.train.parameter_server.delays import DelayModel

LABELS = torch.tensor([0, 1, 2, 3, 4, 5] * 4 + [0, 0, 0, 5])


def test_shared_is_everything_for_everybody() -> None:
    found = partition.parts("shared", LABELS, 3, seed=1)
    assert [part.tolist() for part in found] == [list(range(28))] * 3


@pytest.mark.parametrize("workers", [1, 3, 5, 28])
def test_a_split_has_every_sample_once(workers: int) -> None:
    found = partition.parts("split", LABELS, workers, seed=1)
    sizes = [len(part) for part in found]
    assert len(found) == workers
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat(found).tolist()) == list(range(28))
    again = partition.parts("split", LABELS, workers, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_labels_are_dealt_out_in_turn_and_cut_to_the_smallest() -> None:
    unscaled = partition.parts("labels_unscaled", LABELS, 3, seed=2)
    scaled = partition.parts("labels", LABELS, 3, seed=2)
    labels_of = [set(LABELS[part].tolist()) for part in unscaled]
    assert sorted(len(found) for found in labels_of) == [2, 2, 2]
    assert set.union(*labels_of) == set(range(6))
    assert sorted(torch.cat(unscaled).tolist()) == list(range(28))
    smallest = min(len(part) for part in unscaled)
    assert [len(part) for part in scaled] == [smallest] * 3
    for whole, cut in zip(unscaled, scaled, strict=True):
        assert set(cut.tolist()) <= set(whole.tolist())
        assert set(LABELS[cut].tolist()) == set(LABELS[whole].tolist())


def test_labels_need_not_divide_where_sizes_may_differ() -> None:
    found = partition.parts("labels_unscaled", LABELS, 4, seed=2)
    assert sorted(len(set(LABELS[part].tolist())) for part in found) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("kind", "workers", "match"),
    [
        (
            "labels",
            4,
            "6 labels cannot be dealt out to 4 workers so that each has as many; allowed: 1, 2, 3, 6",
        ),
        ("labels_unscaled", 7, r"6 labels .* 7 workers; allowed: 1, 2, 3, 4, 5, 6"),
        ("split", 29, "28 training samples cannot be shared by 29"),
        ("by_color", 2, "allowed are shared, split, labels, labels_unscaled"),
    ],
)
def test_what_cannot_be_shared_is_refused(kind: Any, workers: int, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        partition.parts(kind, LABELS, workers, seed=0)


def test_constant_delays() -> None:
    everybody = DelayModel(60.0, kind="constant", slow_worker=2)
    assert [everybody.seconds(0, worker, 5) for worker in (1, 2, 3)] == [0.06, 0.12, 0.06]
    only_one = DelayModel(60.0, kind="constant", are_all_delayed=False, slow_worker=1)
    assert [only_one.seconds(0, worker, 5) for worker in (1, 2, 3)] == [0.12, 0.0, 0.0]


def test_gaussian_delays_are_drawn_alike_every_time() -> None:
    model = DelayModel(30.0, 10.0, slow_worker=2)
    drawn = torch.tensor([[model.seconds(7, worker, k) for k in range(2000)] for worker in (1, 2)])
    assert float(drawn.min()) >= 0
    torch.testing.assert_close(drawn.mean(1), torch.tensor([0.030, 0.060]), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn.std(1), torch.tensor([0.010, 0.020]), atol=1e-3, rtol=0)
    assert model.seconds(7, 1, 3) == pytest.approx(float(drawn[0, 3]), rel=1e-6)
    assert model.seconds(8, 1, 3) != model.seconds(7, 1, 3)
    assert DelayModel(0.0, 50.0).seconds(0, 1, 0) >= 0.0


@pytest.mark.parametrize(
    "options",
    [{"mean_ms": -1.0}, {"mean_ms": 1.0, "std_ms": math.inf}, {"mean_ms": 1.0, "are_all_delayed": False}],
)
def test_delays_refuse(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="delay"):
        DelayModel(**options)


def test_compensation_by_hand() -> None:
    g, now, then = (torch.tensor([x], dtype=torch.float64) for x in (0.5, 2.0, 1.0))
    [found] = Compensation(Rule(2.0), [now]).apply([g], [now], [then])
    assert found.item() == 0.5 + 2.0 * 0.25 * 1.0
    adaptive = Compensation(Rule(2.0, "adaptive", momentum=0.9, eps=1e-3), [now])
    [first] = adaptive.apply([g], [now], [then])
    mean = 0.1 * 0.25
    assert first.item() == pytest.approx(0.5 + 2.0 / math.sqrt(mean + 1e-3) * 0.25)
    state = adaptive.state_dict()
    [second] = adaptive.apply([g], [now], [then])
    mean = 0.9 * mean + 0.1 * 0.25
    assert second.item() == pytest.approx(0.5 + 2.0 / math.sqrt(mean + 1e-3) * 0.25)
    resumed = Compensation(Rule(2.0, "adaptive", momentum=0.9, eps=1e-3), [now])
    resumed.load_state_dict(state)
    assert torch.equal(resumed.apply([g], [now], [then])[0], second)


@pytest.mark.parametrize(
    "rule", [{"strength": -1.0}, {"strength": 1.0, "momentum": 1.0}, {"strength": 1.0, "eps": 0}]
)
def test_compensation_refuses(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compensation"):
        Rule(**rule)
