"""Submission of a sweep: every cell an ordinary run directory, one job array for as many as can share it.

Cells that have finished, wait or run are left alone; the others, failed ones among them, are submitted, so
the same command can be given until all are done. Everything is checked before anything is written, and
written before anything is submitted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcsngd import rundir
from hpcsngd.config import matrix
from hpcsngd.config.matrix import Matrix
from hpcsngd.errors import PreflightError, SchedulerError
from hpcsngd.launch import arrays, cells, plan, preflight, provenance, schedulers, secrets, status
from hpcsngd.launch.plan import Directive, Host, Plan
from hpcsngd.launch.sending import job_facts, say_what_is_dropped
from hpcsngd.launch.submit import need_scheduler, paths
from hpcsngd.rundir import RunDir
from hpcsngd.sweepdir import Member, SweepDir, run_name

NEW = "new"
SKIPPED = ("completed", "pending", "running")
"""States of cells that are not submitted again."""


@dataclass(frozen=True)
class Placed:
    """A cell with its plan, its run directory and where that stands (`NEW` if it does not exist)."""

    cell: matrix.Cell
    plan: Plan
    run: RunDir
    state: str

    @property
    def is_due(self) -> bool:
        """Returns whether the cell needs to be submitted."""
        return self.state not in SKIPPED

    @functools.cached_property
    def member(self) -> Member:
        """Returns the cell's place in an array: its next attempt."""
        attempts = self.run.attempts() if self.state != NEW else []
        return Member(self.run.name, attempts[-1].number + 1 if attempts else 1)


@dataclass(frozen=True)
class SubmittedSweep:
    """A submitted sweep.

    Attributes:
        sweep: its directory.
        job_ids: of its arrays; the controller's process id on a local site.
        submitted: how many cells were submitted.
        skipped: state -> how many cells in it were left alone.
    """

    sweep: SweepDir
    job_ids: tuple[str, ...]
    submitted: int
    skipped: dict[str, int] = field(default_factory=dict)


def submit(
    found: Matrix,
    *,
    argv: Sequence[str],
    run_root: Path | None = None,
    worker: str = plan.WORKER,
    directives: Mapping[str, Directive] | None = None,
    after: Sequence[RunDir] = (),
    probe: bool = False,
) -> SubmittedSweep:
    """Submits the cells of a matrix that have neither finished nor are on their way.

    Args:
        found: the checked cells.
        argv: the command line, for the record.
        run_root: folder in which the sweep directory is made; default: the site's.
        worker: the module that a worker runs; only tests change it.
        directives: more directives for this submission, such as ``hold``; see `hpcsngd.launch.order`.
        after: as for `hpcsngd.launch.submit.submit`.
        probe: whether to try the workers' Python on a node first.

    Raises:
        ConfigError: a cell's configuration holds what looks like a secret.
        PreflightError: a cell cannot work on this site, or the run root cannot be written.
        SchedulerError: the scheduler is missing, refuses or does not answer; what was written stays, and the
            same submission takes up there.
    """
    plans = [dataclasses.replace(made, after=paths(after)) for made in make_plans(found, worker=worker)]
    sweep = directory(found, run_root)
    _check(found, plans, sweep.path.parent, worker=worker, probe=probe)
    need_scheduler(plans[0])
    placed = place(found, plans, sweep)
    due = [each for each in placed if each.is_due]
    skipped = Counter(each.state for each in placed if not each.is_due)
    if not due:
        return SubmittedSweep(sweep, (), 0, dict(skipped))
    origin = provenance.collect(argv, image=plans[0].image)
    _write_record(sweep, found, placed, origin)
    _write_runs(due, origin)
    say_what_is_dropped()
    try:
        job_ids = _send(sweep, due, found.cells[0].resolved.site.scheduler.parallel_cells, directives or {})
    except SchedulerError as error:
        raise SchedulerError(
            f"{error} (the cells are in {sweep.path}; the same command submits them again)"
        ) from error
    return SubmittedSweep(sweep, tuple(job_ids), len(due), dict(skipped))


