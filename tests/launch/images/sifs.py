"""Small SIF files for tests, written field by field from the format's description."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

ID = bytes(range(16))
CREATED = 1_700_000_000
TABLE = 4096
PARTITION, DEFINITION, SIGNATURE, JSON = 0x4004, 0x4001, 0x4005, 0x4006


def descriptor(kind: int, offset: int, size: int, name: bytes = b"", extra: bytes = b"") -> bytes:
    """Returns one used descriptor."""
    head = struct.pack("<i?IIIqqqqqqq", kind, True, 1, 1, 0, offset, size, size, CREATED, CREATED, 0, 0)
    return head + name.ljust(128, b"\0") + extra.ljust(384, b"\0")


def partition(arch: bytes, *, filesystem: int = 1) -> bytes:
    """Returns what describes a primary system partition."""
    return struct.pack("<ii3s", filesystem, 2, arch)


def write(
    path: Path,
    *,
    arch: bytes = b"02",
    header_arch: bytes | None = None,
    labels: dict[str, str] | None = None,
    filesystem: int = 1,
    more: tuple[int, ...] = (),
) -> Path:
    """Writes a SIF file: a definition, labels if given, a partition, and empty objects of more kinds."""
    objects: list[tuple[int, bytes, bytes, bytes]] = [(DEFINITION, b"Bootstrap: scratch\n", b"", b"")]
    if labels is not None:
        data: dict[str, Any] = {"data": {"attributes": {"labels": labels}}, "type": "container"}
        objects.append((JSON, json.dumps(data).encode(), b"inspect-metadata.json", b""))
    objects.append((PARTITION, b"hsqs", b"", partition(arch, filesystem=filesystem)))
    objects += [(kind, b"", b"", b"") for kind in more]
    table, body, offset = b"", b"", TABLE + 585 * len(objects)
    for kind, content, name, extra in objects:
        table += descriptor(kind, offset + len(body), len(content), name, extra)
        body += content
    numbers = (CREATED, CREATED + 60, 0, len(objects), TABLE, len(table), offset, len(body))
    head = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0"
    head += (header_arch or arch) + b"\0" + ID + struct.pack("<8q", *numbers)
    path.write_bytes(head.ljust(TABLE, b"\0") + table + body)
    return path
