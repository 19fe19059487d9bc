"""Whole runs with a parameter server, in this process; see test_processes.py for real ones."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import rundir
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import models
from hpcsngd.train.faults import NotFiniteError, SettingError
from hpcsngd.train.parameter_server import session
from hpcsngd.train.parameter_server.delays import DelayModel
from hpcsngd.train.parameter_server.engine import LostWorkerError, Push
from hpcsngd.train.parameter_server.server import Server
from tests.train import runs
from tests.train.parameter_server.runs import WorkerDiedError, served, train
from tests.train.runs import assert_same_weights, dropout_net, rows, weights


def staleness(run: RunDir) -> list[dict[str, Any]]:
    return list(rundir.read_rows(run.metrics("staleness"), TABLES["staleness"]))


def finished(run: RunDir, attempt: int = 1) -> dict[str, Any]:
    return rundir.read_yaml(run.attempt(attempt).finished_yaml)


@pytest.mark.parametrize("section", ["{}", "{mode: sync}", "{compensation: {strength: 2}}"])
def test_one_worker_is_ddp_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    """With dropout, batch norm, momentum, accumulation, a schedule and clipping."""
    monkeypatch.setitem(models.MODELS, "digits-cnn", dropout_net)
    settings = {"schedule.kind": "cosine", "clip_norm": 1.0, "accumulate": 2}
    alone, one = runs.make_run(tmp_path, **settings), served(tmp_path, section, **settings)
    assert runs.train(alone)
    assert train(one)
    assert_same_weights(alone, one)
    for table in ("train", "eval"):
        assert rows(alone, table) == rows(one, table)
    assert [row["staleness"] for row in staleness(one)] == [0] * finished(one)["steps"]


@pytest.mark.parametrize("optimizer", ["{name: adam, lr: 0.01, betas: [0.8, 0.9]}", "{name: sgd, lr: 0.1}"])
def test_synchronous_workers_are_ddp_on_as_many_samples(tmp_path: Path, optimizer: str) -> None:
    whole = runs.make_run(tmp_path, batch_size=48, optimizer=optimizer)
    shared = served(tmp_path, "{mode: sync}", batch_size=16, optimizer=optimizer)
    assert runs.train(whole)
    assert train(shared, workers=3)
    for name, value in weights(whole).items():
        # sums in another order, in float32, over 8 steps
        torch.testing.assert_close(weights(shared)[name], value, rtol=1e-3, atol=1e-4)
    assert [row["worker"] for row in staleness(shared)] == [1, 2, 3] * 8
    assert {row["staleness"] for row in staleness(shared)} == {0}


@pytest.mark.parametrize("section", ["{}", "{shares: equal, partition: split}", "{partition: shared}"])
def test_every_strategy_uses_as_many_samples(tmp_path: Path, section: str) -> None:
    run = served(tmp_path, section)
    assert train(run, workers=3)
    assert rows(run, "train")[-1]["samples"] == 2 * 200
    found = staleness(run)
    assert [row["step"] for row in found] == list(range(1, 27))
    assert sorted(row["work"] for row in found) == list(range(26))
    if "equal" in section:
        assert sorted(Counter(row["worker"] for row in found).values()) == [8, 9, 9]


def test_a_replay_repeats_a_run_bit_for_bit_and_compensation_changes_it(tmp_path: Path) -> None:
    delay = "delay: {mean_ms: 2, std_ms: 2}"
    run = served(tmp_path, f"{{{delay}}}")
    assert train(run, workers=3)
    assert max(row["staleness"] for row in staleness(run)) > 0
    log = f"replay: {run.path}"
    same, none, some = (
        served(tmp_path, section)
        for section in (
            f"{{{log}, {delay}}}",
            f"{{{log}, compensation: {{strength: 0}}}}",
            f"{{{log}, compensation: {{strength: 2}}}}",
        )
    )
    for other in (same, none, some):
        assert train(other, workers=3)
        names = ("step", "worker", "pulled", "staleness", "work")
        assert [[row[name] for name in names] for row in staleness(other)] == [
            [row[name] for name in names] for row in staleness(run)
        ]
    assert_same_weights(run, same)
    assert_same_weights(run, none)
    largest = max(float((weights(run)[name] - weights(some)[name]).abs().max()) for name in weights(run))
    assert largest > 1e-4
    # drawn alike for the same worker and turn, and written down as they were
    model = DelayModel(2.0, 2.0)
    for worker in (1, 2, 3):
        drawn = [row["delay_ms"] for row in staleness(run) if row["worker"] == worker]
        assert drawn == [1000 * model.seconds(3, worker, turn) for turn in range(len(drawn))]
        assert drawn == [row["delay_ms"] for row in staleness(same) if row["worker"] == worker]


@pytest.mark.parametrize(("section", "workers"), [("{}", 1), ("{mode: sync}", 2)])
@pytest.mark.parametrize("stop_after", [5, 13])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, section: str, workers: int, stop_after: int
) -> None:
    batch = {"batch_size": 16 // workers, "optimizer.name": "adam", "optimizer.lr": 0.01}
    whole, parted = (served(tmp_path, section, **batch) for _ in range(2))
    assert train(whole, workers=workers)
    assert not train(parted, workers=workers, stop_after=stop_after)
    assert parted.attempt(1).stopped_yaml.exists()
    assert train(parted, 2, workers=workers)
    assert_same_weights(whole, parted)
    for table in ("train", "eval"):
        assert rows(whole, table) == rows(parted, table)


def test_a_stopped_asynchronous_run_leaves_no_sample_out(tmp_path: Path) -> None:
    run = served(tmp_path, "{partition: split}", **{"checkpoint.every_steps": 4})
    assert not train(run, workers=3, stop_after=6)
    assert train(run, 2, workers=3)
    last = {row["step"]: row["work"] for row in staleness(run)}
    assert sorted(last.values()) == list(range(26))
    repeat = served(tmp_path, f"{{partition: split, replay: {run.path}}}", **{"checkpoint.every_steps": 4})
    assert train(repeat, workers=3)
    assert_same_weights(run, repeat)


def dies_at(worker: int, number: int) -> Any:
    def on_push(who: int, push: Push, server: Server) -> None:
        if (who, push.number) == (worker, number):
            raise WorkerDiedError

    return on_push


def test_asynchronous_training_goes_on_without_a_lost_worker(tmp_path: Path) -> None:
    run = served(tmp_path)
    assert train(run, workers=2, on_push=dies_at(1, 0))
    assert [row["worker"] for row in staleness(run)] == [2] * 26
    assert sorted(row["work"] for row in staleness(run)) == list(range(26))
    [lost] = finished(run)["lost_workers"]
    assert lost.startswith("worker 1 was ended by a test, seen after step ")


def test_a_worker_that_falls_silent_counts_as_lost(tmp_path: Path) -> None:
    """It is not dead: what it pushes in the end is refused."""
    over = threading.Event()
    late: list[Exception] = []

    def on_push(who: int, push: Push, server: Server) -> None:
        if (who, push.number) != (2, 1):
            return
        server._heard[2] -= 7200
        assert over.wait(60)
        try:
            server.push(who, push)
        except LostWorkerError as error:
            late.append(error)
            raise

    def end_when_finished() -> None:
        deadline = time.monotonic() + 60
        while not run.attempt(1).finished_yaml.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        over.set()

    run = served(tmp_path, "{lost_after_s: 3600}")
    watching = threading.Thread(target=end_when_finished)
    watching.start()
    assert train(run, workers=2, on_push=on_push)
    watching.join()
    [lost] = finished(run)["lost_workers"]
    assert re.match(r"worker 2 has been silent for 7\d\d\d s, seen after step ", lost)
    assert "its push does not count" in str(late[0])
    assert sorted(row["work"] for row in staleness(run)) == list(range(26))


def test_threads_are_shared_by_the_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    session._bound_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    session._bound_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    session._bound_threads()
    assert asked == [2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("section", ["{mode: sync}", "{compensation: {strength: 2}}"])
def test_a_gpu_trains_alike(tmp_path: Path, section: str) -> None:
    there, here = served(tmp_path, section, deterministic="false"), served(tmp_path, section)
    workers = 2 if "sync" in section else 1
    assert train(there, workers=workers, device=torch.device("cuda"))
    assert train(here, workers=workers)
    for name, value in weights(here).items():
        # convolutions sum in another order, in float32, over 26 steps
        torch.testing.assert_close(weights(there)[name].cpu(), value, rtol=1e-2, atol=1e-3)


def test_synchronous_training_ends_with_the_lost_workers_name(tmp_path: Path) -> None:
    run = served(tmp_path, "{mode: sync}")
    with pytest.raises(
        LostWorkerError, match="worker 2 was ended by a test, and synchronous updates need it"
    ):
        train(run, workers=2, on_push=dies_at(2, 1))
    assert not run.attempt(1).finished_yaml.exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = served(tmp_path, **{"optimizer.lr": 1e30})
    with pytest.raises(NotFiniteError, match=r"loss is (nan|inf) in update"):
        train(run, workers=2)


@pytest.mark.parametrize(
    ("section", "workers", "match"),
    [
        ("{partition: labels}", 3, "10 labels cannot be dealt out to 3 workers .* allowed: 1, 2, 5, 10"),
        ("{delay: {mean_ms: 1, slow_worker: 3}}", 2, "slow_worker is 3, but the last worker is 2"),
        ("{}", 0, "at least 2 ranks"),
        ("{replay: /nowhere}", 2, "parameter_server.replay"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, section: str, workers: int, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        train(served(tmp_path, section), workers=workers)


@pytest.mark.parametrize("section", ["{delay: {mean_ms: 5}}", "{mode: sync, delay: {mean_ms: 5}}"])
def test_a_time_limit_ends_a_run_wherever_it_is(tmp_path: Path, section: str) -> None:
    run = served(tmp_path, section, epochs=100000, train_limit_s=0.5)
    assert train(run, workers=2)
    result, last = finished(run), rows(run, "train")[-1]
    assert result["train_s"] >= 0.5
    assert last["step"] == result["steps"] == rows(run, "eval")[-1]["step"] < 100000
    assert result["epochs"] == last["epoch"]
    assert run.newest_checkpoint() == f"step_{result['steps']}"
    # nothing is left to do
    assert train(run, 2, workers=2)
    assert finished(run, 2)["steps"] == result["steps"]


def test_a_replay_of_another_size_is_refused(tmp_path: Path) -> None:
    run = served(tmp_path, epochs=1)
    assert train(run, workers=2)
    with pytest.raises(SettingError, match="has 13 updates of workers up to 2; this run makes 26 with 2"):
        train(served(tmp_path, f"{{replay: {run.path}}}"), workers=2)


def test_a_checkpoint_of_other_workers_is_refused(tmp_path: Path) -> None:
    run = served(tmp_path)
    assert not train(run, workers=2, stop_after=3)
    with pytest.raises(SettingError, match="start as many ranks as before"):
        train(run, 2, workers=3)
