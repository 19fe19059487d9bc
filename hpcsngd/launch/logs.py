"""The logs of a run: which files there are, their lines, and new lines as they come.

Per node: what its agent's children wrote. Per rank: what torchrun keeps, or the rank's own file where ranks
are started singly. The job's own log (submitit's folder) comes last: it has the agents' words and Slurm's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.errors import RunDirError
from hpcsngd.launch.plan import Plan
from hpcsngd.rundir import Attempt, RunDir

STREAMS = ("out", "err")
FOLLOW_S = 0.5
_BLOCK_BYTES = 2**20
_KEPT_NAMES = {"out": "stdout.log", "err": "stderr.log"}


@dataclass(frozen=True)
class Choice:
    """Which logs: None stands for all ranks or nodes, and for the newest attempt."""

    rank: int | None = None
    node: int | None = None
    attempt: int | None = None
    streams: tuple[str, ...] = STREAMS


@dataclass(frozen=True)
class LogFile:
    """One log: what it is called here, and its path."""

    label: str
    path: Path


def find(run: RunDir, choice: Choice) -> list[LogFile]:
    """Returns the logs that exist and have been asked for.

    Raises:
        RunDirError: an attempt, node or rank that the run does not have; the message says which it has.
    """
    attempt = _attempt(run, choice.attempt)
    if attempt is None:
        return []
    plan = Plan.from_record(run.plan_record(attempt.number))
    _check(choice, plan)
    if choice.rank is not None:
        files = [log for stream in choice.streams for log in _of_rank(attempt, plan, choice.rank, stream)]
    else:
        files = [*_of_nodes(attempt, plan, choice), *_of_job(run, attempt, choice)]
    return [log for log in files if log.path.is_file()]


def follow(
    files: Callable[[], Sequence[LogFile]], is_over: Callable[[], bool], *, pause_s: float = FOLLOW_S
) -> Iterator[tuple[str, str]]:
    """Yields (label, line) for every line of some logs, as they grow, until nothing more can come.

    Args:
        files: returns the logs; asked again each time, because a new attempt has new ones.
        is_over: whether the writers have ended.
        pause_s: seconds between looks.
    """
    readers: dict[Path, _Reader] = {}
    while True:
        # asked first: what is written after this look is read in the next
        is_last = is_over()
        for log in files():
            reader = readers.setdefault(log.path, _Reader(log.path))
            for line in reader.lines(to_the_end=is_last):
                yield log.label, line
        if is_last:
            return
        time.sleep(pause_s)


class _Reader:
    """Reads the complete lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._rest = b""

    def lines(self, *, to_the_end: bool) -> Iterator[str]:
        """Yields new lines; an unfinished last one only if nothing more will come."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            while block := file.read(_BLOCK_BYTES):
                self._place += len(block)
                *complete, self._rest = (self._rest + block).split(b"\n")
                for line in complete:
                    yield line.decode("utf-8", errors="replace")
        if to_the_end and self._rest:
            yield self._rest.decode("utf-8", errors="replace")
            self._rest = b""


def _attempt(run: RunDir, number: int | None) -> Attempt | None:
    attempts = run.attempts()
    if number is None:
        return attempts[-1] if attempts else None
    if number not in [attempt.number for attempt in attempts]:
        known = ", ".join(str(attempt.number) for attempt in attempts) or "none"
        raise RunDirError(f"{run.name} has no attempt {number}; it has {known}")
    return run.attempt(number)


def _check(choice: Choice, plan: Plan) -> None:
    for name, value, count in (("rank", choice.rank, plan.world_size), ("node", choice.node, plan.nodes)):
        if value is not None and not 0 <= value < count:
            raise RunDirError(f"there is no {name} {value}: the run has {name}s 0 to {count - 1}")


def _of_rank(attempt: Attempt, plan: Plan, rank: int, stream: str) -> Iterator[LogFile]:
    label = f"rank{rank}.{stream}"
    if plan.starts_ranks:
        yield LogFile(label, attempt.rank_log(rank, stream))
        return
    node, local = divmod(rank, plan.ranks_per_node)
    kept = attempt.torchrun_logs(node).glob(f"*/attempt_*/{local}/{_KEPT_NAMES[stream]}")
    # a start for each lease of the port, in the order of time
    for path in sorted(kept, key=lambda path: path.stat().st_mtime):
        yield LogFile(label, path)


def _of_nodes(attempt: Attempt, plan: Plan, choice: Choice) -> Iterator[LogFile]:
    nodes = range(plan.nodes) if choice.node is None else [choice.node]
    for node in nodes:
        for stream in choice.streams:
            if not plan.starts_ranks:
                yield LogFile(f"node{node}.{stream}", attempt.node_log(node, stream))
                continue
            first = node * plan.ranks_per_node
            for rank in range(first, first + plan.ranks_per_node):
                yield LogFile(f"rank{rank}.{stream}", attempt.rank_log(rank, stream))


def _of_job(run: RunDir, attempt: Attempt, choice: Choice) -> Iterator[LogFile]:
    if not attempt.submitted_yaml.exists() or choice.node is not None:
        return
    job_id = rundir.read_yaml(attempt.submitted_yaml)["job_id"]
    for stream in choice.streams:
        for path in sorted(run.submit_dir.glob(f"{job_id}_*_log.{stream}")):
            yield LogFile(f"job.{path.name.split('_')[-2]}.{stream}", path)
