"""Python and the packages: ours, and those of the Python that workers will run with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

from hpcsngd import __version__
from hpcsngd.config.site import Site
from hpcsngd.launch import commands, container
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine

OLDEST_PYTHON = (3, 10)
IMPORT_TIMEOUT_S = 180.0
"""torch takes a second from a warm disk and minutes from a cold parallel file system."""

# Asked in a process of its own: this one must not import torch, and the worker's Python may be another.
# The last line counts; what preload lines print stands above it.
_QUESTION = """
import json, sys
answer = {"python": sys.version.split()[0]}
try:
    import hpcsngd
    answer["hpcsngd"] = hpcsngd.__version__
except Exception as error:
    answer["hpcsngd_error"] = f"{type(error).__name__}: {error}"
try:
    import torch
    import torch.distributed as dist
    answer |= {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    answer["gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    answer["backends"] = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]
except Exception as error:
    answer["torch_error"] = f"{type(error).__name__}: {error}"
try:
    from hpcsngd.train import vision
    answer["torchvision"] = vision.load().__version__
except Exception as error:
    answer["torchvision_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(answer))
"""


def check(site: Site | None, machine: Machine) -> Iterator[Finding]:
    """Yields what is found about Python, our packages, torch and torchvision, and the container runtime."""
    yield _python(machine)
    yield _packages()
    yield from _workers(site, machine)
    yield from _runtime(site, machine)


def _python(machine: Machine) -> Finding:
    version = ".".join(map(str, machine.python_version))
    if machine.python_version < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        return broken("python", f"{version} ({machine.python})", f"hpcsngd needs Python {needed} or later")
    return ok("python", f"{version} ({machine.python}), {machine.architecture}")


def _packages() -> Finding:
    versions = ", ".join(filter(None, map(_version, ("submitit", "pydantic", "PyYAML", "click"))))
    missing = [name for name in ("pandas", "plotly", "jinja2") if util.find_spec(name) is None]
    if missing:
        advice = "reports need it: pip install 'hpcsngd[analysis]', here or where you write reports"
        return warning("packages", f"hpcsngd {__version__}, {versions}; without {', '.join(missing)}", advice)
    return ok("packages", f"hpcsngd {__version__}, {versions}, reports available")


def _version(package: str) -> str:
    """Returns name and version; an empty text where it is missing, as submitit is in images."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def _workers(site: Site | None, machine: Machine) -> Iterator[Finding]:
    """Asks the Python that workers run with; a preload line may only work on the nodes."""
    if site and site.container:
        yield ok("torch", "comes from the image")
        return
    python = (site and site.launch.python) or machine.python
    preload = site.preload if site else []
    words = ["bash", "-c", commands.shell_text(preload), "hpcsngd", python, "-c", _QUESTION]
    answer = machine.run(words, IMPORT_TIMEOUT_S)
    is_here = site is None or site.scheduler.kind == "local"
    facts = _last_json(answer.text) if answer.status == 0 else None
    if facts is None:
        said = answer.text.strip().splitlines()
        text = f"cannot ask {python}: {said[-1] if said else 'no output'}"
        advice = "check preload and launch.python of the site; they may work on the nodes alone"
        yield (broken if is_here else warning)("torch", text, advice)
        return
    yield from _torch(facts, python, has_site=site is not None, is_here=is_here)


def _torch(facts: dict[str, Any], python: str, *, has_site: bool, is_here: bool) -> Iterator[Finding]:
    where = "" if is_here else " (asked on this machine; the nodes may differ)"
    install = f"install it for {python}: pip install 'hpcsngd[train]'"
    # a login node may lack torch; a local site, or a Python that a site names, may not
    bad = broken if has_site else warning
    if "torch" not in facts:
        yield bad("torch", f"{facts['torch_error']}{where}", install)
        return
    if "hpcsngd" not in facts:
        yield broken("hpcsngd", f"{facts['hpcsngd_error']} in {python}{where}", install)
    elif facts["hpcsngd"] != __version__:
        text = f"workers have {facts['hpcsngd']}, you submit with {__version__}{where}"
        yield broken("hpcsngd", text, f"bring {python} to the same version")
    built = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    yield ok("torch", f"{facts['torch']} for {built}, {'/'.join(facts['backends'])}{where}")
    if "torchvision" in facts:
        yield ok("torchvision", f"{facts['torchvision']}{where}")
    else:
        yield warning("torchvision", f"{facts['torchvision_error']}{where}", "models torchvision/* need it")


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _runtime(site: Site | None, machine: Machine) -> Iterator[Finding]:
    asked = site.container.runtime if site and site.container else "auto"
    names = container.RUNTIMES if asked == "auto" else (asked,)
    found = next((name for name in names if machine.find(name)), None)
    if found:
        said = machine.run([found, "--version"], 30)
        yield ok("runtime", said.text.strip() or found)
    elif site and site.container:
        text = f"no {' and no '.join(names)} in PATH"
        advice = "load the site's module, or check that the nodes have it: jobs run inside an image"
        yield (broken if site.scheduler.kind == "local" else warning)("runtime", text, advice)
    if site and site.container and site.gpus_per_node and site.container.gpu_flag == "none":
        advice = (
            "set container.gpu_flag to --nv or --rocm, unless the nodes' runtime always brings the driver"
        )
        yield warning(
            "gpus in image", "the site has GPUs, but nothing brings their driver into the image", advice
        )
