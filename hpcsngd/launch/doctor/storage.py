"""Folders: where runs go and where data are."""

from __future__ import annotations

from collections.abc import Iterator

from hpcsngd.config.site import Site
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine

LITTLE_SPACE_GB = 5.0


def check(site: Site | None, machine: Machine) -> Iterator[Finding]:
    """Yields what is found about the run root, the data root and the image of a site."""
    if site is None:
        return
    yield _run_root(site.run_root, machine)
    if site.data_root and "${" not in site.data_root:
        is_unseen = site.data_root_on == "nodes" and site.scheduler.kind != "local"
        yield _unseen(site.data_root) if is_unseen else _data_root(site.data_root, machine)
    if site.container:
        yield _image(site.container.image, machine)


def _run_root(folder: str, machine: Machine) -> Finding:
    if "${" in folder:
        return warning("run root", f"{folder} is not known", "set its variable")
    if not machine.is_writable(folder):
        return broken("run root", f"{folder} cannot be written", "choose another: run_root, or --run-root")
    free = machine.free_gb(folder)
    if free < LITTLE_SPACE_GB:
        text = f"{folder}: {free:.1f} GB free"
        return warning("run root", text, "checkpoints of a large model need more; clean up or move")
    return ok("run root", f"{folder}: writable, {free:.0f} GB free")


def _unseen(folder: str) -> Finding:
    return ok("data root", f"{folder}: on the nodes (data_root_on), so it cannot be looked at from here")


def _data_root(folder: str, machine: Machine) -> Finding:
    if not machine.exists(folder):
        text = f"{folder} does not exist here"
        return warning(
            "data root", text, "data sets that need files will be refused; set data_root or make it"
        )
    return ok("data root", folder)


def _image(path: str, machine: Machine) -> Finding:
    if "${" in path or machine.exists(path):
        return ok("image", path)
    return broken("image", f"no image at {path}", "build it, or correct container.image of the site")
