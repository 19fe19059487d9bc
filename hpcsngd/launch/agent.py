"""The node agent: the one callable that submitit starts on the nodes, outside any image.

It finds out where it stands, agrees on the rendezvous with the other agents through the run directory, runs
the workers, and says how it ended. Agent 0 leases the port and publishes host, port and a generation number
in ``rendezvous.yaml``; the others wait for that file. If the port is taken between lease and use, agent 0's
workers fail to listen: it then leases another and publishes the next generation, and every agent whose
workers belong to an older one starts them again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import signal
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeAlias

from hpcsngd import __version__, lifeline, rundir
from hpcsngd.launch import (
    commands,
    container,
    environment,
    hardware,
    outcome,
    place,
    ports,
    processes,
    requeue,
    schedulers,
    turn,
    usage,
    verdict,
    watch,
)
from hpcsngd.launch.context import AgentFaultError, Context, Ended
from hpcsngd.launch.crew import Crew
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.stop import Stop
from hpcsngd.launch.walltime import RESERVE_S
from hpcsngd.rundir import Attempt

Reason = Literal["stop", "moved", "peer", "hang"]
Workers: TypeAlias = processes.Child | Crew

log = logging.getLogger(__name__)

POLL_S = 0.2
FILES_POLL_S = 1.0
"""Shared file systems are asked less often than the kernel."""
PEER_GRACE_S = 10.0
"""A failed rank leaves the others waiting in a collective; so long they may end with words of their own."""
END_GRACE_S = 5.0
LATE_LEASE_S = 10.0
"""How long the workers of agent 0 may take longer than others to find their port taken."""
MAX_LEASES = 4


@dataclass(frozen=True)
class Rendezvous:
    """Where the workers of one generation meet."""

    generation: int
    address: str
    port: int
    utc: str


@dataclass(frozen=True)
class NodeAgent:
    """What is pickled and started: a path and a number, nothing else.

    Attributes:
        run_dir: the run directory.
        attempt: number of the attempt; restarts by the scheduler are added to it.
    """

    run_dir: str
    attempt: int

    def __call__(self) -> None:
        """Runs the workers of this node (or this rank) to their end.

        Raises:
            RunFailedError: they did not succeed; the reason is in ``status.yaml``.
        """
        run = rundir.open_run(Path(self.run_dir))
        plan = Plan.from_record(run.plan_record(self.attempt))
        here = place.locate()
        attempt = run.attempt(self.attempt + here.restarts)
        if is_superseded(attempt, plan, here):
            log.info("attempt %d is another job's, not job %s's: nothing to do", attempt.number, here.job_id)
            return
        context = Context(run, plan, here, attempt, place.time_left_s(here, plan))
        is_adopting = processes.adopt_orphans()
        log.info("agent %d of %d on %s, orphans adopted: %s", here.index, here.agents, here.host, is_adopting)
        with Stop() as stop:
            try:
                if here.is_leader and not turn.has_come(context):
                    return
                ended = Supervisor(context, stop).run()
            except Exception as error:
                outcome.fail(context, error)
                raise
            finally:
                processes.kill_descendants()
            usage.write_own(context, ended.exit_status)
            outcome.conclude(context, ended, stop)


def is_superseded(attempt: Attempt, plan: Plan, here: place.Place) -> bool:
    """Returns whether an attempt belongs to another job: Slurm may start one again that was given up."""
    if plan.scheduler == "local" or not attempt.submitted_yaml.exists():
        return False
    return str(rundir.read_yaml(attempt.submitted_yaml)["job_id"]) != here.job_id


class Supervisor:
    """Starts the workers, watches them, and starts them again when the rendezvous moves."""

    def __init__(self, context: Context, stop: Stop) -> None:
        self._context = context
        self._run = context.run
        self._plan = context.plan
        self._place = context.place
        self._attempt = context.attempt
        self._stop = stop
        self._ranks = context.ranks
        self._guard = self._new_guard()
        self._faults_since = 0.0
        self._generation = 0
        self._taken: set[int] = set()

    def run(self) -> Ended:
        """Returns how the workers ended.

        Raises:
            AgentFaultError: the job differs from the plan, or there is no rendezvous.
        """
        if problem := place.misfit(self._place, self._plan):
            raise AgentFaultError("configuration", problem)
        number = requeue.attempts_in_a_row(self._run, self._attempt, self._place.restarts)
        if self._place.restarts and number > self._plan.max_attempts:
            allowed = f"restart.max_attempts allows {self._plan.max_attempts}"
            raise AgentFaultError("preempted", f"the scheduler starts attempt {number}; {allowed}")
        if self._place.is_leader:
            self._write_attempt()
        while True:
            meeting = self._lead() if self._place.is_leader else self._follow()
            if meeting is None:
                return Ended("stop", exit_status=-1, lines=[])
            child = self._start(meeting)
            try:
                ended = self._watch(child, meeting)
            finally:
                child.end(END_GRACE_S)
            self._context.sign(ended.by)
            if not self._is_again(ended, meeting):
                return ended
            processes.kill_descendants()
            self._attempt.forget_faults(self._ranks)

    def _write_attempt(self) -> None:
        facts = {
            "scheduler": self._plan.scheduler,
            "job_id": self._place.job_id,
            "restarts": self._place.restarts,
            "hosts": list(self._place.hosts),
            "nodes": self._plan.nodes,
            "ranks_per_node": self._plan.ranks_per_node,
            "world_size": self._plan.world_size,
            "mode": self._plan.mode,
            "start": rundir.utc_now(),
            "versions": {
                "hpcsngd": __version__,
                "python": platform.python_version(),
                "submitit": version("submitit"),
            },
            "hardware": hardware.facts(),
            "job": self._job_record(),
        }
        rundir.write_yaml(self._attempt.attempt_yaml, facts)

    def _job_record(self) -> dict[str, str]:
        scheduler = schedulers.of(self._plan.scheduler)
        return scheduler.job_record(self._place.job_id) if scheduler else {}

    def _lead(self) -> Rendezvous:
        """Leases a port and publishes where the next generation meets."""
        try:
            lease = ports.lease(self._plan.ports, avoid=self._taken)
        except ports.PortTakenError as error:
            raise AgentFaultError("rendezvous", f"{error.strerror}; {self._port_rule()}") from error
        self._generation += 1
        # let go first: a worker of another node that is quicker than ours must meet a closed door, not us
        port = lease.hand_over()
        meeting = Rendezvous(self._generation, self._place.address(self._plan), port, rundir.utc_now())
        rundir.write_yaml(self._attempt.rendezvous_yaml, dataclasses.asdict(meeting))
        return meeting

    def _port_rule(self) -> str:
        first, last = self._plan.ports
        allowed = str(first) if first == last else f"{first}-{last}"
        return f"site {self._plan.site_name} allows master_port {allowed}"

    def _follow(self) -> Rendezvous | None:
        """Waits for a newer generation; None if the agent is asked to stop meanwhile."""
        deadline = time.monotonic() + self._plan.rendezvous_timeout_s
        while time.monotonic() < deadline:
            if self._stop.is_requested:
                return None
            if meeting := self._newer():
                self._generation = meeting.generation
                return meeting
            time.sleep(POLL_S)
        raise AgentFaultError(
            "rendezvous",
            f"no word from node 0 ({self._place.hosts[0]}) within {self._plan.rendezvous_timeout_s:g} s",
        )

    def _newer(self) -> Rendezvous | None:
        """Returns the published rendezvous if it is newer than the one in force here."""
        file = self._attempt.rendezvous_yaml
        if file.parent.is_dir():
            list(file.parent.iterdir())  # NFS: reading the folder makes a new file visible
        if not file.exists():
            return None
        meeting = Rendezvous(**rundir.read_yaml(file))
        return meeting if meeting.generation > self._generation else None

    def _start(self, meeting: Rendezvous) -> Workers:
        here = self._place
        try:
            plan = container.settle(self._plan)
        except ValueError as error:
            raise AgentFaultError("configuration", str(error)) from error
        shared = environment.worker_environment(os.environ, plan)
        number = self._attempt.number
        run_dir = str(self._run.path)
        if not plan.starts_ranks:
            words = commands.node_command(
                plan, run_dir, number, node=here.node, address=meeting.address, port=meeting.port
            )
            logs = [self._attempt.node_log(here.node, stream) for stream in ("out", "err")]
            return processes.Child(words, shared, *logs)
        words = commands.rank_command(plan, run_dir, number)
        children = {}
        for local, rank in enumerate(self._ranks, start=here.local_index):
            try:
                own = environment.rank_environment(
                    shared, plan, rank=rank, local_rank=local, address=meeting.address, port=meeting.port
                )
            except ValueError as error:
                raise AgentFaultError("configuration", str(error)) from error
            logs = [self._attempt.rank_log(rank, stream) for stream in ("out", "err")]
            children[rank] = processes.Child(words, own, *logs)
        return Crew(children, self._attempt, here.host) if plan.is_served else children[here.index]

    def _watch(self, child: Workers, meeting: Rendezvous) -> Ended:
        self._guard = self._new_guard()
        self._faults_since = next_files = 0.0
        while (status := child.poll()) is None:
            now = time.monotonic()
            if self._stop.is_requested:
                self._attempt.stop_request.touch()
            if self._stop.is_due(now):
                return self._ended("stop", child)
            if now >= next_files:
                next_files = now + FILES_POLL_S
                if by := self._look(now):
                    return self._ended(by, child)
            time.sleep(POLL_S)
        lines = child.tail()
        log.info("generation %d ended with exit status %d", meeting.generation, status)
        return Ended("itself", status, lines)

    def _new_guard(self) -> watch.Watch:
        return watch.Watch(
            self._attempt.heartbeats,
            self._ranks,
            start_timeout_s=self._plan.start_timeout_s,
            hang_timeout_s=self._plan.hang_timeout_s,
            now=time.monotonic(),
        )

    def _look(self, now: float) -> Reason | None:
        """Gives a sign of life and looks at the others'; returns why the workers should be ended, if so."""
        self._context.sign(lifeline.WATCHING)
        if self._plan.ssh and self._attempt.cancel_request.exists() and not self._stop.is_requested:
            # whoever cancelled may not reach this host; elsewhere the scheduler's signal is sure to come
            os.kill(os.getpid(), signal.SIGTERM)
        if self._place.is_leader:
            self._mind_the_limit(now)
        elif self._newer():
            return "moved"
        silent_s = self._guard.silence(now)
        if silent_s is not None and not self._attempt.faults():
            self._record_hang(silent_s)
        faults = self._attempt.faults()
        if any(fault.kind == "hang" for fault in faults):
            logs = [self._log_of(rank) for rank in self._ranks]
            watch.dump_stacks(self._attempt.heartbeats, self._ranks, logs)
            return "hang"
        self._faults_since = (self._faults_since or now) if faults else 0.0
        # an agent that is about to be killed must use the time for its last word
        grace_s = 0.0 if self._stop.is_terminated else PEER_GRACE_S
        return "peer" if faults and now - self._faults_since >= grace_s else None

    def _mind_the_limit(self, now: float) -> None:
        walltime, beat = self._context.walltime, self._context.rank_0
        is_limits_signal = self._stop.is_requested and walltime.is_near(now, beat)
        if not self._stop.is_at_limit and (is_limits_signal or walltime.is_due(now, beat)):
            log.info("%.0f s of wall time are left: asking the workers to leave", walltime.ends_at - now)
            self._stop.warn(walltime.ends_at - RESERVE_S)

    def _record_hang(self, silent_s: float) -> None:
        folder = self._attempt.heartbeats
        beats = [lifeline.read_beat(folder, f"rank{rank}") for rank in range(self._plan.world_size)]
        message, evidence = watch.describe(beats, silent_s)
        outcome.record_fault(self._context, verdict.Verdict("hang", message, evidence))

    def _log_of(self, rank: int) -> Path:
        if self._plan.starts_ranks:
            return self._attempt.rank_log(rank, "err")
        return self._attempt.node_log(self._place.node, "err")

    def _ended(self, by: Reason, child: Workers) -> Ended:
        self._context.sign(by)  # ending them takes a while: no silence
        is_urgent = self._stop.is_hard or by == "hang" or (by == "peer" and self._stop.is_terminated)
        child.end(0.0 if is_urgent else END_GRACE_S)
        return Ended(by, child.poll() or 0, child.tail())

    def _is_again(self, ended: Ended, meeting: Rendezvous) -> bool:
        """Returns whether the workers should be started again, in another generation."""
        if ended.by == "moved":
            return True
        if ended.by != "itself" or ended.exit_status == 0 or self._stop.is_requested:
            return False
        if not self._place.is_leader:
            return self._is_moved_late(ended)
        if not verdict.is_port_taken(ended.lines, meeting.port):
            return False
        self._taken.add(meeting.port)
        if self._plan.ports[0] == self._plan.ports[1] or meeting.generation >= MAX_LEASES:
            raise AgentFaultError(
                "rendezvous",
                f"port {meeting.port} is in use on {meeting.address} ({self._place.host}), "
                f"lease {meeting.generation} of {MAX_LEASES}; {self._port_rule()}",
                ended.lines[-verdict.EVIDENCE_LINES :],
            )
        log.warning("port %d was taken between lease and use; leasing another", meeting.port)
        return True

    def _is_moved_late(self, ended: Ended) -> bool:
        """Waits for a newer generation if these workers may have failed because the port was another's."""
        if verdict.classify(ended.lines, ended.exit_status).kind not in ("rendezvous", "unknown"):
            return False
        deadline = time.monotonic() + LATE_LEASE_S
        while time.monotonic() < deadline and not self._stop.is_requested:
            if self._newer():
                return True
            time.sleep(POLL_S)
        return False
