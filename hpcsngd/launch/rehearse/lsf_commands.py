"""The commands of a played LSF: they read real options, refuse what the site refuses, and really start jobs.

Each takes its words and the cluster's folder and returns its exit status. Where a real LSF misreads instead
of refusing, so does this one: unknown options of the OpenLava family, indices of arrays out of bounds.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd.launch.lsf import flavors
from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse import lsf_listing as listing
from hpcsngd.launch.rehearse.book import Book, Job
from hpcsngd.launch.rehearse.cluster import Cluster

REFUSED = 255
DOWN = "down"
"""A file of this name in the cluster's folder: LSF does not answer."""
_BARE = frozenset(["H", "r", "x", "K", "I", "Ip", "Is", "N", "B", "Zs", "is", "rn"])
_ARRAY = re.compile(r"(?P<name>[^\[]*)\[(?P<indices>[\d,:-]+)\](?:%(?P<parallel>\d+))?$")
_CONDITION = re.compile(r"(?P<word>done|ended|exit)\((?P<id>\d+)(?:\[\d+\])?\)$")
_CONDITIONS = {"done": "ok", "ended": "any", "exit": "notok"}
_LIMIT = re.compile(r"(?:(\d+):)?(\d+)$")
_PTILE = re.compile(r"ptile=(\d+)")


class RefusedError(Exception):
    """bsub says no, with these words."""


def bsub(words: list[str], folder: Path) -> int:
    """Submits a job."""
    cluster = clusters.load(folder)
    try:
        options, command = _options(words, cluster)
        job, indices = _job(options, command, Book(folder), cluster)
    except RefusedError as error:
        return _refuse(f"{error}. Job not submitted.")
    number = Book(folder).submit(job, os.environ, indices)
    queue = "queue" if "q" in options else "default queue"
    _say(f"Job <{number}> is submitted to {queue} <{job.queue}>.")
    return 0


def _options(words: Sequence[str], cluster: Cluster) -> tuple[dict[str, str], list[str]]:
    """Returns the options and the command; what no option claims begins the command."""
    known = flavors.known(cluster.flavor)
    options: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-") and len(rest[0]) > 1:
        name = rest.pop(0)[1:]
        if name in known:
            if name not in _BARE and not rest:
                raise RefusedError(f"Option -{name} needs a value")
            options[name] = "" if name in _BARE else rest.pop(0)
        elif cluster.flavor == "compatible" and name[0] in known and name[0] not in _BARE:
            # getopt: -alloc_flags is -a with the value "lloc_flags"; what follows is taken for the command
            options[name[0]] = name[1:]
        else:
            raise RefusedError(f"Illegal option -- {name}")
        if name in cluster.refused:
            raise RefusedError(f"Request aborted by esub: this site takes no -{name}")
    return options, rest


def _job(options: dict[str, str], command: list[str], book: Book, cluster: Cluster) -> tuple[Job, list[int]]:
    """Returns what is asked for, and the indices of an array."""
    if not command:
        raise RefusedError("Empty job")
    _mind_the_site(options, command, cluster)
    nodes, slots = _size(options, cluster)
    walltime_min = _minutes(options.get("W", "60"))
    queue = options.get("q", cluster.queues[0])
    if queue not in cluster.queues:
        raise RefusedError(f"{queue}: No such queue")
    if problem := cluster.refusal(nodes=nodes, walltime_min=walltime_min, queue=queue):
        raise RefusedError(f"Request aborted by esub: {problem}")
    name, indices, parallel = _array(options.get("J", command[0]), cluster)
    job = Job(
        id=0,
        name=name,
        command=command,
        cwd=str(Path.cwd()),
        nodes=nodes,
        slots=slots,
        walltime_s=walltime_min * cluster.minute_s,
        parallel=parallel,
        queue=queue,
        project=options.get("P", ""),
        user=getpass.getuser(),
        is_held="H" in options,
        after=_conditions(options.get("w", ""), book),
        output=options.get("o", ""),
        options={"J": options.get("J", command[0]), "from_host": "login1"},
    )
    return job, indices


