"""The command line: ``slurm up``, ``slurm status``, ``slurm down``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from . import cluster, services
from .errors import EXIT_NO_SLURM_HERE, EXIT_NOT_UP, EXIT_OK, TestbedError
from .layout import DEFAULT_DIR, DEFAULT_NET, Layout, Shape

EPILOG = f"""\
exit codes:
  0   done, or already so
  1   failed; the message and the logs say why
  2   wrong usage
  {EXIT_NOT_UP}   status: the cluster is not up
  {EXIT_NO_SLURM_HERE}  this machine cannot have a Slurm (not root, or no packages); the reason is on stderr

environment:
  HPCSNGD_TESTBED_DIR  state directory: configuration, logs, database (default {DEFAULT_DIR})
  HPCSNGD_TESTBED_NET  first three bytes of the nodes' addresses (default {DEFAULT_NET})
"""


def _say(text: str) -> None:
    print(f"hpcsngd testbed: {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slurm",
        description="A real Slurm with several nodes on one Debian 12-like machine, for tests. Run as root.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|status|down")
    up = commands.add_parser("up", help="install what is missing and start a cluster; nothing if it is up")
    default = Shape()
    suppress = (
        argparse.SUPPRESS
    )  # "not asked for" differs from the default: a running cluster may have any shape
    up.add_argument("--nodes", type=int, default=suppress, help=f"compute nodes (default {default.nodes})")
    up.add_argument("--cpus", type=int, default=suppress, help=f"CPUs per node (default {default.cpus})")
    up.add_argument("--gpus", type=int, default=suppress, help=f"fake GPUs per node (default {default.gpus})")
    commands.add_parser("status", help="show daemons, nodes and jobs")
    down = commands.add_parser("down", help="cancel all jobs and stop everything that 'up' started")
    down.add_argument("--force", action="store_true", help="although test sessions use the cluster")
    return parser


def _up(layout: Layout, wanted: dict[str, int]) -> int:
    begin = time.monotonic()
    facts, started = cluster.up(layout, wanted)
    took = f"up in {time.monotonic() - begin:.1f} s" if started else "already up"
    _say(f"{took}: {facts.shape} network={facts.network}")
    if cluster.needs_slurm_conf(layout):
        _say("the machine has another /etc/slurm/slurm.conf; to use the testbed:")
    print(f"export SLURM_CONF={layout.slurm_conf}")
    return EXIT_OK


def _status(layout: Layout) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "slurm status | head" is no error
    facts = cluster.read_facts(layout)
    names = facts.shape.node_names if facts else ()
    for daemon in cluster.daemons(layout, names):
        pid = daemon.pid()
        print(f"{daemon.name:20} {f'running, pid {pid}' if pid else 'stopped'}")
    if cluster.running(layout) is None:
        _say("not up")
        return EXIT_NOT_UP
    print(f"export SLURM_CONF={layout.slurm_conf}")
    print(services.client(layout, "sinfo", "-N", "-p", "debug", "-o", "%N %t cpus=%c %G"), end="")
    print(services.client(layout, "squeue"), end="")
    return EXIT_OK


def _stop_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that a half-started cluster is taken down


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    os.umask(0o022)  # jobs of any user have to reach the munge socket
    signal.signal(signal.SIGTERM, _stop_on_signal)
    try:
        layout = Layout.from_env()
        if command == "up":
            return _up(layout, options)
        if command == "status":
            return _status(layout)
        _say("down" if cluster.down(layout, force=options["force"]) else "nothing was up")
    except TestbedError as error:
        print(f"hpcsngd testbed: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK
