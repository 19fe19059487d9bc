"""Status from what is left, cancel, resume, rerun, order, comparison; with stand-ins for Slurm's programs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.config.resolve import Override
from hpcsngd.errors import ConfigError, PreflightError, SchedulerError
from hpcsngd.launch import compare, order, processes, status, submit
from hpcsngd.launch.cancel import cancel
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.resume import rerun, resume
from hpcsngd.tables import TABLES

from .conftest import Configure
from .test_submit import ACCEPT, SITE, path, program

__all__ = ["path"]  # the fixture

FORGOTTEN = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
NUMBERED = (
    'n=$(cat "$0.n" 2>/dev/null || echo 10); echo $((n+1)) > "$0.n"; cp "$1" "$0.script"; echo "job $n"'
)


@pytest.fixture
def run(configure: Configure, path: Path) -> rundir.RunDir:
    """A submitted run; Slurm has forgotten its job, and keeps no accounts."""
    program(path, "sbatch", ACCEPT)
    program(path, "squeue", FORGOTTEN)
    program(path, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    return submit.submit(configure(SITE), argv=[]).run


def state_of(run: rundir.RunDir) -> status.RunState:
    return status.states([run])[0]


def begin(run: rundir.RunDir, ago_s: float = 0.0) -> rundir.Attempt:
    """Writes what an agent writes at the start."""
    attempt = run.attempts()[-1]
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=ago_s)
    facts = {"hosts": ["node1"], "start": start.isoformat(), "world_size": 2, "hardware": {"cpus": 4}}
    rundir.write_yaml(attempt.attempt_yaml, facts)
    return attempt


def train(run: rundir.RunDir, epoch: float, train_s: float) -> None:
    writer = rundir.CsvWriter(run.metrics("train"), TABLES["train"])
    common = {"attempt": 1, "step": 10, "wall_s": 4.0, "utc": "x", "samples": 1, "accuracy": 0.9, "lr": 0.1}
    writer.write(**common, epoch=epoch, train_s=train_s, loss=0.25)
    writer.close()


def test_silence_is_never_success(run: rundir.RunDir) -> None:
    state = state_of(run)
    assert (state.state, state.fault_kind) == ("lost", "unknown")
    assert "accounting storage is disabled" in state.reason


def test_rank_0s_own_report_is_success_where_slurm_has_forgotten(run: rundir.RunDir, path: Path) -> None:
    rundir.write_yaml(begin(run).finished_yaml, {"test_accuracy": 0.5})
    state = state_of(run)
    assert (state.state, state.result) == ("completed", {"test_accuracy": 0.5})
    ended = submit.wait(run, poll_s=0.01)
    assert (ended.state, ended.fault, ended.result) == ("completed", None, {"test_accuracy": 0.5})


def test_it_is_no_success_where_slurm_says_otherwise(run: rundir.RunDir, path: Path) -> None:
    rundir.write_yaml(begin(run).finished_yaml, {"test_accuracy": 0.5})
    program(path, "squeue", 'echo "4711|FAILED|NonZeroExitCode|2026-11-21T10:00:00"')
    assert state_of(run).state == "failed"


def test_a_recorded_fault_is_the_verdict_of_a_run_whose_agent_died(run: rundir.RunDir) -> None:
    begin(run).write_fault(rundir.Fault("nan", "loss is nan in step 7", "node2", rank=3, evidence=["x"]))
    state = state_of(run)
    assert (state.state, state.fault_kind) == ("failed", "nan")
    assert state.reason.startswith("nan: loss is nan in step 7 (rank 3 on node2, ")
    assert (state.fault or {})["evidence"] == ["x"]
    ended = submit.wait(run, poll_s=0.01)
    assert (ended.fault or {})["rank"] == 3


def test_slurms_words_in_the_jobs_log_are_a_verdict(run: rundir.RunDir) -> None:
    words = "slurmstepd: error: *** JOB 4711 ON node7 CANCELLED AT 2026-11-21T10:00:00 DUE TO TIME LIMIT ***"
    (run.submit_dir / "4711_0_log.err").write_text(f"submitit INFO\n{words}\n")
    state = state_of(run)
    assert (state.state, state.fault_kind, (state.fault or {})["host"]) == ("timeout", "walltime", "node7")


def test_a_cancel_in_the_jobs_log_is_no_failure(run: rundir.RunDir) -> None:
    words = "slurmstepd: error: *** JOB 4711 ON node7 CANCELLED AT 2026-11-21T10:00:00 ***"
    (run.submit_dir / "4711_0_log.err").write_text(f"{words}\n")
    state = state_of(run)
    assert (state.state, state.fault_kind) == ("cancelled", "killed")


def test_an_echo_alone_names_no_cause(run: rundir.RunDir) -> None:
    torn = rundir.Fault("rendezvous", "connection reset by peer", "node2", rank=1, is_echo=True)
    begin(run).write_fault(torn)
    assert state_of(run).state == "lost"


def test_an_agent_that_cannot_start_says_so_in_the_jobs_log(run: rundir.RunDir) -> None:
    (run.submit_dir / "4711_0_log.err").write_text("ModuleNotFoundError: No module named 'submitit'\n")
    state = state_of(run)
    assert (state.state, state.fault_kind) == ("failed", "import_error")


def test_a_later_attempt_is_not_judged_by_the_log_of_the_first(run: rundir.RunDir) -> None:
    (run.submit_dir / "4711_0_log.err").write_text("ModuleNotFoundError: No module named 'submitit'\n")
    rundir.write_yaml(run.attempt(2).attempt_yaml, {"hosts": ["node1"], "start": rundir.utc_now()})
    assert state_of(run).state == "lost"


def test_a_pending_run_says_why_and_when(run: rundir.RunDir, path: Path) -> None:
    program(path, "squeue", 'echo "4711|PENDING|QOSMaxJobsPerUserLimit|2026-11-21T10:00:00"')
    state = state_of(run)
    assert state.state == "pending"
    assert state.reason == "QOSMaxJobsPerUserLimit: a limit of the quality of service is reached"
    local = datetime.datetime.fromisoformat("2026-11-21T10:00:00").astimezone()
    assert datetime.datetime.fromisoformat(state.start_estimate) == local
    assert state.start_estimate.endswith("+00:00")
    program(path, "squeue", 'echo "4711|PENDING|Weather|N/A"')
    assert (state_of(run).reason, state_of(run).start_estimate) == ("Weather", "")


def test_a_running_run_says_how_long_it_will_take(run: rundir.RunDir, path: Path) -> None:
    program(path, "squeue", 'echo "4711|RUNNING|None|2026-11-21T10:00:00"')
    begin(run, ago_s=600)
    assert state_of(run).time_left_s is None
    train(run, epoch=2.5, train_s=5.0)
    state = state_of(run)
    assert state.time_left_s == pytest.approx(15.0)  # 10 epochs at 2 s each, 2.5 done
    assert state.limit_left_s == pytest.approx(1800 - 600, abs=30)


def test_cancel_notes_first_and_asks_once(configure: Configure, path: Path) -> None:
    program(path, "sbatch", NUMBERED)
    runs = [submit.submit(configure(SITE), argv=[]).run for _ in range(3)]
    begin(runs[1])
    runs[2].write_status(rundir.Status("completed", "", 1))
    program(path, "squeue", "printf '10|PENDING|Priority|N/A\\n11|RUNNING|None|N/A\\n'")
    notes = " ".join(str(run.attempt(1).cancel_request) for run in runs[:2])
    program(path, "scancel", f'ls {notes} > "$0.notes" && echo "$@" >> "$0.calls"')
    done = cancel(runs)
    assert [(each.state, each.was_sent) for each in done] == [
        ("pending", True),
        ("running", True),
        ("completed", False),
    ]
    assert (path / "scancel.calls").read_text() == "10 11\n"
    ended = runs[0].status()
    assert ended is not None
    assert (ended.state, ended.fault) == ("cancelled", None)
    assert runs[1].status() is None  # its agent will say
    note = rundir.read_yaml(runs[1].attempt(1).cancel_request)
    assert set(note) == {"utc", "host", "user"}
    assert not runs[2].attempt(1).cancel_request.exists()


def test_a_cancel_that_is_refused_can_be_repeated(run: rundir.RunDir, path: Path) -> None:
    program(path, "squeue", 'echo "4711|PENDING|Priority|N/A"')
    program(path, "scancel", "echo 'error: Access/permission denied' >&2; exit 1")
    with pytest.raises(SchedulerError, match="permission denied"):
        cancel([run])
    assert state_of(run).state == "pending"
    program(path, "scancel", "echo 'scancel: error: Invalid job id 4711' >&2; exit 1")
    assert cancel([run])[0].was_sent
    assert state_of(run).state == "cancelled"


def test_a_cell_that_another_process_would_start_gets_a_note_only(run: rundir.RunDir) -> None:
    facts = rundir.read_yaml(run.attempt(1).submitted_yaml)
    facts |= {"scheduler": "local", "queued": True, "job_id": "1", "start_ticks": processes.start_ticks(1)}
    rundir.write_yaml(run.attempt(1).submitted_yaml, facts)
    [done] = cancel([run])  # process 1 would not survive a signal, nor would the test
    assert (done.was_sent, "it will not be started" in done.text) == (True, True)


def test_resume_asks_for_other_resources_and_keeps_the_old_plan(run: rundir.RunDir, path: Path) -> None:
    program(path, "sbatch", NUMBERED)
    resumed = resume(
        run, [Override("experiment.resources.walltime", "2h", "--walltime")], argv=["resume", "x"]
    )
    assert resumed.job_id == "10"
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    assert "#SBATCH --time=120" in (path / "sbatch.script").read_text()
    walltimes = [Plan.from_record(run.plan_record(number)).walltime_min for number in (1, 2, 3)]
    assert walltimes == [30, 120, 120]
    assert rundir.read_yaml(run.attempt(2).plan_yaml)["provenance"]["argv"] == ["resume", "x"]
    assert rundir.read_yaml(run.attempt(2).submitted_yaml)["job_id"] == "10"


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(run: rundir.RunDir, path: Path) -> None:
    run.write_status(rundir.Status("failed", "it failed", 1))
    program(path, "sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    with pytest.raises(SchedulerError, match="sbatch refused"):
        resume(run, argv=[])
    assert (state_of(run).state, state_of(run).reason) == ("failed", "it failed")
    assert len(run.attempts()) == 1
    with pytest.raises(PreflightError, match="fits no row"):
        resume(run, [Override("experiment.resources.nodes", 5, "--nodes")], argv=[])


def test_resume_refuses_what_runs_what_completed_and_another_experiment(
    run: rundir.RunDir, path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"experiment\.epochs: a resumed run trains what it began"):
        resume(run, [Override("experiment.epochs", 3, "--set epochs")], argv=[])
    program(path, "squeue", 'echo "4711|RUNNING|None|N/A"')
    with pytest.raises(PreflightError, match=r"is running \(job 4711\)"):
        resume(run, argv=[])
    run.write_status(rundir.Status("completed", "", 1))
    with pytest.raises(PreflightError, match="has completed; to do it again: hpcsngd rerun"):
        resume(run, argv=[])


def test_rerun_is_a_new_run_that_names_the_old(run: rundir.RunDir, path: Path) -> None:
    program(path, "sbatch", NUMBERED)
    again = rerun(run, [Override("experiment.seed", 7, "--set seed")], argv=[]).run
    assert again.path.parent == run.path.parent
    assert again.record()["provenance"]["rerun_of"] == str(run.path)
    found = compare.compare(run, again)
    assert found["config"] == {"experiment.seed": (run.record()["config"]["experiment"]["seed"], 7)}
    assert found["code"] == {}


def test_a_comparison_has_hardware_and_outcome(run: rundir.RunDir, path: Path) -> None:
    program(path, "sbatch", NUMBERED)
    again = rerun(run, argv=[]).run
    begin(run)
    train(run, epoch=10.0, train_s=5.0)
    run.write_status(rundir.Status("completed", "", 1, result={"test_accuracy": 0.5}))
    found = compare.compare(run, again)
    assert found["hardware"]["hardware.cpus"] == (4, None)
    assert found["outcome"]["state"] == ("completed", None)
    assert found["outcome"]["train.loss"] == (0.25, None)
    assert found["outcome"]["result.test_accuracy"] == (0.5, None)
    json.dumps(found)


def test_order_waits_for_those_that_have_not_ended(configure: Configure, path: Path) -> None:
    program(path, "sbatch", NUMBERED)
    runs = [submit.submit(configure(SITE), argv=[]).run for _ in range(3)]
    runs[2].write_status(rundir.Status("completed", "", 1))
    program(path, "squeue", "printf '10|PENDING|Priority|N/A\\n11|RUNNING|None|N/A\\n'")
    wanted = order.directives("slurm", after=runs, hold=True)
    assert wanted == {"hold": True, "dependency": "afterany:10:11"}
    run = submit.submit(configure(SITE), argv=[], directives=wanted, after=runs[:2]).run
    assert Plan.from_record(run.plan_record(1)).after == (str(runs[0].path), str(runs[1].path))
    script = (path / "sbatch.script").read_text()
    assert "#SBATCH --hold\n" in script
    assert "#SBATCH --dependency=afterany:10:11\n" in script


def test_order_refuses_what_cannot_happen(run: rundir.RunDir) -> None:
    with pytest.raises(PreflightError, match="need a scheduler with a queue"):
        order.directives("local", hold=True)
    with pytest.raises(PreflightError, match=r"it is lost \(Slurm no longer knows job 4711"):
        order.directives("slurm", after=[run])


def test_directives_of_one_submission_are_not_the_plans(configure: Configure, path: Path) -> None:
    program(path, "sbatch", ACCEPT)
    run = submit.submit(configure(SITE), argv=[], directives={"hold": True}).run
    plan: dict[str, Any] = run.record()["plan"]
    assert "hold" not in plan["directives"]
