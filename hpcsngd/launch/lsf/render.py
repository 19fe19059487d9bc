"""The script that LSF runs on the first host of a job. Pure text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd.launch.lsf.hosts import BatchHost
from hpcsngd.launch.lsf.launchers import ResourceSets


@dataclass(frozen=True)
class Head:
    """What the head of a job is told, in the script that starts it.

    Attributes:
        python: the interpreter of the head and the starters, as shell text.
        folder: where the tasks' logs go; may hold submitit's ``%j`` and the like.
        log_folder: where the head's log goes.
        nodes: compute hosts.
        tasks_per_node: tasks on each.
        walltime_min: the run limit that was asked for, in minutes.
        warning_s: seconds before the limit at which tasks are warned.
        launcher: jsrun, blaunch, lsrun or none.
        launcher_args: more words for it.
        sets: jsrun's resource sets.
        batch_host: whether the first host only runs the script.
        straggler_s: seconds that other tasks have after one has failed; None: as long as they want.
        is_joined: whether standard error goes to the log of standard output.
    """

    python: str
    folder: str
    log_folder: str
    nodes: int
    tasks_per_node: int
    walltime_min: int
    warning_s: int
    launcher: str
    launcher_args: tuple[str, ...] = ()
    sets: ResourceSets | None = None
    batch_host: BatchHost = "auto"
    straggler_s: float | None = None
    is_joined: bool = False

    def words(self) -> list[str]:
        """Returns the options of `hpcsngd.launch.lsf.head`."""
        words = [
            f"--nodes={self.nodes}",
            f"--tasks-per-node={self.tasks_per_node}",
            f"--limit-min={self.walltime_min}",
            f"--warning-s={self.warning_s}",
            f"--launcher={self.launcher}",
            f"--batch-host={self.batch_host}",
            *(f"--launcher-arg={word}" for word in self.launcher_args),
        ]
        if self.sets is not None:
            sets = self.sets
            words.append(f"--sets={sets.per_host},{sets.tasks},{sets.gpus},{sets.cores},{sets.bind}")
        if self.straggler_s is not None:
            words.append(f"--straggler-s={self.straggler_s:g}")
        return [*words, "--join"] if self.is_joined else words


def script(head: Head, command: str, *, setup: Sequence[str] = ()) -> str:
    """Returns the script; it writes to files of its own, because LSF shows a job's output at its end only.

    Until Python runs, USR2, the signal of the run limit, would kill the shell.

    Args:
        head: the head's settings.
        command: what each task runs, as shell text.
        setup: shell lines that run first.
    """
    logs = shlex.quote(head.log_folder)
    start = f"exec {head.python} -u -m hpcsngd.launch.lsf.head {shlex.quote(head.folder)}"
    lines = [
        "#!/bin/bash",
        "# run by LSF on the first host of the job; every option of bsub stood on its command line",
        "trap '' USR2",
        'job=$LSB_JOBID; [ "${LSB_JOBINDEX:-0}" = 0 ] || job=${LSB_JOBID}_$LSB_JOBINDEX',
        f'mkdir -p {logs} && exec >>{logs}/"${{job}}_head.log" 2>&1',
        *setup,
        "export SUBMITIT_EXECUTOR=lsf",
        " \\\n  ".join([start, shlex.join(head.words()), f"-- {command}"]),
    ]
    return "\n".join(lines) + "\n"
