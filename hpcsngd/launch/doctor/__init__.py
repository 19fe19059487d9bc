"""``hpcsngd doctor``: looks at this machine, and at a site as seen from it, before anybody waits in a queue.

Each room of checks is a pure function of a `Machine`, which tests replace. A check never raises for what it
finds; it says ok, warning or broken, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpcsngd.config.site import Site
from hpcsngd.launch.doctor import hardware, scheduler, software, storage
from hpcsngd.launch.doctor.finding import Finding
from hpcsngd.launch.doctor.machine import Machine
from hpcsngd.launch.doctor.variables import expanded


@dataclass(frozen=True)
class Report:
    """What `examine` found, in the order in which it looked."""

    findings: tuple[Finding, ...]

    @property
    def is_broken(self) -> bool:
        """Returns whether anything is broken."""
        return any(finding.verdict == "broken" for finding in self.findings)


def examine(site_name: str | None, site: Site | None, machine: Machine, env: Mapping[str, str]) -> Report:
    """Returns the findings about this machine and, if one is named, a site.

    Args:
        site_name: the site's name; None to look at the machine alone.
        site: its file's content with ``${NAME}`` unexpanded; None with ``site_name``.
        machine: this machine.
        env: the environment that ``${NAME}`` is expanded from.
    """
    unset: list[Finding] = []
    if site is not None:
        site, unset = expanded(site, env)
    return Report(
        (
            *unset,
            *software.check(site, machine),
            *scheduler.check(site_name, site, machine),
            *hardware.check(site, machine),
            *storage.check(site, machine),
        )
    )
