"""One attempt of a run goes to its scheduler: from submit, from resume, and from an agent that goes on."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from submitit.core.core import Executor
from submitit.core.utils import FailedSubmissionError

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import processes
from hpcsngd.launch.executors import LocalSiteExecutor, LsfSiteExecutor, SlurmSiteExecutor
from hpcsngd.launch.plan import Directive, Plan
from hpcsngd.launch.ssh import jobs as ssh_jobs
from hpcsngd.rundir import RunDir

log = logging.getLogger(__name__)

# options for every submission of a user
_OVERRIDES = ("SBATCH_", "BSUB_", "LSB_DEFAULT", "LSB_SUB_")
EXECUTORS: dict[str, Callable[[Path, Plan], Executor]] = {
    "slurm": SlurmSiteExecutor,
    "lsf": LsfSiteExecutor,
    "local": LocalSiteExecutor,
}


def send(run: RunDir, plan: Plan, attempt: int, **directives: Directive) -> str:
    """Submits an attempt and records its job in the attempt's folder; returns the scheduler's id.

    Args:
        run: the run.
        plan: what is asked for.
        attempt: its number; the folder need not exist.
        directives: more than the plan has, for this submission only, such as ``dependency``.

    Raises:
        SchedulerError: the scheduler is missing, refuses, or does not answer as submitit knows it.
    """
    from hpcsngd.launch.agent import NodeAgent  # an agent sends the next attempt

    say_what_is_dropped()
    run.submit_dir.mkdir(exist_ok=True)
    if plan.ssh:
        job_id, agents = ssh_jobs.start(run, plan, attempt)
        rundir.write_yaml(run.attempt(attempt).submitted_yaml, job_facts(plan, job_id) | {"agents": agents})
        return job_id
    asked = dataclasses.replace(plan, directives={**plan.directives, **directives})
    executor = EXECUTORS[plan.scheduler](run.submit_dir, asked)
    try:
        job_id = str(executor.submit(NodeAgent(str(run.path), attempt)).job_id)
    except FailedSubmissionError as error:
        raise SchedulerError(str(error)) from error
    rundir.write_yaml(run.attempt(attempt).submitted_yaml, job_facts(plan, job_id))
    return job_id


def job_facts(plan: Plan, job_id: str) -> dict[str, str | int | None]:
    """Returns what ``submitted.yaml`` says about a job that has just been submitted."""
    facts: dict[str, str | int | None] = {
        "scheduler": plan.scheduler,
        "job_id": job_id,
        "host": socket.gethostname(),
        "utc": rundir.utc_now(),
    }
    if plan.scheduler == "local":
        facts["start_ticks"] = processes.start_ticks(int(job_id))
    return facts


def say_what_is_dropped() -> None:
    """Warns of variables of sbatch's and bsub's own, which are kept from them."""
    names = sorted(name for name in os.environ if name.startswith(_OVERRIDES))
    if names:
        log.warning("ignored, because they would override what the job asks for: %s", ", ".join(names))
