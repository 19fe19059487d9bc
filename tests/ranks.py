"""Runs a function on several gloo ranks of this machine and fails loudly when a rank dies or hangs."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from hpcsngd import dist

# The fork server imports once what ranks need; each is then forked from it within milliseconds.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "tests.ranks", "tests.train.preloaded"])


class RankError(AssertionError):
    """One or more ranks raised, died or hung; the message holds each rank's text."""


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Calls ``fn(*args)`` on every rank of a fresh gloo group; returns the results in rank order.

    Args:
        fn: a module-level function (it is pickled by name); it may use ``hpcsngd.dist``.
        world_size: number of ranks, each with one thread.
        args: picklable arguments, the same on every rank.
        timeout_s: limit for the whole call; a rank still running then is terminated and named.

    Raises:
        RankError: a rank raised (with its traceback), died (with its exit code) or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_main, args=(folder, r, world_size, fn, args)) for r in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, time.monotonic() + timeout_s)
            problems = [text for r, process in enumerate(ranks) if (text := _problem(folder, r, process))]
        finally:
            _end(ranks)
        if problems:
            raise RankError(f"{len(problems)} of {world_size} ranks failed\n" + "\n".join(problems))
        return [pickle.loads(Path(folder, f"result{r}").read_bytes()) for r in range(world_size)]


def _main(folder: str, rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init("gloo", init_method=f"file://{folder}/rendezvous", timeout_s=60)
        result = fn(*args)
        # Nobody leaves (and takes gloo's connections along) while another rank still communicates.
        dist.barrier()
        dist.shutdown()
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _wait(ranks: list[Any], deadline: float) -> None:
    """Returns when every rank has ended, soon after one has failed, or at the deadline."""
    waiting = {process.sentinel: process for process in ranks}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for sentinel in multiprocessing.connection.wait(list(waiting), timeout=left):
            if waiting.pop(sentinel).exitcode != 0:
                # The others now wait for the lost rank: a moment for their own error text, no more.
                deadline = min(deadline, time.monotonic() + 5)


def _problem(folder: str, rank: int, process: Any) -> str:
    """Returns what went wrong on ``rank``, or an empty string."""
    error = Path(folder, f"error{rank}")
    if process.exitcode is None:
        return f"rank {rank} hung and was terminated"
    if error.exists():
        return f"rank {rank} raised:\n{error.read_text()}"
    return "" if process.exitcode == 0 else f"rank {rank} died with exit code {process.exitcode}"


def _end(ranks: list[Any]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
