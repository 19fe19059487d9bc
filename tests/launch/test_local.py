"""Jobs on this machine, through submitit's local executor: the whole way from submit to status."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.launch import processes, status, submit

from .conftest import LOCAL_SITE, Configure


def reports(run: rundir.RunDir) -> dict[int, dict[str, Any]]:
    files = sorted((run.path / "report").glob("rank*.json"))
    return {int(file.stem.removeprefix("rank")): json.loads(file.read_text()) for file in files}


def site(**changes: Any) -> dict[str, Any]:
    merged = dict(LOCAL_SITE)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def run_to_end(configure: Configure, standin: str, **changes: Any) -> tuple[rundir.RunDir, rundir.Status]:
    submitted = submit.submit(configure(site(**changes)), argv=["test"], worker=standin)
    return submitted.run, submit.wait(submitted.run, poll_s=0.2)


def wait_until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.05)


def test_per_rank_job_completes_and_every_rank_knows_who_it_is(configure: Configure, standin: str) -> None:
    run, ended = run_to_end(configure, standin, launch={"mode": "per_rank"})
    assert (ended.state, ended.result) == ("completed", {"accuracy": 0.5})
    # these workers do not wait for each other, so rank 0 may end the run before rank 1 has begun
    wait_until(lambda: len(reports(run)) == 2, "the report of rank 1")
    table = reports(run)
    assert [table[rank]["RANK"] for rank in (0, 1)] == ["0", "1"]
    assert [table[rank]["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert {report["WORLD_SIZE"] for report in table.values()} == {"2"}
    assert {report["MASTER_ADDR"] for report in table.values()} == {"127.0.0.1"}
    assert len({report["MASTER_PORT"] for report in table.values()}) == 1
    assert {report["HPCSNGD_DEVICE"] for report in table.values()} == {"cpu"}
    assert all(report["foreign"] == [] for report in table.values())


@pytest.mark.dist
def test_torchrun_job_meets_and_completes(configure: Configure, standin: str) -> None:
    run, ended = run_to_end(configure, standin, env={"STANDIN": "meet"})
    assert ended.state == "completed", ended.reason
    assert ended.result == {"accuracy": 0.5, "total": 1.0}
    facts = rundir.read_yaml(run.attempt(1).attempt_yaml)
    assert (facts["world_size"], facts["hosts"]) == (2, [socket.gethostname()])
    assert rundir.read_yaml(run.attempt(1).rendezvous_yaml)["generation"] == 1


@pytest.mark.dist
def test_per_rank_job_meets(configure: Configure, standin: str) -> None:
    _, ended = run_to_end(configure, standin, launch={"mode": "per_rank"}, env={"STANDIN": "meet"})
    assert ended.result == {"accuracy": 0.5, "total": 1.0}, ended.reason


def test_failing_import_is_told_in_one_line(configure: Configure, standin: str) -> None:
    run, ended = run_to_end(configure, standin, launch={"mode": "per_rank"}, env={"STANDIN": "import"})
    assert ended.state == "failed"
    assert ended.reason.startswith(
        "import error: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    )
    assert "\n" not in ended.reason
    state = status.states([run])[0]
    assert (state.state, state.fault_kind) == ("failed", "import_error")
