"""What the attempts of a run have used: time, memory, exit status; by the agents and by Slurm's accounts.

Each agent writes what its workers used when they are gone. Slurm's accounts also know of agents that were
killed, and of the whole job, but only after its end, where nothing of ours runs: whoever looks at a run that
has ended asks once and keeps the answer in the attempt's folder. Sites without accounts have the agents'.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError
from hpcsngd.launch.context import Context
from hpcsngd.launch.programs import command_output
from hpcsngd.rundir import Attempt, RunDir

log = logging.getLogger(__name__)

_FIELDS = "JobID,State,ExitCode,ElapsedRaw,MaxRSS,MaxRSSNode"
# --duplicates: a job that was put back in the queue has one record for each time that it ran
SACCT = ("sacct", "--noheader", "--parsable2", "--duplicates", "--units=K", f"--format={_FIELDS}", "--jobs")
_OPEN = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUE")
_KIB = re.compile(r"([\d.]+)K?$")


@dataclass(frozen=True)
class Account:
    """Slurm's account of one time that a job ran.

    Attributes:
        state: Slurm's word, such as ``COMPLETED`` or ``REQUEUED``.
        exit_code: exit status and signal, as ``0:15``.
        elapsed_s: wall time in seconds.
        max_rss_mib: the most resident memory of one task, in MiB; None where it was never sampled.
        max_rss_node: the node of that task.
    """

    state: str
    exit_code: str
    elapsed_s: int
    max_rss_mib: float | None = None
    max_rss_node: str = ""

    @property
    def is_final(self) -> bool:
        """Returns whether nothing of it will change."""
        return self.state not in _OPEN


def write_own(context: Context, exit_status: int) -> None:
    """Writes what this agent's workers used, once they are gone; see getrusage(2).

    Memory is that of the largest single process, as Slurm's is that of the largest task.
    """
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {
        "host": context.place.host,
        "elapsed_s": round(time.monotonic() - context.began, 1),
        "exit_status": exit_status,
        "cpu_s": round(spent.ru_utime + spent.ru_stime, 1),
        "max_rss_mib": round(spent.ru_maxrss / 1024, 1),  # Linux counts in KiB
    }
    rundir.write_yaml(context.attempt.usage_yaml(context.place.index), facts)


def parse(text: str) -> dict[str, list[Account]]:
    """Returns job id -> its accounts in the order of their starts, from lines of `SACCT`.

    A line for the job begins an account; those of its steps (``12.batch``, ``12.0``) have the memory.
    """
    found: dict[str, list[Account]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != len(_FIELDS.split(",")):
            continue
        job_id, is_step, _ = cells[0].partition(".")
        if not is_step:
            elapsed_s = int(cells[3]) if cells[3].isdigit() else 0
            found.setdefault(job_id, []).append(Account(cells[1].partition(" ")[0], cells[2], elapsed_s))
        elif job_id in found and (memory := _KIB.match(cells[4])):
            found[job_id][-1] = _with_memory(found[job_id][-1], float(memory[1]) / 1024, cells[5])
    return found


def _with_memory(account: Account, mib: float, node: str) -> Account:
    if account.max_rss_mib is not None and account.max_rss_mib >= mib:
        return account
    return Account(account.state, account.exit_code, account.elapsed_s, round(mib, 1), node)


def settle(run: RunDir) -> None:
    """Keeps Slurm's accounts of an ended run in its attempts' folders; nothing where there are none (yet)."""
    attempts = run.attempts()
    jobs = {
        attempt.number: str(facts["job_id"])
        for attempt in attempts
        if attempt.submitted_yaml.exists()
        and (facts := rundir.read_yaml(attempt.submitted_yaml))["scheduler"] == "slurm"
    }
    if not jobs or attempts[-1].accounting_yaml.exists() or not os.access(attempts[-1].path, os.W_OK):
        return
    patience = float(run.record()["plan"]["command_timeout_s"])
    try:
        told = parse(command_output([*SACCT, ",".join(dict.fromkeys(jobs.values()))], timeout_s=patience))
    except SchedulerError as error:
        log.info("no accounts: %s", error)
        return
    for first, job_id in jobs.items():
        # a job that is started again gives the next attempt each time
        for number, account in enumerate(told.get(job_id, []), start=first):
            is_its_own = jobs.get(number, job_id) == job_id and run.attempt(number).path.is_dir()
            if account.is_final and is_its_own:
                facts = {"job_id": job_id, **asdict(account)}
                rundir.write_yaml(run.attempt(number).accounting_yaml, facts)


def summary(run: RunDir) -> list[dict[str, Any]]:
    """Returns what each ended attempt used: number, elapsed seconds, exit code, most memory, who says so.

    ``exit_code`` is Slurm's (status and signal) or the first failing agent's status; ``max_rss_mib`` is the
    largest known.
    """
    return [found for attempt in run.attempts() if (found := _of(attempt))]


def _of(attempt: Attempt) -> dict[str, Any]:
    agents = [rundir.read_yaml(file) for file in attempt.usage_files()]
    if not attempt.accounting_yaml.exists():
        return _by_agents(attempt, agents) if agents else {}
    slurm = rundir.read_yaml(attempt.accounting_yaml)
    known = [each["max_rss_mib"] for each in (slurm, *agents) if each["max_rss_mib"] is not None]
    return {
        "attempt": attempt.number,
        "elapsed_s": slurm["elapsed_s"],
        "exit_code": slurm["exit_code"],
        "max_rss_mib": max(known, default=None),
        "by": "Slurm",
    }


def _by_agents(attempt: Attempt, agents: list[dict[str, Any]]) -> dict[str, Any]:
    failed = (agent["exit_status"] for agent in agents if agent["exit_status"])
    return {
        "attempt": attempt.number,
        "elapsed_s": max(agent["elapsed_s"] for agent in agents),
        "exit_code": str(next(failed, 0)),
        "max_rss_mib": max(agent["max_rss_mib"] for agent in agents),
        "by": "agents",
    }


def line(used: Mapping[str, Any]) -> str:
    """Returns one attempt of `summary` for people."""
    memory = f", most memory of a process {used['max_rss_mib']:.0f} MiB" if used["max_rss_mib"] else ""
    return (
        f"attempt {used['attempt']}: {used['elapsed_s']:.0f} s, exit code {used['exit_code']}{memory} "
        f"(by {used['by']})"
    )
