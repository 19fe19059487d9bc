"""What a SIF file says about itself, read in pure Python: no runtime needed, nothing unpacked.

The file begins with a header of 128 bytes (launch line, magic, version, architecture, id, times, table of
objects); each object has a descriptor of 585 bytes. Format: sylabs/sif, ``pkg/sif`` (``header``,
``rawDescriptor``, ``partition``), version 01. Labels are in an object that builders since 3.6 add
(``inspect-metadata.json``); images of older builders keep them inside the file system, which takes a runtime.
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from hpcsngd.errors import HpcsngdError
from hpcsngd.launch.images.machines import BY_SIF_CODE

_HEADER = struct.Struct("<32s10s3s3s16s8q")
_DESCRIPTOR = struct.Struct("<i?IIIqqqqqqq128s384s")
_PARTITION = struct.Struct("<ii3s")
_MAGIC = b"SIF_MAGIC\0"
_TYPE_DEFINITION, _TYPE_PARTITION, _TYPE_SIGNATURE, _TYPE_JSON = 0x4001, 0x4004, 0x4005, 0x4006
_OCI_TYPES = (0x400A, 0x400B)
_PRIMARY = 2
_ENCRYPTED = 5
_METADATA_NAME = "inspect-metadata.json"
_MAX_OBJECTS = 10_000
_MAX_METADATA_BYTES = 16 * 1024 * 1024


class SifError(HpcsngdError):
    """A file that is not a SIF image, or a damaged one."""


@dataclass(frozen=True)
class Sif:
    """An image file.

    Attributes:
        arch: architecture of the primary partition, or of the header without one, in the kernel's name, or
            ``unknown`` with its code.
        header_arch: architecture in the header.
        id: the image's unique id.
        created: when it was made, in UTC.
        modified: when an object was last added or removed, such as a signature, in UTC.
        size_bytes: the file's size.
        labels: name -> value; None where only a runtime can read them.
        definition: the text that it was built from; None if it holds none.
        signatures: how many objects are signatures; they are counted, not verified.
        is_encrypted: whether the primary partition is.
        is_oci: whether it is an OCI-SIF, which needs SingularityCE 4 and ``--oci``.
    """

    arch: str
    header_arch: str
    id: str
    created: datetime
    modified: datetime
    size_bytes: int
    labels: dict[str, str] | None = None
    definition: str | None = None
    signatures: int = 0
    is_encrypted: bool = False
    is_oci: bool = False


@dataclass(frozen=True)
class _Object:
    """One used descriptor."""

    kind: int
    offset: int
    size: int
    name: str = ""
    extra: bytes = field(default=b"", repr=False)


def read(image: Path) -> Sif:
    """Returns what an image file says about itself.

    Raises:
        SifError: not a SIF file, or one that is cut short.
        OSError: it cannot be opened.
    """
    with image.open("rb") as file:
        size = image.stat().st_size
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[32:42] != _MAGIC:
            raise SifError(f"{image} is not a SIF image{_looks_like(image, head)}")
        _, _, _, code, identity, created, modified, _, total, table, _, _, _ = _HEADER.unpack(head)
        objects = _objects(file, image, table, total, size)
        partition = next((each for each in objects if _is_primary(each)), None)
        header_arch = _arch(code)
        kinds = [each.kind for each in objects]
        return Sif(
            arch=_arch(_PARTITION.unpack_from(partition.extra)[2]) if partition else header_arch,
            header_arch=header_arch,
            id=str(uuid.UUID(bytes=identity)),
            created=datetime.fromtimestamp(created, timezone.utc),
            modified=datetime.fromtimestamp(modified, timezone.utc),
            size_bytes=size,
            labels=_labels(file, objects),
            definition=_definition(file, objects),
            signatures=kinds.count(_TYPE_SIGNATURE),
            is_encrypted=bool(partition and _PARTITION.unpack_from(partition.extra)[0] == _ENCRYPTED),
            is_oci=any(kind in kinds for kind in _OCI_TYPES),
        )


def _objects(file: BinaryIO, image: Path, table: int, total: int, size: int) -> list[_Object]:
    if not (0 <= total <= _MAX_OBJECTS and 0 < table <= size):
        raise SifError(f"{image}: damaged header ({total} objects at byte {table} of {size})")
    file.seek(table)
    data = file.read(total * _DESCRIPTOR.size)
    if len(data) < total * _DESCRIPTOR.size:
        raise SifError(f"{image}: cut short, its table of objects ends at byte {size}")
    found = []
    for row in _DESCRIPTOR.iter_unpack(data):
        kind, is_used, offset, length, name, extra = row[0], row[1], row[5], row[6], row[12], row[13]
        if not is_used:
            continue
        if offset < 0 or length < 0 or offset + length > size:
            raise SifError(
                f"{image}: cut short, an object ends at byte {offset + length} of {size}; copy it again"
            )
        found.append(_Object(kind, offset, length, name.rstrip(b"\0").decode(errors="replace"), extra))
    return found


def _is_primary(each: _Object) -> bool:
    return each.kind == _TYPE_PARTITION and _PARTITION.unpack_from(each.extra)[1] == _PRIMARY


def _arch(code: bytes) -> str:
    text = code.rstrip(b"\0").decode(errors="replace")
    return BY_SIF_CODE.get(text, f"unknown ({text})")


def _content(file: BinaryIO, each: _Object) -> bytes:
    file.seek(each.offset)
    return file.read(min(each.size, _MAX_METADATA_BYTES))


def _labels(file: BinaryIO, objects: list[_Object]) -> dict[str, str] | None:
    for each in objects:
        if each.kind == _TYPE_JSON and each.name == _METADATA_NAME:
            try:
                data: Any = json.loads(_content(file, each))
                found = data["data"]["attributes"].get("labels") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                return None
            return {str(name): str(value) for name, value in found.items()}
    return None


def _definition(file: BinaryIO, objects: list[_Object]) -> str | None:
    for each in objects:
        if each.kind == _TYPE_DEFINITION:
            return _content(file, each).decode(errors="replace")
    return None


def _looks_like(image: Path, head: bytes) -> str:
    """Returns a guess at what else it is, with the way from there to a SIF."""
    if head[:4] == b"hsqs":
        return ": it is a bare squashfs, as Singularity 2 made them; build it again"
    if head[:2] == b"\x1f\x8b" or image.suffix in (".tar", ".tgz"):
        return f": it looks like an archive; build from it: Bootstrap: docker-archive, From: {image.name}"
    return " (no SIF_MAGIC at byte 32); was it copied completely?"
