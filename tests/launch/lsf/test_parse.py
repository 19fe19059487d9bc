"""LSF's words, on recorded output; see tests/data/lsf/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.lsf import head, parse
from hpcsngd.launch.lsf.parse import Seen, Story

DATA = Path(__file__).parents[2] / "data" / "lsf"


def text(name: str) -> str:
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "said",
    [
        "Job <12> is submitted to queue <normal>.\n",
        "Job <12> is submitted to default queue <normal>.\n",
        "== welcome to the cluster, job 99 ==\n5 node hours left\nJob <12> is submitted to queue <b>.\n",
    ],
)
def test_the_id_is_found_between_a_sites_words(said: str) -> None:
    assert parse.submitted_id(said) == "12"


def test_a_refusal_is_quoted() -> None:
    with pytest.raises(SchedulerError, match=r"no job id: Request aborted by esub\. Job not submitted\."):
        parse.submitted_id("Request aborted by esub. Job not submitted.\n")
    with pytest.raises(SchedulerError, match="no job id: nothing"):
        parse.submitted_id("")


def test_a_list_with_array_elements_and_unknown_ids() -> None:
    assert parse.jobs(text("bjobs-json-volclava")) == {
        "59": Seen("59", "DONE"),
        "2_7": Seen("2_7", "PEND"),
        "2_5": Seen("2_5", "EXIT"),
        "97": Seen("97", "UNKWN"),
    }
    assert parse.jobs(text("bjobs-json-ibm")) == {
        "34435": Seen("34435", "RUN"),
        "34436_12": Seen("34436_12", "PSUSP"),
    }
    assert parse.jobs("cluster news!\n" + text("bjobs-json-none")) == {}


@pytest.mark.parametrize("said", ["", "LSF is down. Please wait ...", '{"COMMAND": "bjobs", "JOBS": 1, "REC'])
def test_what_is_no_list_is_no_answer(said: str) -> None:
    assert parse.jobs(said) is None


def test_long_listing() -> None:
    told = parse.stories(text("bjobs-long-volclava"))
    reasons = ("Job's resource requirements not satisfied: 1 host", "Not enough job slot(s): 3 hosts")
    assert told["58"] == Story("PEND", pending=reasons)
    assert told["60_4"] == Story("EXIT", 7, has_started=True)
    assert told["61"] == Story("DONE", 0, has_started=True)


def test_history_that_is_wrapped_in_the_middle_of_words() -> None:
    told = parse.stories(text("bhist-long-volclava"))
    assert told["62"] == Story("EXIT", signal=9, ended_by="tester", has_started=True)
    assert told["63"] == Story("PEND")  # the last event counts, not the end before it
    assert told["64_2"] == Story("UNKWN", has_started=True)
    told = parse.stories(text("bhist-long-ibm"))
    assert told == {"101": Story("EXIT", 140, reason="TERM_RUNLIMIT", has_started=True)}


def test_the_limit_of_arrays() -> None:
    assert parse.array_limit(text("bparams")) == 2000
    assert parse.array_limit("bparams: command not found") is None


def test_why_a_job_is_ended_by_its_history() -> None:
    history = text("bhist-long-volclava")
    assert head.fate(history.split("---")[0]) == "KILLED"
    requeued = f"Sat Nov 21 09:23:50: Signal <REQUEUE_PE\n{' ' * 21}ND> requested by user <tester>;\n"
    assert head.fate(history + requeued) == "REQUEUED"
    assert head.fate("") == "KILLED"  # a job that a person kills must never come back
