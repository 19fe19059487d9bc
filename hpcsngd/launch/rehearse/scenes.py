"""The scenes of a rehearsal: what is asked of the scheduler, what is done to the job, what must follow.

Each scene yields checks; a check that fails says what was found. Nothing depends on how fast the machine is:
scenes wait for what must happen, up to `PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpcsngd import lifeline, rundir
from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import PreflightError
from hpcsngd.launch import cancel, limits, plan, programs, schedulers, scripts, status, submit
from hpcsngd.launch.executors import LsfSiteExecutor
from hpcsngd.launch.lsf import request
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.rehearse import life, stage
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.cluster import Cluster
from hpcsngd.rundir import Attempt, RunDir

T = TypeVar("T")

PATIENCE_S = 300.0
"""Longest wait for one thing to happen; a loaded machine needs a minute to start torch on some ranks."""
POLL_S = 0.5
_RESUMED = re.compile(r"resumed after step (\d+)")
_STEPS = 3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what must hold.
        passed: whether it does.
        detail: what was found.
        wall_s: how long it took, in seconds.
    """

    name: str
    passed: bool
    detail: str
    wall_s: float = 0.0


@dataclass
class Setting:
    """What the scenes play with.

    Attributes:
        full: the configuration as it would be submitted.
        small: the run in small.
        cluster: the played cluster.
        book: its records.
        folder: for what the scenes write.
        start_s: the longest time that a run has taken to its first steps, in seconds.
    """

    full: Resolved
    small: Resolved
    cluster: Cluster
    book: Book
    folder: Path
    start_s: float = 30.0


def play(setting: Setting, names: Sequence[str]) -> Iterator[Check]:
    """Yields the checks of the chosen scenes, each with its time."""
    for name in names:
        began = time.monotonic()
        for check in SCENES[name](setting):
            now = time.monotonic()
            yield dataclasses.replace(check, wall_s=now - began)
            began = now


def policy(setting: Setting) -> Iterator[Check]:
    """The request at its full size, and one beyond the site's limits."""
    made = plan.make(setting.full, is_dry=True)
    said = _send(made, setting)
    yield Check("the scheduler takes the job at its full size", said.status == 0, said.words())
    if not setting.full.site.limits:
        return
    row = limits.chosen_row(setting.full)
    minutes = 1 + max(limit.max_walltime_min for limit in setting.cluster.limits)
    try:
        plan.make(stage.longer(setting.full, minutes), is_dry=True)
        found = "not refused"
    except PreflightError as error:
        found = str(error)
    yield Check(
        f"hpcsngd refuses {minutes} min and quotes the rule", "fits no row" in found and bool(row), found
    )
    name, value = ("W", request.walltime(minutes)) if made.flavor else ("time", str(minutes))
    said = _send(dataclasses.replace(made, directives=made.directives | {name: value}), setting)
    yield Check("the scheduler refuses it, too", said.status != 0, said.words())


def _send(made: Plan, setting: Setting) -> programs.Said:
    """Submits a job that is held, as it stands, and takes it back."""
    scheduler = schedulers.QUEUES[made.scheduler]
    held = dataclasses.replace(made, directives=made.directives | dict(scheduler.held))
    file = setting.folder / "full-size.sh"
    file.write_text(scripts.script(held, setting.folder), encoding="utf-8")
    file.chmod(0o755)
    words = ["sbatch", str(file)]
    if made.flavor:
        words = LsfSiteExecutor(setting.folder, held).bsub_words(file)
    said = programs.run(words, timeout_s=made.command_timeout_s)
    for job in setting.book.jobs():
        if job.is_held and not job.has_ended:
            setting.book.ask(job.key, "kill")
    return said


def completion(setting: Setting) -> Iterator[Check]:
    """A short run from submission to its result."""
    run = _submit(setting, setting.small)
    ended = _ended(run)
    yield Check("a run completes", ended is not None and ended.state == "completed", _words(ended))
    yield from _placement(run, setting)
    yield _cleanness(run, setting)


def preemption(setting: Setting) -> Iterator[Check]:
    """A run that does not end by itself: preempted, then cancelled."""
    run = _submit(setting, stage.endless(setting.small))
    yield _progress(run, 1, "a run trains", setting)
    setting.book.ask(_key(run), "preempt")
    yield _progress(run, 2, "after a preemption the run goes on from its checkpoint", setting)
    cancel.cancel([run])
    ended = _ended(run)
    is_kept = ended is not None and ended.state == "cancelled"
    yield Check("a cancelled run stays cancelled", is_kept, _words(ended))
    yield _cleanness(run, setting)


def limit(setting: Setting) -> Iterator[Check]:
    """A run whose wall time is too short."""
    run = _submit(setting, stage.brief(setting.small, setting.start_s))
    yield _progress(run, 2, "after the time limit the run goes on from its checkpoint", setting)
    word = run.attempt(1).ended_yaml
    cause = str(rundir.read_yaml(word)["cause"]) if word.exists() else "nothing recorded"
    yield Check("the time limit is told from other ends", cause == "timeout", cause)
    cancel.cancel([run])
    _ended(run)
    yield _cleanness(run, setting)


