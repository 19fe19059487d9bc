"""The run directory: the contract between launcher, training and analysis. This module is its only author.

Layout (every name is spelled here and nowhere else)::

    <run_root>/<exp>-<utc>-<4 hex>/
      run.yaml                    what was asked for: schema, resolved configuration, origins, provenance
      status.yaml                 how it ended; absent while it has not
      summary.txt                 the model, as torchinfo sees it
      attempts/<n>/submitted.yaml scheduler and job id, written by submit
      attempts/<n>/attempt.yaml   hosts, world size, start; written by the agent of node 0
      attempts/<n>/rendezvous.yaml  master host and port in force
      attempts/<n>/plan.yaml      the plan, where a resume asked for other resources than run.yaml has
      attempts/<n>/stop-request   exists when workers should checkpoint and leave
      attempts/<n>/stopped.yaml   the workers did so: step and seconds; written by rank 0
      attempts/<n>/cancel-request  exists when a person has cancelled: the run must not be restarted
      attempts/<n>/ended.yaml     how the attempt ended if the run goes on in another; written by an agent
      attempts/<n>/heartbeats/    one file per rank and agent, see `hpcsngd.lifeline`
      attempts/<n>/finished.yaml  the workers reached the end; written by rank 0
      attempts/<n>/faults/*.yaml  one file per process that failed
      attempts/<n>/usage/agent<k>.yaml  time, memory and exit status of an agent's workers
      attempts/<n>/accounting.yaml  the same of the whole job, by the scheduler's accounts
      attempts/<n>/logs/          node<k>.out, node<k>.err (and rank<r>.* where ranks are started singly)
      attempts/<n>/logs/torchrun/ what torchrun keeps of each of its ranks
      submit/                     submitit's own folder
      metrics/                    CSV files, see `hpcsngd.tables`
      checkpoints/step_<n>/       and the file ``latest``

Files are written to a temporary name and renamed, CSV rows are appended and flushed, each file has one
writer. A run's meaning is never parsed out of its name. Nothing here is pickled.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from hpcsngd.errors import PreflightError, RunDirError
from hpcsngd.tables import TABLES, Table

log = logging.getLogger(__name__)

SCHEMA = 1

STATES = ("completed", "failed", "timeout", "preempted", "cancelled")
FAULT_KINDS = (
    "out_of_memory",
    "nan",
    "walltime",
    "preempted",
    "node_failure",
    "rendezvous",
    "import_error",
    "architecture",
    "missing_data",
    "quota",
    "killed",
    "configuration",
    "hang",
    "unknown",
)

Value = int | float | str

# libyaml where PyYAML was built with it: two to three times as fast, which counts over a thousand runs
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def utc_now() -> str:
    """Returns the time now as ISO 8601 in UTC, to the millisecond."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def utc_of(seconds: float) -> str:
    """Returns a time in seconds since 1970, such as a file's, as ISO 8601 in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds")


def yaml_text(data: Mapping[str, Any]) -> str:
    """Returns a mapping as YAML, keys in their order."""
    text: str = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a mapping as YAML: temporary file in the same folder, flush to disk, rename."""
    write_text(path, yaml_text(data))


