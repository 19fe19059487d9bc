"""Our own runs on a played LSF: the whole way from submit to status, on two hosts."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.config import matrix
from hpcsngd.errors import PreflightError
from hpcsngd.launch import order, plan, probe, status, submit, sweep, sweep_scripts, sweep_status
from hpcsngd.launch.cancel import cancel
from hpcsngd.launch.executors import LsfSiteExecutor
from hpcsngd.launch.plan import Host
from hpcsngd.launch.rehearse import lsf_commands, lsf_listing
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.rundir import RunDir
from tests.launch.conftest import STANDIN, Configure

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
@pytest.mark.parametrize(("flavor", "mode"), [("csm", "torchrun"), ("ibm", "per_rank")])
def test_a_run_on_two_hosts(play: Play, configure: Configure, flavor: str, mode: str) -> None:
    book = play(flavor)
    run = send(configure, site("meet", mode=mode))
    ended = submit.wait(run, poll_s=0.5)
    assert (ended.state, ended.reason) == ("completed", "")
    facts = rundir.read_yaml(run.attempt(1).attempt_yaml)
    assert facts["hosts"] == ["c1", "c2"]
    assert facts["job"]["LSB_JOBID"] == facts["job_id"]
    told = reports(run)
    assert sorted(told) == [0, 1, 2, 3]
    assert [words["foreign"] for words in told.values()] == [[]] * 4
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert (book.jobs()[0].state, left_over(book)) == ("done", [])


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_run(play: Play, configure: Configure) -> None:
    book = play("ibm")
    run = send(configure, site("fault"))
    ended = submit.wait(run, poll_s=0.5)
    assert (ended.state, (ended.fault or {})["kind"]) == ("failed", "nan")
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert book.jobs()[0].state == "exit"
    assert left_over(book) == []


@pytest.mark.slow
def test_a_cancelled_run_leaves_nothing(play: Play, configure: Configure) -> None:
    book = play("ibm")
    run = send(configure, site("hang"))
    wait_until(lambda: len(reports(run)) == 4, "the start of the ranks")
    assert status.states([run])[0].state == "running"
    (done,) = cancel([run])
    assert done.was_sent
    assert done.text.startswith("cancelled (LSF job ")
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "cancelled"
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert left_over(book) == []
    assert status.states([run])[0].state == "cancelled"
    assert cancel([run])[0].text == "had ended already: cancelled"


def test_a_held_run_waits_and_can_be_cancelled(play: Play, configure: Configure) -> None:
    book = play("compatible")
    run = submit.submit(
        configure(site(), nodes=2),
        argv=[],
        worker=STANDIN,
        directives=order.directives("lsf", hold=True),
    ).run
    state = status.states([run])[0]
    assert (state.state, state.reason) == ("pending", f"held; start it with: bresume {state.job_id}")
    follower = submit.submit(
        configure(site(), nodes=1), argv=[], worker=STANDIN, directives=order.directives("lsf", after=[run])
    ).run
    wait_until(lambda: "dependency" in status.states([follower])[0].reason, "LSF's word about the dependency")
    cancel([run, follower])
    assert [each.state for each in status.states([run, follower])] == ["cancelled", "cancelled"]
    wait_until(lambda: all(job.has_ended for job in book.jobs()), "the end of the jobs")
    assert [job.started for job in book.jobs()] == [0.0, 0.0]


@pytest.mark.slow
def test_a_preempted_run_goes_on_under_its_id(play: Play, configure: Configure) -> None:
    """LSF's signal of a limit, or of a preemption, has the ranks checkpoint; the agent requeues the job."""
    book = play("ibm")
    run = send(configure, site("stop"), restart__on=["preempted"])
    wait_until(lambda: len(reports(run)) == 4, "the start of the ranks")
    key = book.jobs()[0].key
    book.ask(key, "signal 12")
    wait_until(run.attempt(2).attempt_yaml.exists, "the second attempt")
    first = rundir.read_yaml(run.attempt(1).ended_yaml)
    assert (first["state"], first["next"], first["job_id"]) == ("preempted", "requeue", key)
    second = rundir.read_yaml(run.attempt(2).attempt_yaml)
    assert (second["job_id"], second["restarts"]) == (key, 1)
    assert status.states([run])[0].state in ("pending", "running")
    wait_until(lambda: status.states([run])[0].state == "running", "the second attempt's word")
    cancel([run])
    assert submit.wait(run, poll_s=0.5).state == "cancelled"


