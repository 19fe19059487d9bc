"""One training process: ``python -m hpcsngd.train.worker RUN_DIR --attempt N``.

RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment; without RANK there is one
process. Nothing is imported at the top that may be missing or broken inside an image: if ``import torch``
fails, the run's directory must still say so.

Exit status: 0 at the end of the run, `EXIT_STOPPED` after a stop request and its checkpoint, 1 on a failure,
which is recorded in the attempt's ``faults/``.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpcsngd import fingerprint, lifeline, rundir
from hpcsngd.handover import CODE, EXIT_STOPPED
from hpcsngd.train import faults
from hpcsngd.train.pulse import Heartbeat, Pulse

log = logging.getLogger(__name__)

EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains one rank of a run; returns the exit status.

    Args:
        arguments: run directory and ``--attempt``; default: those of the command line.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m hpcsngd.train.worker", description="Trains one rank.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    _configure_logging(rank)
    # cuBLAS reads this when it starts; without it deterministic matrix products are refused
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        _check_code()
        run = rundir.open_run(options.run_dir)
        pulse = Pulse(rank)
        with Heartbeat(pulse, run.attempt(options.attempt).heartbeats):
            is_finished = _train(run, options.attempt, started, pulse)
    except faults.DismissedError as error:
        log.error("%s", error)  # noqa: TRY400 - what has happened is known
        return EXIT_FAILED
    except Exception as error:
        _record(rundir.RunDir(options.run_dir).attempt(options.attempt), error, rank)
        return EXIT_FAILED
    # All ranks are done: one that has left must not have torchrun end the others with another exit status.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0 if is_finished else EXIT_STOPPED


def _train(run: rundir.RunDir, attempt: int, started: float, pulse: Pulse) -> bool:
    if run.record()["config"]["experiment"]["strategy"] == "parameter_server":
        from hpcsngd.train.parameter_server import session as served

        return served.train(run, attempt, started=started, pulse=pulse)
    from hpcsngd import dist
    from hpcsngd.train import devices, session

    device = devices.choose_device()
    pulse.at("rendezvous")
    devices.join_ranks(device)
    is_finished = session.train(run, attempt, device, started=started, pulse=pulse)
    # Not after an error: leaving the group would wait for ranks that wait for this one.
    dist.shutdown()
    return is_finished


def _check_code() -> None:
    """Refuses to be another hpcsngd than the submitter's, which only an image can bring about."""
    expected, found = os.environ.get(CODE), fingerprint.identity()
    if expected not in (None, found):
        raise faults.SettingError(
            f"the image has hpcsngd {found}, but {expected} submitted the run: build the image again, or set "
            "container.code: bind in the site file"
        )


def _configure_logging(rank: int) -> None:
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank{rank}] %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def _record(attempt: rundir.Attempt, error: Exception, rank: int) -> None:
    """Prints the traceback and writes the fault for the agent and for people."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        sys.stderr.write(f"[rank{rank}]: {line}\n")
    fault = rundir.Fault(
        kind=faults.kind_of(error),
        message=faults.message_of(error),
        host=socket.gethostname(),
        rank=rank,
        evidence=faults.evidence_of(error),
        is_echo=faults.is_echo(error),
    )
    try:
        attempt.write_fault(fault)
    except OSError as problem:  # a full disk is one of the faults
        log.error("cannot record the fault: %s", problem)  # noqa: TRY400


def run() -> None:
    """Runs `main` as all that this process is for; does not return."""
    # An agent that is killed cannot end its workers, and the kernel's word needs no scheduler.
    lifeline.bind_to_parent()
    # The agent asks for the stacks of all threads when nothing goes on any more.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == EXIT_FAILED:
        # An orderly exit may wait for ever on a collective that other ranks will not join.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
