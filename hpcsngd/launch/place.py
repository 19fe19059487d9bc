"""Where an agent stands in its job: hosts, node number, which of the job's agents it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from submitit import JobEnvironment

from hpcsngd.launch import names, schedulers
from hpcsngd.launch.lsf import node as lsf_node
from hpcsngd.launch.plan import WITHOUT_QUEUE, Plan
from hpcsngd.launch.ssh import remote

_RESTARTS = ("SLURM_RESTART_COUNT", lsf_node.RESTARTS)


@dataclass(frozen=True)
class Place:
    """Where an agent stands.

    Attributes:
        job_id: the scheduler's id of the job.
        hosts: host names of the job's nodes, in the scheduler's order.
        node: number of this node, from 0.
        index: number of this agent in the job; in per_rank mode the rank.
        local_index: number of this agent on its node; in per_rank mode the local rank.
        agents: agents in the job.
        restarts: how often the scheduler has started the job again.
        host: this node's host name, by its own word.
    """

    job_id: str
    hosts: tuple[str, ...]
    node: int
    index: int
    local_index: int
    agents: int
    restarts: int
    host: str

    @property
    def is_leader(self) -> bool:
        """Returns whether this is the agent that leases the port and records the outcome."""
        return self.index == 0

    def address(self, plan: Plan) -> str:
        """Returns where workers find rank 0: the first host by the scheduler's name, loopback if local.

        A host often calls itself 127.0.0.1, so its own word will not do for others.
        """
        if plan.ssh and plan.nodes > 1:  # an alias of ssh's configuration is no name to others
            return plan.ssh.address(0)
        return "127.0.0.1" if plan.scheduler in WITHOUT_QUEUE else names.address(self.hosts[0])


def locate() -> Place:
    """Returns where this process stands, by the word of submitit and the scheduler, or of who used ssh."""
    if told := os.environ.get(remote.PLACE):
        facts = json.loads(told)
        return Place(**facts | {"hosts": tuple(facts["hosts"])})
    job = JobEnvironment()
    return Place(
        job_id=job.job_id,
        hosts=tuple(job.hostnames),
        node=job.node,
        index=job.global_rank,
        local_index=job.local_rank,
        agents=job.num_tasks,
        restarts=max(int(os.environ.get(name) or 0) for name in _RESTARTS),
        host=names.host_name(),
    )


def time_left_s(place: Place, plan: Plan) -> float | None:
    """Returns the seconds until the job's time limit by the scheduler's word; None if it cannot be had.

    A job's clock runs before its agents start, and its limit may have been changed since the submission.
    Only the leader needs it: many agents would be many questions.
    """
    scheduler = schedulers.of(plan.scheduler)
    if scheduler is None or not place.is_leader:
        return None
    job = scheduler.own_job(place.job_id, timeout_s=plan.command_timeout_s)
    return job.left_s if job else None


def misfit(place: Place, plan: Plan) -> str | None:
    """Returns how the job differs from its plan; None if it does not."""
    wanted = plan.nodes * plan.agents_per_node
    if len(place.hosts) != plan.nodes:
        return f"planned {plan.nodes} node(s), the job has {len(place.hosts)}: {', '.join(place.hosts)}"
    if place.agents != wanted:
        return f"planned {wanted} agent(s), the job has {place.agents}"
    return None
