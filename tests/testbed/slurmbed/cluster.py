"""Up, down and status: the order in which the parts of a cluster start and stop."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from . import claims, config, network, packages, services
from .config import Site
from .errors import TestbedError
from .layout import LOGIN_CONF, PROGRAM_PATH, Layout, Shape, login_name
from .processes import Daemon


@dataclass(frozen=True)
class Facts:
    """A cluster that is up: its shape, and ``netns`` or ``loopback``."""

    shape: Shape
    network: str


def read_facts(layout: Layout) -> Facts | None:
    """Returns what ``up`` wrote when it was done, or None."""
    try:
        data = json.loads(layout.facts.read_text())
    except (FileNotFoundError, ValueError):  # not up, or killed while writing
        return None
    return Facts(Shape(**data["shape"]), data["network"])


def daemons(layout: Layout, node_names: tuple[str, ...]) -> list[Daemon]:
    """Returns all daemons of a cluster in starting order."""
    names = (*services.SERVICES, *(f"slurmd.{name}" for name in node_names))
    return [services.daemon(layout, name) for name in names]


def running(layout: Layout) -> Facts | None:
    """Returns the facts of the cluster if all of it is up, else None."""
    facts = read_facts(layout)
    if facts is None or any(daemon.pid() is None for daemon in daemons(layout, facts.shape.node_names)):
        return None
    return facts if services.controller_answers(layout) else None


def up(layout: Layout, wanted: Mapping[str, int]) -> tuple[Facts, bool]:
    """Starts a cluster unless it is up; whatever a killed ``up`` or a crash left behind is cleared first.

    Args:
        layout: Where, and with which addresses.
        wanted: The parts of the shape that were asked for; the others have their defaults.

    Returns:
        The cluster's facts, and whether it was started now.

    Raises:
        TestbedError: If it is up in another shape, another state directory's is up, or a part does not start.
        NoSlurmHereError: If this machine cannot have a Slurm.
    """
    shape = Shape(**wanted)
    packages.require_root()
    with claims.exclusive():
        facts = running(layout)
        if facts is not None:
            _check_shape(facts.shape, wanted)
            return facts, False
        packages.ensure_installed()
        _clear_other_owner(layout)
        take_down(layout)
        claims.set_owner(layout.root)
        try:
            return _start(layout, shape), True
        except BaseException:  # an interrupt too: half a cluster helps nobody; the logs stay
            take_down(layout)
            raise


def down(layout: Layout, *, force: bool = False) -> bool:
    """Cancels all jobs and stops the cluster; returns whether there was anything to stop.

    Args:
        layout: Which cluster.
        force: Stop it although test sessions use it.

    Raises:
        TestbedError: If test sessions use it, without ``force``.
    """
    packages.require_root()
    with claims.exclusive():
        if not force and claims.owner() == layout.root and claims.in_use():
            raise TestbedError(
                "test sessions are using the cluster; wait for their end, or say 'down --force'"
            )
        return take_down(layout)


def take_down(layout: Layout) -> bool:
    """Ends jobs, daemons, network and names, whole cluster or remains; returns whether there was anything."""
    if services.controller_answers(layout):
        services.cancel_all_jobs(layout)
    layout.facts.unlink(missing_ok=True)
    names = {path.stem for path in layout.run.glob("*.pid")}
    ordered = [
        *sorted(names.difference(services.SERVICES)),
        *(name for name in reversed(services.SERVICES) if name in names),
    ]
    stopped = [services.daemon(layout, name).stop() for name in ordered]
    if claims.owner() in (None, layout.root):  # names and namespaces are per machine: perhaps not ours
        found = network.remove() if shutil.which("ip", path=PROGRAM_PATH) else False
        network.withdraw_names()
        stopped.append(found)
        claims.set_owner(None)
    if _is_our_link(layout):
        LOGIN_CONF.unlink()
    return any(stopped)


def _check_shape(shape: Shape, wanted: Mapping[str, int]) -> None:
    if any(getattr(shape, name) != value for name, value in wanted.items()):
        raise TestbedError(f"already up with {shape}; run 'down' first: its jobs would be lost")


def _clear_other_owner(layout: Layout) -> None:
    other = claims.owner()
    if other is None or other == layout.root:
        return
    remains = Layout(other, layout.net)
    if running(remains):
        raise TestbedError(
            f"the testbed of {other} is up; stop it first: HPCSNGD_TESTBED_DIR={other} ... down"
        )
    take_down(remains)


def _start(layout: Layout, shape: Shape) -> Facts:
    _make_state_dir(layout, shape)
    network.check_free(layout)
    refused = network.create(layout, shape)
    if refused:
        network.remove()
        print(f"hpcsngd testbed: nodes share this machine's loopback, because of {refused}", file=sys.stderr)
    site = Site(layout, shape, login_name(), "loopback" if refused else "netns")
    _write_files(site)
    network.publish_names(site)
    services.start_services(site)
    services.start_nodes(site)
    if not LOGIN_CONF.exists() and not LOGIN_CONF.is_symlink():
        LOGIN_CONF.symlink_to(layout.slurm_conf)
    facts = Facts(shape, site.network)
    layout.facts.write_text(json.dumps(asdict(facts)) + "\n")
    return facts


def _make_state_dir(layout: Layout, shape: Shape) -> None:
    root = layout.root
    if root.exists() or root.is_symlink():
        # The default lies in /tmp, where anybody may have put something under this name.
        if (
            root.is_symlink()
            or root.stat().st_uid != 0
            or not (layout.seal.exists() or not any(root.iterdir()))
        ):
            raise TestbedError(
                f"{root} holds something else; remove it or choose another HPCSNGD_TESTBED_DIR"
            )
        shutil.rmtree(root)
    spools = [root / "spool" / name for name in shape.node_names]
    for directory in (layout.etc, layout.run, layout.log, root / "state", root / "dev", *spools):
        directory.mkdir(parents=True)
    layout.database.mkdir(mode=0o700)
    layout.seal.touch()
    LOGIN_CONF.parent.mkdir(parents=True, exist_ok=True)  # where the nodes mount our configuration


def _write_files(site: Site) -> None:
    layout = site.layout
    # Slurm's job ids end at 67 million. Ten a second: more than a cluster before this one can have used up.
    first_job_id = int(10 * time.time()) % 60_000_000 + 1
    layout.slurm_conf.write_text(config.slurm_conf(site, first_job_id))
    (layout.etc / "cgroup.conf").write_text(config.CGROUP_CONF)
    (layout.etc / "gres.conf").write_text(config.gres_conf(layout, site.shape.gpus))
    for index in range(site.shape.gpus):
        (layout.root / "dev" / f"gpu{index}").symlink_to("/dev/null")
    layout.hosts.write_text(config.node_hosts(site))
    private = {layout.etc / "slurmdbd.conf": config.slurmdbd_conf(site).encode()}
    private[layout.root / "etc" / "munge.key"] = os.urandom(128)
    for path, content in private.items():
        path.touch(mode=0o600)
        path.write_bytes(content)


def _is_our_link(layout: Layout) -> bool:
    return LOGIN_CONF.is_symlink() and LOGIN_CONF.readlink() == layout.slurm_conf


def needs_slurm_conf(layout: Layout) -> bool:
    """Returns True if the login node's clients find another cluster unless ``SLURM_CONF`` is set."""
    return not _is_our_link(layout)
