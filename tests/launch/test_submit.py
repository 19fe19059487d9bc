"""Submission to Slurm with stand-in commands: missing, refusing, hanging, and what they are given."""

from __future__ import annotations

import stat
import time
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.errors import EXIT_SCHEDULER, PreflightError, SchedulerError
from hpcsngd.launch import provenance, status, submit

from .conftest import Configure

SITE: dict[str, Any] = {
    "description": "cluster",
    "scheduler": {"kind": "slurm", "command_timeout_s": 5, "poll_s": 0.05},
    "limits": [{"max_nodes": 4, "max_walltime": "2h"}],
}
ACCEPT = 'cp "$1" "$0.script"; env > "$0.env"; echo "Submitted batch job 4711"'


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a folder for stand-in programs first in PATH; Slurm's own are not behind it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("sbatch", "squeue", "sacct", "scontrol", "sacctmgr"):
        program(folder, name, "echo stand-in not set up >&2; exit 1")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def only_run(tmp_path: Path) -> rundir.RunDir:
    [file] = (tmp_path / "runs").glob("*/run.yaml")
    return rundir.open_run(file.parent)


def test_an_accepted_job_is_recorded(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", ACCEPT)
    submitted = submit.submit(configure(SITE, nodes=2), argv=["submit", "--nodes", "2"])
    assert submitted.job_id == "4711"
    facts = rundir.read_yaml(submitted.run.attempt(1).submitted_yaml)
    assert (facts["scheduler"], facts["job_id"]) == ("slurm", "4711")
    script = (path / "sbatch.script").read_text()
    assert "#SBATCH --nodes=2" in script
    assert str(submitted.run.submit_dir) in script
    assert (submitted.run.submit_dir / "4711_submitted.pkl").is_file()
    assert (submitted.run.submit_dir / "4711_submission.sh").read_text() == script


def test_the_submitters_own_job_does_not_reach_sbatch(
    configure: Configure, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outer = {"SLURM_NTASKS": "7", "SBATCH_TIMELIMIT": "1", "PMIX_RANK": "1", "OMPI_X": "1", "RANK": "3"}
    for name, value in (outer | {"SLURM_CONF": "/etc/x.conf", "KEEP": "me"}).items():
        monkeypatch.setenv(name, value)
    program(path, "sbatch", ACCEPT)
    submit.submit(configure(SITE), argv=[])
    given = dict(line.split("=", 1) for line in (path / "sbatch.env").read_text().splitlines() if "=" in line)
    assert not set(outer) & set(given)
    assert (given["SLURM_CONF"], given["KEEP"]) == ("/etc/x.conf", "me")
    assert "SBATCH_TIMELIMIT" in caplog.text


def test_a_missing_sbatch_leaves_nothing_behind(
    configure: Configure, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SchedulerError, match="sbatch is not in PATH, but site testsite needs Slurm"
    ) as caught:
        submit.submit(configure(SITE), argv=[])
    assert caught.value.exit_code == EXIT_SCHEDULER
    assert not (tmp_path / "runs").exists()


def test_a_refusal_is_quoted_and_recorded(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", 'echo "sbatch: error: invalid account" >&2; echo "x" >&2; exit 1')
    with pytest.raises(SchedulerError, match="sbatch refused: sbatch: error: invalid account / x"):
        submit.submit(configure(SITE), argv=[])
    run = only_run(tmp_path)
    ended = run.status()
    assert ended is not None
    assert ended.state == "failed"
    assert ended.reason.startswith("not submitted: sbatch refused: sbatch: error: invalid account")
    state = status.states([run])[0]
    assert (state.state, state.job_id, state.fault_kind) == ("failed", "", "configuration")


def test_a_hanging_sbatch_is_given_up(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", "sleep 30")
    site = SITE | {"scheduler": {"kind": "slurm", "command_timeout_s": 0.3}}
    start = time.monotonic()
    with pytest.raises(SchedulerError, match=r"sbatch did not answer within 0\.3 s"):
        submit.submit(configure(site), argv=[])
    assert time.monotonic() - start < 10
    ended = only_run(tmp_path).status()
    assert ended is not None
    assert ended.state == "failed"


def test_words_that_name_no_job_are_a_failure(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", 'echo "welcome to our cluster"')
    with pytest.raises(SchedulerError, match="Could not make sense of sbatch output"):
        submit.submit(configure(SITE), argv=[])


def test_limits_refuse_before_sbatch_is_called(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", ACCEPT)
    with pytest.raises(PreflightError, match="max_nodes: 4, max_walltime: 02:00:00"):
        submit.submit(configure(SITE, nodes=5), argv=[])
    assert not (path / "sbatch.script").exists()
    assert not (tmp_path / "runs").exists()


def test_a_run_root_that_cannot_be_made_is_refused(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "sbatch", ACCEPT)
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="cannot write the run root"):
        submit.submit(configure(SITE), argv=[], run_root=tmp_path / "file" / "runs")
    assert not (path / "sbatch.script").exists()


@pytest.fixture
def run(configure: Configure, path: Path) -> rundir.RunDir:
    """A submitted run whose job is known to nobody yet."""
    program(path, "sbatch", ACCEPT)
    return submit.submit(configure(SITE), argv=[]).run


@pytest.mark.parametrize(
    ("squeue", "state", "kind", "words"),
    [
        ("CANCELLED by 0|None", "cancelled", "killed", "the job was cancelled (Slurm: CANCELLED by 0)"),
        ("NODE_FAIL|None", "failed", "node_failure", "a node failed (Slurm: NODE_FAIL)"),
        ("TIMEOUT|TimeLimit", "timeout", "walltime", "time limit (Slurm: TIMEOUT TimeLimit)"),
        ("COMPLETED|None", "failed", "unknown", "ended without a status (Slurm: COMPLETED)"),
        ("OUT_OF_MEMORY|OutOfMemory", "failed", "out_of_memory", "more memory than it asked for"),
    ],
)
def test_a_job_that_ends_silently_gets_the_schedulers_word(
    run: rundir.RunDir, path: Path, squeue: str, state: str, kind: str, words: str
) -> None:
    program(path, "squeue", f'echo x >> "$0.calls"; echo "4711|{squeue}"')
    seen: list[str] = []
    ended = submit.wait(run, poll_s=0.01, on_update=lambda update: seen.append(update.state))
    assert (ended.state, (ended.fault or {})["kind"]) == (state, kind)
    assert words in ended.reason
    assert seen == [state] * submit.ENDED_POLLS
    assert run.status() == ended


def test_a_job_that_nobody_knows_is_lost(run: rundir.RunDir, path: Path) -> None:
    program(path, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    program(path, "sacct", "exit 0")
    assert status.states([run])[0].state == "lost"
    ended = submit.wait(run, poll_s=0.01)
    assert (ended.state, (ended.fault or {})["kind"]) == ("failed", "unknown")
    assert "Slurm no longer knows job 4711" in ended.reason


def test_waiting_goes_on_while_the_scheduler_is_silent(run: rundir.RunDir, path: Path) -> None:
    reasons: list[str] = []

    def look(update: status.RunState) -> None:
        reasons.append(update.reason)
        assert update.state == "pending"
        if len(reasons) > submit.ENDED_POLLS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit.wait(run, poll_s=0.01, on_update=look)
    assert all(reason.startswith("the scheduler cannot be asked: squeue refused") for reason in reasons)
    assert run.status() is None


def test_a_status_that_arrives_late_is_waited_for(run: rundir.RunDir, path: Path) -> None:
    program(path, "squeue", 'echo "4711|COMPLETED|None"')
    finished = rundir.Status("completed", "", 1, result={"accuracy": 1.0})
    seen: list[str] = []

    def look(update: status.RunState) -> None:
        seen.append(update.state)
        if len(seen) == submit.ENDED_POLLS - 1:
            run.write_status(finished)

    assert submit.wait(run, poll_s=0.01, on_update=look) == finished


def test_one_question_for_many_runs(configure: Configure, path: Path) -> None:
    program(path, "sbatch", 'n=$(cat "$0.n" 2>/dev/null || echo 10); echo $((n+1)) > "$0.n"; echo "job $n"')
    runs = [submit.submit(configure(SITE), argv=[]).run for _ in range(3)]
    program(
        path, "squeue", 'echo "$@" >> "$0.calls"; printf "10|PENDING|Priority\\n11|RUNNING|None\\n12|NEW|\\n"'
    )
    found = status.states(runs)
    assert [(state.state, state.reason) for state in found] == [
        ("pending", "Priority: jobs of higher priority go first"),
        ("running", ""),
        ("pending", "Slurm calls it NEW"),
    ]
    assert len((path / "squeue.calls").read_text().splitlines()) == 1
    assert found[0].to_json()["job_id"] == "10"


def test_progress_comes_from_the_metrics(run: rundir.RunDir, path: Path) -> None:
    from hpcsngd.tables import TABLES

    common = {"attempt": 1, "epoch": 2.5, "step": 40, "train_s": 3.5, "wall_s": 4.0, "utc": "x"}
    writer = rundir.CsvWriter(run.metrics("train"), TABLES["train"])
    writer.write(**common, samples=640, loss=0.25, accuracy=0.9, lr=0.1)
    writer.close()
    writer = rundir.CsvWriter(run.metrics("eval"), TABLES["eval"])
    writer.write(**common, split="test", count=10, loss=0.5, accuracy=0.75, eval_s=0.1)
    writer.close()
    program(path, "squeue", 'echo "4711|RUNNING|None"')
    state = status.states([run])[0]
    assert (state.epoch, state.epochs, state.step, state.loss) == (2.5, 10, 40, 0.25)
    assert (state.accuracy, state.train_s) == (0.75, 3.5)


def test_the_status_of_an_earlier_attempt_is_not_the_runs(run: rundir.RunDir, path: Path) -> None:
    run.write_status(rundir.Status("preempted", "stopped", 1))
    assert status.states([run])[0].state == "preempted"
    rundir.write_yaml(run.attempt(2).attempt_yaml, {"start": rundir.utc_now()})
    program(path, "squeue", 'echo "4711|RUNNING|None"')
    state = status.states([run])[0]
    assert (state.state, state.attempt) == ("running", 2)


def test_a_submission_that_was_interrupted_is_lost(configure: Configure, run: rundir.RunDir) -> None:
    run.attempt(1).submitted_yaml.unlink()
    state = status.states([run])[0]
    assert (state.state, state.job_id) == ("lost", "")
    assert "never submitted" in state.reason


def test_provenance_of_a_dirty_repository(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> None:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert provenance.git_state(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("one\n")
    git("add", "a")
    git("commit", "-m", "x")
    clean = provenance.git_state(tmp_path)
    assert clean is not None
    assert (clean["dirty"], clean["diff"], clean["untracked"]) == (False, "", [])
    (tmp_path / "a").write_text("two\n" * 100_000)
    (tmp_path / "b").touch()
    dirty = provenance.git_state(tmp_path)
    assert dirty is not None
    assert (dirty["dirty"], dirty["untracked"], dirty["diff_is_cut"]) == (True, ["b"], True)
    assert len(dirty["diff"].encode()) <= provenance.MAX_DIFF_BYTES
    assert dirty["diff"].startswith("diff --git a/a b/a")
