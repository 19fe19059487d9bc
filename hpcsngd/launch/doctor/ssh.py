"""Hosts that are reached by ssh: whether each answers, with the same hpcsngd, and sees the run root."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hpcsngd import __version__
from hpcsngd.config.site import Site
from hpcsngd.errors import SchedulerError
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine
from hpcsngd.launch.ssh import jobs
from hpcsngd.launch.ssh.words import Ssh


def check(site: Site, machine: Machine) -> Iterator[Finding]:
    """Yields what each host of a site says, one finding per host."""
    scheduler = site.scheduler
    if machine.find("ssh") is None:
        yield broken("scheduler", "no ssh in PATH", "install OpenSSH's client")
        return
    if not scheduler.hosts:
        yield broken("scheduler", "the site names no hosts for ssh", "list them in scheduler.hosts")
        return
    yield ok("scheduler", f"ssh: {len(scheduler.hosts)} host(s), no queue")
    reached = Ssh.of(scheduler, len(scheduler.hosts))
    python = scheduler.python or machine.python
    with machine.mark(site.run_root) as file:
        request = json.dumps({"verb": "facts", "file": file})
        for host in reached.hosts:
            said = machine.run(jobs.command(reached, python, host), scheduler.command_timeout_s, request)
            found = jobs.read(host, said.text, said.text, said.status)
            yield _finding(host, found, site)


def _finding(host: str, found: dict[str, Any] | SchedulerError, site: Site) -> Finding:
    name = f"host {host}"
    if isinstance(found, SchedulerError):
        advice = "try `ssh -o BatchMode=yes` by hand; it needs a key, a known host and hpcsngd over there"
        return broken(name, str(found), advice)
    text = f"Python {found['python']}, hpcsngd {found['hpcsngd']}, {found['machine']}"
    if objection := _objection(found, site):
        return broken(name, f"{text}; {objection[0]}", objection[1])
    if found["sees_file"] is None:
        return warning(name, text, f"whether it sees {site.run_root} is not known: make that folder first")
    return ok(name, f"{text}; sees {site.run_root}")


def _objection(found: dict[str, Any], site: Site) -> tuple[str, str] | None:
    """Returns what speaks against a host, and what to do about it."""
    if found["hpcsngd"] != __version__:
        return f"{__version__} here", "bring both to one version"
    if found["sees_file"] is False:
        advice = "run_root must be on a file system that all hosts share"
        return f"it does not see {site.run_root} of this machine", advice
    if found["machine"] != site.arch != "any":
        return f"the site says {site.arch}", "correct arch of the site"
    if not found["has_torch"] and not (site.container or site.preload or site.launch.python):
        return "without torch", "pip install 'hpcsngd[train]' over there"
    return None
