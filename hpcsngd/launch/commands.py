"""The command that an agent runs: shell around the preload lines, container, torchrun, worker. Pure text.

``dry_run`` shows what these functions return and the agent runs what they return, so the two cannot differ.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hpcsngd.launch import container
from hpcsngd.launch.plan import Plan
from hpcsngd.rundir import RunDir

PRELOAD_FAILED = 98
"""Exit status of the shell when a preload line failed."""


def shell_text(preload: Sequence[str], passed: Sequence[str] = ()) -> str:
    """Returns the text for ``bash -c`` that runs the preload lines, then becomes its arguments.

    A line that fails ends it with `PRELOAD_FAILED` and says which line it was. ``set -e`` would not do: the
    scripts behind ``module load`` and ``conda activate`` rely on commands that may fail.

    Args:
        preload: the site's lines.
        passed: variables that go into an image.
    """
    lines = ["trap '' USR2"]  # the agent's warning signal; some process trackers hand it to every process
    for number, line in enumerate(preload, start=1):
        complaint = shlex.quote(f"hpcsngd: preload line {number} failed: {line}")
        lines.append(
            f"eval {shlex.quote(line)} || {{ printf '%s\\n' {complaint} >&2; exit {PRELOAD_FAILED}; }}"
        )
    lines += container.export_lines(passed) if passed else []
    return "\n".join([*lines, 'exec "$@"'])


def wrap(plan: Plan, run_dir: str, command: Sequence[str]) -> list[str]:
    """Returns the command inside the plan's container and shell."""
    inside = container.run_words(plan, run_dir) if plan.image else []
    return ["bash", "-c", shell_text(plan.preload, plan.pass_env), "hpcsngd", *inside, *command]


def worker_words(plan: Plan, run_dir: str, attempt: int) -> list[str]:
    """Returns the worker's module and its arguments."""
    return [plan.worker, run_dir, "--attempt", str(attempt)]


def rank_command(plan: Plan, run_dir: str, attempt: int) -> list[str]:
    """Returns the command of one singly started rank; who it is stands in its environment."""
    return wrap(plan, run_dir, [plan.python, "-u", "-m", *worker_words(plan, run_dir, attempt)])


def _torchrun_logs(run_dir: str, attempt: int, node: int | str) -> str:
    return str(RunDir(Path(run_dir)).attempt(attempt).torchrun_logs(node))


def node_command(
    plan: Plan, run_dir: str, attempt: int, *, node: int | str, address: str, port: int | str
) -> list[str]:
    """Returns the torchrun command of one node, with a static rendezvous.

    Static, because it keeps rank 0 on the node whose address is announced; the dynamic ones number the nodes
    in order of arrival.
    """
    torchrun = [
        plan.python,
        "-u",
        "-m",
        "torch.distributed.run",
        f"--nnodes={plan.nodes}",
        f"--nproc-per-node={plan.ranks_per_node}",
        f"--node-rank={node}",
        f"--master-addr={address}",
        f"--master-port={port}",
        f"--rdzv-conf=timeout={int(plan.rendezvous_timeout_s)}",
        # the node's log gets each line with its rank in front; a file per rank keeps what a killed torchrun
        # had not passed on yet
        "--tee=3",
        f"--log-dir={_torchrun_logs(run_dir, attempt, node)}",
        "-m",
    ]
    return wrap(plan, run_dir, [*torchrun, *worker_words(plan, run_dir, attempt)])
