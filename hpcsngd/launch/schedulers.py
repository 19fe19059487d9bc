"""The schedulers with a queue, by the site's ``scheduler.kind``: what we ask of each, as plain functions.

A local site has none; its jobs are processes of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpcsngd.launch import ownjob, slurm
from hpcsngd.launch.lsf import jobs as lsf
from hpcsngd.launch.lsf import request
from hpcsngd.launch.ownjob import OwnJob
from hpcsngd.launch.plan import Directive
from hpcsngd.launch.queued import Answer


class _Ask(Protocol):
    def __call__(self, job_ids: Sequence[str], *, timeout_s: float) -> Answer: ...


class _Cancel(Protocol):
    def __call__(self, job_ids: Sequence[str], *, timeout_s: float) -> None: ...


class _Requeue(Protocol):
    def __call__(self, job_id: str, *, timeout_s: float) -> None: ...


class _OwnJob(Protocol):
    def __call__(self, job_id: str, *, timeout_s: float) -> OwnJob | None: ...


class _Record(Protocol):
    def __call__(self, job_id: str) -> dict[str, str]: ...


class _After(Protocol):
    def __call__(self, job_ids: Sequence[str]) -> dict[str, Directive]: ...


class _Avoid(Protocol):
    def __call__(self, hosts: Sequence[str], directives: Mapping[str, Directive]) -> dict[str, Directive]: ...


@dataclass(frozen=True)
class Scheduler:
    """One scheduler.

    Attributes:
        title: its name, for people.
        submit_program: what a login node must have.
        array_index: environment variable with an array element's own number.
        first_index: number of an array's first element.
        held: directives of a job that waits for a person.
        ask: what the queue knows of jobs.
        cancel: ends jobs.
        requeue: puts the job that this process runs in back in the queue.
        own_job: what is known of the job that this process runs in.
        job_record: facts about the job that this process runs in, by the scheduler's names.
        after: directives of a job that waits for the end of others, however they end.
        avoid: directives of a job that keeps off hosts, besides those that it has; empty where it cannot.
    """

    title: str
    submit_program: str
    array_index: str
    first_index: int
    held: Mapping[str, Directive]
    ask: _Ask
    cancel: _Cancel
    requeue: _Requeue
    own_job: _OwnJob
    job_record: _Record
    after: _After
    avoid: _Avoid


def _own_slurm_job(job_id: str, *, timeout_s: float) -> OwnJob | None:
    return ownjob.ask(job_id, timeout_s=timeout_s)


def _after_slurm(job_ids: Sequence[str]) -> dict[str, Directive]:
    return {"dependency": "afterany:" + ":".join(job_ids)}


def _avoid_slurm(hosts: Sequence[str], directives: Mapping[str, Directive]) -> dict[str, Directive]:
    own = directives.get("exclude")
    return {"exclude": ",".join(dict.fromkeys([*([str(own)] if own else []), *hosts]))}


def _after_lsf(job_ids: Sequence[str]) -> dict[str, Directive]:
    return {"w": request.after(job_ids, "ended")}


def _avoid_lsf(hosts: Sequence[str], directives: Mapping[str, Directive]) -> dict[str, Directive]:
    if "nnodes" in directives:
        return {}  # no -R there; CSM takes a node that fails out of service
    others = " && ".join(f"hname!={host}" for host in hosts)
    return {"R": f"select[{others}] {directives.get('R', '')}".strip()}


QUEUES: dict[str, Scheduler] = {
    "slurm": Scheduler(
        title="Slurm",
        submit_program="sbatch",
        array_index="SLURM_ARRAY_TASK_ID",
        first_index=0,
        held={"hold": True},
        ask=slurm.ask,
        cancel=slurm.cancel,
        requeue=slurm.requeue,
        own_job=_own_slurm_job,
        job_record=slurm.job_record,
        after=_after_slurm,
        avoid=_avoid_slurm,
    ),
    "lsf": Scheduler(
        title="LSF",
        submit_program="bsub",
        array_index="LSB_JOBINDEX",
        first_index=1,
        held={"H": True},
        ask=lsf.ask,
        cancel=lsf.cancel,
        requeue=lsf.requeue,
        own_job=lsf.own_job,
        job_record=lsf.job_record,
        after=_after_lsf,
        avoid=_avoid_lsf,
    ),
}


def of(kind: str) -> Scheduler | None:
    """Returns the scheduler of a kind; None for a kind without a queue."""
    return QUEUES.get(kind)
