"""An image against what would run it: the site's architecture, and the hpcsngd that submits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hpcsngd import fingerprint
from hpcsngd.launch.images.definition import PREFIX
from hpcsngd.launch.images.sif import Sif

BUILT_FOR_BINDS = "bind"
"""The label ``code`` of an image that brings no hpcsngd of its own."""


def problems(image: Sif, *, arch: str, code: str, site: str) -> list[str]:
    """Returns why an image would not work, one sentence each with the remedy; empty if nothing is known.

    Args:
        image: the image.
        arch: architecture of the nodes; ``any`` is not compared.
        code: the site's ``container.code``.
        site: the site's name, for the remedy.
    """
    rebuild = f"build it again: hpcsngd container build --site {site} --force"
    found = []
    if arch not in ("any", image.arch):
        found.append(wrong_arch(image.arch, arch, site))
    if image.header_arch != image.arch:
        found.append(
            f"its header says {image.header_arch}, but its system is {image.arch}: "
            f"it was not made by a plain build; {rebuild}"
        )
    if image.is_encrypted:
        found.append("it is encrypted, and workers have no key: build it without --encrypt")
    if image.is_oci:
        found.append("it is an OCI-SIF, which exec takes only with --oci: pull or build it without --oci")
    if words := code_problem(image.labels or {}, code=code):
        found.append(f"{words}; {rebuild}")
    return found


def wrong_arch(found: str, nodes: str, site: str) -> str:
    """Returns the sentence about an image of another architecture."""
    return (
        f"the image is built for {found}, the nodes are {nodes} (it would end with 'Exec format error'); "
        f"build one for {nodes}, on such a machine or one with qemu: "
        f"hpcsngd container build --site {site} --force"
    )


def code_problem(labels: Mapping[str, str], *, code: str) -> str | None:
    """Returns why the hpcsngd in an image is not the one that submits; None if nothing is known."""
    inside = labels.get(PREFIX + "code")
    if code != "image" or inside is None:
        return None
    if inside == BUILT_FOR_BINDS:
        return "the image brings no hpcsngd (it was built with code: bind): set container.code: bind"
    if inside == fingerprint.identity():
        return None
    return (
        f"the image has hpcsngd {inside}, this is {fingerprint.identity()}: set container.code: bind to run "
        "this one in it"
    )


def to_record(image: Sif) -> dict[str, Any]:
    """Returns plain data for JSON, without the definition's text."""
    record = dataclasses.asdict(image)
    del record["definition"]
    return record | {
        "created": image.created.isoformat(),
        "modified": image.modified.isoformat(),
        "has_definition": image.definition is not None,
    }
