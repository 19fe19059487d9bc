"""sbatch, srun, squeue, scancel, scontrol and sacct of a played Slurm.

They know what hpcsngd and submitit ask for and answer in Slurm's own forms (22.05 and later); an option that
they do not know is refused.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse import slurm_listing
from hpcsngd.launch.rehearse.book import Book, Job
from hpcsngd.launch.rehearse.launchers import RefusedError, Task, run_tasks
from hpcsngd.launch.rehearse.slurm_listing import complain

_BARE = frozenset({"exclusive", "requeue", "no-requeue", "hold", "parsable", "use-min-nodes"})
_VALUED = frozenset(
    (
        "job-name",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "mem",
        "time",
        "account",
        "partition",
        "qos",
        "constraint",
        "reservation",
        "wckey",
        "gpus-per-node",
        "gres",
        "signal",
        "dependency",
        "output",
        "error",
        "open-mode",
        "array",
        "exclude",
        "nodelist",
        "comment",
        "mail-type",
        "mail-user",
        "hint",
        "gpus-per-task",
        "mem-per-cpu",
        "licenses",
    )
)
_SIGNALS = {"USR1": 10, "USR2": 12, "TERM": 15, "INT": 2, "KILL": 9}
_RANGE = re.compile(r"(\d+)-(\d+)(?:%(\d+))?$")


def sbatch(words: list[str], folder: Path) -> int:
    """Submits a script; refuses options and requests as the site does."""
    try:
        asked, script = _request(words)
        job, indices = _job(asked, script, folder)
    except RefusedError as error:
        return complain("sbatch: error", f"{error}", "sbatch: error: Batch job submission failed")
    book = Book(folder)
    number = book.submit(job, dict(os.environ), indices)
    sys.stdout.write(f"{number}\n" if "parsable" in asked else f"Submitted batch job {number}\n")
    return 0


def _request(words: Sequence[str]) -> tuple[dict[str, str], Path]:
    """Returns the options, those of the command line last, and the script."""
    own = list(_options([word for word in words if word.startswith("-")]))
    scripts = [word for word in words if not word.startswith("-")]
    if len(scripts) != 1 or not Path(scripts[0]).is_file():
        raise RefusedError(f"Unable to open file {' '.join(scripts)}")
    script = Path(scripts[0])
    written = [
        shlex.split(line.removeprefix("#SBATCH "))[0]
        for line in script.read_text(encoding="utf-8").splitlines()
        if line.startswith("#SBATCH ")
    ]
    return dict([*_options(written), *own]), script


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        known = name in _BARE or (name in _VALUED and equals)
        if not word.startswith("--") or not (known or name == "exclusive"):
            raise RefusedError(f"unrecognized option '{word}'")
        yield name, value


def _job(asked: dict[str, str], script: Path, folder: Path) -> tuple[Job, list[int]]:
    cluster = clusters.load(folder)
    for name in asked:
        if name in cluster.refused:
            raise RefusedError(f"--{name} is refused by this site")
    nodes, minutes = int(asked.get("nodes", 1)), minutes_of(asked.get("time", "60"))
    queue = asked.get("partition", cluster.queues[0])
    if cluster.is_project_needed and not asked.get("account"):
        raise RefusedError("Invalid account or account/partition combination specified")
    if problem := cluster.refusal(nodes=nodes, walltime_min=minutes, queue=queue):
        raise RefusedError(problem)
    indices, parallel = _members(asked.get("array", ""))
    name, _, before = asked.get("signal", "").partition("@")
    number = _SIGNALS.get(name.rpartition(":")[2].removeprefix("SIG"))
    options = {"warning": f"{number}@{before or 60}"} if number else {}
    job = Job(
        id=0,
        name=asked.get("job-name", script.name),
        command=["bash", str(script.absolute())],
        cwd=str(Path.cwd()),
        nodes=nodes,
        walltime_s=minutes * cluster.minute_s,
        parallel=parallel,
        tasks_per_node=int(asked.get("ntasks-per-node", 1)),
        queue=queue,
        project=asked.get("account", ""),
        user=getpass.getuser(),
        is_held="hold" in asked,
        after=_after(asked.get("dependency", "")),
        excluded=[host for host in asked.get("exclude", "").split(",") if host],
        output=asked.get("output", "slurm-%j.out"),
        options={**options, "qos": asked.get("qos", ""), "requeue": str("no-requeue" not in asked)},
    )
    return job, indices


def minutes_of(text: str) -> int:
    """Returns a time limit as sbatch(1) reads it, in minutes: ``M``, ``M:S``, ``H:M:S``, ``D-H[:M[:S]]``."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, *seconds = [*parts, 0, 0][:3]
    else:
        hours, mins, *seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return (int(days or 0) * 24 + hours) * 60 + mins + (1 if any(seconds) else 0)