def _mind_the_site(options: dict[str, str], command: Sequence[str], cluster: Cluster) -> None:
    if cluster.is_project_needed and "P" not in options:
        raise RefusedError("Request aborted by esub: a project is required: -P PROJECT")
    if cluster.flavor != "csm":
        return
    # the filter of a real site looked at every word of the line
    if "n" in options or "-n" in command:
        raise RefusedError("Request aborted by esub: -n is not supported, use -nnodes")
    if missing := [name for name in ("W", "nnodes") if name not in options]:
        raise RefusedError(f"Request aborted by esub: -{missing[0]} is required")
    if "R" in options and options.get("csm") != "y":
        raise RefusedError("Request aborted by esub: -R needs -csm y")


def _size(options: dict[str, str], cluster: Cluster) -> tuple[int, int]:
    """Returns hosts and slots."""
    if cluster.flavor == "csm":
        nodes = int(options["nnodes"])
        return nodes, nodes * cluster.slots
    text = options.get("n", "1").partition(",")[0]  # of a range, the least
    if not text.isdigit():
        raise RefusedError("Bad argument for option -n")
    slots, ptile = int(text), _PTILE.search(options.get("R", ""))
    per_host = int(ptile[1]) if ptile else cluster.slots
    if per_host > cluster.slots or slots > cluster.slots * len(cluster.hosts):
        raise RefusedError("Too many processors requested")
    return math.ceil(slots / per_host), slots


def _minutes(text: str) -> int:
    match = _LIMIT.match(text)
    minutes = 60 * int(match[1] or 0) + int(match[2]) if match else 0
    if minutes < 1:
        raise RefusedError(f"{text}: Bad RUNLIMIT specification")
    return minutes


def _array(text: str, cluster: Cluster) -> tuple[str, list[int], int]:
    """Returns name, indices and limit; bounds that LSF does not like make an ordinary job of that name."""
    match = _ARRAY.match(text)
    if not match:
        return text, [], 0
    indices: list[int] = []
    for part in match["indices"].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        indices += range(int(first), int(last or first) + 1, int(step or 1))
    if not indices or min(indices) < 1 or max(indices) > array_limit(cluster):
        return text, [], 0
    return match["name"], indices, int(match["parallel"] or 0)


def array_limit(cluster: Cluster) -> int:
    """Returns the largest index of an array."""
    return int(cluster.facts.get("MAX_JOB_ARRAY_SIZE", "1000"))


def _conditions(text: str, book: Book) -> list[tuple[str, int]]:
    found = []
    for term in filter(None, (part.strip() for part in text.split("&&"))):
        match = _CONDITION.match(term)
        if not match:
            raise RefusedError(f"{term}: Bad dependency condition")
        if not book.jobs(int(match["id"])):
            raise RefusedError(f"{match['id']}: No matching job found")
        found.append((_CONDITIONS[match["word"]], int(match["id"])))
    return found


@dataclass(frozen=True)
class _Asked:
    """Which jobs a command is about.

    Attributes:
        jobs: those that are known.
        unknown: ids that are not.
    """

    jobs: list[Job]
    unknown: list[str]


def _asked(words: Sequence[str], folder: Path, *, with_ended: bool) -> _Asked:
    """Returns the jobs of ids such as ``60`` and ``60[4]``; without ids all that are remembered."""
    cluster, now = clusters.load(folder), time.time()
    known = [job for job in Book(folder).jobs() if not job.has_ended or now - job.ended < cluster.forget_s]
    ids = [word for word in words if word != "0"]
    if not ids:
        return _Asked([job for job in known if with_ended or not job.has_ended], [])
    chosen, unknown = [], []
    for word in ids:
        found = [job for job in known if word in (str(job.id), listing.job_id(job))]
        chosen += found
        unknown += [] if found else [word]
    return _Asked(chosen, unknown)


