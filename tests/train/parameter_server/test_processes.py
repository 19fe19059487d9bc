"""A server and workers in processes of their own, started by an agent, killed and asked to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import lifeline, rundir
from hpcsngd.config import resolve
from hpcsngd.launch import plan, submit
from hpcsngd.rundir import RunDir, Status
from hpcsngd.tables import TABLES
from tests.train.runs import EXPERIMENT

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def send(folder: Path, section: str, worker: str = plan.WORKER, **settings: Any) -> RunDir:
    """Submits a run of a server and two workers, of a module, on this machine."""
    file = folder / "small.yaml"
    file.write_text(EXPERIMENT)
    given = {"strategy": "parameter_server", "parameter_server": section, "ranks_per_node": 3}
    given |= {"run_root": folder / "runs", **settings}
    changes = [resolve.override(name, str(value), "test") for name, value in given.items()]
    return submit.submit(resolve.resolve("local", str(file), changes), argv=["test"], worker=worker).run


def updates(run: RunDir) -> int:
    """Returns how many updates the server has made."""
    file = run.metrics("staleness")
    return file.read_text().count("\n") - 1 if file.exists() else 0


def wait_until(is_true: Callable[[], bool], run: RunDir) -> None:
    deadline = time.monotonic() + 240
    while not is_true():
        assert run.status() is None, run.status()
        assert time.monotonic() < deadline
        time.sleep(0.1)


#: Worker 2 waits until it is killed, whatever the speed of the machine.
STUCK = "delay: {mean_ms: 150000, kind: constant, all_workers: false, slow_worker: 2}"


def run_and_kill(folder: Path, section: str) -> tuple[RunDir, Status]:
    """Returns a run, one of whose workers was killed while it waited on purpose."""
    run = send(folder, section)

    def worker() -> lifeline.Beat | None:
        return lifeline.read_beat(run.attempt(1).heartbeats, "rank2")

    wait_until(lambda: (beat := worker()) is not None and beat.phase == "compute", run)
    beat = worker()
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    return run, submit.wait(run, poll_s=0.2)


def test_asynchronous_training_survives_a_killed_worker(tmp_path: Path) -> None:
    # with equal shares worker 1 cannot be done with everything before worker 2 is there
    run, ended = run_and_kill(tmp_path, f"{{mode: async, shares: equal, {STUCK}}}")
    assert ended.state == "completed", ended.reason
    assert ended.reason.startswith("went on although worker 2 on ")
    assert "was ended by SIGKILL (signal 9), seen after step " in ended.reason
    assert ended.result is not None
    assert ended.result["steps"] == 26
    rows = list(rundir.read_rows(run.metrics("staleness"), TABLES["staleness"]))
    assert sorted(row["work"] for row in rows) == list(range(26))
    assert [row["worker"] for row in rows] == [1] * 26


def test_synchronous_training_names_a_killed_worker(tmp_path: Path) -> None:
    run, ended = run_and_kill(tmp_path, f"{{mode: sync, {STUCK}}}")
    assert ended.state == "failed"
    assert ended.reason.startswith("killed: worker 2 on ")
    assert "was ended by SIGKILL (signal 9), and synchronous updates need it (rank 0 on" in ended.reason
    # the worker that is left was told the cause
    told = [fault for fault in run.attempt(1).faults() if fault.rank == 1]
    assert [fault.is_echo for fault in told] == [True]
    assert "and synchronous updates need it" in told[0].message


def test_an_exception_of_the_server_reaches_everybody(tmp_path: Path) -> None:
    run = send(tmp_path, "{mode: async}", **{"optimizer.lr": "1e30"})
    ended = submit.wait(run, poll_s=0.2)
    assert ended.state == "failed"
    assert ended.reason.startswith("nan: loss is ")
    assert "(rank 0 on" in ended.reason
    faults = {fault.rank: fault for fault in run.attempt(1).faults()}
    assert set(faults) == {0, 1, 2}
    assert {fault.kind for fault in faults.values()} == {"nan"}
    assert [faults[rank].is_echo for rank in (0, 1, 2)] == [False, True, True]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_an_exception_of_a_worker_ends_the_run(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike the loss of a worker: the same program would fail in the others as well."""
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))))
    failing = f"{__package__}.failing_worker"
    # worker 1 is slow enough to leave something for worker 2
    slow = "delay: {mean_ms: 2000, kind: constant, all_workers: false, slow_worker: 1}"
    ended = submit.wait(run := send(tmp_path, f"{{mode: {mode}, {slow}}}", failing), poll_s=0.2)
    assert ended.state == "failed"
    assert ended.reason.startswith("unknown: RuntimeError: no such luck (rank 2 on")
    faults = {fault.rank: fault for fault in run.attempt(1).faults()}
    assert set(faults) == {0, 1, 2}
    assert [faults[rank].is_echo for rank in (0, 1, 2)] == [True, True, False]
    assert "no such luck" in faults[1].message


def test_a_stop_request_is_followed_with_a_checkpoint(tmp_path: Path) -> None:
    # so many epochs that it cannot be over before
    run = send(tmp_path, "{mode: async, delay: {mean_ms: 50}}", epochs=10000)
    wait_until(lambda: updates(run) >= 3, run)
    run.attempt(1).stop_request.touch()
    ended = submit.wait(run, poll_s=0.2)
    assert (ended.state, ended.reason) == (
        "preempted",
        "stopped by a stop request; the workers checkpointed and left",
    )
    step = int(run.newest_checkpoint().removeprefix("step_"))
    assert 3 <= step == updates(run)
    assert run.attempt(1).lost_ranks() == {}
