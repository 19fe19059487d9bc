"""A parameter server on three nodes of the real cluster: a lost worker, and a run that is put back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hpcsngd import lifeline, rundir
from hpcsngd.config.resolve import Resolved
from hpcsngd.launch import submit
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from tests.train.parameter_server.runs import train
from tests.train.runs import assert_same_weights, rows

from .conftest import Configure

if TYPE_CHECKING:
    from tests.testbed.plugin import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.usefixtures("slurm_cluster")]

STEPS = 32
#: Every step takes long enough to be hit; what is learned is the same.
DELAY = {"mean_ms": 1000.0, "kind": "constant"}
#: Worker 2 waits until it is killed, whatever the speed of the machine.
STUCK = {"mean_ms": 150000.0, "kind": "constant", "all_workers": False, "slow_worker": 2}


def configured(configure: Configure, launch_mode: str, **section: Any) -> Resolved:
    """Returns a server and two workers, a rank on each node, for 32 steps of 32 samples."""
    overrides = {
        "parameter_server": section,
        "data.train_limit": 512,
        "data.test_limit": 128,
        "batch_size": 32 if section["mode"] == "async" else 16,
        "epochs": 2,
        "diagnostics.log_every": 1,
        "nodes": 3,
        "ranks_per_node": 1,
    }
    limits = [{"max_nodes": 3, "max_walltime": "30m"}]
    return configure(
        launch_mode, experiment="digits-async", overrides=overrides, limits=limits, ranks_per_node=1
    )


def updates(run: RunDir) -> list[dict[str, Any]]:
    file = run.metrics("staleness")
    return list(rundir.read_rows(file, TABLES["staleness"])) if file.exists() else []


def wait_until(is_true: Callable[[], object], run: RunDir) -> None:
    deadline = time.monotonic() + 240
    while not is_true():
        assert run.status() is None, run.status()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_worker_that_is_killed_on_its_node_is_survived(configure: Configure) -> None:
    """srun ends a step whose task fails; the lost worker's agent does not."""
    # with equal shares worker 1 cannot be done with everything before worker 2 is there
    resolved = configured(configure, "per_rank", mode="async", shares="equal", delay=STUCK)
    run = submit.submit(resolved, argv=["test"]).run

    def worker() -> lifeline.Beat | None:
        return lifeline.read_beat(run.attempt(1).heartbeats, "rank2")

    wait_until(lambda: (beat := worker()) is not None and beat.phase == "compute", run)
    beat = worker()
    assert beat is not None
    os.kill(beat.pid, signal.SIGKILL)
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "completed", ended.reason
    assert ended.reason.startswith(f"went on although worker 2 on {beat.host} was ended by SIGKILL")
    hosts = rundir.read_yaml(run.attempt(1).attempt_yaml)["hosts"]
    assert len(set(hosts)) == 3
    assert beat.host == hosts[2]
    assert sorted(row["work"] for row in updates(run)) == list(range(STEPS))


def test_a_run_that_is_put_back_ends_as_if_it_had_not_been(
    slurm_cluster: SlurmCluster, configure: Configure
) -> None:
    resolved = configured(configure, "torchrun", mode="sync", delay=DELAY)
    submitted = submit.submit(resolved, argv=["test"])
    run = submitted.run
    wait_until(lambda: len(updates(run)) >= 6, run)
    slurm_cluster.run("scancel", "--signal=USR2", submitted.job_id)
    ended = submit.wait(run, poll_s=0.5)
    assert (ended.state, ended.attempt) == ("completed", 2), ended.reason
    assert 3 <= int(rundir.read_yaml(run.attempt(1).stopped_yaml)["step"]) < STEPS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has; sums may depend on it
    config = run.record()["config"]
    config["experiment"]["parameter_server"]["delay"] = None
    undisturbed = rundir.create(run.path.parent, "undisturbed", {"config": config})
    try:
        assert train(undisturbed, workers=2)
    finally:
        torch.set_num_threads(threads)
    assert_same_weights(run, undisturbed)
    for table in ("train", "eval"):
        assert rows(run, table) == rows(undisturbed, table)
