"""hpcsngd's own code for an image: a wheel made from the running package, without build tools or network.

It has the package and its data files, not the report: what workers need. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from hpcsngd import __version__
from hpcsngd.resources import Kind, resource_dir

WHEEL_NAME = f"hpcsngd-{__version__}-py3-none-any.whl"
_PACKAGE = Path(__file__).resolve().parents[2]
_INFO = f"hpcsngd-{__version__}.dist-info"
_METADATA = f"Metadata-Version: 2.1\nName: hpcsngd\nVersion: {__version__}\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: hpcsngd\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that an archive can hold


def write_wheel(folder: Path) -> Path:
    """Writes the wheel into a folder and returns its path."""
    content = {name: file.read_bytes() for name, file in _files()}
    content |= {f"{_INFO}/METADATA": _METADATA.encode(), f"{_INFO}/WHEEL": _WHEEL.encode()}
    record = f"{_INFO}/RECORD"
    rows = [f"{name},sha256={_hash(data)},{len(data)}" for name, data in content.items()]
    content[record] = "\n".join([*rows, f"{record},,", ""]).encode()
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def _files() -> Iterator[tuple[str, Path]]:
    """Yields name in the wheel and file: the package, then the folders that ship with it."""
    for file in sorted([*_PACKAGE.rglob("*.py"), _PACKAGE / "py.typed"]):
        if "_data" not in file.relative_to(_PACKAGE).parts:
            yield f"hpcsngd/{file.relative_to(_PACKAGE).as_posix()}", file
    for kind in get_args(Kind):
        folder = resource_dir(kind)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            yield f"hpcsngd/_data/{kind}/{file.relative_to(folder).as_posix()}", file


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
