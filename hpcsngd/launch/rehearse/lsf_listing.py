"""What a played LSF prints about jobs, in the forms recorded from real ones. Pure.

IBM's programs wrap long lines in the middle of words and end a history with a reason of their own; those of
the OpenLava family do not know the reasons, and indent JSON with tabs.
"""

from __future__ import annotations

import datetime
import json
import re
import signal
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from hpcsngd.launch.rehearse.book import Job
from hpcsngd.launch.rehearse.cluster import Cluster

_WIDTH = 80
_INDENT = 21
SHOWN_STATE = "shown_state"
"""Key of `Job.options` with a state to show instead, such as UNKWN: no real host is lost in a rehearsal."""

FIELDS = [
    *("JOBID", "USER", "STAT", "QUEUE", "FROM_HOST", "EXEC_HOST", "JOB_NAME", "SUBMIT_TIME"),
    *("PROJ_NAME", "CPU_USED", "MEM", "SWAP", "PIDS", "START_TIME", "FINISH_TIME"),
]
"""What ``bjobs -o`` of the OpenLava family can show; IBM's shows these and many more."""

_STATES = {"pending": "PEND", "running": "RUN", "suspended": "USUSP", "done": "DONE", "exit": "EXIT"}
_REASONS = {
    "killed": "TERM_OWNER: job killed by owner.",
    "limit": "TERM_RUNLIMIT: job killed after reaching LSF run time limit.",
    "preempted": "TERM_PREEMPT: job killed after preemption.",
    "node": "TERM_ZOMBIE: job exited while LSF is not available.",
}
_PENDING = {
    "resources": "Not enough job slot(s): 2 hosts;",
    "dependency": "Job dependency condition not satisfied;",
    "dependency-never": "Dependency condition invalid or never satisfied;",
}


def state(job: Job) -> str:
    """Returns LSF's word for where a job stands."""
    if job.state == "pending" and job.is_held:
        return "PSUSP"
    return job.options.get(SHOWN_STATE, _STATES[job.state])


def job_id(job: Job) -> str:
    """Returns the id as LSF writes it in long listings: ``60[4]`` for an element of an array."""
    return str(job.id) if job.index is None else f"{job.id}[{job.index}]"


def job_name(job: Job) -> str:
    """Returns the name, with the index of an element of an array."""
    return job.name if job.index is None else f"{job.name}[{job.index}]"


def value(job: Job, field: str) -> str:
    """Returns what ``bjobs -o`` shows of a job in one of `FIELDS`; empty where the player has nothing."""
    shown = {
        "JOBID": str(job.id),
        "USER": job.user,
        "STAT": state(job),
        "QUEUE": job.queue,
        "FROM_HOST": job.options.get("from_host", "login1"),
        "EXEC_HOST": job.hosts[0] if job.hosts else "",
        "JOB_NAME": job_name(job),
        "SUBMIT_TIME": _clock(job.submitted)[4:16],
        "PROJ_NAME": job.project or "default",
        "START_TIME": _clock(job.started)[4:16] if job.started else "",
        "FINISH_TIME": _clock(job.ended)[4:16] if job.ended else "",
    }
    return shown.get(field, "")


def as_json(jobs: Sequence[Job], unknown: Sequence[str], fields: Sequence[str], cluster: Cluster) -> str:
    """Returns the answer of ``bjobs -o FIELDS -json``; ids that are unknown get a record with an error."""
    records = [{field: value(job, field) for field in fields} for job in jobs]
    records += [{"JOBID": number, "ERROR": f"Job <{number}> is not found"} for number in unknown]
    told = {"COMMAND": "bjobs", "JOBS": len(records), "RECORDS": records}
    return json.dumps(told, indent="\t" if cluster.flavor == "compatible" else 2)


def as_table(jobs: Iterable[Job], fields: Sequence[str]) -> str:
    """Returns the answer of ``bjobs -o FIELDS``, or of a plain ``bjobs`` for its usual fields."""
    rows = [list(fields), *([value(job, field) or "-" for field in fields] for job in jobs)]
    return "\n".join(" ".join(row) for row in rows)


