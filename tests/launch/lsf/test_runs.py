"""Our own runs on a played LSF: the whole way from submit to status, on two hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.launch import order, status, submit
from hpcsngd.launch.cancel import cancel
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.rundir import RunDir

from ..conftest import STANDIN, Configure
from .conftest import Play, left_over, wait_until

SITE: dict[str, Any] = {
    "description": "a played LSF",
    "scheduler": {"kind": "lsf", "account": "abc", "poll_s": 0.5},
    "env": {"OMP_NUM_THREADS": "1", "STANDIN": "ok"},
    "launch": {"rendezvous_timeout_s": 120},
    "cpus_per_node": 4,
}

pytestmark = pytest.mark.usefixtures("standin")


def site(standin: str = "ok", **launch: Any) -> dict[str, Any]:
    return {
        **SITE,
        "env": {**SITE["env"], "STANDIN": standin},
        "launch": {**SITE["launch"], **launch},
    }


def send(configure: Configure, asked: dict[str, Any], **overrides: Any) -> RunDir:
    resolved = configure(asked, **{"nodes": 2, **overrides})
    return submit.submit(resolved, argv=["test"], worker=STANDIN).run


def reports(run: RunDir) -> dict[int, dict[str, Any]]:
    files = sorted((run.path / "report").glob("rank*.json"))
    return {int(file.stem.removeprefix("rank")): json.loads(file.read_text()) for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["ibm", "csm"])
def test_a_run_on_two_hosts(play: Play, configure: Configure, flavor: str) -> None:
    book = play(flavor)
    run = send(configure, site("meet"))
    ended = submit.wait(run, poll_s=0.5)
    assert (ended.state, ended.reason) == ("completed", "")
    facts = rundir.read_yaml(run.attempt(1).attempt_yaml)
    assert facts["hosts"] == ["c1", "c2"] or set(facts["hosts"]) < {"c1", "c2", "c3"}
    assert facts["job"]["LSB_JOBID"] == facts["job_id"]
    told = reports(run)
    assert sorted(told) == [0, 1, 2, 3]
    assert [words["foreign"] for words in told.values()] == [[]] * 4
    assert left_over(book) == []