def write_text(path: Path, text: str, *, is_flushed: bool = True) -> None:
    """Writes a whole file: temporary file in the same folder, flush to disk (unless told not to), rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if is_flushed:
            os.fsync(file.fileno())
    temporary.replace(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file written by `write_yaml`.

    Raises:
        RunDirError: missing, unreadable or not a mapping; the message names the file.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - safe loaders both
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise RunDirError(f"{path} is damaged: expected a mapping, found {type(data).__name__}")
    return data


@dataclass(frozen=True)
class Fault:
    """Why a process failed: one line for people, facts for programs.

    Attributes:
        kind: one of `FAULT_KINDS`.
        message: the cause in one line.
        host: host name of the process.
        utc: when, ISO 8601.
        rank: the failing rank; None for an agent.
        node: node number in the job, from 0.
        evidence: lines of the log that show it.
        is_echo: whether it looks like the consequence of another process's end, such as a torn connection.
    """

    kind: str
    message: str
    host: str
    utc: str = field(default_factory=utc_now)
    rank: int | None = None
    node: int | None = None
    evidence: list[str] = field(default_factory=list)
    is_echo: bool = False

    def line(self) -> str:
        """Returns the fault as one line: kind, message, where, when."""
        who = f"rank {self.rank}" if self.rank is not None else f"node {self.node}"
        return f"{self.kind.replace('_', ' ')}: {self.message} ({who} on {self.host}, {self.utc})"


@dataclass(frozen=True)
class Status:
    """How a run ended. ``state`` is one of `STATES`; ``reason`` is one line, empty when all went well."""

    state: str
    reason: str
    attempt: int
    utc: str = field(default_factory=utc_now)
    fault: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


class CsvWriter:
    """Appends rows of one table to one file, flushing each row.

    A last line that was cut off by a kill is removed on opening, and the log says so: it never was a row.

    Raises:
        RunDirError: the file exists with another header.
    """

    def __init__(self, path: Path, table: Table) -> None:
        self._table = table
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_partial_line(path)
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            _check_header(path, table)
        self._file: TextIO = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if is_new:
            self._put(list(table.header))

    def write(self, **values: Value) -> None:
        """Appends one row; exactly the table's columns must be given.

        Raises:
            TypeError: a column is missing or unknown.
        """
        if set(values) != set(self._table.header):
            wrong = sorted(set(values) ^ set(self._table.header))
            raise TypeError(f"table {self._table.name}: columns {wrong} are missing or unknown")
        self._put([_text(values[name]) for name in self._table.header])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _put(self, cells: list[str]) -> None:
        self._writer.writerow(cells)
        self._file.flush()


def write_table(path: Path, table: Table, rows: Iterable[Mapping[str, Value]]) -> None:
    """Writes a whole CSV file of a table: all rows or, after a kill, none; an older file is replaced.

    Raises:
        TypeError: a row lacks a column or has an unknown one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    writer = CsvWriter(temporary, table)
    try:
        for row in rows:
            writer.write(**row)
    finally:
        writer.close()
    temporary.replace(path)


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    return str(value)


def _cut_partial_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep < len(data):
        log.warning("%s: removed an unfinished last line of %d bytes", path, len(data) - keep)
        with path.open("r+b") as file:
            file.truncate(keep)


def _check_header(path: Path, table: Table) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        found = next(csv.reader(file), [])
    if found != table.header:
        raise RunDirError(
            f"{path}:1: columns are {','.join(found)}; schema {SCHEMA} has {','.join(table.header)}"
        )


def read_rows(path: Path, table: Table) -> Iterator[dict[str, Value]]:
    """Yields the rows of one CSV file, typed by the table; a last line without newline is not a row yet.

    Raises:
        RunDirError: a header or a row that does not fit, with file and line.
    """
    _check_header(path, table)
    convert = {"int": int, "float": float, "str": str}
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line for line in file if line.endswith("\n"))
        reader = csv.reader(lines)
        next(reader, None)
        for cells in reader:
            try:
                pairs = zip(table.columns, cells, strict=True)
                yield {column.name: convert[column.dtype](cell) for column, cell in pairs}
            except ValueError as error:
                raise RunDirError(f"{path}:{reader.line_num}: {error}") from error


def last_row(path: Path, table: Table) -> dict[str, Value] | None:
    """Returns the last complete row, reading only the end of the file; None while there is none."""
    if not path.exists():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")[:-1]
    if len(lines) < 2:
        return None
    cells = next(csv.reader([lines[-1]]))
    convert = {"int": int, "float": float, "str": str}
    try:
        pairs = zip(table.columns, cells, strict=True)
        return {column.name: convert[column.dtype](cell) for column, cell in pairs}
    except ValueError as error:
        raise RunDirError(f"{path}: last line: {error}") from error


