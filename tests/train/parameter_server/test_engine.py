"""The server's state: scripted schedules against hand-stepped weights, threads, losses and failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.train.faults import NotFiniteError
from hpcsngd.train.parameter_server.compensation import Rule
from hpcsngd.train.parameter_server.engine import Engine, LostWorkerError, Push, Snapshot, Update

LR, MOMENTUM = 0.1, 0.9


class Quadratic(nn.Module):
    """Loss 0.5 |w - target|^2 of a sample; one buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))


def make(
    mode: Any = "async", workers: int = 2, momentum: float = 0.0, **options: Any
) -> tuple[Quadratic, Engine]:
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    return model, Engine(model, [optimizer], mode=mode, workers=range(1, workers + 1), **options)


def gradient(w: Tensor, target: float) -> Tensor:
    return w - target


def push_of(snapshot: Snapshot, number: int, target: float, samples: int = 4) -> Push:
    w, _ = snapshot.parameters[0], snapshot.buffers
    buffers = (torch.full((2,), target, dtype=torch.float64), torch.tensor(number + 1))
    return Push(number, snapshot.version, [gradient(w, target)], buffers, 1.0 * samples, 1.0, samples)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Runs calls at once; returns their results or exceptions."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def test_one_worker_is_sgd_bit_for_bit() -> None:
    model, engine = make(workers=1, momentum=MOMENTUM)
    plain = Quadratic()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM)
    for step in range(6):
        snapshot = engine.pull(1)
        assert engine.push(1, push_of(snapshot, step, target=0.3 * step)) == step + 1
        plain.w.grad = gradient(plain.w.detach(), 0.3 * step)
        optimizer.step()
        assert torch.equal(model.w, plain.w)
    assert engine.samples == 24


def scripted(engine: Engine) -> None:
    """Worker 1 pulls, worker 2 makes two updates, worker 1 pushes what has grown old."""
    old = engine.pull(1)
    for number in range(2):
        engine.push(2, push_of(engine.pull(2), number, target=1.0))
    engine.push(1, push_of(old, 0, target=-1.0))


@pytest.mark.parametrize("strength", [None, 0.0, 2.0])
def test_a_stale_push_by_hand(strength: float | None) -> None:
    seen: list[Update] = []
    rule = None if strength is None else Rule(strength)
    model, engine = make(compensation=rule, after_update=seen.append)
    scripted(engine)
    w = start = Quadratic().w.detach()
    for _ in range(2):
        w = w - LR * gradient(w, 1.0)
    g = gradient(start, -1.0)
    expected = w - LR * (g + (strength or 0.0) * g * g * (w - start))
    assert torch.allclose(model.w, expected, rtol=1e-14, atol=0)
    assert [update.staleness for update in seen] == [0, 0, 2]
    assert [update.worker for update in seen] == [2, 2, 1]
    assert [update.version for update in seen] == [1, 2, 3]


def test_compensation_changes_the_update_and_zero_does_not() -> None:
    found = {}
    for strength in (None, 0.0, 2.0):
        model, engine = make(compensation=None if strength is None else Rule(strength))
        scripted(engine)
        found[strength] = model.w.detach().clone()
    assert torch.equal(found[None], found[0.0])
    assert float((found[2.0] - found[0.0]).abs().max()) > 0.1


def test_a_snapshot_is_never_changed() -> None:
    _, engine = make()
    old = engine.pull(1)
    kept = old.parameters[0].clone()
    engine.push(2, push_of(engine.pull(2), 0, target=5.0))
    assert torch.equal(old.parameters[0], kept)
    assert engine.pull(1).version == 1


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_a_round_is_the_mean_over_all_samples(order: tuple[int, ...]) -> None:
    """Whoever comes first: gradients are added in the order of the workers."""
    seen: list[Update] = []
    model, engine = make("sync", workers=3, after_update=seen.append)
    snapshots = {worker: engine.pull(worker) for worker in order}
    pushes = {worker: push_of(snapshots[worker], 0, float(worker), samples=worker) for worker in order}
    versions = in_threads(*(lambda w=w: engine.push(w, pushes[w]) for w in order))
    assert versions == [1, 1, 1]
    w = Quadratic().w.detach()
    expected = w - LR * sum(worker / 6 * gradient(w, float(worker)) for worker in (1, 2, 3))
    assert torch.allclose(model.w, expected, rtol=1e-14, atol=0)
    assert [(update.staleness, update.samples) for update in seen] == [(0, 6)]
    assert torch.allclose(model.get_buffer("mean"), torch.full((2,), 2.0, dtype=torch.float64))
    assert model.get_buffer("seen").item() == 1


def test_a_round_goes_on_without_who_has_finished() -> None:
    _, engine = make("sync", workers=2)
    first, second = engine.pull(1), engine.pull(2)
    waiting = lambda: engine.push(1, push_of(first, 0, 1.0))  # noqa: E731
    assert in_threads(waiting, lambda: engine.finish(2)) == [1, None]
    assert engine.push(1, push_of(engine.pull(1), 1, 1.0)) == 2
    assert second.version == 0