@pytest.mark.slow
def test_the_head_warns_before_the_limit(play: Play, configure: Configure) -> None:
    """One minute of wall time; nobody but our own clocks warns, 30 s before its end."""
    book = play("compatible")
    run = send(configure, site("stop") | {"stop_margin_s": 40.0}, walltime="1m")
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "timeout"
    assert ended.reason.startswith("wall time of 1 min reached; the workers checkpointed and left")
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert "wall time is over" not in [note for _, note in book.jobs()[0].history]


@pytest.mark.slow
def test_a_sweep_is_one_array(play: Play, configure: Configure, tmp_path: Path) -> None:
    """Elements count from 1 there and from 0 here; what has completed is not sent again."""
    book = play("ibm")
    configure({**site(), "gpus_per_node": 0})
    files = (str(tmp_path / "testsite.yaml"), str(tmp_path / "standin.yaml"))
    found = matrix.resolve(*files, (), [matrix.parse("seed=1,2,3")], environment={})
    assert found is not None
    made = sweep.submit(found, argv=["test"], worker=STANDIN)
    assert [job.key for job in book.jobs()] == [f"{made.job_ids[0]}_{index}" for index in (1, 2, 3)]
    ended = sweep_status.wait(made.sweep, poll_s=0.5)
    assert ended.counts == {"completed": 3}
    ids = [state.job_id for _, state in ended.cells]
    assert ids == [job.key for job in book.jobs()]
    assert sweep.submit(found, argv=["test"], worker=STANDIN).skipped == {"completed": 3}


def test_the_head_is_told_what_the_plan_says(configure: Configure, host: Host) -> None:
    asked = configure(site() | {"stop_margin_s": 44.5}, nodes=2)
    executor = LsfSiteExecutor(Path("/runs/r/submit"), plan.make(asked, host=host))
    words = executor.bsub_words(Path("/s.sh"))
    assert words[:3] == ["bsub", "-J", "standin"]
    assert words[-3:] == ["-o", "/runs/r/submit/%J_lsf.out", "/s.sh"]
    for option in ("--nodes=2", "--limit-min=30", "--warning-s=45", "--launcher=blaunch", "--straggler-s=60"):
        assert option in executor.script
    assert 'exec >>/runs/r/submit/"${job}_head.log" 2>&1' in executor.script


@pytest.mark.slow
def test_a_job_that_a_person_kills_never_comes_back(play: Play, configure: Configure) -> None:
    """bkill by hand leaves no note of ours; LSF's history says who it was."""
    book = play("ibm", grace_s=4.0)
    run = send(configure, site("stop"), restart__on=["preempted", "timeout"])
    wait_until(lambda: len(reports(run)) == 4, "the start of the ranks")
    subprocess.run(["bkill", "101"], check=True, capture_output=True)
    ended = submit.wait(run, poll_s=0.5)
    # whether the signal or LSF's word reaches the agent first is the scheduler's affair
    assert (ended.state, "cancelled" in ended.reason) == ("cancelled", True)
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert (book.jobs()[0].restarts, left_over(book)) == (0, [])


@pytest.fixture
def sent(play: Play, configure: Configure) -> tuple[Book, RunDir]:
    """A run whose held job is shown as the test wants it."""
    book = play("ibm", forget_s=0.0, facts={"bhist": "denied"})
    resolved = configure(site(), nodes=1)
    held = order.directives("lsf", hold=True)
    return book, submit.submit(resolved, argv=[], worker=STANDIN, directives=held).run


def show(book: Book, state: str) -> None:
    with book.changing("101") as job:
        job.is_held = False
        job.after = [("ok", 101)]  # on itself: it never starts
        job.options[lsf_listing.SHOWN_STATE] = state


@pytest.mark.parametrize("word", ["UNKWN", "ZOMBI"])
def test_a_host_that_cannot_be_reached_is_no_end(sent: tuple[Book, RunDir], word: str) -> None:
    book, run = sent
    rundir.write_yaml(run.attempt(1).attempt_yaml, {"start": rundir.utc_now(), "hosts": ["c1"]})
    show(book, word)
    state = status.states([run])[0]
    assert (state.state, state.reason) == ("running", f"LSF calls it {word}")


