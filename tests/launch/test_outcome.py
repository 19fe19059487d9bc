"""From exit statuses, faults and signals to a status; agents as values, no processes."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import lifeline, rundir
from hpcsngd.errors import RunFailedError, SchedulerError
from hpcsngd.launch import outcome, ownjob, place, plan, requeue, schedulers
from hpcsngd.launch.context import AgentFaultError, Context, Ended
from hpcsngd.launch.place import Place
from hpcsngd.launch.stop import Stop
from hpcsngd.rundir import Fault

from .conftest import LOCAL_SITE, Configure

TORN = ["torch.distributed.DistNetworkError: Connection reset by peer"]
OOM = ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"]


@pytest.fixture
def context(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Agent 0 of two nodes with two ranks each, just started, with half an hour."""
    monkeypatch.setattr(outcome, "SETTLE_S", 0.0)
    monkeypatch.setattr(outcome, "FINISHED_WAIT_S", 0.0)
    site = LOCAL_SITE | {"scheduler": {"kind": "slurm"}}
    made = plan.make(configure(site, nodes=2, ranks_per_node=2, restart__on=[]))
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: None)
    run = rundir.create(tmp_path / "runs", "x", {})
    here = Place("7", ("n0", "n1"), 0, 0, 0, 2, 0, "n0")
    return Context(run, made, here, run.attempt(1))


def instead(context: Context, *, left_s: float | None = None, **changes: Any) -> Context:
    """Returns the context with another place or plan, or so much time left."""
    here = dataclasses.replace(
        context.place, **{k: v for k, v in changes.items() if hasattr(context.place, k)}
    )
    made = dataclasses.replace(context.plan, **{k: v for k, v in changes.items() if hasattr(context.plan, k)})
    return Context(context.run, made, here, context.attempt, left_s)


def stopped(*signals: signal.Signals) -> Stop:
    stop = Stop()
    stop.received.extend(signals)
    return stop


def end(context: Context, ended: Ended, *signals: signal.Signals) -> rundir.Status | None:
    """Concludes and returns the status; the exception must say what the status says."""
    with pytest.raises(RunFailedError) as caught:
        outcome.conclude(context, ended, stopped(*signals))
    status = context.run.status()
    assert status is None or status.reason == str(caught.value)
    return status


def at_limit(context: Context) -> Context:
    return instead(context, left_s=60.0)


def test_success_is_what_rank_0_reported(context: Context) -> None:
    rundir.write_yaml(context.attempt.finished_yaml, {"test_accuracy": 0.9})
    outcome.conclude(context, Ended("itself", 0, []), stopped())
    status = context.run.status()
    assert status is not None
    assert (status.state, status.reason, status.result) == ("completed", "", {"test_accuracy": 0.9})


def test_only_agent_0_declares_success(context: Context) -> None:
    rundir.write_yaml(context.attempt.finished_yaml, {})
    follower = instead(context, node=1, index=1)
    outcome.conclude(follower, Ended("itself", 0, []), stopped())
    assert context.run.status() is None


def test_exit_0_without_a_report_is_a_failure(context: Context) -> None:
    status = end(context, Ended("itself", 0, []))
    assert status is not None
    assert status.state == "failed"
    assert "did not report that training finished" in status.reason


def test_the_ranks_own_fault_goes_before_the_agents(context: Context) -> None:
    context.attempt.write_fault(Fault("nan", "loss is nan", "n1", rank=3))
    status = end(context, Ended("itself", 1, OOM))
    assert status is not None
    assert status.reason.startswith("nan: loss is nan (rank 3 on n1")
    assert [fault.kind for fault in context.attempt.faults()] == ["nan", "out_of_memory"]


def test_an_echo_of_a_known_cause_is_not_recorded(context: Context) -> None:
    context.attempt.write_fault(Fault("unknown", "exit status 1", "n1", node=1))
    status = end(context, Ended("itself", 1, TORN))
    assert status is not None
    assert status.reason.startswith("unknown: exit status 1 (node 1 on n1")
    assert len(context.attempt.faults()) == 1


