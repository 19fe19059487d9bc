"""Definition files: a base's template and the part that every image has, with all values written in.

Apptainer's own ``%arguments`` are not used: Singularity 3.x, which many POWER9 systems have, does not know
them. A placeholder is ``@NAME@``; one without a value is an error, so none can reach a build.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpcsngd import __version__, fingerprint
from hpcsngd.errors import ConfigError, did_you_mean
from hpcsngd.launch import provenance
from hpcsngd.launch.images.bases import BASES, check_arch
from hpcsngd.launch.images.code import WHEEL_NAME
from hpcsngd.launch.images.machines import Machine
from hpcsngd.resources import resource_dir

PREFIX = "org.hpcsngd."
"""Of our labels."""
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_UNSAFE = re.compile(r"[\s'\"\\$`]")


@dataclass(frozen=True)
class Request:
    """What an image should be.

    Attributes:
        base: a key of `BASES`.
        machine: the architecture.
        code: ``image`` puts hpcsngd inside, ``bind`` leaves room for the host's.
        parent: image to start from; None is the base's own.
        pins: versions that replace the base's.
        mirror: Debian mirror; only bases that are made with debootstrap need one.
    """

    base: str
    machine: Machine
    code: Literal["image", "bind"] = "image"
    parent: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    mirror: str | None = None

    def __post_init__(self) -> None:
        """Checks the request.

        Raises:
            ConfigError: an unknown base or pin, an architecture that the base is not for, or a value that
                cannot be written into a definition.
        """
        if self.base not in BASES:
            raise ConfigError(
                f"unknown base {self.base!r}{did_you_mean(self.base, BASES) or '.'} Known: {', '.join(BASES)}"
            )
        check_arch(self.base, self.machine)
        known = BASES[self.base].pins
        for name, value in self.pins.items():
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise ConfigError(
                    f"base {self.base} has no pin {name!r}{did_you_mean(name, known)} Allowed: {allowed}"
                )
            _check_word(f"pin {name}", value)
        if BASES[self.base].parent is None and self.parent:
            raise ConfigError(f"base {self.base} is made from packages and has no parent: drop {self.parent}")
        if BASES[self.base].parent == "" and not self.parent:
            raise ConfigError(f"base {self.base} needs a parent image: --parent, or container.build.parent")


def render(request: Request, *, wheel: str = WHEEL_NAME) -> str:
    """Returns a complete definition file.

    Args:
        request: what the image should be.
        wheel: path of hpcsngd's wheel as the build will see it; unused with ``code: bind``.

    Raises:
        ConfigError: a value is missing or cannot be written into a definition.
    """
    values = _values(request)
    values["LABELS"] = "\n".join(f"    {key} {value}" for key, value in labels(request).items())
    values["HELP"] = "\n".join(f"    {name}: {value}" for name, value in _pinned(request).items())
    folder = resource_dir("containers")
    parts = [_template(folder, BASES[request.base].template)]
    if request.code == "image":
        _check_word("the path of hpcsngd's wheel", wheel)
        parts.append(f"\n%files\n    {wheel} /opt/hpcsngd/code.whl\n")
    parts.append(_template(folder, "every-image"))
    return _title(request) + _fill("".join(parts), values)


def labels(request: Request) -> dict[str, str]:
    """Returns the labels of an image: what it is, what it is made of, and which code it was made by."""
    commit = (provenance.git_state(Path(__file__).resolve().parent) or {}) if request.code == "image" else {}
    facts = {
        "version": __version__,
        "commit": f"{commit['sha'][:12]}{'-dirty' if commit['dirty'] else ''}" if commit else "",
        "code": fingerprint.identity() if request.code == "image" else "bind",
        "base": request.base,
        "arch": request.machine.kernel,
        "parent": _parent(request) or "",
        **{f"pin.{name.lower()}": value for name, value in _pinned(request).items()},
    }
    return {PREFIX + name: value for name, value in facts.items() if value}


def apt_mirror() -> str | None:
    """Returns the mirror that apt on this machine gets Debian's ``main`` from; None without apt or Debian."""
    words = [
        "apt-get",
        "indextargets",
        "--format",
        "$(COMPONENT) $(REPO_URI)",
        "Identifier: Packages",
        "Origin: Debian",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [row.split() for row in done.stdout.splitlines()]
    return next((row[1].rstrip("/") for row in rows if len(row) == 2 and row[0] == "main"), None)


def needs_mirror(base: str) -> bool:
    """Returns whether a base is made with debootstrap."""
    return "@MIRROR@" in _template(resource_dir("containers"), BASES[base].template)


def from_registry(base: str) -> bool:
    """Returns whether a base starts from an image in a registry."""
    return "Bootstrap: docker\n" in _template(resource_dir("containers"), BASES[base].template)


def _values(request: Request) -> dict[str, str]:
    values = {
        "VERSION": __version__,
        "BASE": request.base,
        "ARCH": request.machine.kernel,
        "DEBIAN_ARCH": request.machine.debian,
        **_pinned(request),
    }
    if parent := _parent(request):
        values["PARENT"] = _checked_line("the parent image", parent)
    if needs_mirror(request.base):
        if not request.mirror:
            raise ConfigError(
                "which Debian mirror? apt here names none: give --mirror or container.build.mirror, "
                "such as http://mirror.example.org/debian"
            )
        values["MIRROR"] = _check_word("the mirror", request.mirror)
    return values


def _pinned(request: Request) -> dict[str, str]:
    return {**BASES[request.base].pins, **request.pins}


def _parent(request: Request) -> str | None:
    return request.parent or BASES[request.base].parent


def _template(folder: Path, name: str) -> str:
    return (folder / f"{name}.def").read_text(encoding="utf-8")


def _title(request: Request) -> str:
    code = "" if request.code == "bind" else f"\n# It needs {WHEEL_NAME} where %files says."
    return f"# Written by hpcsngd {__version__}: base {request.base}, {request.machine.kernel}.{code}\n"


def _fill(text: str, values: Mapping[str, str]) -> str:
    lacking = sorted(set(_PLACEHOLDER.findall(text)) - set(values))
    if lacking:
        raise ConfigError(f"the definition has no value for {', '.join(lacking)}")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _check_word(what: str, value: str) -> str:
    """Returns the value if it is safe in a shell and a header alike."""
    if not value or _UNSAFE.search(value):
        raise ConfigError(f"{what} is {value!r}; allowed: one word without quotes, backslash, $ and space")
    return value


def _checked_line(what: str, value: str) -> str:
    """Returns the value if it is safe in a definition's header, where # begins a comment."""
    if not value.strip() or "\n" in value or "#" in value or "{{" in value:
        raise ConfigError(f"{what} is {value!r}; allowed is one line without # and {{{{")
    return value