def test_a_lost_worker_ends_synchronous_training_by_name() -> None:
    _, engine = make("sync", workers=2)
    snapshot = engine.pull(1)
    found = in_threads(lambda: engine.push(1, push_of(snapshot, 0, 1.0)), lambda: engine.lose(2))
    assert isinstance(found[0], LostWorkerError)
    assert "worker 2 is gone" in str(found[0])
    with pytest.raises(LostWorkerError, match="worker 2 is gone"):
        engine.pull(1)


def test_asynchronous_training_survives_a_lost_worker() -> None:
    model, engine = make(workers=2)
    snapshot = engine.pull(2)
    engine.lose(2)
    assert engine.push(1, push_of(engine.pull(1), 0, 1.0)) == 1
    with pytest.raises(LostWorkerError, match="its push does not count"):
        engine.push(2, push_of(snapshot, 0, 1.0))
    assert engine.version == 1
    engine.lose(1)
    with pytest.raises(LostWorkerError, match="all workers are gone"):
        engine.pull(1)
    assert torch.isfinite(model.w).all()


def test_a_repeated_push_counts_once() -> None:
    model, engine = make()
    push = push_of(engine.pull(1), 0, 1.0)
    assert engine.push(1, push) == 1
    w = model.w.detach().clone()
    assert engine.push(1, push) == 1
    assert torch.equal(model.w, w)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: push_of(s, 3, 1.0), "push 3 came before push 0"),
        (
            lambda s: push_of(Snapshot(7, s.parameters, s.buffers), 0, 1.0),
            "of snapshot 7, but it has snapshot 0",
        ),
        (lambda s: push_of(s, 0, 1.0, samples=0), "push of 0 samples"),
    ],
)
def test_pushes_that_cannot_be(change: Callable[[Snapshot], Push], match: str) -> None:
    _, engine = make()
    with pytest.raises(ValueError, match=match):
        engine.push(1, change(engine.pull(1)))
    assert engine.version == 0


def test_an_error_in_an_update_reaches_everybody() -> None:
    def explode(_: Update) -> None:
        raise OSError("disk full")

    _, engine = make("sync", workers=2, after_update=explode)
    snapshots = {worker: engine.pull(worker) for worker in (1, 2)}
    found = in_threads(*(lambda w=w: engine.push(w, push_of(snapshots[w], 0, 1.0)) for w in (1, 2)))
    assert [str(error) for error in found] == ["disk full"] * 2
    assert str(engine.failure) == "disk full"


def test_a_loss_that_is_not_finite_ends_training_before_the_update() -> None:
    model, engine = make()
    before = model.w.detach().clone()
    good = push_of(engine.pull(1), 0, 1.0)
    bad = Push(0, 0, good.gradients, good.buffers, float("nan"), 0.0, 4)
    with pytest.raises(NotFiniteError, match="loss is nan in update 1, pushed by worker 1"):
        engine.push(1, bad)
    assert torch.equal(model.w, before)


def test_a_replay_repeats_a_run_bit_for_bit() -> None:
    def work(engine: Engine, worker: int) -> None:
        for number in range(15):
            engine.push(worker, push_of(engine.pull(worker), number, target=0.1 * worker + 0.01 * number))

    def run(replay: Any) -> tuple[Tensor, list[Any]]:
        model, engine = make(workers=3, momentum=MOMENTUM, compensation=Rule(1.0), replay=replay)
        found = in_threads(*(lambda w=w: work(engine, w) for w in (1, 2, 3)))
        assert found == [None] * 3
        return model.w.detach().clone(), engine.events

    free, events = run(None)
    assert len(events) == 90
    again, same = run(events)
    assert same == events
    assert torch.equal(free, again)
    by_worker = [event for w in (1, 2, 3) for _ in range(15) for event in (("pull", w), ("push", w))]
    in_rounds = [(verb, w) for _ in range(15) for verb in ("pull", "push") for w in (1, 2, 3)]
    ends = []
    for turns in (by_worker, in_rounds):
        end, followed = run(turns)
        assert followed == turns
        ends.append(end)
    assert not torch.equal(*ends)


def test_a_resumed_engine_goes_on() -> None:
    model, engine = make(workers=1, compensation=Rule(1.0, "adaptive"))
    engine.push(1, push_of(engine.pull(1), 0, 1.0))
    other, resumed = make(workers=1, compensation=Rule(1.0, "adaptive"))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(engine.state_dict())
    assert (resumed.version, resumed.samples) == (1, 4)
    engine.push(1, push_of(engine.pull(1), 1, 2.0))
    resumed.push(1, push_of(resumed.pull(1), 0, 2.0))
    assert torch.equal(model.w, other.w)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no delay to compensate"):
        make("sync", compensation=Rule(1.0))
    with pytest.raises(ValueError, match="at least one worker"):
        make(workers=0)
