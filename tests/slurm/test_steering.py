"""Steering runs on a real Slurm: why they wait, order, cancel, resume, logs, refusals before submission."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcsngd import rundir
from hpcsngd.errors import PreflightError
from hpcsngd.launch import order, preflight, probe, status, submit, usage
from hpcsngd.launch.cancel import cancel
from hpcsngd.launch.plan import Directive
from hpcsngd.launch.resume import rerun, resume

from .conftest import STANDIN, Configure, reports
from .test_launch import wait_until

if TYPE_CHECKING:
    from tests.testbed.plugin import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm_cluster")]


def send(
    configure: Configure, behavior: str, *, after: Sequence[rundir.RunDir] = (), **directives: Directive
) -> submit.Submitted:
    resolved = configure("per_rank", env={"STANDIN": behavior})
    return submit.submit(resolved, argv=["test"], worker=STANDIN, directives=directives, after=after)


def state_of(run: rundir.RunDir) -> status.RunState:
    return status.states([run])[0]


def shim(folder: Path, monkeypatch: pytest.MonkeyPatch, **bodies: str) -> None:
    """Puts programs in front of Slurm's own."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_held_run_and_the_one_after_it(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    first = send(configure, "ok", **order.directives("slurm", hold=True))
    waiting = order.directives("slurm", after=[first.run])
    assert waiting == {"dependency": f"afterany:{first.job_id}"}
    second = send(configure, "ok", after=[first.run], **waiting)
    # Slurm names the dependency only after its scheduler has looked at the job.
    wait_until(lambda: state_of(second.run).reason.startswith("Dependency"), "the reason", timeout_s=60)
    found = status.states([first.run, second.run])
    assert [state.state for state in found] == ["pending", "pending"]
    assert found[0].reason == f"JobHeldUser: held; start it with: scontrol release {first.job_id}"
    assert found[1].reason == "Dependency: it waits for another job"
    slurm_cluster.run("scontrol", "release", first.job_id)
    ended = [submit.wait(each.run, poll_s=0.5) for each in (first, second)]
    assert [each.state for each in ended] == ["completed", "completed"]
    starts = [rundir.read_yaml(each.run.attempt(1).attempt_yaml)["start"] for each in (first, second)]
    assert ended[0].utc < starts[1]
    assert order.directives("slurm", after=[first.run]) == {}
    assert cancel([first.run])[0].was_sent is False
    assert not first.run.attempt(1).cancel_request.exists()
    record = rundir.read_yaml(second.run.attempt(1).attempt_yaml)["job"]
    assert (record["JobId"], record["Partition"], record["NumNodes"]) == (second.job_id, "debug", "2")