def bjobs(words: list[str], folder: Path) -> int:
    """Lists jobs."""
    cluster = clusters.load(folder)
    if "-noheader" in words and cluster.flavor == "compatible":
        return _refuse("bjobs: illegal option -- noheader")
    fields, unknown_field = listing.FIELDS[:8], ""
    rest = [word for word in words if word not in ("-a", "-w", "-json", "-UF", "-l", "-noheader")]
    if "-o" in rest:
        place = rest.index("-o")
        fields, unknown_field = listing.wanted_fields(rest[place + 1])
        del rest[place : place + 2]
    if unknown_field:
        _refuse(f"<{unknown_field}> in the format string is not a valid field name.")
        return 99
    found = _asked(rest, folder, with_ended="-a" in words)
    if "-json" in words:
        _say(listing.as_json(found.jobs, found.unknown, fields, cluster))
        return 0 if found.jobs else REFUSED
    for number in found.unknown:
        _refuse(f"Job <{number}> is not found")
    if found.jobs and "-l" in words:
        rule = "\n" + "-" * 78 + "\n"
        _say(rule.join(listing.long_listing(job, cluster) for job in found.jobs))
    elif found.jobs:
        _say(listing.as_table(found.jobs, fields))
    elif not found.unknown:
        _refuse("No unfinished job found")
    return 0 if found.jobs else REFUSED


def bhist(words: list[str], folder: Path) -> int:
    """Tells what happened to jobs; it remembers those that bjobs has forgotten."""
    remembering = dataclasses.replace(clusters.load(folder), forget_s=math.inf)
    ids = [word for word in words if not word.startswith("-")]
    chosen = [job for job in Book(folder).jobs() if not ids or {str(job.id), listing.job_id(job)} & set(ids)]
    if not chosen or remembering.facts.get("bhist") == "denied":
        return _refuse("No matching job found")
    rule = "\n" + "-" * 78 + "\n"
    _say(rule.join(listing.history(job, remembering) for job in chosen))
    return 0


def bkill(words: list[str], folder: Path) -> int:
    """Kills jobs, or sends them a signal."""
    rest = list(words)
    request, text = "kill", "is being terminated"
    if "-s" in rest:
        place = rest.index("-s")
        name = rest[place + 1]
        number = int(name) if name.isdigit() else signal.Signals[f"SIG{name.removeprefix('SIG')}"]
        request, text = f"signal {int(number)}", "is being signaled"
        del rest[place : place + 2]
    return _order(rest, folder, request, text)


def brequeue(words: list[str], folder: Path) -> int:
    """Puts running jobs back in the queue."""
    return _order(words, folder, "requeue", "is being requeued", only_started=True)


def bstop(words: list[str], folder: Path) -> int:
    """Suspends jobs."""
    return _order(words, folder, "suspend", "is being stopped")


def bresume(words: list[str], folder: Path) -> int:
    """Lets suspended or held jobs go on."""
    return _order(words, folder, "resume", "is being resumed")


def _order(words: Sequence[str], folder: Path, request: str, text: str, *, only_started: bool = False) -> int:
    book, found = Book(folder), _asked(words, folder, with_ended=True)
    status = REFUSED if found.unknown else 0
    for number in found.unknown:
        _refuse(f"Job <{number}>: No matching job found")
    for job in found.jobs:
        if job.has_ended:
            status = _refuse(f"Job <{listing.job_id(job)}>: Job has already finished")
        elif only_started and job.state == "pending":
            status = _refuse(f"Job <{listing.job_id(job)}>: Job has not started yet")
        else:
            book.ask(job.key, request)
            _say(f"Job <{listing.job_id(job)}> {text}")
    return status


def bqueues(words: list[str], folder: Path) -> int:
    """Lists the queues."""
    _say(listing.queues(clusters.load(folder)))
    return 0


def bparams(words: list[str], folder: Path) -> int:
    """Tells the cluster's parameters."""
    _say(f"    MAX_JOB_ARRAY_SIZE = {array_limit(clusters.load(folder))}")
    return 0


def lsid(words: list[str], folder: Path) -> int:
    """Tells what LSF this is."""
    _say(listing.identity(clusters.load(folder)))
    return 0


def _guarded(command: Callable[[list[str], Path], int]) -> Callable[[list[str], Path], int]:
    """Returns a command that does nothing while LSF is down."""

    def run(words: list[str], folder: Path) -> int:
        if (folder / DOWN).exists():
            return _refuse("LSF is down. Please wait ...")
        return command(words, folder)

    return run


COMMANDS = {
    command.__name__: _guarded(command)
    for command in (bsub, bjobs, bkill, bhist, brequeue, bstop, bresume, bqueues, bparams, lsid)
}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _refuse(text: str) -> int:
    sys.stderr.write(text + "\n")
    return REFUSED
