"""GPUs, shared memory and the network of this machine, against what the site says where that can be told."""

from __future__ import annotations

from collections.abc import Iterator

from hpcsngd.config.fields import port_range
from hpcsngd.config.site import Site
from hpcsngd.launch import ports
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - torch's data loaders put their batches there
FEW_SHARED_GB = 1.0
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check(site: Site | None, machine: Machine) -> Iterator[Finding]:
    """Yields what is found about GPUs, shared memory, interfaces, the host name and the ports."""
    is_here = site is None or site.scheduler.kind == "local"
    yield _gpus(site, machine, is_here=is_here)
    yield _shared_memory(machine)
    yield _interfaces(site, machine, is_here=is_here)
    yield _host_name(machine)
    if site:
        yield _ports(site)


def _gpus(site: Site | None, machine: Machine, *, is_here: bool) -> Finding:
    found = _gpu_names(machine)
    wanted = site.gpus_per_node if site else 0
    if is_here and wanted > len(found):
        text = f"{len(found)} here, the site says {wanted}"
        return broken("gpus", text, "check the driver (nvidia-smi, rocm-smi), or gpus_per_node of the site")
    if not found:
        return ok(
            "gpus", "none on this machine" + ("" if is_here else "; those of the nodes are not seen here")
        )
    kinds = ", ".join(f"{found.count(name)} x {name}" for name in dict.fromkeys(found))
    return ok("gpus", kinds)


def _gpu_names(machine: Machine) -> list[str]:
    if machine.find("nvidia-smi"):
        answer = machine.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], 60)
        if answer.status == 0:
            return [
                line.strip().replace(", ", ", driver ") for line in answer.text.splitlines() if line.strip()
            ]
    return [f"{gpu['name']}, driver {gpu['driver']}" for gpu in machine.amd_gpus()]


def _shared_memory(machine: Machine) -> Finding:
    if not machine.exists(SHARED_MEMORY):
        return warning("shared memory", f"no {SHARED_MEMORY}", "data.workers must be 0")
    free = machine.free_gb(SHARED_MEMORY)
    if free < FEW_SHARED_GB:
        return warning(
            "shared memory", f"{free:.1f} GB free in {SHARED_MEMORY}", "keep data.workers at 0 here"
        )
    return ok("shared memory", f"{free:.0f} GB free in {SHARED_MEMORY}")


def _interfaces(site: Site | None, machine: Machine, *, is_here: bool) -> Finding:
    found = machine.interfaces()
    shown = (
        ", ".join(f"{name}{'' if is_up else ' (down)'}" for name, is_up in found.items()) or "loopback only"
    )
    for variable in INTERFACE_VARIABLES if site else ():
        # "=hsn0" and "^docker" are NCCL's exact and exclude forms; prefixes may stand for several
        value = (site.env if site else {}).get(variable, "").lstrip("=")
        missing = [
            name
            for name in value.split(",")
            if name and not value.startswith("^") and not any(known.startswith(name) for known in found)
        ]
        if missing:
            text = f"{shown}; the site's {variable} names {', '.join(missing)}"
            if is_here:
                return broken("interfaces", text, f"correct env.{variable} of the site, or leave it out")
            return warning("interfaces", text, "make sure that the nodes have it; this machine has not")
    return ok("interfaces", shown)


def _host_name(machine: Machine) -> Finding:
    address = machine.own_address()
    if address is None:
        return warning(
            "host name", "it stands for no address", "gloo needs one: set GLOO_SOCKET_IFNAME in env"
        )
    if address.startswith("127."):
        advice = "fine for one node; across nodes set GLOO_SOCKET_IFNAME in the site's env"
        return warning("host name", f"it stands for {address}, which other machines cannot reach", advice)
    return ok("host name", f"it stands for {address}")


def _ports(site: Site) -> Finding:
    first, last = port_range(site.master_port)
    low, high = ports.ephemeral_range()
    text = str(first) if first == last else f"{first}-{last}"
    if first >= low and last <= high:
        advice = "any outgoing connection may hold one; a range below it is safer"
        return warning(
            "ports", f"master_port {text} lies in the kernel's ephemeral range {low}-{high}", advice
        )
    return ok("ports", f"master_port {text}; ephemeral ports begin at {low}")
