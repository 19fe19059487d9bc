"""The played LSF itself: it reads real options, refuses what sites refuse, and prints what was recorded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hpcsngd.launch.lsf import parse
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.cluster import Row

from .conftest import Play, left_over, wait_until

CSM = ("-P", "abc", "-W", "1:00", "-nnodes", "2")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def bsub(*words: str) -> str:
    """Submits a job and returns its number."""
    done = run("bsub", *words)
    assert done.returncode == 0, done.stderr
    return parse.submitted_id(done.stdout)


def ended(book: Book) -> None:
    wait_until(lambda: all(job.has_ended for job in book.jobs()), "the end of all jobs")


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A script that writes what LSF tells it, and waits if it is asked to."""
    file = tmp_path / "job.sh"
    file.write_text(f"#!/bin/bash\nenv >{tmp_path}/env.$LSB_JOBINDEX\nexec ${{*:-true}}\n")
    file.chmod(0o755)
    return str(file)


def told(tmp_path: Path, index: int = 0) -> dict[str, str]:
    lines = (tmp_path / f"env.{index}").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize(
    ("flavor", "words", "said"),
    [
        ("ibm", (), "Empty job"),
        ("ibm", ("-W", "0:00:30", "true"), "0:00:30: Bad RUNLIMIT specification"),
        ("ibm", ("-q", "nope", "true"), "nope: No such queue"),
        ("ibm", ("-n", "99", "true"), "Too many processors requested"),
        ("ibm", ("-n", "2", "-R", "span[ptile=9]", "true"), "Too many processors requested"),
        ("ibm", ("-w", "done(555)", "true"), "555: No matching job found"),
        ("ibm", ("-nnodes", "2", "true"), "Illegal option -- nnodes"),
        ("compatible", ("-nnodes", "2", "true"), "Bad argument for option -n"),
        ("csm", (*CSM, "-n", "2", "true"), "-n is not supported, use -nnodes"),
        ("csm", (*CSM, "prog", "-n", "2"), "-n is not supported, use -nnodes"),
        ("csm", (*CSM[:4], "true"), "-nnodes is required"),
        ("csm", (*CSM[:2], *CSM[4:], "true"), "-W is required"),
        ("csm", (*CSM, "-R", "span[hosts=1]", "true"), "-R needs -csm y"),
    ],
)
def test_what_is_refused(play: Play, flavor: str, words: tuple[str, ...], said: str) -> None:
    book = play(flavor)
    done = run("bsub", *words)
    assert (done.returncode, done.stdout) == (255, "")
    assert said in done.stderr
    assert "Job not submitted." in done.stderr
    assert book.jobs() == []


def test_a_site_enforces_its_limits(play: Play) -> None:
    rows = (Row(1, 120), Row(3, 60, min_nodes=2))
    play("ibm", is_project_needed=True, limits=rows)
    assert "a project is required" in run("bsub", "true").stderr
    done = run("bsub", "-P", "x", "-n", "8", "-W", "2:00", "true")
    assert "2 node(s) for 120 min in normal fit no row of the limits" in done.stderr


def test_unknown_options_are_misread_letter_by_letter(play: Play) -> None:
    """What the refusals of `hpcsngd.launch.lsf.flavors` are for."""
    book = play("compatible")
    bsub("-alloc_flags", "smt4", "true")
    assert book.jobs()[0].command == ["smt4", "true"]
    ended(book)
    assert book.jobs()[0].exit_code == 127


def test_indices_out_of_bounds_make_an_ordinary_job(play: Play) -> None:
    book = play("compatible", facts={"MAX_JOB_ARRAY_SIZE": "3"})
    for name in ("z[0-2]", "y[1-4]"):
        bsub("-J", name, "true")
    assert [(job.name, job.index) for job in book.jobs()] == [("z[0-2]", None), ("y[1-4]", None)]
    bsub("-J", "x[1,3]%1", "true")
    assert [job.index for job in book.jobs(103)] == [1, 3]
    assert "MAX_JOB_ARRAY_SIZE = 3" in run("bparams", "-l").stdout


def test_what_a_job_is_told(play: Play, script: str, tmp_path: Path) -> None:
    book = play("ibm")
    number = bsub("-n", "8", "-R", "span[ptile=4]", "-J", "x", "-o", f"{tmp_path}/%J_%I.out", script)
    ended(book)
    words = told(tmp_path)
    assert (words["LSB_JOBID"], words["LSB_JOBINDEX"]) == (number, "0")
    assert words["LSB_MCPU_HOSTS"] == "c1 4 c2 4 "
    assert Path(words["LSB_DJOB_HOSTFILE"]).read_text().split() == ["c1"] * 4 + ["c2"] * 4
    assert (tmp_path / f"{number}_0.out").exists()


