"""Job arrays: one batch script, and one call of sbatch or bsub, for many cells of a sweep.

The script runs `hpcsngd.launch.cell` with the sweep's path and the number of a list that was written before,
so nothing has to be moved into place after the scheduler has answered, and a job that it starts again finds
its cell as before.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from submitit.core.utils import FailedSubmissionError

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import schedulers
from hpcsngd.launch.executors import LsfSiteExecutor, SlurmSiteExecutor
from hpcsngd.launch.lsf.plugin import array_limit
from hpcsngd.launch.plan import Directive, Plan
from hpcsngd.launch.programs import command_output
from hpcsngd.sweepdir import SweepDir

DEFAULT_SIZE = 1001
"""Slurm's own MaxArraySize; the largest index is one less (slurm.conf(5)). LSF's default is 1000."""
_SIZE = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


class Array(Protocol):
    """Cells that ask for the same, to be submitted as one array."""

    @property
    def script(self) -> str:
        """Returns the text that the scheduler runs."""

    def command_line(self, script: Path) -> list[str]:
        """Returns the scheduler's command with options that are not in the script; empty if all are."""

    def send(self) -> str:
        """Submits the array and returns its job id.

        Raises:
            SchedulerError: the scheduler refuses, or does not answer as submitit knows it.
        """


def executor(
    sweep: SweepDir, number: int, plan: Plan, count: int, *, parallel: int | None, after: str = ""
) -> Array:
    """Returns what submits cells as one array.

    Args:
        sweep: the sweep.
        number: of the list of cells.
        plan: what each cell asks for.
        count: cells in the list.
        parallel: how many may run at once; None for no limit.
        after: job id after whose end the array may start; empty for none.
    """
    asked = dataclasses.replace(plan, directives=_waiting(plan, after))
    made = LsfArray if plan.scheduler == "lsf" else SlurmArray
    return made(sweep, number, asked, count, parallel)


def _waiting(plan: Plan, after: str) -> dict[str, Directive]:
    """Returns the plan's directives, and the wait for another array besides what the plan waits for."""
    if not after:
        return plan.directives
    ((name, term),) = schedulers.QUEUES[plan.scheduler].after([after]).items()
    both = " && " if plan.scheduler == "lsf" else ","
    before = plan.directives.get(name)
    return {**plan.directives, name: f"{before}{both}{term}" if before else term}


def _command(python: str, sweep: SweepDir, number: int) -> str:
    words = ["-u", "-m", "hpcsngd.launch.cell", str(sweep.path), str(number)]
    return f"{python} {shlex.join(words)}"


class SlurmArray(SlurmSiteExecutor):
    """An array of Slurm's; see `executor`."""

    def __init__(self, sweep: SweepDir, number: int, plan: Plan, count: int, parallel: int | None) -> None:
        super().__init__(sweep.submit_dir, plan)
        self._sweep, self._number = sweep, number
        self.parameters["map_count"] = count
        self.parameters["array_parallelism"] = parallel or count

    @property
    def _submitit_command_str(self) -> str:
        return _command(self.python, self._sweep, self._number)

    def command_line(self, script: Path) -> list[str]:
        """Returns nothing: sbatch reads the script's directives."""
        return []

    def send(self) -> str:
        """Submits the array and returns its job id; see `Array.send`."""
        self._sweep.submit_dir.mkdir(parents=True, exist_ok=True)
        try:
            return str(self._submit_command(self._submitit_command_str).job_id)
        except FailedSubmissionError as error:
            raise SchedulerError(str(error)) from error


class LsfArray(LsfSiteExecutor):
    """An array of LSF's, whose elements count from 1; see `executor`."""

    def __init__(self, sweep: SweepDir, number: int, plan: Plan, count: int, parallel: int | None) -> None:
        super().__init__(sweep.submit_dir, plan)
        self._sweep, self._number, self._count = sweep, number, count
        self.parameters["array_parallelism"] = parallel or count

    @property
    def _submitit_command_str(self) -> str:
        return _command(self.python, self._sweep, self._number)

    def command_line(self, script: Path) -> list[str]:
        """Returns the words of bsub for a script."""
        return self.bsub_words(script, array=self._count)

    def send(self) -> str:
        """Submits the array and returns its job id; see `Array.send`."""
        try:
            return self._send(self._submitit_command_str, array=self._count)
        except FailedSubmissionError as error:
            raise SchedulerError(str(error)) from error


def key(plan: Plan) -> str:
    """Returns a text that is equal for plans that fit in one array: those with the same script."""
    asked: list[Any] = [
        plan.directives,
        plan.skip_options,
        plan.launcher,
        plan.launch_args,
        plan.cpus_per_agent,
    ]
    return json.dumps(asked, sort_keys=True)


def size_limit(plan: Plan) -> int:
    """Returns how many cells an array of this cluster may have; the default if it does not tell."""
    if plan.scheduler == "lsf":
        return array_limit()
    try:
        found = _SIZE.search(command_output(["scontrol", "show", "config"], timeout_s=plan.command_timeout_s))
    except SchedulerError:
        return DEFAULT_SIZE
    return int(found[1]) if found else DEFAULT_SIZE


def parts(count: int, size: int) -> Sequence[range]:
    """Returns ranges of at most ``size`` that cover ``count`` cells, as even as they can be."""
    number = -(-count // size)
    bounds = [count * index // number for index in range(number + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]
