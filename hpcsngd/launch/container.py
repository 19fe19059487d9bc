"""How a command is wrapped to run inside an image, and what an image file says about itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcsngd.config.site import Container

RUNTIMES = ("apptainer", "singularity")
# architecture codes in the header of a SIF file (sylabs/sif, pkg/sif: hdrArch*)
_SIF_ARCH = {b"01": "i386", b"02": "x86_64", b"03": "arm", b"04": "aarch64", b"05": "ppc64", b"06": "ppc64le"}
_SIF_LAUNCH_BYTES = 32
_SIF_MAGIC = b"SIF_MAGIC"


def exec_prefix(container: Container, binds: Sequence[str], installed: str | None) -> tuple[str, ...]:
    """Returns the words that run a command inside the image, up to and without the image itself.

    Args:
        container: the site's container section.
        binds: folders that are always bound, under their own names.
        installed: the runtime found on this machine; used where the site says ``auto``.
    """
    runtime = container.runtime if container.runtime != "auto" else installed or RUNTIMES[0]
    words = [runtime, "exec"]
    if container.gpu_flag != "none":
        words.append(container.gpu_flag)
    for bind in _without_repeats([*binds, *container.binds]):
        words += ["--bind", bind]
    return (*words, *container.args)


def image_arch(image: Path) -> str | None:
    """Returns the architecture in a SIF file's header; None for anything that is not a SIF file."""
    try:
        with image.open("rb") as file:
            header = file.read(48)
    except OSError:
        return None
    magic = header[_SIF_LAUNCH_BYTES : _SIF_LAUNCH_BYTES + len(_SIF_MAGIC)]
    # launch line 32 bytes, magic 10, version 3, then two digits
    return _SIF_ARCH.get(header[45:47]) if magic == _SIF_MAGIC else None


def _without_repeats(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