def test_a_summit_style_job_starts_on_the_batch_host(play: Play, script: str, tmp_path: Path) -> None:
    book = play("csm", slots=42)
    bsub(*CSM, "-alloc_flags", "smt4 nvme", script)
    ended(book)
    words = told(tmp_path)
    assert words["HPCSNGD_PLAYED_HOST"] == "batch1"
    assert words["LSB_MCPU_HOSTS"] == "batch1 1 c1 42 c2 42 "
    assert "CSM_ALLOCATION_ID" in words


def test_a_compatible_scheduler_tells_less(play: Play, script: str, tmp_path: Path) -> None:
    book = play("compatible")
    bsub("-J", "a[1-2]", script)
    ended(book)
    assert (told(tmp_path, 1)["LSB_JOBNAME"], told(tmp_path, 2)["LSB_JOBINDEX"]) == ("a[1-2]", "2")
    assert [name for name in told(tmp_path, 1) if name.startswith("LSB_DJOB")] == []


@pytest.mark.parametrize("flavor", ["ibm", "compatible"])
def test_listings_are_as_recorded(play: Play, flavor: str) -> None:
    book = play(flavor)
    number = bsub("-J", "a[1-2]", "-W", "1", "false")
    ended(book)
    assert run("bjobs").stderr == "No unfinished job found\n"
    done = run(*parse.BJOBS, number, "999")
    assert done.returncode == 0
    assert ("\t" in done.stdout) == (flavor == "compatible")
    assert json.loads(done.stdout)["RECORDS"][-1] == {"JOBID": "999", "ERROR": "Job <999> is not found"}
    assert parse.jobs(done.stdout) == {
        f"{number}_{index}": parse.Seen(f"{number}_{index}", "EXIT") for index in (1, 2)
    }
    for program in (parse.BJOBS_LONG, parse.BHIST_LONG):
        stories = parse.stories(run(*program, number).stdout)
        assert {job_id: (story.state, story.exit_code) for job_id, story in stories.items()} == {
            f"{number}_1": ("EXIT", 1),
            f"{number}_2": ("EXIT", 1),
        }
    assert run("bjobs", "999").stderr == "Job <999> is not found\n"
    assert run("bjobs", "999").returncode == 255
    unknown = run("bjobs", "-o", "jobid exit_code", number)
    assert (unknown.returncode, "<EXIT_CODE> in the format string" in unknown.stderr) == (99, True)
    assert "normal" in run("bqueues").stdout


def test_kill_hold_stop_and_requeue(play: Play, script: str, tmp_path: Path) -> None:
    book = play("ibm", requeue_gap_s=1.0)
    held, sleeper = bsub("-H", script), bsub(script, "sleep", "600")
    wait_until((tmp_path / "env.0").exists, "the start")
    states = parse.jobs(run(*parse.BJOBS, held, sleeper).stdout)
    assert states == {held: parse.Seen(held, "PSUSP"), sleeper: parse.Seen(sleeper, "RUN")}
    assert run("brequeue", held).stderr == f"Job <{held}>: Job has not started yet\n"
    assert run("bstop", sleeper).stdout == f"Job <{sleeper}> is being stopped\n"
    wait_until(lambda: book.jobs()[1].state == "suspended", "the stop")
    assert (parse.jobs(run(*parse.BJOBS, sleeper).stdout) or {})[sleeper].state == "USUSP"
    run("bresume", sleeper, held)
    wait_until(lambda: book.jobs()[1].state == "running", "the resumption")
    assert run("brequeue", sleeper).stdout == f"Job <{sleeper}> is being requeued\n"
    wait_until(lambda: book.jobs()[1].restarts == 1, "the requeue")
    wait_until(lambda: book.jobs()[1].state == "running", "the second start")
    assert run("bkill", sleeper).stdout == f"Job <{sleeper}> is being terminated\n"
    ended(book)
    assert [job.state for job in book.jobs()] == ["done", "exit"]
    story = parse.stories(run("bhist", "-l", sleeper).stdout)[sleeper]
    assert (story.state, story.reason, story.ended_by != "") == ("EXIT", "TERM_OWNER", True)
    assert run("bkill", sleeper).stderr == f"Job <{sleeper}>: Job has already finished\n"
    assert run("bkill", "999").stderr == "Job <999>: No matching job found\n"
    assert left_over(book) == []


def test_the_run_limit_sends_usr2_first(play: Play, tmp_path: Path) -> None:
    book = play("ibm", minute_s=1.0, limit_grace_s=1.0)
    file = tmp_path / "deaf.sh"
    file.write_text(f"#!/bin/bash\ntrap 'touch {tmp_path}/usr2' USR2\nwhile :; do sleep 0.1; done\n")
    file.chmod(0o755)
    number = bsub("-W", "1", str(file))
    ended(book)
    assert (tmp_path / "usr2").exists()
    assert parse.stories(run("bhist", "-l", number).stdout)[number].reason == "TERM_RUNLIMIT"
