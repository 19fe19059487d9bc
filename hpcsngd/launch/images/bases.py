"""The bases that images can be built on: a template in ``containers/`` each, and the versions that it pins.

Plain templates rather than a generator library: see ``containers/README.md`` for why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError
from hpcsngd.launch.images.machines import Machine, find


@dataclass(frozen=True)
class Base:
    """One base.

    Attributes:
        template: its file in ``containers/``, without suffix.
        about: what it is, for people.
        arches: the architectures it can be built for, in the kernel's names.
        pins: placeholder -> version; a person may set others.
        parent: the image it starts from; None where it has none, empty where the user must name one.
    """

    template: str
    about: str
    arches: tuple[str, ...]
    pins: dict[str, str] = field(default_factory=dict)
    parent: str | None = None


_EVERY_ARCH = ("x86_64", "aarch64", "ppc64le")

BASES = {
    "debian": Base(
        "debian",
        "CPU; torch from Debian; no registry needed",
        _EVERY_ARCH,
        {
            "SUITE": "trixie",
            "TORCH": "2.6.0",
            "TORCHVISION": "0.21.0",
            "SKLEARN": "1.4.2",
            "PYDANTIC": "2.10.6",
        },
    ),
    "cuda": Base(
        "cuda",
        "NVIDIA GPUs; NVIDIA's PyTorch image",
        ("x86_64", "aarch64"),
        {"PYDANTIC": "2.10.6"},
        parent="nvcr.io/nvidia/pytorch:25.01-py3",
    ),
    "cuda-ppc64le": Base(
        "cuda-ppc64le",
        "NVIDIA GPUs on POWER9; Open-CE's conda packages",
        ("ppc64le",),
        {
            "SUITE": "bookworm",
            "MINIFORGE": "24.3.0-0",
            "CHANNEL": "rocketce",
            "CUDA": "12.2",
            "PYTHON": "3.11",
            "TORCH": "2.1.2",
            "TORCHVISION": "0.16.2",
            "PYDANTIC": "2.10.6",
        },
    ),
    "rocm": Base(
        "rocm",
        "AMD GPUs; AMD's PyTorch image",
        ("x86_64",),
        {"PYDANTIC": "2.10.6"},
        parent="rocm/pytorch:rocm6.4_ubuntu24.04_py3.12_pytorch_release_2.6.0",
    ),
    "local": Base(
        "local",
        "an image of yours that has torch",
        _EVERY_ARCH,
        parent="",
    ),
}


def for_site(site_name: str, site: Site) -> str:
    """Returns the base that a site's own words call for.

    Raises:
        ConfigError: the site has GPUs, but does not say of which make.
    """
    build = site.container.build if site.container else None
    if build and build.base:
        return build.base
    flag = site.container.gpu_flag if site.container else "none"
    if flag == "--rocm":
        return "rocm"
    if not site.gpus_per_node:
        return "debian"
    if site.arch == "ppc64le":
        return "cuda-ppc64le"
    if flag == "--nv" or site.arch == "aarch64":
        return "cuda"
    raise ConfigError(
        f"site {site_name} has GPUs but does not say of which make: choose with --base cuda or --base rocm, "
        "or set container.build.base in the site file"
    )


def check_arch(base: str, machine: Machine) -> None:
    """Raises ConfigError unless a base can be built for an architecture."""
    if machine.kernel not in BASES[base].arches:
        able = [name for name, entry in BASES.items() if machine.kernel in entry.arches]
        raise ConfigError(
            f"base {base} is for {', '.join(BASES[base].arches)}, not for {machine.kernel}; "
            f"for {machine.kernel} there are: {', '.join(able)}"
        )


def arch_of(site: Site, own: str) -> Machine:
    """Returns the architecture of a site's nodes; ``any`` is that of this machine."""
    return find(own if site.arch == "any" else site.arch)