@dataclass(frozen=True)
class Attempt:
    """The folder of one attempt; all its file names."""

    path: Path

    @property
    def number(self) -> int:
        """Returns the attempt's number, from 1."""
        return int(self.path.name)

    @property
    def submitted_yaml(self) -> Path:
        """Scheduler, job id and time of submission."""
        return self.path / "submitted.yaml"

    @property
    def attempt_yaml(self) -> Path:
        """Hosts, world size and start time."""
        return self.path / "attempt.yaml"

    @property
    def rendezvous_yaml(self) -> Path:
        """Master host, port and generation in force."""
        return self.path / "rendezvous.yaml"

    @property
    def stop_request(self) -> Path:
        """Exists when the workers should checkpoint at the next step boundary and leave."""
        return self.path / "stop-request"

    @property
    def stopped_yaml(self) -> Path:
        """Written by rank 0 when the workers have checkpointed on a stop request and leave."""
        return self.path / "stopped.yaml"

    @property
    def cancel_request(self) -> Path:
        """Exists when a person has cancelled the run; written before the scheduler is asked to."""
        return self.path / "cancel-request"

    @property
    def plan_yaml(self) -> Path:
        """Plan and provenance of a resume; the plan holds for later attempts too."""
        return self.path / "plan.yaml"

    @property
    def ended_yaml(self) -> Path:
        """How the attempt ended although the run goes on: state, reason, and what starts the next one."""
        return self.path / "ended.yaml"

    @property
    def heartbeats(self) -> Path:
        """Folder of the heartbeats of ranks and agents."""
        return self.path / "heartbeats"

    @property
    def finished_yaml(self) -> Path:
        """Written by rank 0 when training reached its end."""
        return self.path / "finished.yaml"

    def usage_yaml(self, agent: int) -> Path:
        """Returns the file in which an agent says what its workers used."""
        return self.path / "usage" / f"agent{agent}.yaml"

    def usage_files(self) -> list[Path]:
        """Returns the files of `usage_yaml` that exist, by the agents' numbers."""
        files = (self.path / "usage").glob("agent*.yaml")
        return sorted(files, key=lambda file: int(file.stem.removeprefix("agent")))

    @property
    def accounting_yaml(self) -> Path:
        """What the scheduler's accounts say of the attempt, once it has ended."""
        return self.path / "accounting.yaml"

    @property
    def logs(self) -> Path:
        """Folder of the attempt's logs."""
        return self.path / "logs"

    def node_log(self, node: int, stream: str) -> Path:
        """Returns the log file of a node; ``stream`` is ``out`` or ``err``."""
        return self.logs / f"node{node}.{stream}"

    def rank_log(self, rank: int, stream: str) -> Path:
        """Returns the log file of a rank that was started singly."""
        return self.logs / f"rank{rank}.{stream}"

    def torchrun_logs(self, node: int | str) -> Path:
        """Returns the folder in which torchrun keeps the output of each rank of a node."""
        return self.logs / "torchrun" / f"node{node}"

    def write_fault(self, fault: Fault) -> None:
        """Records a fault in a file of its own: ``rank<r>.yaml`` or ``node<k>.yaml``.

        Raises:
            ValueError: an unknown kind.
        """
        if fault.kind not in FAULT_KINDS:
            raise ValueError(f"unknown fault kind {fault.kind!r}; allowed: {', '.join(FAULT_KINDS)}")
        name = f"rank{fault.rank}" if fault.rank is not None else f"node{fault.node}"
        write_yaml(self.path / "faults" / f"{name}.yaml", dataclasses.asdict(fault))

    def write_lost(self, rank: int, how: str) -> None:
        """Records that a rank's process has ended without a word; one that others may do without."""
        write_yaml(self.path / "lost" / f"rank{rank}.yaml", {"how": how, "utc": utc_now()})

    def lost_ranks(self) -> dict[int, str]:
        """Returns rank -> how its process ended, of those that `write_lost` has recorded."""
        found = (self.path / "lost").glob("rank*.yaml")
        return {int(file.stem.removeprefix("rank")): str(read_yaml(file)["how"]) for file in found}

    def forget_faults(self, ranks: Iterable[int]) -> None:
        """Removes the faults of ranks that are about to start again in this attempt."""
        for rank in ranks:
            (self.path / "faults" / f"rank{rank}.yaml").unlink(missing_ok=True)

    def faults(self) -> list[Fault]:
        """Returns all recorded faults, the first cause first.

        A cause goes before an echo, a rank's own fault explains more than its agent's, and a known kind more
        than an unknown one; within a class the earliest is first.
        """
        found = [Fault(**read_yaml(file)) for file in sorted((self.path / "faults").glob("*.yaml"))]
        return sorted(found, key=_first_cause)


def _first_cause(fault: Fault) -> tuple[bool, bool, bool, str]:
    return fault.is_echo, fault.rank is None, fault.kind == "unknown", fault.utc


