"""Whether and how a stopped run goes on; Slurm's programs as values, no processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.errors import PreflightError, SchedulerError
from hpcsngd.launch import agent, ownjob, plan, requeue, schedulers, sending, slurm
from hpcsngd.launch.ownjob import OwnJob
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.rundir import Fault, RunDir

from .conftest import LOCAL_SITE, Configure

SLURM_SITE = LOCAL_SITE | {"scheduler": {"kind": "slurm"}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return rundir.create(tmp_path / "runs", "x", {})


@pytest.fixture
def made(configure: Configure) -> Plan:
    asked = {"restart__on": ["timeout", "preempted"], "restart__max_attempts": 3}
    return plan.make(configure(SLURM_SITE, **asked))


def refusal(
    run: RunDir, made: Plan, cause: str, number: int = 1, restarts: int = 0, first: str = ""
) -> str | None:
    return requeue.refusal(run, made, run.attempt(number), cause, restarts=restarts, first_checkpoint=first)


def checkpoint(run: RunDir, step: int) -> None:
    run.checkpoints_dir.mkdir(exist_ok=True)
    (run.checkpoints_dir / "latest").write_text(f"step_{step}\n")


def test_only_listed_causes_go_on(run: RunDir, made: Plan) -> None:
    assert refusal(run, made, "preempted") is None
    assert refusal(run, made, "hang") == "restart.on has no hang"
    assert refusal(run, made, "failed") == "restart.on has no failed"
    assert refusal(run, made, "cancelled") == "restart.on has no cancelled"


def test_local_runs_do_not_go_on(run: RunDir, configure: Configure) -> None:
    made = plan.make(configure(restart__on=["preempted"]))
    assert refusal(run, made, "preempted") == "local runs are not restarted"


def test_a_cancelled_run_does_not_go_on(run: RunDir, made: Plan) -> None:
    rundir.write_yaml(run.attempt(1).attempt_yaml, {})
    run.attempt(1).cancel_request.touch()
    assert refusal(run, made, "preempted") == "it was cancelled"


def test_attempts_are_capped_in_a_row(run: RunDir, made: Plan) -> None:
    for number in (1, 2):
        rundir.write_yaml(run.attempt(number).ended_yaml, {})
    assert refusal(run, made, "preempted", number=2) is None
    assert refusal(run, made, "preempted", number=3) == "attempt 3 of restart.max_attempts 3"
    # attempt 3 ended for good and a person resumed: attempt 4 is the first of a new row
    assert refusal(run, made, "preempted", number=4) is None


def test_restarts_by_the_scheduler_count_although_no_agent_told(run: RunDir, made: Plan) -> None:
    assert requeue.attempts_in_a_row(run, run.attempt(3), restarts=2) == 3
    assert refusal(run, made, "preempted", number=3, restarts=2) == "attempt 3 of restart.max_attempts 3"


def test_a_time_out_without_a_new_checkpoint_would_only_repeat(run: RunDir, made: Plan) -> None:
    reason = "it came to no new checkpoint, and another attempt of this length would not either"
    assert refusal(run, made, "timeout") == reason
    checkpoint(run, 8)
    assert refusal(run, made, "timeout") is None
    assert refusal(run, made, "timeout", first="step_8") == reason


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what is asked of Slurm; every call works."""
    asked: list[Any] = []
    monkeypatch.setattr(slurm, "command_output", lambda words, **_: asked.append(list(words)))

    def send(run: RunDir, made: Plan, attempt: int, **directives: object) -> str:
        asked.append((attempt, directives))
        return "8"

    monkeypatch.setattr(sending, "send", send)
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: OwnJob("RUNNING", 0, False, 60.0))
    return asked


def refusing(text: str) -> Callable[..., str]:
    def refuse(*_: object, **__: object) -> str:
        raise SchedulerError(text)

    return refuse