def test_workers_ended_for_a_peer_get_no_fault_of_their_own(context: Context) -> None:
    context.attempt.write_fault(Fault("quota", "disk full", "n1", rank=2))
    status = end(context, Ended("peer", -9, OOM))
    assert status is not None
    assert (status.fault or {})["kind"] == "quota"
    assert len(context.attempt.faults()) == 1


@pytest.mark.parametrize(
    ("exit_status", "signals", "state", "words"),
    [
        (75, [signal.SIGUSR2], "preempted", "stopped by SIGUSR2; the workers checkpointed and left"),
        (75, [signal.SIGTERM], "preempted", "stopped by SIGTERM; the workers checkpointed and left"),
        (75, [], "preempted", "stopped by a stop request; the workers checkpointed and left"),
        (
            -15,
            [signal.SIGTERM],
            "cancelled",
            "stopped by SIGTERM (cancelled or preempted); the workers were ended",
        ),
        (
            1,
            [signal.SIGUSR2, signal.SIGTERM],
            "preempted",
            "stopped by SIGUSR2, SIGTERM; the workers were ended",
        ),
    ],
)
def test_stopped(
    context: Context, exit_status: int, signals: list[signal.Signals], state: str, words: str
) -> None:
    status = end(context, Ended("itself", exit_status, []), *signals)
    assert status is not None
    assert (status.state, status.reason) == (state, words)
    assert context.attempt.faults() == []


@pytest.mark.parametrize("ended", [Ended("stop", -9, []), Ended("itself", 75, [])])
def test_a_stop_near_the_limit_is_the_limits(context: Context, ended: Ended) -> None:
    status = end(at_limit(context), ended, signal.SIGUSR2)
    assert status is not None
    assert status.state == "timeout"
    assert status.reason.startswith("wall time of 30 min reached; the workers")


def test_a_real_cause_stands_even_while_stopping(context: Context) -> None:
    status = end(context, Ended("itself", 1, OOM), signal.SIGTERM)
    assert status is not None
    assert (status.state, (status.fault or {})["kind"]) == ("failed", "out_of_memory")


def test_a_signal_that_follows_a_failure_elsewhere_is_not_the_cause(context: Context) -> None:
    """srun --kill-on-bad-exit sends SIGTERM to the other agents."""
    context.attempt.write_fault(Fault("import_error", "no module x", "n1", node=1))
    status = end(context, Ended("stop", -15, TORN), signal.SIGTERM)
    assert status is not None
    assert status.reason.startswith("import error: no module x (node 1")


def test_a_completed_run_stays_completed(context: Context) -> None:
    context.run.write_status(rundir.Status("completed", "", 1))
    with pytest.raises(RunFailedError):
        outcome.conclude(context, Ended("itself", 1, TORN), stopped())
    status = context.run.status()
    assert status is not None
    assert status.state == "completed"


def test_a_walltime_fault_is_a_timeout(context: Context) -> None:
    context.attempt.write_fault(Fault("walltime", "no time left", "n0", rank=0))
    status = end(context, Ended("itself", 1, []))
    assert status is not None
    assert status.state == "timeout"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (AgentFaultError("rendezvous", "port 1 is in use"), "rendezvous: port 1 is in use (node 0 on n0"),
        (OSError(28, "No space"), "unknown: the agent failed: OSError: [Errno 28] No space (node 0 on n0"),
    ],
)
def test_failures_of_the_agent_itself(context: Context, error: Exception, line: str) -> None:
    outcome.fail(context, error)
    status = context.run.status()
    assert status is not None
    assert status.reason.startswith(line)


def test_ranks_of_an_agent(context: Context) -> None:
    assert list(instead(context, node=1, index=1).ranks) == [2, 3]
    assert list(instead(context, node=1, index=1, mode="per_rank").ranks) == [1]


def test_a_job_that_differs_from_its_plan_is_told(context: Context) -> None:
    assert place.misfit(context.place, context.plan) is None
    fewer = dataclasses.replace(context.place, hosts=("n0",))
    assert place.misfit(fewer, context.plan) == "planned 2 node(s), the job has 1: n0"
    more = dataclasses.replace(context.place, agents=5)
    assert place.misfit(more, context.plan) == "planned 2 agent(s), the job has 5"