def _members(text: str) -> tuple[list[int], int]:
    if not text:
        return [], 0
    match = _RANGE.match(text)
    if match is None:
        raise RefusedError(f"Invalid job array specification {text}")
    return list(range(int(match[1]), int(match[2]) + 1)), int(match[3] or 0)


def _after(text: str) -> list[tuple[str, int]]:
    found = []
    for term in filter(None, text.split(",")):
        word, *numbers = term.split(":")
        if word not in ("afterok", "afterany", "afternotok"):
            raise RefusedError(f"Job dependency problem: {term}")
        found += [(word.removeprefix("after"), int(number.partition("_")[0])) for number in numbers]
    return found


def srun(words: list[str], folder: Path) -> int:
    """Starts the job's tasks, ``ntasks-per-node`` on each node; returns the first failure's status."""
    job = Book(folder).read(os.environ.get(clusters.JOB, ""))
    if job is None:
        return complain("srun: error", "Unable to allocate resources: not inside a job")
    outputs, rest = _srun_words(words)
    tasks = []
    for rank in range(job.nodes * job.tasks_per_node):
        node, local = divmod(rank, job.tasks_per_node)
        told = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": str(job.nodes * job.tasks_per_node),
            "SLURMD_NODENAME": job.hosts[node],
        }
        files = {name: job.filled(pattern, rank) for name, pattern in outputs.items()}
        tasks.append(Task(job.hosts[node], rest, told, **files))
    return run_tasks(tasks, grace_s=clusters.load(folder).grace_s)


def _srun_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    rest, outputs = list(words), {}
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).removeprefix("--").partition("=")
        if name in ("output", "error"):
            outputs[name] = value if equals else rest.pop(0)
    return outputs, rest


def scancel(words: list[str], folder: Path) -> int:
    """Cancels jobs, or sends them a signal."""
    rest = list(words)
    number = None
    if "--signal" in rest:
        position = rest.index("--signal")
        number = _SIGNALS[rest[position + 1].removeprefix("SIG")]
        del rest[position : position + 2]
    book = Book(folder)
    status = 0
    for word in rest:
        found = [job for job in book.jobs() if word in (job.key, str(job.id)) and not job.has_ended]
        if not found:
            status = complain("scancel: error", f"Kill job error on job id {word}: Invalid job id specified")
        for job in found:
            book.ask(job.key, f"signal {number}" if number else "kill")
    return status


def scontrol(words: list[str], folder: Path) -> int:
    """Requeues, holds and releases jobs; shows host names, a job, the partitions and the configuration."""
    book, cluster = Book(folder), clusters.load(folder)
    match words:
        case ["show", ("hostnames" | "hostname"), listed]:
            sys.stdout.write("".join(f"{host}\n" for host in listed.split(",")))
        case ["show", "job", key, *_]:
            job = book.read(key)
            if job is None:
                return complain("slurm_load_jobs error", "Invalid job id specified")
            sys.stdout.write(slurm_listing.job_line(job) + "\n")
        case ["show", "partition", *_]:
            sys.stdout.write("".join(f"{line}\n" for line in slurm_listing.partition_lines(cluster)))
        case ["show", "config"]:
            sys.stdout.write("MaxArraySize            = 1001\nAccountingStorageEnforce = none\n")
        case [("requeue" | "hold" | "release") as verb, key]:
            requests = {"requeue": "requeue", "hold": "suspend", "release": "release"}
            job = book.read(key)
            if job is None or (job.has_ended and verb != "requeue"):
                return complain("scontrol", f"Invalid job id specified for job {key}")
            with contextlib.suppress(KeyError):
                book.ask(key, requests[verb])
        case _:
            return complain("scontrol", f"invalid keyword: {' '.join(words)}")
    return 0