def go_on(run: RunDir, made: Plan) -> dict[str, Any]:
    here = Place("7", ("n0",), 0, 0, 0, 1, 0, "n0")
    requeue.go_on(run, made, run.attempt(1), here, {"state": "preempted"})
    return rundir.read_yaml(run.attempt(1).ended_yaml)


def test_the_job_is_requeued(run: RunDir, made: Plan, calls: Sequence[Any]) -> None:
    assert go_on(run, made) == {"state": "preempted", "next": "requeue", "job_id": "7"}
    assert calls == [["scontrol", "requeue", "7"]]


def test_where_it_cannot_be_a_new_job_waits_for_its_end(
    run: RunDir, made: Plan, calls: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "command_output", refusing("scontrol is not installed here"))
    assert go_on(run, made) == {"state": "preempted", "next": "resubmit", "job_id": "8"}
    assert calls == [(2, {"dependency": "afterany:7"})]


def test_a_scheduler_that_was_quicker_is_left_alone(
    run: RunDir, made: Plan, calls: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "command_output", refusing("Job is pending execution"))
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: OwnJob("COMPLETING", 1, False, 60.0))
    assert go_on(run, made) == {"state": "preempted", "next": "scheduler", "job_id": "7"}
    assert calls == []


def test_both_reasons_are_told_if_neither_works(
    run: RunDir, made: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "command_output", refusing("no scontrol"))
    monkeypatch.setattr(sending, "send", refusing("no sbatch"))
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: None)
    with pytest.raises(SchedulerError, match=r"^no scontrol; no sbatch$"):
        go_on(run, made)
    assert not run.attempt(1).ended_yaml.exists()


LOST = Fault("node_failure", "node 1 fell silent", "n1", node=1)


def lose(run: RunDir, made: Plan, *faults: Fault) -> dict[str, Any]:
    """Goes on after faults on a job of three nodes; returns what is recorded."""
    for fault in faults:
        run.attempt(1).write_fault(fault)
    here = Place("7", ("n0", "n1", "n2"), 0, 0, 0, 3, 0, "n0")
    requeue.go_on(run, made, run.attempt(1), here, {"cause": "node_failure"})
    return rundir.read_yaml(run.attempt(1).ended_yaml)


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []
    ours = dataclasses.replace(schedulers.QUEUES["slurm"], cancel=lambda job_ids, **_: asked.append(job_ids))
    monkeypatch.setitem(schedulers.QUEUES, "slurm", ours)
    return asked


def test_after_a_lost_node_a_new_job_keeps_off_it(
    run: RunDir, made: Plan, calls: Sequence[Any], cancelled: Sequence[Any]
) -> None:
    assert lose(run, made, LOST) == {
        "cause": "node_failure",
        "lost_hosts": ["n1"],
        "next": "resubmit",
        "job_id": "8",
    }
    assert calls == [(2, {"dependency": "afterany:7", "exclude": "n1"})]
    assert cancelled == [["7"]]


