"""Where jobs stand, and orders to LSF: no silence, hiccup or exit code is taken for more than it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import programs, queued
from hpcsngd.launch.lsf import jobs
from hpcsngd.launch.lsf.parse import Story
from hpcsngd.launch.programs import Said
from hpcsngd.rundir import FAULT_KINDS, STATES

from .test_parse import text

Answers = dict[str, Said | SchedulerError]
Play = Callable[[Answers], list[list[str]]]
NOTHING = Said("", "Job <7> is not found\n", 255)


@pytest.fixture
def lsf(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Returns a function that sets what each program says (``bjobs -l`` apart) and returns all calls."""

    def make(answers: Answers) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(words: Sequence[str], *, timeout_s: float, env: object = None) -> Said:
            calls.append(list(words))
            said = answers.get("bjobs -l" if words[:3] == ["bjobs", "-a", "-l"] else words[0], NOTHING)
            if isinstance(said, SchedulerError):
                raise said
            return said

        monkeypatch.setattr(programs, "run", run)
        return calls

    return make


def listed(*pairs: tuple[str, str]) -> Said:
    records = ", ".join(
        f'{{"JOBID": "{number}", "STAT": "{state}", "JOB_NAME": "x"}}' for number, state in pairs
    )
    return Said(f'{{"RECORDS": [{records}]}}', "", 0)


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        *((state, queued.PENDING) for state in ("PEND", "PSUSP", "WAIT", "PROV")),
        *((state, queued.RUNNING) for state in ("RUN", "USUSP", "SSUSP", "SUSP")),
        *((state, queued.ENDED) for state in ("DONE", "EXIT")),
        *((state, queued.UNKNOWN) for state in ("UNKWN", "ZOMBI", "TELEPORTED")),
    ],
)
def test_every_state(state: str, phase: str) -> None:
    assert jobs.Job("1", state).phase == phase


@pytest.mark.parametrize(
    ("story", "ours", "kind"),
    [
        (Story(exit_code=140, reason="TERM_RUNLIMIT"), "timeout", "walltime"),
        (Story(exit_code=140), "timeout", "walltime"),
        (Story(signal=12), "timeout", "walltime"),
        (Story(exit_code=1, reason="TERM_MEMLIMIT"), "failed", "out_of_memory"),
        (Story(reason="TERM_PREEMPT"), "preempted", "preempted"),
        (Story(reason="TERM_CSM_ALLOC"), "failed", "node_failure"),
        (Story(signal=9, ended_by="anna"), "cancelled", "killed"),
        (Story(reason="TERM_OWNER"), "cancelled", "killed"),
        (Story(exit_code=130), "cancelled", "killed"),
        (Story(signal=9), "failed", "killed"),
        (Story(exit_code=143), "failed", "killed"),
        (Story(exit_code=127), "failed", "configuration"),
        (Story(exit_code=7), "failed", "unknown"),
        (Story(), "failed", "unknown"),
    ],
)
def test_an_exit_without_a_status_of_ours(story: Story, ours: str, kind: str) -> None:
    found = jobs.Job("1", "EXIT", story).ending()
    assert found[:2] == (ours, kind)
    assert "(LSF: EXIT" in found[2]
    assert ours in STATES
    assert kind in FAULT_KINDS


def test_all_reasons_are_ones_of_ours() -> None:
    assert {state for state, _, _ in jobs._REASONS.values()} <= set(STATES)
    assert {kind for _, kind, _ in jobs._REASONS.values()} <= set(FAULT_KINDS)


def test_done_alone_is_no_success() -> None:
    job = jobs.Job("1", "DONE")
    assert job.is_success
    assert job.ending() == ("failed", "unknown", "the job ended without a status (LSF: DONE)")


def test_why_a_job_waits_or_stands_still(lsf: Play) -> None:
    lsf({"bjobs": listed(("58", "PEND")), "bjobs -l": Said(text("bjobs-long-volclava"), "", 0)})
    (job,) = jobs.ask(["58"], timeout_s=1).jobs.values()
    assert (
        job.waiting() == "Job's resource requirements not satisfied: 1 host; Not enough job slot(s): 3 hosts"
    )
    assert jobs.Job("5_2", "PSUSP").waiting() == "held; start it with: bresume 5[2]"
    assert jobs.Job("5", "USUSP").detail.endswith("bresume lets it go on")