def long_listing(job: Job, cluster: Cluster) -> str:
    """Returns one block of ``bjobs -l``."""
    head = (
        f"Job <{job_id(job)}>, Job Name <{job_name(job)}>, User <{job.user}>, "
        f"Project <{job.project or 'default'}>, Status <{state(job)}>, Queue <{job.queue}>, "
        f"Command <{' '.join(job.command)}>"
    )
    lines = [head, *_events(job, cluster, end=".")]
    shown = [_wrapped(line) if cluster.flavor != "compatible" else line for line in lines]
    if job.ends_at or job.walltime_s:
        shown += ["", " RUNLIMIT", f" {job.walltime_s / cluster.minute_s:.1f} min"]
    if job.state == "pending" and not job.is_held:
        shown += [
            " PENDING REASONS:",
            f" {_PENDING.get(job.reason, 'New job is waiting for scheduling;')}",
            "",
        ]
    return "\n".join(shown)


def history(job: Job, cluster: Cluster) -> str:
    """Returns one block of ``bhist -l``, which every flavor wraps."""
    head = f"Job <{job_id(job)}>, Job Name <{job_name(job)}>, User <{job.user}>, Project <default>, Command"
    lines = [f"{head} <{' '.join(job.command)}>", *_events(job, cluster, end=";")]
    return "\n".join(map(_wrapped, lines))


def _events(job: Job, cluster: Cluster, *, end: str) -> Iterator[str]:
    for when, note in job.history:
        for text in _event(job, note, cluster, end):
            yield f"{_clock(when)}: {text}"


def _event(job: Job, note: str, cluster: Cluster, end: str) -> Iterator[str]:
    """Yields LSF's lines for one note of the keeper."""
    word, _, rest = note.partition(" ")
    if note == "submitted":
        yield f"Submitted from host <{value(job, 'FROM_HOST')}>, to Queue <{job.queue}>, CWD <{job.cwd}>;"
    elif word == "started":
        hosts = " ".join(f"<{host}>" for host in rest.removeprefix("on ").split())
        yield f"Started on {hosts};"
    elif note == "requeued":
        yield "Pending: Job has been requeued;"
    elif word in ("kill", "killed"):
        yield f"Signal <KILL> requested by user or administrator <{job.user}>;"
        if word == "killed":  # before its start
            yield "Exited;"
    elif word == "signal":
        name = signal.Signals(int(rest)).name.removeprefix("SIG")
        yield f"Signal <{name}> requested by user or administrator <{job.user}>;"
    elif word in ("requeue", "preempt") and cluster.flavor != "compatible":
        # sites that preempt by killing have the job requeued
        who = job.user if word == "requeue" else "lsfadmin"
        yield f"Signal <REQUEUE_PEND> requested by user or administrator <{who}>;"
    elif note == "exit 0":
        yield f"Done successfully. The CPU time used is 0.0 seconds{end}"
    elif word in ("exit", "ended"):
        how = f"with exit code {rest}" if word == "exit" else f"by signal {rest.rpartition(' ')[2]}"
        yield f"Exited {how}. The CPU time used is 0.0 seconds{end}"
        if cluster.flavor != "compatible" and job.has_ended and job.reason in _REASONS:
            yield f"Completed <exit>; {_REASONS[job.reason]}"


def _clock(when: float) -> str:
    moment = datetime.datetime.fromtimestamp(when, datetime.timezone.utc).astimezone()
    return moment.strftime("%a %b %e %H:%M:%S")


def _wrapped(line: str) -> str:
    """Returns a line broken at its 80th column, in the middle of words, as LSF does."""
    first, rest = line[:_WIDTH], line[_WIDTH:]
    size = _WIDTH - _INDENT
    pieces = [rest[start : start + size] for start in range(0, len(rest), size)]
    return "\n".join([first, *(" " * _INDENT + piece for piece in pieces)])


def queues(cluster: Cluster) -> str:
    """Returns the answer of ``bqueues``."""
    rows = [
        f"{name:<15} 30  Open:Active       -    -    -    -     0     0     0     0"
        for name in cluster.queues
    ]
    head = "QUEUE_NAME      PRIO STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN  SUSP"
    return "\n".join([head, *rows])


def identity(cluster: Cluster) -> str:
    """Returns the answer of ``lsid``."""
    if cluster.flavor == "compatible":
        first = "volclava project 2.2, Nov 21 2026"
    else:
        first = "IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022"
    return textwrap.dedent(f"""\
        {first}

        My cluster name is played
        My master name is {cluster.batch_host or cluster.hosts[0]}""")


def wanted_fields(text: str) -> tuple[list[str], str]:
    """Returns the fields of a format such as ``jobid stat:8 delimiter='^'``, and the first unknown one."""
    words = [re.sub(r":-?\d*$", "", word).upper() for word in text.split() if "=" not in word]
    unknown = [word for word in words if word not in FIELDS]
    return words, unknown[0] if unknown else ""