def test_a_waiting_run_is_expected_to_start(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    """A job that takes all cores is in the way; Slurm says when its limit is over."""
    wide = slurm_cluster.submit("-N2", "--exclusive", "--time=3", command="sleep 60")
    try:
        slurm_cluster.wait_state(wide, {"RUNNING"})
        submitted = send(configure, "ok")
        wait_until(lambda: state_of(submitted.run).start_estimate, "an estimate", timeout_s=30)
        state = state_of(submitted.run)
        assert (state.state, state.reason.partition(":")[0]) == ("pending", "Resources")
        assert state.start_estimate > state.submitted[:19]
    finally:
        slurm_cluster.run("scancel", wide)
    assert submit.wait(submitted.run, poll_s=0.5).state == "completed"


def test_cancel_while_it_waits(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    submitted = send(configure, "ok", hold=True)
    behind = send(configure, "ok", after=[submitted.run], **order.directives("slurm", after=[submitted.run]))
    [done] = cancel([submitted.run])
    assert (done.state, done.was_sent) == ("pending", True)
    ended = submitted.run.status()
    assert ended is not None
    assert ended.state == "cancelled"
    assert ended.reason.startswith("cancelled by ")
    assert slurm_cluster.wait_state(submitted.job_id, {"CANCELLED", "COMPLETED"}) == "CANCELLED"
    [again] = cancel([submitted.run])
    assert (again.was_sent, again.text) == (False, "had ended already: cancelled")
    with pytest.raises(PreflightError, match="it is cancelled"):
        order.directives("slurm", after=[submitted.run])
    never = submit.wait(behind.run, poll_s=0.5)
    words = f"configuration: it was to start after {submitted.run.name}, which is cancelled (cancelled by "
    assert (never.state, never.reason.startswith(words)) == ("failed", True), never.reason
    assert reports(behind.run) == []


def test_cancel_while_it_runs_then_resume_with_less(
    slurm_cluster: SlurmCluster, configure: Configure
) -> None:
    from hpcsngd.cli.arguments import overrides

    submitted = send(configure, "stop")
    run = submitted.run
    wait_until(lambda: len(reports(run)) == 4, "the start of all ranks")
    with pytest.raises(PreflightError, match="is running"):
        resume(run, argv=["test"])
    [done] = cancel([run])
    assert (done.state, done.was_sent) == ("running", True)
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "cancelled"
    assert ended.reason.startswith("cancelled by ")
    slurm_cluster.wait_state(submitted.job_id, {"CANCELLED", "COMPLETED", "FAILED"})
    changes = overrides(["walltime=5m", "nodes=1", "site.env.STANDIN=ok"])
    resumed = resume(run, changes, argv=["test"])
    assert resumed.job_id != submitted.job_id
    assert submit.wait(run, poll_s=0.5).state == "completed"
    facts = rundir.read_yaml(run.attempt(2).attempt_yaml)
    assert (facts["nodes"], facts["world_size"], facts["job"]["TimeLimit"]) == (1, 2, "00:05:00")
    assert facts["hardware"]["cpus"] >= 1
    wait_until(lambda: usage.settle(run) or run.attempt(2).accounting_yaml.exists(), "the accounts", 60)
    cancelled, completed = usage.summary(run)
    assert (cancelled["attempt"], completed["attempt"]) == (1, 2)
    assert (completed["exit_code"], completed["by"]) == ("0:0", "Slurm")
    assert completed["max_rss_mib"] > 10  # the stand-in is a Python
    with pytest.raises(PreflightError, match="has completed"):
        resume(run, argv=["test"])


def test_status_without_accounting_and_after_slurm_has_forgotten(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disabled = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
    shim(tmp_path / "bin", monkeypatch, sacct=disabled)
    submitted = send(configure, "stop")
    run = submitted.run
    wait_until(lambda: len(reports(run)) == 4, "the start of all ranks")
    assert (state_of(run).state, state_of(run).reason) == ("running", "")
    again = rerun(run, argv=["test"], directives={"hold": True})
    assert again.run.record()["provenance"]["rerun_of"] == str(run.path)
    cancel([run, again.run])
    assert submit.wait(run, poll_s=0.5).state == "cancelled"
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    shim(tmp_path / "bin", monkeypatch, squeue=forgotten)
    assert [state.state for state in status.states([run, again.run])] == ["cancelled", "cancelled"]
    # killed before its agent could write: the note of the cancel is left, then not even that
    run.status_yaml.unlink()
    assert state_of(run).state == "cancelled"
    run.attempt(1).cancel_request.unlink()
    shutil.rmtree(run.attempt(1).path / "faults", ignore_errors=True)
    for file in run.submit_dir.glob("*_log.err"):
        file.unlink()
    state = state_of(run)
    assert state.state == "lost", state.reason
    assert "Slurm no longer knows" in state.reason
    assert "accounting storage is disabled" in state.reason


def test_logs_are_followed_to_the_end(configure: Configure) -> None:
    resolved = configure("torchrun", env={"STANDIN": "import"})
    run = submit.submit(resolved, argv=["test"], worker=STANDIN).run
    words = [sys.executable, "-m", "hpcsngd", "logs", str(run.path), "--follow"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("ModuleNotFoundError: No module named 'no_such_module_anywhere'") >= 2
    assert "==> node1.err <==" in done.stdout
    assert done.stderr.startswith("failed: import error: ModuleNotFoundError")
    own = subprocess.run(
        [*words[:-1], "--rank", "3", "--stream", "err"], capture_output=True, text=True, check=True
    )
    assert "==> rank3.err <==" in own.stdout
    told = subprocess.run([*words[:3], "status", str(run.path)], capture_output=True, text=True, check=True)
    assert "import error: ModuleNotFoundError" in told.stdout
    assert "  evidence:" in told.stdout


def test_everything_wrong_is_told_before_a_submission(configure: Configure, tmp_path: Path) -> None:
    resolved = configure("torchrun", scheduler={"partition": "short"}, limits=[])
    with pytest.raises(PreflightError) as refused:
        submit.submit(resolved, argv=["test"], worker=STANDIN)
    text = str(refused.value)
    assert "partition short gives a job at most 1 node(s), asked: 2" in text
    assert "partition short gives a job at most 00:05:00, asked: 00:10:00" in text
    misspelt = configure("torchrun", scheduler={"partition": "shrt"})
    with pytest.raises(PreflightError, match="no partition 'shrt'; did you mean 'short'"):
        submit.submit(misspelt, argv=["test"], worker=STANDIN)
    assert not (tmp_path / "runs").exists()


def test_a_probe_imports_torch_on_a_node(configure: Configure, tmp_path: Path) -> None:
    import torch

    made = preflight.check(configure("torchrun"), run_root=tmp_path / "runs")
    assert probe.probe(made, tmp_path).split()[1] == torch.__version__
    broken = configure("torchrun", preload=["module() { return 1; }", "module load torch"])
    with pytest.raises(PreflightError, match="preload line 2 failed: module load torch"):
        preflight.check(broken, run_root=tmp_path / "runs", probe=True)
