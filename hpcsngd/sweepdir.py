"""The sweep directory: the cells of a matrix, each an ordinary run directory. This module is its only author.

Layout::

    <run_root>/<exp>-sweep-<10 hex>/
      sweep.yaml              schema, axes, cells (id, axes, run directory), submissions, provenance
      <NNNN>-<cell id>/       an ordinary run directory, see `hpcsngd.rundir`; NNNN counts from 0
      arrays/<n>.yaml         the cells of one submitted array, in the order of its indices
      submit/                 batch scripts, and what agents print before they know their run

The digits are a hash of what the cells have in common, so the same sweep submitted again, with more values or
the same, finds its directory and the cells that have finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd.errors import PreflightError, RunDirError
from hpcsngd.rundir import RunDir, open_run, read_yaml, write_yaml

SCHEMA = 1
SWEEP_YAML = "sweep.yaml"


@dataclass(frozen=True)
class Cell:
    """One cell as its sweep knows it.

    Attributes:
        id: hash of what its results depend on.
        axes: key path as written -> value.
        run: its run directory, which need not exist yet.
    """

    id: str
    axes: Mapping[str, Any]
    run: RunDir


@dataclass(frozen=True)
class Member:
    """A place in an array: the run directory's name and the number of the attempt to make."""

    run: str
    attempt: int


@dataclass(frozen=True)
class SweepDir:
    """One sweep's directory; open one with `open_sweep`."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def sweep_yaml(self) -> Path:
        """Axes and cells."""
        return self.path / SWEEP_YAML

    @property
    def submit_dir(self) -> Path:
        """Batch scripts and the agents' own output."""
        return self.path / "submit"

    @property
    def controller_log(self) -> Path:
        """What the controller of a local sweep prints."""
        return self.submit_dir / "controller.log"

    @property
    def report_html(self) -> Path:
        """The report of this sweep."""
        return self.path / "report.html"

    def array_yaml(self, number: int) -> Path:
        """Returns the file that lists the cells of an array."""
        return self.path / "arrays" / f"{number}.yaml"

    def next_array(self) -> int:
        """Returns the number of the next array, from 1."""
        numbers = [int(file.stem) for file in (self.path / "arrays").glob("*.yaml") if file.stem.isdigit()]
        return max(numbers, default=0) + 1

    def write_array(self, number: int, members: Sequence[Member]) -> None:
        """Writes the list of an array; it must be there before the array is submitted."""
        rows = [{"run": member.run, "attempt": member.attempt} for member in members]
        write_yaml(self.array_yaml(number), {"schema": SCHEMA, "members": rows})

    def array(self, number: int) -> list[Member]:
        """Returns the list of an array, in the order of its indices.

        Raises:
            RunDirError: there is none, or it is damaged.
        """
        file = self.array_yaml(number)
        try:
            return [Member(str(row["run"]), int(row["attempt"])) for row in read_yaml(file)["members"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirError(f"{file} is damaged: {error}") from error

    def run(self, name: str) -> RunDir:
        """Returns the run directory of a cell by its name."""
        return RunDir(self.path / name)

    def record(self) -> dict[str, Any]:
        """Returns the content of ``sweep.yaml``; empty while there is none."""
        return read_yaml(self.sweep_yaml) if self.sweep_yaml.exists() else {}

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes ``sweep.yaml``, with ``schema`` added.

        Raises:
            PreflightError: the directory cannot be made or written.
        """
        try:
            write_yaml(self.sweep_yaml, {"schema": SCHEMA, **record})
        except OSError as error:
            raise PreflightError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with --run-root"
            ) from error

    def cells(self) -> list[Cell]:
        """Returns the cells in order.

        Raises:
            RunDirError: ``sweep.yaml`` is damaged.
        """
        try:
            rows = self.record().get("cells", [])
            return [Cell(str(row["id"]), dict(row["axes"]), self.run(str(row["run"]))) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirError(f"{self.sweep_yaml} is damaged: {error}") from error

    def runs(self) -> list[RunDir]:
        """Returns the run directories of the cells, in order; without those that were never written."""
        return [cell.run for cell in self.cells() if cell.run.run_yaml.is_file()]


def is_sweep(path: Path) -> bool:
    """Returns whether a directory is a sweep's."""
    return (path.expanduser() / SWEEP_YAML).is_file()


def open_sweep(path: Path) -> SweepDir:
    """Returns the sweep in a directory.

    Raises:
        RunDirError: no ``sweep.yaml``, or a schema that this version does not know.
    """
    sweep = SweepDir(path.expanduser().resolve())
    if not is_sweep(sweep.path):
        raise RunDirError(f"{sweep.path} has no {SWEEP_YAML}: it is not a sweep directory")
    schema = sweep.record().get("schema")
    if schema != SCHEMA:
        raise RunDirError(f"{sweep.sweep_yaml}: schema {schema!r}; this version knows {SCHEMA}")
    return sweep


def runs_at(path: Path) -> list[RunDir]:
    """Returns the runs of the sweep in a directory, or the one run.

    Raises:
        RunDirError: neither a sweep's nor a run's directory, or an unknown schema.
    """
    return open_sweep(path).runs() if is_sweep(path) else [open_run(path)]


def run_name(index: int, cell_id: str) -> str:
    """Returns the name of a cell's run directory; names sort in the order of the cells."""
    return f"{index:04}-{cell_id}"