def test_stop_takes_note_and_the_shortest_grace_counts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.is_requested
        signal.raise_signal(signal.SIGUSR2)
        now = time.monotonic()
        assert stop.is_requested
        assert (stop.is_due(now + 70), stop.is_due(now + 80), stop.is_hard) == (False, True, False)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.is_due(now + 15), stop.is_due(now + 25)) == (False, True)
        signal.raise_signal(signal.SIGINT)
        assert stop.is_hard
        assert stop.words() == "SIGUSR2, SIGTERM, SIGINT"
    assert signal.getsignal(signal.SIGTERM) is before


def sign(context: Context, index: int, phase: str = lifeline.WATCHING) -> None:
    lifeline.write_beat(context.attempt.heartbeats, lifeline.Beat(f"agent{index}", f"n{index}", 1, phase))


def torn(rank: int, host: str = "n0") -> Fault:
    return Fault("unknown", "RuntimeError: Connection closed by peer", host, rank=rank, is_echo=True)


@pytest.fixture
def patient(context: Context, monkeypatch: pytest.MonkeyPatch) -> Context:
    """The context, with just enough patience to notice that others are silent."""
    monkeypatch.setattr(outcome, "SETTLE_S", 0.01)
    return context


KILLED = Fault("killed", "a worker was ended by SIGKILL (signal 9)", "n1", node=1)