def failure(setting: Setting) -> Iterator[Check]:
    """A worker that is killed."""
    run = _submit(setting, stage.failing(setting.small))
    yield _progress(run, 1, "another run trains", setting)
    ranks = setting.small.nodes * setting.small.ranks_per_node
    beat = lifeline.read_beat(run.attempts()[-1].heartbeats, f"rank{ranks - 1}")
    with contextlib.suppress(ProcessLookupError):  # then the next check says how the run ended
        if beat is not None:
            os.kill(beat.pid, signal.SIGKILL)
    ended = _ended(run)
    is_told = ended is not None and (ended.state, ended.fault_kind) == ("failed", "killed")
    yield Check("a killed worker ends the run, and the reason is told", is_told, _words(ended))
    yield _cleanness(run, setting)


SCENES: dict[str, Callable[[Setting], Iterator[Check]]] = {
    "policy": policy,
    "completion": completion,
    "preemption": preemption,
    "limit": limit,
    "failure": failure,
}


def _submit(setting: Setting, resolved: Resolved) -> RunDir:
    return submit.submit(resolved, argv=["hpcsngd", "rehearse"]).run


def _ended(run: RunDir) -> status.RunState | None:
    """Waits until a run has ended for good, by its own word or the scheduler's; None if it does not."""
    looks = 0

    def look() -> status.RunState | None:
        nonlocal looks
        state = status.states([run])[0]
        # its status may be on its way, or its job about to start again
        looks = looks + 1 if state.has_ended else 0
        return state if looks >= submit.ENDED_POLLS else None

    return _wait(look)


def _words(state: status.RunState | None) -> str:
    if state is None:
        return f"it has not ended after {PATIENCE_S:.0f} s"
    return f"{state.state}: {state.reason}" if state.reason else state.state


def _wait(look: Callable[[], T | None]) -> T | None:
    """Returns what a look finds, or None after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(POLL_S)
    return None


def _key(run: RunDir) -> str:
    job = status.newest_job(run)
    return job.job_id if job else ""


def _progress(run: RunDir, number: int, name: str, setting: Setting) -> Check:
    """Waits until an attempt has trained some steps; a later attempt must say from where it goes on."""
    began = time.monotonic()

    def look() -> str | None:
        state = status.states([run])[0]
        if state.has_ended and state.attempt >= number:
            return f"it ended: {state.state}: {state.reason}"
        return _trained(run.attempt(number), is_first=number == 1)

    found = _wait(look) or f"no attempt {number} that trains; {status.states([run])[0].state}"
    if number == 1:
        setting.start_s = max(setting.start_s, time.monotonic() - began)
    return Check(name, found.startswith("attempt"), found)


def _trained(attempt: Attempt, *, is_first: bool) -> str | None:
    beat = lifeline.read_beat(attempt.heartbeats, "rank0")
    start = 0 if is_first else _resumed(attempt)
    if beat is None or start is None or beat.step < start + _STEPS:
        return None
    since = "" if is_first else f", resumed after step {start}"
    return f"attempt {attempt.number}: step {beat.step}{since}"


def _resumed(attempt: Attempt) -> int | None:
    """Returns the step of the checkpoint that an attempt went on from, by its logs; None if it did not."""
    for log in sorted(attempt.logs.glob("*.err")):
        if match := _RESUMED.search(log.read_text(encoding="utf-8", errors="replace")):
            return int(match[1])
    return None


def _placement(run: RunDir, setting: Setting) -> Iterator[Check]:
    """Looks at where a finished run stood: only compute nodes, and the master on the first of them."""
    attempt = run.attempts()[-1]
    hosts = rundir.read_yaml(attempt.attempt_yaml)["hosts"] if attempt.attempt_yaml.exists() else []
    is_computing = len(hosts) == setting.small.nodes and set(hosts) <= set(setting.cluster.hosts)
    yield Check("its workers stand on compute nodes alone", is_computing, ", ".join(hosts) or "no hosts")
    meeting = rundir.read_yaml(attempt.rendezvous_yaml) if attempt.rendezvous_yaml.exists() else {}
    address = str(meeting.get("address", ""))
    master = next((name for name, place in setting.cluster.addresses.items() if place == address), address)
    yield Check("the master is the first of them", hosts[:1] == [master], master or "no master")
    world = setting.small.nodes * setting.small.ranks_per_node
    beats = [lifeline.read_beat(attempt.heartbeats, f"rank{rank}") for rank in range(world)]
    told = sum(beat is not None for beat in beats)
    yield Check("every rank took part", told == world, f"{told} of {world} ranks")


def _cleanness(run: RunDir, setting: Setting) -> Check:
    """Waits until a job has ended, and looks for what it left running."""
    key = _key(run)

    def look() -> bool:
        job = setting.book.read(key)
        return job is not None and job.has_ended and not life.processes(setting.book.folder, key)

    left = "nothing" if _wait(look) else f"processes {life.processes(setting.book.folder, key)}"
    return Check("nothing of it is left running", left == "nothing", left)
