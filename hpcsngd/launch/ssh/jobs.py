"""A job on hosts without a scheduler: its agents started, asked and ended, all hosts at once.

``submitted.yaml`` says which processes they are. There is no process of ours where the job was submitted: it
goes on when the submitter leaves, and whoever sees the run directory and reaches the hosts can ask for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd import __version__
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import programs
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.ssh import remote, words
from hpcsngd.launch.ssh.words import Ssh
from hpcsngd.rundir import RunDir

_CANNOT_CONNECT = 255  # ssh(1)


@dataclass(frozen=True)
class Agents:
    """The agents of one job.

    Attributes:
        ssh: how their hosts are reached.
        python: their Python.
        timeout_s: seconds given to one host.
        run_dir: the run directory.
        agents: from ``submitted.yaml``, in their order: ``host``, ``pid``, ``start_ticks``, ``boot``.
    """

    ssh: Ssh
    python: str
    timeout_s: float
    run_dir: str
    agents: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, run: RunDir, plan: Plan, facts: Mapping[str, Any]) -> Agents:
        """Returns the agents that ``submitted.yaml`` names."""
        return cls(
            _ssh(plan), plan.agent_python, plan.command_timeout_s, str(run.path), tuple(facts["agents"])
        )

    def ask(self, verb: str, **more: Any) -> list[bool | SchedulerError]:
        """Asks all hosts about their agents; returns whether each ran, or why that cannot be told."""
        hosts = list(dict.fromkeys(agent["host"] for agent in self.agents))
        requests = {
            host: {
                "verb": verb,
                "agents": [
                    agent | {"run_dir": self.run_dir} for agent in self.agents if agent["host"] == host
                ],
                **more,
            }
            for host in hosts
        }
        said = ask(self.ssh, self.python, requests, timeout_s=self.timeout_s)
        rows = {host: iter(found["alive"]) for host, found in said.items() if isinstance(found, dict)}
        return [
            next(rows[host]) if host in rows else _error(said[host])
            for host in (agent["host"] for agent in self.agents)
        ]


def start(run: RunDir, plan: Plan, attempt: int) -> tuple[str, list[dict[str, Any]]]:
    """Starts an agent on each host (one per rank in per_rank mode); they wait for ``submitted.yaml``.

    Args:
        run: the run.
        plan: what is to be started.
        attempt: number of the attempt.

    Returns:
        The job's id and how its agents are known, see `Agents`.

    Raises:
        SchedulerError: a host cannot be reached or refuses; agents that had started are ended.
    """
    ssh, job_id = _ssh(plan), f"ssh-{secrets.token_hex(4)}"
    requests = {host: _start_request(run, plan, attempt, job_id, node) for node, host in enumerate(ssh.hosts)}
    said = ask(ssh, plan.agent_python, requests, timeout_s=plan.command_timeout_s)
    agents = [
        {"host": host, **agent}
        for host, found in said.items()
        if isinstance(found, dict)
        for agent in found["agents"]
    ]
    problems = [str(found) for found in said.values() if isinstance(found, SchedulerError)]
    if problems:
        Agents.of(run, plan, {"agents": agents}).ask("end", is_hard=True)
        raise SchedulerError("; ".join(problems))
    return job_id, agents


def _start_request(run: RunDir, plan: Plan, attempt: int, job_id: str, node: int) -> dict[str, Any]:
    ssh = _ssh(plan)
    indices = [node * plan.agents_per_node + local for local in range(plan.agents_per_node)]
    return {
        "verb": "start",
        "run_dir": str(run.path),
        "attempt": attempt,
        "digest": hashlib.sha256(run.run_yaml.read_bytes()).hexdigest(),
        "version": __version__,
        "cwd": str(Path.cwd()),
        "env": words.passed(ssh, os.environ),
        "places": [
            {
                "job_id": job_id,
                "hosts": list(ssh.names),
                "node": node,
                "index": index,
                "local_index": local,
                "agents": plan.nodes * plan.agents_per_node,
                "restarts": 0,
                "host": ssh.names[node],
            }
            for local, index in enumerate(indices)
        ],
        # as submitit names the logs of a job's tasks
        "logs": [str(run.submit_dir / f"{job_id}_{index}_log") for index in indices],
    }


def ask(
    ssh: Ssh, python: str, requests: Mapping[str, Mapping[str, Any]], *, timeout_s: float
) -> dict[str, dict[str, Any] | SchedulerError]:
    """Sends a request to each of some hosts at once; returns their answers, or why there is none.

    Args:
        ssh: how they are reached.
        python: the Python that answers there.
        requests: host -> request, see `hpcsngd.launch.ssh.remote`.
        timeout_s: seconds given to each host.
    """
    if not requests:
        return {}
    with ThreadPoolExecutor(min(len(requests), 32)) as pool:
        answers = pool.map(lambda host: _ask_one(ssh, python, host, requests[host], timeout_s), requests)
        return dict(zip(requests, answers, strict=True))


def command(ssh: Ssh, python: str, host: str) -> list[str]:
    """Returns the command line that reaches a host; its request goes to standard input."""
    return ssh.words(host, [python, "-m", words.REMOTE], words.search_path(os.environ))


def _ask_one(
    ssh: Ssh, python: str, host: str, request: Mapping[str, Any], timeout_s: float
) -> dict[str, Any] | SchedulerError:
    try:
        said = programs.run(command(ssh, python, host), timeout_s=timeout_s, text=json.dumps(request))
    except SchedulerError as error:
        return SchedulerError(f"host {host}: {error}")
    return read(host, said.out, said.err, said.status)


def read(host: str, out: str, err: str, status: int) -> dict[str, Any] | SchedulerError:
    """Returns a host's answer, or what its silence means."""
    found = remote.parse(out.splitlines())
    if found is None:
        told = programs.Said(out, err, status).words() or f"exit status {status}"
        what = "cannot be reached" if status == _CANNOT_CONNECT else "does not answer as hpcsngd does"
        return SchedulerError(f"host {host} {what}: {told}")
    return SchedulerError(f"host {host}: {found['error']}") if "error" in found else found


def complaints(said: Sequence[bool | SchedulerError]) -> list[str]:
    """Returns what is known of hosts that did not answer, each once."""
    return list(dict.fromkeys(str(each) for each in said if isinstance(each, SchedulerError)))


def _error(found: dict[str, Any] | SchedulerError) -> SchedulerError:
    return found if isinstance(found, SchedulerError) else SchedulerError(str(found))


def _ssh(plan: Plan) -> Ssh:
    if plan.ssh is None:
        raise SchedulerError(f"the plan of site {plan.site_name} names no hosts")
    return plan.ssh