def directory(found: Matrix, run_root: Path | None = None) -> SweepDir:
    """Returns where a matrix has its sweep directory, which need not exist yet."""
    first = found.cells[0].resolved
    root = (run_root or Path(first.site.run_root)).expanduser().absolute()
    return SweepDir(root / f"{plan.job_name(first.exp_name)}-sweep-{found.base_id}")


def make_plans(found: Matrix, *, host: Host | None = None, worker: str = plan.WORKER) -> list[Plan]:
    """Returns the plan of each cell.

    Raises:
        ConfigError: a cell's configuration holds what looks like a secret.
        PreflightError: what the site would refuse, once per reason, with the cells it is about.
    """
    here = host or Host.here()
    # the same few files are looked for in every cell
    cached = dataclasses.replace(
        here, exists=functools.cache(here.exists), image_arch=functools.cache(here.image_arch)
    )
    plans: list[Plan] = []
    problems: dict[str, list[str]] = {}
    for cell in found.cells:
        secrets.refuse(cell.resolved)
        try:
            plans.append(plan.make(cell.resolved, host=cached, worker=worker))
        except PreflightError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(str(cell))
    if problems:
        raise PreflightError(matrix.listed(problems))
    return plans


def _check(found: Matrix, plans: Sequence[Plan], run_root: Path, *, worker: str, probe: bool) -> None:
    """Asks this machine and its scheduler about one cell of each kind.

    Raises:
        PreflightError: every reason why a cell would fail, once.
    """
    kinds = {arrays.key(made): cell.resolved for cell, made in zip(found.cells, plans, strict=True)}
    problems: dict[str, None] = {}
    for resolved in kinds.values():
        try:
            preflight.check(resolved, run_root=run_root, worker=worker, probe=probe)
        except PreflightError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if problems:
        raise PreflightError("\n".join(problems))


def place(found: Matrix, plans: Sequence[Plan], sweep: SweepDir) -> list[Placed]:
    """Returns each cell with its run directory and state; new cells get the next free names."""
    known = {cell.id: cell.run for cell in sweep.cells()}
    runs = []
    for cell in found.cells:
        run = known.setdefault(cell.id, sweep.run(run_name(len(known), cell.id)))
        runs.append(run)
    states = _states([run for run in runs if run.run_yaml.exists()])
    return [
        Placed(cell, made, run, states.get(run.path, NEW))
        for cell, made, run in zip(found.cells, plans, runs, strict=True)
    ]


def _states(runs: Sequence[RunDir]) -> Mapping[Path, str]:
    """Returns path -> state; only runs that have not completed are asked about."""
    ended = {run.path: status.current(run) for run in runs}
    states = {path: found.state for path, found in ended.items() if found}
    open_runs = [run for run in runs if run.path not in states]
    return states | {
        run.path: found.state for run, found in zip(open_runs, status.states(open_runs), strict=True)
    }


def _write_record(
    sweep: SweepDir, found: Matrix, placed: Sequence[Placed], origin: Mapping[str, Any]
) -> None:
    """Writes ``sweep.yaml``: cells of earlier submissions stay, new ones are added."""
    before = sweep.record()
    rows = {cell.id: {"id": cell.id, "axes": dict(cell.axes), "run": cell.run.name} for cell in sweep.cells()}
    rows |= {
        each.cell.id: {"id": each.cell.id, "axes": each.cell.axes, "run": each.run.name} for each in placed
    }
    first = found.cells[0].resolved
    sweep.write_record(
        {
            "exp_name": first.exp_name,
            "site_name": first.site_name,
            "axes": [list(axis.keys) for axis in found.axes],
            "cells": sorted(rows.values(), key=lambda row: row["run"]),
            "submissions": [*before.get("submissions", []), dict(origin)],
        }
    )


