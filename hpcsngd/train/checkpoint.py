"""Checkpoints that survive a kill at any moment, and damage.

A checkpoint is a folder ``step_<n>`` with ``common.pt`` (what all ranks share, written by rank 0), one
``rank<r>.pt`` per rank (its random streams) and ``manifest.yaml`` with the size and SHA-256 of each. It is
written under a temporary name, flushed to disk and renamed, so a folder called ``step_<n>`` is complete. The
file ``latest`` names the newest for people and programs that look on; loading goes by the folders and their
sums. Files are loaded with ``weights_only=True``: nothing in them can run code.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hpcsngd import dist, rundir
from hpcsngd.errors import RunDirError
from hpcsngd.train.faults import CheckpointError

log = logging.getLogger(__name__)

SCHEMA = 1
LATEST = "latest"
MANIFEST = "manifest.yaml"
COMMON = "common.pt"
_PREFIX = "step_"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds for this rank.

    Attributes:
        step: optimizer steps done when it was written.
        world_size: number of ranks that wrote it.
        common: what all ranks share.
        own: this rank's part; None where another number of ranks wrote it.
    """

    step: int
    world_size: int
    common: dict[str, Any]
    own: dict[str, Any] | None


class _Choice(NamedTuple):
    """The checkpoint to load: its step and number of ranks (0: there is none), or why none can be."""

    step: int = 0
    world_size: int = 0
    problem: str = ""


class Checkpoints:
    """The checkpoints of one run; `save` and `load` are collective.

    Args:
        folder: where they lie.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, step: int, common: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Writes a checkpoint; when it returns on any rank, the checkpoint is complete.

        Args:
            step: optimizer steps done.
            common: shared by all ranks; rank 0's is written.
            own: this rank's part.

        Raises:
            OSError: the file system refused.
        """
        temporary = self._folder / f".{_PREFIX}{step}.tmp"
        if dist.rank() == 0:
            for unfinished in self._folder.glob(f".{_PREFIX}*.tmp"):
                shutil.rmtree(unfinished)
            temporary.mkdir(parents=True)
        dist.barrier()
        written = [_write(temporary / _own_file(dist.rank()), own)]
        if dist.rank() == 0:
            written.append(_write(temporary / COMMON, common))
        gathered = dist.gather_objects(written)
        if gathered is not None:
            files = dict(item for items in gathered for item in items)
            self._publish(temporary, step, files)
        dist.barrier()

    def load(self, device: torch.device) -> Loaded | None:
        """Returns the newest checkpoint whose files are as they were written; None where there never was one.

        Args:
            device: where tensors go.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        found = dist.broadcast_object(self._newest_valid() if dist.rank() == 0 else None)
        if found.problem:
            raise CheckpointError(found.problem)
        if not found.world_size:
            return None
        folder = self._folder / f"{_PREFIX}{found.step}"
        own = None
        if found.world_size == dist.world_size():
            # random streams live on the CPU
            own = _read(folder / _own_file(dist.rank()), torch.device("cpu"))
        return Loaded(found.step, found.world_size, _read(folder / COMMON, device), own)

    def intact(self) -> list[int]:
        """Returns the steps of the checkpoints whose files are as they were written, rising; logs the others.

        Not collective: files are read by the rank that calls.
        """
        found = []
        for folder in reversed(self._by_age()):
            problem, _ = _verify(folder)
            if problem:
                log.warning("checkpoint %s; left out", problem)
            else:
                found.append(_step_of(folder))
        return found

    def common(self, step: int, device: torch.device) -> dict[str, Any]:
        """Returns what all ranks share of the checkpoint of a step; not collective.

        Args:
            step: one of `intact`.
            device: where tensors go.
        """
        return _read(self._folder / f"{_PREFIX}{step}" / COMMON, device)

    def _publish(self, temporary: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        manifest = {"schema": SCHEMA, "step": step, "world_size": dist.world_size(), "files": files}
        rundir.write_yaml(temporary / MANIFEST, manifest)
        _flush_folder(temporary)
        final = self._folder / f"{_PREFIX}{step}"
        # One of this step or a later one was passed over as damaged when the run was resumed.
        for passed_over in [folder for folder in self._by_age() if _step_of(folder) >= step]:
            shutil.rmtree(passed_over)
        temporary.rename(final)
        self._point_to(final)
        _flush_folder(self._folder)
        for folder in self._by_age()[self._keep :]:
            shutil.rmtree(folder)

    def _point_to(self, final: Path) -> None:
        temporary = self._folder / f".{LATEST}.tmp"
        temporary.write_text(final.name + "\n", encoding="utf-8")
        temporary.replace(self._folder / LATEST)

    def _by_age(self) -> list[Path]:
        """Returns the checkpoints, the newest first."""
        folders = [path for path in self._folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
        return sorted(folders, key=_step_of, reverse=True)

    def _newest_valid(self) -> _Choice:
        problems: list[str] = []
        for folder in self._by_age():
            problem, manifest = _verify(folder)
            if not problem:
                for damaged in problems:
                    log.warning("checkpoint %s; resuming from %s instead", damaged, folder.name)
                return _Choice(int(manifest["step"]), int(manifest["world_size"]))
            problems.append(problem)
        if problems:
            what = f"every checkpoint in {self._folder} is damaged ({'; '.join(problems)})"
            return _Choice(problem=f"{what}; remove the folder to start over")
        return _Choice()


def _verify(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns what is wrong with a checkpoint (empty if nothing) and its manifest."""
    try:
        manifest = rundir.read_yaml(folder / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            return f"{folder.name} has schema {manifest.get('schema')!r}, this version knows {SCHEMA}", {}
        complete = {COMMON, *(_own_file(rank) for rank in range(manifest["world_size"]))}
        if manifest["step"] != _step_of(folder) or set(manifest["files"]) != complete:
            return f"{folder.name}/{MANIFEST} does not list the files of this checkpoint", {}
        for name, facts in manifest["files"].items():
            data = (folder / name).read_bytes()
            if len(data) != facts["size_bytes"]:
                return f"{folder.name}/{name} has {len(data)} of {facts['size_bytes']} bytes", {}
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                return f"{folder.name}/{name} does not have the SHA-256 it was written with", {}
    except (OSError, RunDirError, KeyError, TypeError, AttributeError) as error:
        return f"{folder.name} cannot be read ({error})", {}
    return "", manifest


def _write(path: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Writes one file to disk; returns its name, and its size and sum for the manifest."""
    # Through memory: torch hides the reason when the file system refuses, and the sum costs no second read.
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    data = buffer.getbuffer()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path.name, {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return content


def _step_of(folder: Path) -> int:
    return int(folder.name[len(_PREFIX) :])


def _own_file(rank: int) -> str:
    return f"rank{rank}.pt"


def _flush_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
