"""Copies of data sets on each node's own disk: made by one process per node, verified, and used by all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import IO

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import locks
from hpcsngd.train.faults import MissingDataError, SettingError

_CHUNK = 16 * 2**20
MARKER = ".hpcsngd-staged"
LOCK = ".hpcsngd-stage.lock"


def stage(how: schema.Stage, name: str, root: Path | None) -> Path:
    """Returns the node's own data root, with the data set in it.

    The first process of a node to come here copies, the others wait at a lock. Files are written to a folder
    of another name, read again and compared with what was read from the source, then the folder is renamed;
    so what has its name is whole. A copy of the same source is used again, one of another source replaced.

    Args:
        how: the experiment's ``data.stage``.
        name: of the data set.
        root: the data root that is copied from.

    Raises:
        SettingError: the folder's name holds a variable that this node does not set.
        MissingDataError: no source, or the copy failed or differs; the message says what.
    """
    target = Path(os.path.expandvars(how.to)).expanduser()
    if unset := re.findall(r"\$\{?\w+\}?", str(target)):
        raise SettingError(f"data.stage.to: this node does not set {', '.join(unset)}")
    source, folder = _source(how, name, root)
    place = target / folder
    identity = _identity(source)
    try:
        with locks.exclusive(target / LOCK):
            if not _is_staged(target, folder, identity):
                _copy(source, place)
                _marker(target, folder).write_text(identity, encoding="utf-8")
    except (OSError, tarfile.TarError) as error:
        raise MissingDataError(f"cannot copy {source} to {place}: {error}") from error
    return target


def _source(how: schema.Stage, name: str, root: Path | None) -> tuple[Path, str]:
    """Returns what is copied, and the name of its folder below the data root."""
    facts = CATALOGUE[name]
    if root is None:
        raise MissingDataError(f"data.stage: no data root to copy {name} from")
    if how.archive is not None:
        archive = root / how.archive
        if not archive.is_file():
            raise MissingDataError(f"data.stage.archive: no file {archive}")
        return archive, facts.folders[0]
    found = next((name for name in facts.folders if (root / name).is_dir()), None)
    if found is None:
        places = " or ".join(str(root / name) for name in facts.folders)
        raise MissingDataError(f"data.stage: nothing to copy at {places}")
    return root / found, found


def _identity(source: Path) -> str:
    """Returns what tells one source from another, without reading it: place, size and time of change."""
    about = source.stat()
    return f"{source.resolve()}\n{about.st_size}\n{about.st_mtime_ns}\n"


def _marker(target: Path, folder: str) -> Path:
    return target / f"{MARKER}-{folder.replace('/', '-')}"


def _is_staged(target: Path, folder: str, identity: str) -> bool:
    marker = _marker(target, folder)
    return (target / folder).is_dir() and marker.exists() and marker.read_text(encoding="utf-8") == identity


def _copy(source: Path, place: Path) -> None:
    """Fills a new folder and gives it its name."""
    unfinished = place.with_name(f".{place.name}.unfinished")
    for old in (unfinished, place):
        if old.exists():
            shutil.rmtree(old)
    unfinished.mkdir(parents=True)
    written = _unpack(source, unfinished) if source.is_file() else _copy_folder(source, unfinished)
    for file, digest in written:
        with file.open("rb") as stream:
            if _digest(stream) != digest:
                raise MissingDataError(f"{file} differs from what was read from {source}")
    inner = [*unfinished.iterdir()]
    # an archive of the folder itself, as data sets come, and an archive of what is in it are both welcome
    is_wrapped = source.is_file() and len(inner) == 1 and inner[0].name == place.name and inner[0].is_dir()
    (inner[0] if is_wrapped else unfinished).rename(place)
    if is_wrapped:
        unfinished.rmdir()


def _copy_folder(source: Path, target: Path) -> list[tuple[Path, bytes]]:
    return [
        (place, _write(file, place))
        for file in sorted(source.rglob("*"))
        if file.is_file()
        for place in (target / file.relative_to(source),)
    ]


def _unpack(archive: Path, target: Path) -> list[tuple[Path, bytes]]:
    written = []
    with tarfile.open(archive) as tar:
        for member in tar:
            place = (target / member.name).resolve()
            if not place.is_relative_to(target.resolve()):
                raise MissingDataError(f"{archive} has a member outside of its folder: {member.name}")
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    written.append((place, _digest(content, out)))
    if not written:
        raise MissingDataError(f"{archive} holds no file")
    return written


def _write(file: Path, place: Path) -> bytes:
    place.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as stream, place.open("wb") as out:
        return _digest(stream, out)


def _digest(stream: IO[bytes], out: IO[bytes] | None = None) -> bytes:
    """Returns the digest of what is left in a stream, which is copied on the way."""
    digest = hashlib.blake2b(digest_size=16)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        if out is not None:
            out.write(chunk)
    return digest.digest()