def test_the_sites_own_exclusions_and_earlier_losses_stay(
    run: RunDir, made: Plan, calls: Sequence[Any], cancelled: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that names its GPU's failure tells the node, too."""
    site = dataclasses.replace(made, directives={"exclude": "n8"}, ranks_per_node=2)
    lose(run, site, LOST, Fault("node_failure", "GPU is lost", "n2", rank=4))
    assert calls == [(2, {"dependency": "afterany:7", "exclude": "n8,n1,n2"})]
    here = Place("8", ("n0", "n3"), 0, 0, 0, 2, 0, "n0")
    monkeypatch.setattr(slurm, "command_output", refusing("no scontrol"))
    requeue.go_on(run, site, run.attempt(2), here, {"cause": "timeout"})
    assert calls[-1] == (3, {"dependency": "afterany:8", "exclude": "n8,n1,n2"})


def test_too_few_nodes_without_the_lost_one_are_asked_for_all_the_same(
    run: RunDir, made: Plan, calls: list[Any], cancelled: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_exclude(run: RunDir, made: Plan, attempt: int, **directives: object) -> str:
        if "exclude" in directives:
            raise SchedulerError("Requested node configuration is not available")
        calls.append((attempt, directives))
        return "8"

    monkeypatch.setattr(sending, "send", refuse_to_exclude)
    assert lose(run, made, LOST)["job_id"] == "8"
    assert calls == [(2, {"dependency": "afterany:7"})]
    assert cancelled == [["7"]]


def test_a_loss_that_slurm_has_noticed_is_left_to_it(
    run: RunDir, made: Plan, calls: Sequence[Any], cancelled: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: OwnJob("COMPLETING", 1, False, 60.0))
    assert lose(run, made, LOST)["next"] == "scheduler"
    assert (calls, cancelled) == ([], [])


def test_a_job_that_cannot_be_cancelled_changes_nothing(
    run: RunDir, made: Plan, calls: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "cancel", refusing("busy"))
    assert lose(run, made, LOST)["next"] == "resubmit"


def test_a_job_that_was_given_up_leaves_at_once(run: RunDir, made: Plan) -> None:
    here = Place("7", ("n0",), 0, 0, 0, 1, 1, "n0")
    assert not agent.is_superseded(run.attempt(2), made, here)
    rundir.write_yaml(run.attempt(2).submitted_yaml, {"job_id": "8"})
    assert agent.is_superseded(run.attempt(2), made, here)
    assert not agent.is_superseded(run.attempt(2), made, dataclasses.replace(here, job_id="8"))
    local = dataclasses.replace(made, scheduler="local")
    assert not agent.is_superseded(run.attempt(2), local, here)


def limited(configure: Configure, **overrides: Any) -> Plan:
    site = SLURM_SITE | {
        "limits": [{"max_nodes": 4, "max_walltime": "2h"}, {"max_nodes": 1, "max_walltime": "6h"}]
    }
    return plan.make(configure(site, **overrides))


def test_a_chain_asks_for_the_limit_and_no_more(configure: Configure) -> None:
    chained = {"restart__on": ["timeout"], "walltime": "20h"}
    assert limited(configure, **chained, nodes=2, restart__max_attempts=10).walltime_min == 120
    assert limited(configure, **chained, nodes=1, restart__max_attempts=10).walltime_min == 360
    assert limited(configure, restart__on=["timeout"], walltime="1h").walltime_min == 60


def test_without_permission_to_chain_the_limit_refuses_and_says_how(configure: Configure) -> None:
    with pytest.raises(PreflightError, match=r"20:00:00 fits no row.*chain of jobs: restart.on: \[timeout\]"):
        limited(configure, walltime="20h")


def test_a_chain_longer_than_its_cap_is_refused(configure: Configure) -> None:
    expected = "20:00:00 in jobs of 02:00:00 are 10 attempts, restart.max_attempts allows 9"
    with pytest.raises(PreflightError, match=expected):
        limited(configure, nodes=2, walltime="20h", restart__on=["timeout"], restart__max_attempts=9)


def test_what_may_be_restarted_is_what_slurm_is_told(configure: Configure) -> None:
    asked = plan.make(configure(SLURM_SITE, restart__on=["node_failure"])).directives
    assert asked["requeue"] is True
    asked = plan.make(configure(SLURM_SITE, restart__on=["timeout"])).directives
    assert ("requeue" in asked, asked["no-requeue"]) == (False, True)
    margin = plan.make(configure(SLURM_SITE | {"stop_margin_s": 44.5})).directives
    assert margin["signal"] == "USR2@45"


def test_a_plan_of_an_older_run_restarts_nothing(made: Plan) -> None:
    record = made.to_record()
    for name in ("restart_on", "max_attempts", "stop_margin_s", "hang_timeout_s", "start_timeout_s"):
        del record[name]
    old = Plan.from_record(record)
    assert (old.restart_on, old.max_attempts) == ((), 1)
    assert dataclasses.replace(old, restart_on=made.restart_on, max_attempts=3) == made
