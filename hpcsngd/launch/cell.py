"""What an element of a job array runs: finds its cell in a list and becomes that cell's agent.

``python -m hpcsngd.launch.cell SWEEP ARRAY``; the element's own number comes from the scheduler. A scheduler
keeps that number when it starts the element again, so no state is needed.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from submitit import JobEnvironment

from hpcsngd import rundir, sweepdir
from hpcsngd.launch import schedulers
from hpcsngd.launch.agent import NodeAgent
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.sending import job_facts
from hpcsngd.sweepdir import SweepDir

log = logging.getLogger(__name__)


def run(sweep: SweepDir, array: int, index: int) -> None:
    """Runs one cell to its end, as its agent on this node.

    Args:
        sweep: the sweep.
        array: number of the list.
        index: place in it, from 0.

    Raises:
        RunFailedError: the cell did not succeed.
        RunDirError: list or run directory are missing or damaged.
    """
    member = sweep.array(array)[index]
    cell = sweep.run(member.run)
    log.info("array %d, index %d: cell %s, attempt %d", array, index, member.run, member.attempt)
    _record_job(cell, member.attempt)
    NodeAgent(str(cell.path), member.attempt)()


def _record_job(cell: rundir.RunDir, attempt: int) -> None:
    """Writes ``submitted.yaml`` where the submitter ended before it could."""
    file = cell.attempt(attempt).submitted_yaml
    job = JobEnvironment()
    if job.global_rank == 0 and not file.exists():
        rundir.write_yaml(file, job_facts(Plan.from_record(cell.plan_record(attempt)), job.job_id))


def own_index() -> int:
    """Returns this element's place in its array, from 0, by the word of the scheduler that runs it."""
    scheduler = schedulers.QUEUES[JobEnvironment().name()]
    return int(os.environ[scheduler.array_index]) - scheduler.first_index


def main() -> None:
    """Runs the cell that the command line and the scheduler name."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path, array = sys.argv[1:]
    run(sweepdir.open_sweep(Path(path)), int(array), own_index())


if __name__ == "__main__":
    main()
