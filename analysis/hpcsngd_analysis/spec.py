"""What a report should show, as a YAML file: one for each family of figures of the papers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hpcsngd.errors import HpcsngdError, did_you_mean
from hpcsngd.rundir import read_yaml
from hpcsngd_analysis import sections
from hpcsngd_analysis.sections.context import Options


@dataclass(frozen=True)
class Spec:
    """One file in ``analysis/reports``; every key is optional but the title.

    Attributes:
        title: of the page.
        description: what it shows, a paragraph.
        reference: paper and figure that it stands for.
        sections: ids of `sections.BUILDERS`, in the order wanted; default: all.
        target: test accuracy whose time counts, a share.
        baseline: experiment or group to compare with.
        group_by: keys of the configuration that make groups.
    """

    title: str
    description: str = ""
    reference: str = ""
    sections: tuple[str, ...] = ()
    target: float | None = None
    baseline: str = ""
    group_by: tuple[str, ...] = ()

    def options(self) -> Options:
        """Returns the options of a report."""
        reference = f"After {self.reference}." if self.reference else ""
        return Options(
            target=self.target,
            baseline=self.baseline,
            group_by=self.group_by,
            sections=self.sections,
            title=self.title,
            description=" ".join(filter(None, (self.description.strip(), reference))),
        )


def options(path: Path | None = None, *, target: float | None = None, baseline: str = "") -> Options:
    """Returns the options of a report; what is given by hand goes before the file's.

    Args:
        path: of the spec; None: everything.
        target: test accuracy, a share.
        baseline: experiment or group.

    Raises:
        HpcsngdError: the spec cannot be understood, or the target is no share.
    """
    found = read(path).options() if path else Options()
    if target is not None:
        found = replace(found, target=checked_target(target, "--target"))
    return replace(found, baseline=baseline) if baseline else found


def read(path: Path) -> Spec:
    """Returns the spec in a file.

    Raises:
        HpcsngdError: unreadable, an unknown key or section, or a value of the wrong kind; names file and key.
    """
    data = read_yaml(path)
    known = [each.name for each in fields(Spec)]
    for key in data:
        if key not in known:
            raise HpcsngdError(
                f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}; allowed: {', '.join(known)}"
            )
    if "title" not in data:
        raise HpcsngdError(f"{path}: title is missing")
    spec = Spec(**{key: _value(path, key, value) for key, value in data.items()})
    ids = [builder.id for builder in sections.BUILDERS]
    for name in spec.sections:
        if name not in ids:
            raise HpcsngdError(
                f"{path}: unknown section {name!r}{did_you_mean(name, ids)}; allowed: {', '.join(ids)}"
            )
    return spec


def _value(path: Path, key: str, value: Any) -> Any:
    if key in ("sections", "group_by"):
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise HpcsngdError(f"{path}: {key} should be a list of names, is {value!r}")
        return tuple(value)
    if key == "target":
        return checked_target(value, f"{path}: target")
    if not isinstance(value, str):
        raise HpcsngdError(f"{path}: {key} should be text, is {value!r}")
    return value


def checked_target(value: Any, name: str) -> float:
    """Returns a target accuracy.

    Raises:
        HpcsngdError: it is no share between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise HpcsngdError(f"{name} should be a share above 0 and up to 1, such as 0.92; is {value!r}")
    return float(value)
