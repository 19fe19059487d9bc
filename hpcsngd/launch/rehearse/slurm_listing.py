"""squeue and sacct of a played Slurm, and what scontrol shows: our records in Slurm's own forms."""

from __future__ import annotations

import datetime
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse.book import Book, Job

# our neutral record -> the words of squeue(1)
_STATES = {"pending": "PENDING", "running": "RUNNING", "suspended": "SUSPENDED", "done": "COMPLETED"}
_ENDS = {"limit": "TIMEOUT", "killed": "CANCELLED", "preempted": "PREEMPTED", "node": "NODE_FAIL"}
_WAITS = {"dependency": "Dependency", "dependency-never": "DependencyNeverSatisfied"}


def complain(program: str, *lines: str) -> int:
    """Prints a complaint as Slurm's programs do, and returns their exit status."""
    sys.stderr.write(f"{program}: {lines[0]}\n" + "".join(f"{line}\n" for line in lines[1:]))
    return 1


def squeue(words: list[str], folder: Path) -> int:
    """Lists jobs in the two forms that we ask for."""
    form = next((word for word in words if word.startswith(("--format=", "--Format="))), "")
    found = list(_chosen(words, folder))
    if not found:
        return complain("slurm_load_jobs error", "Invalid job id specified")
    for job in found:
        if form.startswith("--Format="):
            left = max(0, int(job.ends_at - time.time())) if job.started else int(job.walltime_s)
            preempted = _clock(time.time()) if job.is_preempted else "N/A"
            # the count includes a start that is yet to come
            coming = job.restarts + (
                job.state == "running" and job.reason in ("requeue", "preempted", "node")
            )
            row = f"{state(job):<30}{coming:<12}{preempted:<30}{_left(left):<30}"
        else:
            row = "|".join((job.key, state(job), _reason(job), _clock(job.started)))
        sys.stdout.write(row + "\n")
    return 0


def sacct(words: list[str], folder: Path) -> int:
    """Lists jobs, finished ones too, as ``JobID|State|Reason|Start``."""
    for job in _chosen(words, folder, is_past=True):
        sys.stdout.write("|".join((job.key, state(job), "None", _clock(job.started))) + "\n")
    return 0


def _chosen(words: Sequence[str], folder: Path, *, is_past: bool = False) -> Iterator[Job]:
    listed = " ".join(words)
    match = re.search(r"--jobs[= ](\S+)", listed)
    book, forget_s = Book(folder), clusters.load(folder).forget_s
    wanted = match[1].split(",") if match else []
    for job in book.jobs():
        is_remembered = is_past or not job.has_ended or time.time() - job.ended < forget_s
        if is_remembered and (not wanted or job.key in wanted or str(job.id) in wanted):
            yield job


def state(job: Job) -> str:
    """Returns a job's state as squeue(1) has it."""
    if job.state == "running" and job.reason in ("killed", "limit"):
        return "COMPLETING"
    if job.state == "exit":
        return _ENDS.get(job.reason, "FAILED")
    return _STATES[job.state]


def _reason(job: Job) -> str:
    if job.state != "pending":
        return "None"
    return "JobHeldUser" if job.is_held else _WAITS.get(job.reason, "Resources")


def _clock(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment).isoformat(timespec="seconds") if moment else "N/A"  # noqa: DTZ006 - Slurm prints local time


def _left(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def job_line(job: Job) -> str:
    """Returns what ``scontrol show job --oneliner`` says of a job."""
    facts = {
        "JobId": job.key,
        "JobName": job.name,
        "Account": job.project,
        "QOS": job.options.get("qos", ""),
        "Partition": job.queue,
        "JobState": state(job),
        "Restarts": str(job.restarts),
        "SubmitTime": _clock(job.submitted),
        "StartTime": _clock(job.started),
        "TimeLimit": _left(int(job.walltime_s)),
        "NodeList": ",".join(job.hosts),
        "NumNodes": str(job.nodes),
    }
    return " ".join(f"{name}={value or '(null)'}" for name, value in facts.items())


def partition_lines(cluster: clusters.Cluster) -> list[str]:
    """Returns what ``scontrol show partition --oneliner`` says of a cluster's queues."""
    lines = []
    for position, queue in enumerate(cluster.queues):
        rows = [row for row in cluster.limits if row.queue in (None, queue)]
        most = max((row.max_walltime_min for row in rows), default=0)
        nodes = max((row.max_nodes for row in rows), default=len(cluster.hosts))
        facts = {
            "PartitionName": queue,
            "Default": "NO" if position else "YES",
            "State": "UP",
            "TotalNodes": str(nodes),
            "MaxNodes": "UNLIMITED",
            "MaxTime": _left(60 * most) if most else "UNLIMITED",
        }
        lines.append(" ".join(f"{name}={value}" for name, value in facts.items()))
    return lines