def test_a_forgotten_job_is_in_the_history(lsf: Play) -> None:
    calls = lsf(
        {"bjobs": Said(text("bjobs-json-none"), "", 255), "bhist": Said(text("bhist-long-volclava"), "", 0)}
    )
    answer = jobs.ask(["62", "63", "64_2", "65"], timeout_s=1)
    assert {job_id: job.state for job_id, job in answer.jobs.items()} == {
        "62": "EXIT",
        "63": "PEND",
        "64_2": "UNKWN",
    }
    assert answer.jobs["62"].ending()[2] == "the job was killed (LSF: EXIT signal 9, ended by tester)"
    assert answer.is_complete
    assert calls == [[*jobs.parse.BJOBS, "62", "63", "64", "65"], ["bhist", "-l", "62", "63", "64", "65"]]


def test_a_history_that_cannot_be_read_is_said(lsf: Play) -> None:
    lsf({"bhist": Said("", "Failed to open the event file: Permission denied", 255)})
    answer = jobs.ask(["7"], timeout_s=1)
    assert (answer.jobs, answer.is_complete) == ({}, True)
    assert answer.complaints == ("bhist: Failed to open the event file: Permission denied",)


def test_where_the_history_is_closed_the_long_listing_tells(
    lsf: Play,
) -> None:
    records = '{"JOBID": "60", "STAT": "EXIT", "JOB_NAME": "arr[4]"}'
    lsf(
        {
            "bjobs": Said(f'{{"RECORDS": [{records}]}}', "", 0),
            "bjobs -l": Said(text("bjobs-long-volclava"), "", 0),
        }
    )
    (job,) = jobs.ask(["60_4"], timeout_s=1).jobs.values()
    assert job.detail == "exit code 7"


@pytest.mark.parametrize(
    "said",
    [
        Said("", "LSF is down. Please wait ...", 255),
        Said("", "", 255),
        Said('{"RECORDS": [{"JOBID": "7", "ST', "", 0),
        SchedulerError("bjobs did not answer within 1 s"),
    ],
)
def test_a_hiccup_is_no_end(lsf: Play, said: Said | SchedulerError) -> None:
    lsf({"bjobs": said})
    answer = jobs.ask(["7"], timeout_s=1)
    assert (answer.jobs, answer.is_complete) == ({}, False)
    assert answer.complaints


def test_an_exit_status_of_bjobs_says_nothing(lsf: Play) -> None:
    lsf({"bjobs": Said(listed(("7", "RUN")).out, "Job <8> is not found", 255)})
    answer = jobs.ask(["7", "8"], timeout_s=1)
    assert {job_id: job.state for job_id, job in answer.jobs.items()} == {"7": "RUN"}
    assert answer.is_complete


def test_many_jobs_are_asked_for_in_chunks_and_arrays_once(lsf: Play) -> None:
    calls = lsf({"bjobs": listed()})
    jobs.ask([f"{number}_{index}" for number in range(250) for index in (1, 2)], timeout_s=1)
    assert [len(words) - len(jobs.parse.BJOBS) for words in calls if words[0] == "bjobs"] == [200, 50]


def test_cancel(lsf: Play) -> None:
    calls = lsf(
        {"bkill": Said("Job <7> is being terminated\n", "Job <8[2]>: Job has already finished\n", 255)}
    )
    jobs.cancel(["7", "8_2"], timeout_s=1)
    assert calls == [["bkill", "7", "8[2]"]]
    lsf({"bkill": Said("", "Job <7>: Operation is in progress\n", 255)})
    jobs.cancel(["7"], timeout_s=1)  # the host cannot be reached: LSF will do it
    for words in ("Job <7>: Job has already finished", "Job <7>: No matching job found"):
        lsf({"bkill": Said("", words, 255)})
        with pytest.raises(queued.AlreadyEndedError):
            jobs.cancel(["7"], timeout_s=1)
    lsf({"bkill": Said("", "Job <7>: User permission denied", 255)})
    with pytest.raises(SchedulerError, match="bkill refused: Job <7>: User permission denied"):
        jobs.cancel(["7"], timeout_s=1)


def test_outside_a_job_there_is_no_own_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCSNGD_LSF_FOLDER", raising=False)
    assert jobs.own_job("7", timeout_s=1) is None
    with pytest.raises(SchedulerError, match="this process is no task of an LSF job"):
        jobs.requeue("7", timeout_s=1)