def _write_runs(due: Sequence[Placed], origin: Mapping[str, Any]) -> None:
    texts = _Texts()
    shortened = _without_diff(origin)
    for each in due:
        if each.member.attempt == 1:
            record = {
                "schema": rundir.SCHEMA,
                "sweep": {"cell": each.cell.id, "axes": each.cell.axes},
                "config": each.cell.resolved.to_record(),
                "plan": each.plan.to_record(),
                "provenance": shortened,
            }
        else:
            # the run stays what it was; only what it asks for may have changed
            record = each.run.record() | {"plan": each.plan.to_record()}
        # a thousand flushes take minutes on some file systems, and the same command writes them again
        rundir.write_text(each.run.run_yaml, texts.render(record), is_flushed=False)


def _without_diff(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the provenance for a cell: the difference to the commit stands once, in ``sweep.yaml``."""
    git = origin.get("git")
    if not git or not git.get("diff"):
        return dict(origin)
    return dict(origin) | {"git": {**git, "diff": "", "diff_in": f"../{SweepDir(Path()).sweep_yaml.name}"}}


class _Texts:
    """YAML of run records; sections that many cells have in common are rendered once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def render(self, record: Mapping[str, Any]) -> str:
        """Returns a record as YAML, keys in their order."""
        parts = []
        for name, section in record.items():
            if name == "config":
                inner = "".join(self._section(key, value) for key, value in section.items())
                parts.append("config:\n" + textwrap.indent(inner, "  "))
            else:
                parts.append(self._section(name, section))
        return "".join(parts)

    def _section(self, name: str, value: Any) -> str:
        key = json.dumps([name, value])
        if key not in self._known:
            self._known[key] = rundir.yaml_text({name: value})
        return self._known[key]


def _send(
    sweep: SweepDir, due: Sequence[Placed], parallel: int | None, directives: Mapping[str, Directive]
) -> list[str]:
    """Submits the cells that are due; returns the job ids."""
    if due[0].plan.scheduler in plan.WITHOUT_QUEUE:
        number = sweep.next_array()
        sweep.write_array(number, [each.member for each in due])
        return [_start_controller(sweep, due, number, parallel or 1)]
    groups: dict[str, list[Placed]] = {}
    for each in due:
        groups.setdefault(arrays.key(each.plan), []).append(each)
    job_ids: list[str] = []
    for group in groups.values():
        for part in _parts(group):
            # several arrays know nothing of each other's limit, so one follows the other
            after = job_ids[-1] if parallel and job_ids else ""
            job_ids.append(_send_array(sweep, part, parallel, after, directives))
    return job_ids


def _start_controller(sweep: SweepDir, due: Sequence[Placed], number: int, parallel: int) -> str:
    controller = cells.start(sweep, number, parallel)
    # until a cell is started, it is a process of this machine that will start it
    waiting = dataclasses.replace(due[0].plan, scheduler="local")
    facts = job_facts(waiting, str(controller.pid)) | {"queued": True}
    for each in due:
        _record_job(each, facts)
    if controller.stdin:
        controller.stdin.close()
    return str(controller.pid)


def _parts(group: Sequence[Placed]) -> list[Sequence[Placed]]:
    """Returns the cells of one kind in as few arrays as the cluster allows."""
    if len(group) < arrays.DEFAULT_SIZE:
        return [group]
    limit = arrays.size_limit(group[0].plan)
    return [group[part.start : part.stop] for part in arrays.parts(len(group), limit)]


def _send_array(
    sweep: SweepDir,
    group: Sequence[Placed],
    parallel: int | None,
    after: str,
    directives: Mapping[str, Directive],
) -> str:
    number = sweep.next_array()
    sweep.write_array(number, [each.member for each in group])
    made = group[0].plan
    asked = dataclasses.replace(made, directives=made.directives | dict(directives))
    job_id = arrays.executor(sweep, number, asked, len(group), parallel=parallel, after=after).send()
    facts = job_facts(made, job_id)
    first = schedulers.QUEUES[made.scheduler].first_index
    for index, each in enumerate(group, start=first):
        _record_job(each, facts | {"job_id": f"{job_id}_{index}"})
    return job_id


def _record_job(each: Placed, facts: Mapping[str, Any]) -> None:
    file = each.run.attempt(each.member.attempt).submitted_yaml
    if not file.exists():  # the cell was quicker than we are, and knows better
        rundir.write_text(file, rundir.yaml_text(facts), is_flushed=False)
