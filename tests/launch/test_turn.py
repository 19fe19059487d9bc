"""Runs that wait for others, when their job starts; stand-ins for Slurm's programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.launch import status, submit, turn
from hpcsngd.launch.context import AgentFaultError, Context
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.rundir import RunDir, Status

from .conftest import Configure
from .test_steering import FORGOTTEN, NUMBERED
from .test_submit import SITE, path, program

__all__ = ["path"]  # the fixture


@pytest.fixture
def first(configure: Configure, path: Path) -> RunDir:
    """The run that others wait for: job 10."""
    program(path, "sbatch", NUMBERED)
    program(path, "squeue", FORGOTTEN)
    program(path, "sacct", "exit 0")
    return submit.submit(configure(SITE), argv=[]).run


@pytest.fixture
def context(configure: Configure, first: RunDir, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Agent 0 of the run that waits: job 11, on two nodes."""
    monkeypatch.setattr(turn, "PAUSE_S", 0.0)
    submitted = submit.submit(configure(SITE), argv=[], after=[first])
    run = submitted.run
    here = Place(submitted.job_id, ("n0", "n1"), 0, 0, 0, 2, 0, "n0")
    return Context(run, Plan.from_record(run.plan_record(1)), here, run.attempt(1))


def job_of(run: RunDir) -> str:
    return str(rundir.read_yaml(run.attempt(1).submitted_yaml)["job_id"])


def test_a_run_that_waits_for_nobody_begins(context: Context) -> None:
    context.plan = dataclasses.replace(context.plan, after=())
    assert turn.has_come(context)


def test_its_turn_comes_when_the_other_has_completed(context: Context, first: RunDir) -> None:
    first.write_status(Status("completed", "", 1))
    assert turn.has_come(context)
    assert job_of(context.run) == context.place.job_id


def test_it_waits_on_where_the_other_goes_on_as_another_job(
    context: Context, first: RunDir, path: Path
) -> None:
    """Attempt 1 of the other ended at its time limit; attempt 2 is job 99."""
    rundir.write_yaml(first.attempt(2).submitted_yaml, {"scheduler": "slurm", "job_id": "99", "utc": "x"})
    program(path, "squeue", "echo '99|PENDING|Priority|N/A'")
    program(path, "scancel", 'echo "$@" > "$0.asked"')
    assert not turn.has_come(context)
    assert "#SBATCH --dependency=afterany:99\n" in (path / "sbatch.script").read_text()
    assert job_of(context.run) == "12"
    assert (path / "scancel.asked").read_text() == "11\n"


def test_a_job_that_cannot_be_given_up_is_ended_by_its_launcher(
    context: Context, first: RunDir, path: Path
) -> None:
    program(path, "squeue", "echo '10|RUNNING|None|N/A'")
    program(path, "scancel", "echo busy >&2; exit 1")
    assert not turn.has_come(context)
    assert "#SBATCH --dependency=afterany:10\n" in (path / "sbatch.script").read_text()


def test_a_failure_of_the_other_is_its_own(context: Context, first: RunDir) -> None:
    first.write_status(Status("failed", "nan: loss is nan", 1))
    words = rf"after {first.name}, which is failed \(nan: loss is nan\)"
    with pytest.raises(AgentFaultError, match=words) as caught:
        turn.has_come(context)
    assert caught.value.kind == "configuration"


def test_a_job_that_is_gone_is_looked_at_again(
    context: Context, first: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's status reaches this node late."""
    looks = status.states

    def late(runs: Sequence[RunDir]) -> list[status.RunState]:
        found = looks(runs)
        first.write_status(Status("completed", "", 1))
        return found

    monkeypatch.setattr(status, "states", late)
    assert turn.has_come(context)


def test_a_wait_that_cannot_go_on_is_told(context: Context, path: Path) -> None:
    program(path, "squeue", "echo '10|RUNNING|None|N/A'")
    program(path, "sbatch", "echo no >&2; exit 1")
    with pytest.raises(AgentFaultError, match=r"goes on in job 10, and no job can wait for that: .*no"):
        turn.has_come(context)
