"""Which code this is: version and a digest of the files that workers run.

An image is built on one day and the host's hpcsngd changes on the next. The version alone would not tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hpcsngd import __version__

_PACKAGE = Path(__file__).resolve().parent
# the host's side, which never runs in an image, and data
_NOT_WORKERS = frozenset({"cli", "launch", "_data", "__pycache__"})
DIGITS = 12


def identity(package: Path = _PACKAGE) -> str:
    """Returns version and digest of the code that workers run, such as ``0.1.0+3f2a9c01b7de``."""
    return f"{__version__}+{digest(package)}"


def digest(package: Path = _PACKAGE) -> str:
    """Returns a digest of the package's modules that workers may import: 12 hexadecimal digits."""
    total = hashlib.sha256()
    for file in worker_files(package):
        content = file.read_bytes()
        total.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:DIGITS]


def worker_files(package: Path = _PACKAGE) -> Iterator[Path]:
    """Yields the package's modules that workers may import, in a fixed order."""
    for file in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        if not _NOT_WORKERS.intersection(file.relative_to(package).parts):
            yield file
