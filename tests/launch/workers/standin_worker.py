"""A worker for tests of the launcher: says who it is, then behaves as STANDIN asks.

It keeps the worker's side of the contract (arguments, faults, finished.yaml, exit 75) without training.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

from hpcsngd import lifeline, rundir

REPORTED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "HPCSNGD_DEVICE",
    "HPCSNGD_BACKEND",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MARK",
)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    given = parser.parse_args()
    lifeline.bind_to_parent()  # as the real worker does
    run = rundir.open_run(given.run_dir)
    attempt = run.attempt(given.attempt)
    rank = int(os.environ["RANK"])
    report(run, rank)
    behaviors = {
        "ok": finish,
        "meet": meet,
        "linger": linger,
        "import": import_nothing,
        "fault": tell_fault,
        "hang": hang,
        "stop": wait_for_stop,
        "silent": lambda attempt, rank: 0,
    }
    return behaviors[os.environ.get("STANDIN", "ok")](attempt, rank)


def report(run: rundir.RunDir, rank: int) -> None:
    words = {name: os.environ.get(name) for name in REPORTED}
    words["host"] = socket.gethostname()
    prefixes = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI", "SUBMITIT_")
    words["foreign"] = sorted(
        name for name in os.environ if name.startswith(prefixes) and name != "SLURM_CONF"
    )
    file = run.path / "report" / f"rank{rank}.json"
    file.parent.mkdir(exist_ok=True)
    # renamed, because tests read the reports while the ranks still start
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(words))
    unfinished.replace(file)


def finish(attempt: rundir.Attempt, rank: int, **result: object) -> int:
    if rank == 0:
        rundir.write_yaml(attempt.finished_yaml, {"accuracy": 0.5, **result})
    return 0


def meet(attempt: rundir.Attempt, rank: int) -> int:
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo")
    except RuntimeError as error:
        attempt.write_fault(rundir.Fault("rendezvous", str(error), socket.gethostname(), rank=rank))
        raise
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    dist.barrier()
    dist.destroy_process_group()
    return finish(attempt, rank, total=float(total))


def linger(attempt: rundir.Attempt, rank: int) -> int:
    """Meets the others and reduces with them until one is gone, as training does."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for number in range(600):
        dist.all_reduce(torch.ones(1))
        if number == 0:
            (attempt.path / f"met{rank}").touch()
        time.sleep(0.1)
    return 1


def import_nothing(attempt: rundir.Attempt, rank: int) -> int:
    import no_such_module_anywhere  # noqa: F401

    return 0


def tell_fault(attempt: rundir.Attempt, rank: int) -> int:
    """Rank 1 fails first and says why; the others wait in a collective that never returns."""
    if rank == 1:
        fault = rundir.Fault("nan", "loss is nan in step 7", socket.gethostname(), rank=1)
        attempt.write_fault(fault)
        return 1
    return hang(attempt, rank)


def hang(attempt: rundir.Attempt, rank: int) -> int:
    time.sleep(600)
    return 0


def wait_for_stop(attempt: rundir.Attempt, rank: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if attempt.stop_request.exists():
            return 75
        time.sleep(0.1)
    return 1


if __name__ == "__main__":
    sys.exit(main())
