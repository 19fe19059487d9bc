"""Runs on several ranks: they agree with one rank, and survive being killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import rundir
from hpcsngd.rundir import RunDir
from tests import ranks as ranks_module
from tests.ranks import RankError, run_on_ranks
from tests.train import runs
from tests.train.runs import HYLO, assert_same_weights, make_run, rows, weights

pytestmark = pytest.mark.dist

# Ranks are forked from a process that has already imported what takes seconds.
ranks_module._CONTEXT.set_forkserver_preload(["torch", "tests.ranks", "tests.train.preload"])

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ranks", "preconditioner"),
    [(2, {}), (4, {}), (2, HYLO | {"data.augment": "{crop: 1, flip: true, cutout: 2}"}), (4, HYLO)],
    ids=["2-sgd", "4-sgd", "2-hylo-changed-images", "4-hylo"],
)
def test_ranks_do_what_one_rank_does(tmp_path: Path, ranks: int, preconditioner: dict[str, str]) -> None:
    # 200 samples: each epoch ends with a step of 8 that the ranks share
    alone = make_run(tmp_path, batch_size=16, **preconditioner)
    together = make_run(tmp_path, batch_size=16 // ranks, **preconditioner)
    assert runs.train(alone)
    assert run_on_ranks(runs.train, ranks, together) == [True] * ranks
    for name, value in weights(alone).items():
        # sums in another order, in float32, over 26 steps with momentum
        torch.testing.assert_close(weights(together)[name], value, rtol=2e-3, atol=2e-5)
    for mine, others in zip(rows(alone, "eval"), rows(together, "eval"), strict=True):
        assert others["count"] == mine["count"] == 60
        assert others["loss"] == pytest.approx(mine["loss"], rel=1e-3)


def test_accumulation_on_ranks_equals_a_larger_batch(tmp_path: Path) -> None:
    whole = make_run(tmp_path, batch_size=8, **HYLO)
    parts = make_run(tmp_path, batch_size=4, accumulate=2, **HYLO)
    for run in (whole, parts):
        run_on_ranks(runs.train, 2, run)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"optimizer.name": "sgd"}),
        (2, {"optimizer.name": "adam", "optimizer.lr": "0.01"} | HYLO),
        # three ranks: the order in which they are summed depends on DDP's buckets
        (3, HYLO | {"preconditioner.method": "kis", "preconditioner.ratio": "0.5", "accumulate": "2"}),
    ],
    ids=["sgd", "adam-hylo", "3-ranks-kis"],
)
@pytest.mark.parametrize("place", ["step", "checkpoint"])
def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(
    tmp_path: Path, ranks: int, settings: dict[str, str], place: str
) -> None:
    common = {"batch_size": 8, "checkpoint.every_steps": 3, "diagnostics.log_every": 2, "epochs": 3}
    whole, killed = (make_run(tmp_path, **common, **settings) for _ in range(2))
    run_on_ranks(runs.train_with_dropout, ranks, whole)
    for attempt in (1, 2):
        step = random.Random(f"{ranks}{place}{attempt}").randint(4, 9) + 5 * (attempt - 1)
        with pytest.raises(RankError, match="died with exit code -9"):
            run_on_ranks(runs.train_until_killed, ranks, killed, attempt, step, place)
    run_on_ranks(runs.train_with_dropout, ranks, killed, 3)
    assert_same_weights(whole, killed)
    for table in ("train", "eval"):
        assert rows(killed, table) == rows(whole, table)


def test_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    whole, changed = (make_run(tmp_path, batch_size=8, **HYLO) for _ in range(2))
    run_on_ranks(runs.train, 2, whole)
    run_on_ranks(runs.train_until_stopped, 2, changed, 20)
    record = changed.record()
    record["config"]["experiment"]["batch_size"] = 16
    rundir.write_yaml(changed.run_yaml, record)
    assert runs.train(changed, attempt=2)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(changed)[name], value, rtol=2e-3, atol=2e-5)


def test_every_rank_writes_its_own_profile(tmp_path: Path) -> None:
    run = make_run(tmp_path, batch_size=8, epochs=1, **HYLO, **{"diagnostics.profiling": "true"})
    run_on_ranks(runs.train, 2, run)
    for rank in (0, 1):
        assert {row["rank"] for row in rows(run, "profiling", rank=rank)} == {rank}
    assert {row["phase"] for row in rows(run, "communication")} >= {"gather"}
    assert all(row["size_bytes"] > 0 for row in rows(run, "communication"))


def start(run: RunDir, ranks: int, attempt: int) -> list[subprocess.Popen[bytes]]:
    """Starts workers as a launcher does, each in an environment of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"PYTHONPATH": ROOT, "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": ranks}
    command = [sys.executable, "-m", "hpcsngd.train.worker", str(run.path), "--attempt", str(attempt)]
    started = []
    for rank in range(ranks):
        own: dict[str, Any] = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    return started


def end(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Returns the exit statuses; no worker outlives this."""
    try:
        return [each.wait(timeout=120) for each in workers]
    finally:
        for each in workers:
            each.kill()
            each.wait()


def wait_for(condition: Any, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_processes_killed_from_outside_resume_bit_for_bit(tmp_path: Path) -> None:
    settings = {"batch_size": 8, "epochs": 12, "checkpoint.every_steps": 5, "optimizer.lr": 0.02} | HYLO
    whole, killed = make_run(tmp_path, **settings), make_run(tmp_path, **settings)
    assert end(start(whole, 2, 1)) == [0, 0]
    for attempt in (1, 2):
        newest = latest(killed)
        workers = start(killed, 2, attempt)
        wait_for(lambda: latest(killed) > newest + 10)  # noqa: B023
        time.sleep(random.Random(attempt).uniform(0, 0.2))
        for each in workers:
            each.send_signal(signal.SIGKILL)
        assert end(workers) == [-9, -9]
    assert end(start(killed, 2, 3)) == [0, 0]
    assert_same_weights(whole, killed)
    for table in ("train", "eval"):
        assert rows(killed, table) == rows(whole, table)


def test_a_stop_request_ends_all_ranks_with_one_exit_status(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=2000, **{"checkpoint.every_epochs": "null"})
    workers = start(run, 2, 1)
    wait_for(lambda: run.metrics("train").exists())
    run.attempt(1).path.mkdir(parents=True, exist_ok=True)
    run.attempt(1).stop_request.touch()
    assert end(workers) == [75, 75]
    assert latest(run) > 0
    assert not run.attempt(1).finished_yaml.exists()


def latest(run: RunDir) -> int:
    file = run.checkpoints_dir / "latest"
    return int(file.read_text().strip().removeprefix("step_")) if file.exists() else 0