def test_a_forgotten_job_is_judged_by_what_it_left(sent: tuple[Book, RunDir]) -> None:
    book, run = sent
    book.ask("101", "kill")
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    state = status.states([run])[0]
    assert state.state == "lost"
    assert state.reason.startswith("LSF no longer knows job 101, and it wrote no status (bhist: ")
    rundir.write_yaml(run.attempt(1).attempt_yaml, {"start": rundir.utc_now(), "hosts": ["c1"]})
    rundir.write_yaml(run.attempt(1).finished_yaml, {"accuracy": 0.5})
    assert status.states([run])[0].state == "completed"


def test_done_without_a_word_of_ours_is_a_failure(sent: tuple[Book, RunDir]) -> None:
    book, run = sent
    show(book, "DONE")
    state = status.states([run])[0]
    assert (state.state, state.reason) == ("failed", "the job ended without a status (LSF: DONE)")


def test_an_outage_is_no_end(sent: tuple[Book, RunDir]) -> None:
    book, run = sent
    (book.folder / lsf_commands.DOWN).touch()
    state = status.states([run])[0]
    (book.folder / lsf_commands.DOWN).unlink()
    assert state.state == "pending"
    assert "the scheduler cannot be asked: bjobs gave no list: LSF is down." in state.reason


def test_the_short_end_of_a_requeued_job_is_none(sent: tuple[Book, RunDir]) -> None:
    book, run = sent
    show(book, "DONE")
    facts = {"state": "preempted", "next": "requeue", "utc": rundir.utc_now()}
    rundir.write_yaml(run.attempt(1).ended_yaml, facts)
    state = status.states([run])[0]
    assert (state.state, state.reason) == ("pending", "it is being put back in the queue (LSF: DONE)")
    rundir.write_yaml(run.attempt(1).ended_yaml, {**facts, "utc": "2026-01-01T00:00:00+00:00"})
    assert status.states([run])[0].state == "failed"


@pytest.mark.slow
def test_a_probe_is_a_short_job_on_one_host(play: Play, configure: Configure, tmp_path: Path) -> None:
    book = play("csm")
    made = plan.make(configure(site(), nodes=2))
    assert probe.one_lsf_node(made).directives["nnodes"] == 1
    told = probe.probe(made, tmp_path)
    assert re.match(r"\d+\.\d+\.\d+ \d+\.\d+", told)
    assert (book.jobs()[0].name, book.jobs()[0].nodes) == ("hpcsngd-probe", 1)
    with pytest.raises(PreflightError, match="the probe failed"):
        probe.probe(dataclasses.replace(made, preload=("false",)), tmp_path)


def test_the_dry_run_of_a_sweep_shows_the_array(configure: Configure, host: Host, tmp_path: Path) -> None:
    configure(site())
    files = (str(tmp_path / "testsite.yaml"), str(tmp_path / "standin.yaml"))
    found = matrix.resolve(*files, (), [matrix.parse("seed=1,2,3")], environment={})
    assert found is not None
    text = sweep_scripts.dry_run(found, host=host, directives={"H": True})
    (line,) = [line for line in text.splitlines() if line.startswith("bsub ")]
    assert line.startswith("bsub -J 'standin[1-3]' ")
    assert " -H " in line
    assert "%J_%I_lsf.out" in line
    assert "-m hpcsngd.launch.cell" in text


@pytest.mark.slow
@pytest.mark.parametrize(("flavor", "how"), [("csm", "preempt"), ("ibm", "requeue")])
def test_what_lsf_puts_back_itself_is_not_over(
    play: Play, configure: Configure, flavor: str, how: str
) -> None:
    book = play(flavor, grace_s=10.0)
    run = send(configure, site("stop"), nodes=1)
    wait_until(lambda: len(reports(run)) == 2, "the start of the ranks")
    book.ask("101", how)
    wait_until(run.attempt(2).attempt_yaml.exists, "the second attempt")
    assert rundir.read_yaml(run.attempt(1).ended_yaml)["next"] == "scheduler"
    assert run.status() is None
    cancel([run])
    assert submit.wait(run, poll_s=0.5).state == "cancelled"
