"""Job arrays: one batch script, and one call of sbatch, for many cells of a sweep.

The script runs `hpcsngd.launch.cell` with the sweep's path and the number of a list that was written before,
so nothing has to be moved into place after sbatch has answered, and a job that Slurm starts again finds its
cell as before.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from submitit.core.utils import FailedSubmissionError

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.executors import SlurmSiteExecutor
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.programs import command_output
from hpcsngd.sweepdir import SweepDir

DEFAULT_SIZE = 1001
"""Slurm's own MaxArraySize; the largest index is one less (slurm.conf(5))."""
_SIZE = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


class ArrayExecutor(SlurmSiteExecutor):
    """Submits cells that ask for the same as one array.

    Args:
        sweep: the sweep.
        number: of the list of cells.
        plan: what each cell asks for.
        count: cells in the list.
        parallel: how many may run at once; None for no limit.
        after: job id after whose end the array may start; empty for none.
    """

    def __init__(
        self, sweep: SweepDir, number: int, plan: Plan, count: int, *, parallel: int | None, after: str = ""
    ) -> None:
        super().__init__(sweep.submit_dir, plan)
        self._sweep, self._number = sweep, number
        self.parameters["map_count"] = count
        self.parameters["array_parallelism"] = parallel or count
        asked = [str(self.parameters.get("dependency") or ""), f"afterany:{after}" if after else ""]
        if any(asked):
            self.parameters["dependency"] = ",".join(filter(None, asked))

    @property
    def _submitit_command_str(self) -> str:
        words = ["-u", "-m", "hpcsngd.launch.cell", str(self._sweep.path), str(self._number)]
        return f"{self.python} {shlex.join(words)}"

    def send(self) -> str:
        """Submits the array and returns its job id.

        Raises:
            SchedulerError: the scheduler refuses, or does not answer as submitit knows it.
        """
        self._sweep.submit_dir.mkdir(parents=True, exist_ok=True)
        try:
            return str(self._submit_command(self._submitit_command_str).job_id)
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


def size_limit(timeout_s: float) -> int:
    """Returns how many cells an array of this cluster may have; Slurm's default if it does not tell."""
    try:
        found = _SIZE.search(command_output(["scontrol", "show", "config"], timeout_s=timeout_s))
    except SchedulerError:
        return DEFAULT_SIZE
    return int(found[1]) if found else DEFAULT_SIZE


def parts(count: int, size: int) -> Sequence[range]:
    """Returns ranges of at most ``size`` that cover ``count`` cells, as even as they can be."""
    number = -(-count // size)
    bounds = [count * index // number for index in range(number + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]