def test_after_a_kill_a_run_goes_on_where_that_is_allowed(
    patient: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agent 1 has seen the kill and leaves the word to agent 0, which alone puts the job back."""
    asked: list[str] = []

    def take(job_id: str, *, timeout_s: float) -> None:
        asked.append(job_id)

    slurm = dataclasses.replace(schedulers.QUEUES["slurm"], requeue=take)
    monkeypatch.setitem(schedulers.QUEUES, "slurm", slurm)
    allowed = instead(patient, restart_on=("killed",), max_attempts=2)
    allowed.attempt.write_fault(KILLED)
    outcome.conclude(instead(allowed, node=1, index=1), Ended("itself", 1, ["Killed"]), stopped())
    assert (asked, allowed.run.status()) == ([], None)
    outcome.conclude(allowed, Ended("peer", -15, TORN), stopped())
    assert (asked, allowed.run.status()) == (["7"], None)
    assert rundir.read_yaml(allowed.attempt.ended_yaml)["cause"] == "killed"


def test_a_killed_leader_leaves_nobody_who_could_go_on(patient: Context) -> None:
    allowed = instead(patient, restart_on=("killed",), max_attempts=2)
    allowed.attempt.write_fault(torn(2, "n1"))
    sign(allowed, 0)
    follower = instead(allowed, node=1, index=1)
    status = end(follower, Ended("itself", 1, TORN), signal.SIGTERM)
    assert status is not None
    assert status.reason.startswith("killed: the agent of node 0 was killed (node 0 on n0")
    assert not allowed.attempt.ended_yaml.exists()


def test_a_silent_agent_is_a_lost_node(patient: Context) -> None:
    patient.attempt.write_fault(torn(0))
    sign(patient, 1)
    status = end(patient, Ended("itself", 1, TORN))
    assert status is not None
    assert status.reason.startswith("node failure: node 1 fell silent (node 1 on n1")


def test_a_silent_agent_is_a_killed_one_if_the_launcher_ends_the_others(patient: Context) -> None:
    patient.attempt.write_fault(torn(0))
    sign(patient, 1)
    status = end(patient, Ended("itself", 1, TORN), signal.SIGTERM)
    assert status is not None
    assert status.reason.startswith("killed: the agent of node 1 was killed (node 1 on n1")


def test_a_silent_agent_is_a_lost_node_if_slurm_puts_the_job_back(
    patient: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has noticed first: it ends the others and starts the job again."""
    context = instead(patient, restart_on=("node_failure",), max_attempts=3)
    monkeypatch.setattr(ownjob, "ask", lambda *_, **__: ownjob.OwnJob("PENDING", 1, False, None))
    context.attempt.write_fault(torn(0))
    sign(context, 1)
    outcome.conclude(context, Ended("itself", 1, TORN), stopped(signal.SIGTERM))
    assert context.run.status() is None
    told = rundir.read_yaml(context.attempt.ended_yaml)
    assert (told["cause"], told["next"], told["lost_hosts"]) == ("node_failure", "scheduler", ["n1"])


@pytest.mark.parametrize("phase", [lifeline.ENDED, "peer"])
def test_an_agent_that_ends_its_workers_is_not_silent(patient: Context, phase: str) -> None:
    patient.attempt.write_fault(torn(0))
    sign(patient, 1, phase)
    status = end(patient, Ended("itself", 1, TORN))
    assert status is not None
    assert status.reason.startswith("unknown: RuntimeError: Connection closed by peer (rank 0")


def test_silence_does_not_hide_a_known_cause(patient: Context) -> None:
    patient.attempt.write_fault(Fault("nan", "loss is nan", "n1", rank=3))
    sign(patient, 1)
    status = end(patient, Ended("itself", 1, TORN))
    assert status is not None
    assert status.reason.startswith("nan: loss is nan (rank 3")


def test_an_agent_with_torn_workers_leaves_the_word_to_the_first(patient: Context) -> None:
    patient.attempt.write_fault(torn(2, "n1"))
    second = instead(patient, node=1, index=1)
    outcome.conclude(second, Ended("itself", 1, TORN), stopped())
    assert patient.run.status() is None


def test_a_killed_worker_goes_before_its_torn_peers(context: Context) -> None:
    context.attempt.write_fault(torn(1))
    status = end(context, Ended("itself", -9, []))
    assert status is not None
    assert (status.fault or {})["kind"] == "killed"


def test_a_cancel_request_says_why_sigterm_came(context: Context) -> None:
    rundir.write_yaml(context.attempt.attempt_yaml, {})
    context.attempt.cancel_request.touch()
    status = end(context, Ended("itself", 75, []), signal.SIGTERM)
    assert status is not None
    assert (status.state, status.reason) == ("cancelled", "cancelled; the workers checkpointed and left")


@pytest.mark.parametrize(
    ("fate", "state"), [("ending", "cancelled"), ("preempted", "preempted"), ("running", "preempted")]
)
def test_slurm_says_why_sigterm_came(
    context: Context, monkeypatch: pytest.MonkeyPatch, fate: str, state: str
) -> None:
    monkeypatch.setattr(outcome, "_fate", lambda _: fate)
    status = end(context, Ended("itself", 75, []), signal.SIGTERM)
    assert status is not None
    assert status.state == state


def test_a_job_that_slurm_starts_again_is_left_to_slurm(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "_fate", lambda _: "restarting")
    outcome.conclude(context, Ended("itself", 75, []), stopped(signal.SIGTERM))
    assert context.run.status() is None
    told = rundir.read_yaml(context.attempt.ended_yaml)
    assert (told["state"], told["next"]) == ("preempted", "scheduler")


def test_a_stopped_run_that_may_go_on_gets_no_status(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Place] = []
    monkeypatch.setattr(requeue, "go_on", lambda *given: sent.append(given[3]))
    willing = instead(context, restart_on=("preempted",), max_attempts=2)
    outcome.conclude(willing, Ended("itself", 75, []), stopped(signal.SIGUSR2))
    assert (sent, context.run.status()) == ([context.place], None)


def test_a_run_that_cannot_be_requeued_says_why(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SchedulerError("no scontrol; no sbatch")

    monkeypatch.setattr(requeue, "go_on", refuse)
    willing = instead(context, restart_on=("preempted",), max_attempts=2)
    status = end(willing, Ended("itself", 75, []), signal.SIGUSR2)
    assert status is not None
    assert status.reason.endswith("checkpointed and left; not restarted: no scontrol; no sbatch")


def test_only_agent_0_sends_a_stopped_run_on(context: Context) -> None:
    second = instead(context, node=1, index=1, restart_on=("preempted",), max_attempts=2)
    outcome.conclude(second, Ended("itself", 75, []), stopped(signal.SIGUSR2))
    assert context.run.status() is None
    assert not context.attempt.ended_yaml.exists()