@dataclass(frozen=True)
class RunDir:
    """One run's directory. Make one with `create`, open one with `open_run`."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name, an identifier without meaning."""
        return self.path.name

    @property
    def run_yaml(self) -> Path:
        """What was asked for."""
        return self.path / "run.yaml"

    @property
    def status_yaml(self) -> Path:
        """How the run ended."""
        return self.path / "status.yaml"

    @property
    def summary_txt(self) -> Path:
        """The model, as torchinfo sees it."""
        return self.path / "summary.txt"

    @property
    def submit_dir(self) -> Path:
        """The folder that submitit keeps for itself."""
        return self.path / "submit"

    @property
    def metrics_dir(self) -> Path:
        """Folder of the CSV files."""
        return self.path / "metrics"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard event files, when asked for."""
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def newest_checkpoint(self) -> str:
        """Returns the name of the newest checkpoint's folder by the file ``latest``; empty without one."""
        file = self.checkpoints_dir / "latest"
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""

    @property
    def report_html(self) -> Path:
        """The report of this run alone."""
        return self.path / "report.html"

    def attempt(self, number: int) -> Attempt:
        """Returns the folder of an attempt, which need not exist yet."""
        return Attempt(self.path / "attempts" / str(number))

    def attempts(self) -> list[Attempt]:
        """Returns the attempts so far, in order."""
        folder = self.path / "attempts"
        numbers = sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())
        return [self.attempt(number) for number in numbers]

    def metrics(self, table: str, rank: int | None = None) -> Path:
        """Returns the CSV file of a table."""
        return self.metrics_dir / TABLES[table].file_name(rank)

    def record(self) -> dict[str, Any]:
        """Returns the content of ``run.yaml``."""
        return read_yaml(self.run_yaml)

    def plan_record(self, attempt: int) -> dict[str, Any]:
        """Returns the plan in force for an attempt: of the last resume up to it, else of ``run.yaml``."""
        for earlier in reversed(self.attempts()):
            if earlier.number <= attempt and earlier.plan_yaml.exists():
                return dict(read_yaml(earlier.plan_yaml)["plan"])
        return dict(self.record()["plan"])

    def status(self) -> Status | None:
        """Returns how the run ended, or None while it has not.

        Raises:
            RunDirError: ``status.yaml`` is damaged.
        """
        if not self.status_yaml.exists():
            return None
        try:
            return Status(**read_yaml(self.status_yaml))
        except TypeError as error:
            raise RunDirError(f"{self.status_yaml} is damaged: {error}") from error

    def write_status(self, status: Status) -> None:
        """Records how the run ended.

        Raises:
            ValueError: an unknown state.
        """
        if status.state not in STATES:
            raise ValueError(f"unknown state {status.state!r}; allowed: {', '.join(STATES)}")
        write_yaml(self.status_yaml, dataclasses.asdict(status))


def create(run_root: Path, experiment: str, record: Mapping[str, Any]) -> RunDir:
    """Makes a new run directory and writes its ``run.yaml``, with ``schema`` added, before all else.

    Raises:
        PreflightError: the run root cannot be made or written.
    """
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = run_root / f"{experiment}-{stamp}-{secrets.token_hex(2)}"
    try:
        path.mkdir(parents=True)
        write_yaml(path / "run.yaml", {"schema": SCHEMA, **record})
    except OSError as error:
        raise PreflightError(
            f"cannot write the run root {run_root}: {error.strerror}; choose another with --run-root"
        ) from error
    return RunDir(path)


def open_run(path: Path) -> RunDir:
    """Returns the run in a directory.

    Raises:
        RunDirError: no such directory, no ``run.yaml``, or a schema that this version does not know.
    """
    run = RunDir(path.expanduser().resolve())
    if not run.run_yaml.is_file():
        there = "has no run.yaml: it is not a run directory" if run.path.is_dir() else "is not a directory"
        what = there if run.path.exists() else "does not exist"
        raise RunDirError(f"{run.path} {what}")
    checked_record(run)
    return run


def checked_record(run: RunDir) -> dict[str, Any]:
    """Returns the content of ``run.yaml``.

    Raises:
        RunDirError: it is damaged, or has a schema that this version does not know.
    """
    record = run.record()
    schema = record.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = (
            "upgrade hpcsngd to read it" if newer else "it was not written by any known version of hpcsngd"
        )
        raise RunDirError(f"{run.run_yaml}: schema {schema!r}; this version knows {SCHEMA}: {advice}")
    return record
