"""What LSF's programs print, read. Pure; tested on recorded output.

One form of question works with every flavor: ``bjobs -a -o "jobid stat job_name" -json``. Exit codes and
reasons stand in ``bjobs -l`` and ``bhist -l``, which IBM's programs wrap in the middle of words.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpcsngd.errors import SchedulerError

BJOBS = ("bjobs", "-a", "-o", "jobid stat job_name", "-json")
BJOBS_LONG = ("bjobs", "-a", "-l")
BHIST_LONG = ("bhist", "-l")

_SUBMITTED = re.compile(r"Job <(\d+)> is submitted")
_WRAP = re.compile(r"\n {15,}")
_HEAD = re.compile(r"^Job <(?P<id>\d+)(?:\[(?P<index>\d+)\])?>", re.MULTILINE)
_INDEX = re.compile(r"\[(\d+)\]$")
_EVENT = re.compile(
    r"^(?:[A-Z][a-z]{2} [A-Z][a-z]{2} +\d+ [\d:]{8}(?: \d{4})?): (?P<text>\S.*)$", re.MULTILINE
)
_EXIT_CODE = re.compile(r"[Ee]xited with exit code (\d+)")
_SIGNAL = re.compile(r"[Ee]xited by signal (\d+)")
_TERM = re.compile(r"\b(TERM_[A-Z_]+)")
_REQUEST = re.compile(r"Signal <(?:KILL|TERM|INT)> requested by user or administrator <([^>]*)>")
_STARTED = re.compile(r"^(?:\[\d+\] )?(?:[Ss]tarted|Starting|Dispatched)\b")
_ARRAY_LIMIT = re.compile(r"MAX_JOB_ARRAY_SIZE\s*=\s*(\d+)")
_PENDING = re.compile(r"^ *PENDING REASONS:\s*\n((?:^(?: \S.*)\n?)+)", re.MULTILINE)


@dataclass(frozen=True)
class Seen:
    """One job in an answer.

    Attributes:
        job_id: its id; ``60_4`` for an element of an array.
        state: LSF's word, such as ``RUN``.
    """

    job_id: str
    state: str


@dataclass(frozen=True)
class Story:
    """What a long listing or the history tells of one job.

    Attributes:
        state: LSF's word by the last event that tells; empty if none does.
        exit_code: of the job's script, if it ended with one.
        signal: that ended it, if one did.
        reason: LSF's own ``TERM_...``, if it gives one.
        ended_by: the user who asked for its end, if one did.
        has_started: whether it ran.
        pending: why it does not start.
    """

    state: str = ""
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    ended_by: str = ""
    has_started: bool = False
    pending: tuple[str, ...] = ()


def submitted_id(text: str) -> str:
    """Returns the job id in what bsub printed, site banners around it or not.

    Raises:
        SchedulerError: there is none; the text is quoted, for it may be the site's policy speaking.
    """
    match = _SUBMITTED.search(text)
    if match is None:
        raise SchedulerError(f"bsub gave no job id: {' / '.join(text.split(chr(10))).strip() or 'nothing'}")
    return match[1]


def jobs(text: str) -> dict[str, Seen] | None:
    """Returns id -> job for the output of `BJOBS`; unknown ids are left out; None if it is no such output."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        told = json.JSONDecoder().raw_decode(text[start:])[0]
        records: list[dict[str, Any]] = told["RECORDS"]
        found = [_seen(record) for record in records if "ERROR" not in record and record.get("JOBID")]
    except (ValueError, KeyError, TypeError):
        return None
    return {seen.job_id: seen for seen in found}


def _seen(record: Mapping[str, str]) -> Seen:
    # the index of an element is in its name, with every flavor
    index = _INDEX.search(record.get("JOB_NAME", ""))
    number = record["JOBID"].partition("[")[0]
    return Seen(f"{number}_{index[1]}" if index else number, record["STAT"].strip())


def stories(text: str) -> dict[str, Story]:
    """Returns id -> story for the output of ``bjobs -l`` or ``bhist -l`` about one or more jobs."""
    joined = _WRAP.sub("", text)
    heads = list(_HEAD.finditer(joined))
    bounds = [*(head.start() for head in heads), len(joined)]
    return {
        f"{head['id']}_{head['index']}" if head["index"] else head["id"]: _story(joined[start:end])
        for head, (start, end) in zip(heads, itertools.pairwise(bounds), strict=True)
    }


def _story(text: str) -> Story:
    story = Story()
    for event in _EVENT.finditer(text):
        story = _after(story, event["text"])
    if pending := _PENDING.search(text):
        reasons = tuple(line.rstrip(";") for line in lines(pending[1]))
        return dataclasses.replace(story, state=story.state or "PEND", pending=reasons)
    return story


def _after(story: Story, event: str) -> Story:
    """Returns the story with one more event; a requeued job has several ends, and the last event counts."""
    if event.startswith(("Submitted", "Pending:")) or _STARTED.match(event):
        is_start = _STARTED.match(event) is not None
        return Story("RUN" if is_start else "PEND", has_started=is_start)
    if event.startswith("Unknown; unable to reach"):
        return dataclasses.replace(story, state="UNKWN")
    if asked := _REQUEST.match(event):
        return dataclasses.replace(story, ended_by=asked[1])
    if event.startswith("Done successfully"):
        return dataclasses.replace(story, state="DONE", exit_code=0)
    code, signal, reason = (pattern.search(event) for pattern in (_EXIT_CODE, _SIGNAL, _TERM))
    if not (code or signal or reason or event.startswith(("Exited", "Completed <exit>"))):
        return story
    return dataclasses.replace(
        story,
        state="EXIT",
        exit_code=int(code[1]) if code else story.exit_code,
        signal=int(signal[1]) if signal else story.signal,
        reason=reason[1] if reason else story.reason,
    )


def array_limit(text: str) -> int | None:
    """Returns the largest index of an array that ``bparams -l`` names; None if it names none."""
    match = _ARRAY_LIMIT.search(text)
    return int(match[1]) if match else None


def lines(text: str) -> Iterator[str]:
    """Yields the lines of a program's words that are not empty."""
    yield from (line.strip() for line in text.splitlines() if line.strip())
