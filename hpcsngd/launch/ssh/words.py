"""How a host is reached: the words of ssh for a command of ours. Pure.

Nobody is there to type a password, so ssh is told not to ask (``BatchMode``). Keys, known hosts and jump
hosts are the business of the user's own ssh configuration, which is read as ever.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcsngd.config.site import Scheduler

REMOTE = "hpcsngd.launch.ssh.remote"
"""The module that answers on a host."""


@dataclass(frozen=True)
class Ssh:
    """The hosts of a plan and how they are reached.

    Attributes:
        hosts: as ssh takes them, in the order of the nodes.
        addresses: host without its user -> where other hosts find it, as far as that differs.
        options: words of ssh before the host.
        pass_env: variables of the submitter that go along, besides PYTHONPATH.
    """

    hosts: list[str]
    addresses: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    pass_env: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scheduler: Scheduler, nodes: int) -> Ssh:
        """Returns what a site says about its first ``nodes`` hosts."""
        return cls(
            hosts=scheduler.hosts[:nodes],
            addresses=dict(scheduler.addresses),
            options=_options(scheduler),
            pass_env=list(scheduler.pass_env),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the hosts without their users."""
        return tuple(host.rpartition("@")[2] for host in self.hosts)

    def address(self, node: int) -> str:
        """Returns where the other hosts find a node."""
        name = self.names[node]
        return self.addresses.get(name, name)

    def words(self, host: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """Returns the command line that runs a command on a host.

        Args:
            host: one of the hosts.
            command: its words; quoted for the host's shell.
            env: variables to set for it.
        """
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        # env and not the shell sets them: nobody knows which shell a user has there
        inner = ["env", *settings, *command] if settings else list(command)
        return ["ssh", *self.options, host, shlex.join(inner)]

    def to_record(self) -> dict[str, Any]:
        """Returns plain data."""
        return dataclasses.asdict(self)


def passed(ssh: Ssh, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the submitter's variables that go along as far as they are set, without PYTHONPATH."""
    return {name: environment[name] for name in ssh.pass_env if name in environment}


def search_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the submitter's PYTHONPATH, which the first Python on the host needs already."""
    return {"PYTHONPATH": environment["PYTHONPATH"]} if environment.get("PYTHONPATH") else {}


def _options(scheduler: Scheduler) -> list[str]:
    """Returns ssh's options: ours where the site does not say otherwise."""
    bare = {True: "yes", False: "no"}
    own = {
        name: bare[value] if isinstance(value, bool) else value for name, value in scheduler.options.items()
    }
    last = {"ConnectTimeout": str(max(1, math.ceil(scheduler.command_timeout_s / 2)))}
    # a master connection that stays would keep our pipes open
    settings = {"BatchMode": "yes", "ControlMaster": "no"} | last | own
    words = ["-T", *(["-l", scheduler.user] if scheduler.user else [])]
    words += ["-p", str(scheduler.port)] if scheduler.port else []
    return [*words, *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
