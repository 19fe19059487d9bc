"""The doctor's look at LSF: programs, flavor, launcher, queue, and submitit's plugin."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from hpcsngd.config.site import Site
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine
from hpcsngd.launch.lsf import flavors, queues

PROGRAMS = ("bsub", "bjobs", "bkill", "bhist", "brequeue", "bqueues", "lsid")


def check(site_name: str, site: Site, machine: Machine) -> Iterator[Finding]:
    """Yields what is found about the LSF that a site needs."""
    missing = [program for program in PROGRAMS if machine.find(program) is None]
    if missing:
        yield broken("scheduler", f"no {', '.join(missing)} in PATH", "use a login node of the cluster")
        return
    said = machine.run(["lsid"], site.scheduler.command_timeout_s)
    if said.status != 0:
        first = said.text.strip().partition("\n")[0] or "nothing"
        advice = "it may be down, or LSF_ENVDIR may be wrong"
        yield broken("scheduler", f"LSF does not answer: {first}", advice)
        return
    found = flavors.detect(said.text, lambda program: machine.find(program) is not None)
    yield ok("scheduler", said.text.strip().partition("\n")[0])
    yield _plugin()
    yield from _flavor(site_name, site, found, machine)
    yield _queue(site_name, site, machine)


def _plugin() -> Finding:
    names = {point.name for point in entry_points(group="submitit") if point.value.startswith("hpcsngd.")}
    if names >= {"executor", "job_environment"}:
        return ok("plugin", "submitit knows cluster lsf")
    advice = "install hpcsngd again; jobs cannot start without"
    return broken("plugin", "submitit does not know cluster lsf", advice)


def _flavor(site_name: str, site: Site, found: flavors.Flavor, machine: Machine) -> Iterator[Finding]:
    wanted = site.scheduler.flavor
    if wanted not in ("auto", found):
        advice = f"correct it in site_configs/{site_name}.yaml, or set auto"
        yield warning("flavor", f"the site file says {wanted}, lsid and jsrun say {found}", advice)
    else:
        yield ok("flavor", found)
    flavor = found if wanted == "auto" else wanted
    launcher = site.launch.launcher or flavors.default_launcher(flavor, site.nodes)
    if launcher != "none" and machine.find(launcher) is None:
        yield warning("launcher", f"{launcher} is not in PATH here", "it must be where jobs run")


def _queue(site_name: str, site: Site, machine: Machine) -> Finding:
    listed = machine.run(["bqueues"], site.scheduler.command_timeout_s)
    known = queues.parse(listed.text) if listed.status == 0 else {}
    if not known:
        return warning("queue", "bqueues lists none", "queues are not checked before jobs are sent")
    wanted = site.scheduler.queue
    if problem := next(queues.problems(wanted, known), None):
        return broken("queue", problem, f"correct it in site_configs/{site_name}.yaml")
    return ok("queue", wanted or f"the cluster's default; there are {', '.join(sorted(known))}")
