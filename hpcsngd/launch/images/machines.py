"""Names of processor architectures: the kernel's, Debian's and Go's (containers), and SIF's codes."""

from __future__ import annotations

from dataclasses import dataclass

from hpcsngd.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Machine:
    """One architecture under its several names.

    Attributes:
        kernel: as ``uname -m`` and our site files have it.
        debian: Debian's name.
        go: the name in container registries and Apptainer's messages.
        sif: the code in the header of a SIF file (sylabs/sif, ``pkg/sif/arch.go``).
    """

    kernel: str
    debian: str
    go: str
    sif: str


MACHINES = (
    Machine("x86_64", "amd64", "amd64", "02"),
    Machine("aarch64", "arm64", "arm64", "04"),
    Machine("ppc64le", "ppc64el", "ppc64le", "06"),
)
# known to SIF, of no use to us; named so that a message can say what an image is
_OTHER_SIF_CODES = {"01": "i386", "03": "arm", "05": "ppc64", "07": "mips", "11": "s390x", "12": "riscv64"}
BY_SIF_CODE = {machine.sif: machine.kernel for machine in MACHINES} | _OTHER_SIF_CODES


def find(name: str) -> Machine:
    """Returns the architecture with a kernel's, Debian's or Go's name.

    Raises:
        ConfigError: none has it.
    """
    for machine in MACHINES:
        if name.lower() in (machine.kernel, machine.debian, machine.go):
            return machine
    known = [machine.kernel for machine in MACHINES]
    raise ConfigError(
        f"unknown architecture {name!r}{did_you_mean(name, known) or '.'} Known: {', '.join(known)}"
    )
