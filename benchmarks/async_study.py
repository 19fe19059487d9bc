"""The parameter-server study, small: what delays, partitions, momentum and compensation do to accuracy.

Run: ``python -m benchmarks.async_study runs|table FOLDER``. ``runs`` trains the cells of the matrices that
``benchmarks/async_study.yaml`` names, seed by seed, and ``table`` compares each cell with the baseline of its
matrix on the same seeds or folds, and in a full product of axes the levels of each axis over all others.
Every cell is an ordinary run directory with the ordinary workers and their RPC. Only their start is not the
launcher's: this process imports torch once and forks them, because on two cores the imports would take longer
than the training. Cells that have completed are skipped when a command is repeated.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.fashion_mnist import PROSE
from hpcsngd import rundir
from hpcsngd.config import matrix, strict
from hpcsngd.config.fields import Strict
from hpcsngd.config.matrix import Cell
from hpcsngd.config.resolve import Override, Resolved, from_record
from hpcsngd.handover import BACKEND, DEVICE
from hpcsngd.launch import plan, ports, provenance
from hpcsngd.rundir import RunDir, Status
from hpcsngd_analysis import stats
from hpcsngd_analysis.load import load

STUDY = Path(__file__).with_suffix(".yaml")
POLL_S = 0.2


class Study(Strict):
    """The study; see the file itself."""

    every: dict[str, Any]
    """Keys set in every cell."""
    studies: dict[str, list[str]]
    """Experiment with a matrix -> the cells that its others are compared with, a table for each."""
    effects: dict[str, dict[str, list[str]]]
    """Experiment with every combination of its axes -> axis -> the keys that it sets."""


@dataclass(frozen=True)
class Row:
    """One cell of one matrix.

    Attributes:
        study: the experiment.
        axes: what its matrix sets in it, without what repeats it.
        resolved: its configuration.
    """

    study: str
    axes: Mapping[str, Any]
    resolved: Resolved

    @property
    def label(self) -> str:
        """Returns the axes in words."""
        return matrix.words(self.axes)

    @property
    def replicate(self) -> tuple[int, int]:
        """Returns seed and fold (0 without folds)."""
        folds = self.resolved.experiment.data.folds
        return self.resolved.experiment.seed, folds.index if folds else 0

    @property
    def folds(self) -> int:
        """Returns the number of folds, 0 without."""
        folds = self.resolved.experiment.data.folds
        return folds.count if folds else 0


def rows(study: Study) -> list[Row]:
    """Returns all cells, seed by seed and fold by fold, so that a study cut short has whole replicates."""
    overrides = [Override(f"experiment.{key}", value, "the study") for key, value in study.every.items()]
    found = [
        Row(name, _axes(cell), cell.resolved)
        for name in [*study.studies, *study.effects]
        for cell in _cells(name, overrides)
    ]
    return sorted(found, key=lambda row: row.replicate)


def _cells(name: str, overrides: Sequence[Override]) -> tuple[Cell, ...]:
    found = matrix.resolve("local", name, overrides)
    return found.cells if found else ()


def _axes(cell: Cell) -> dict[str, Any]:
    repeats = ("seed", "data.folds.index")
    return {key: value for key, value in cell.axes.items() if key not in repeats}


def facts(resolved: Resolved) -> str:
    """Returns a text that is equal for cells that train the same; several matrices share some."""
    experiment = resolved.experiment
    left_out = {*PROSE, "corrections", "matrix", "resources"}
    return repr((experiment.model_dump(exclude=left_out), resolved.ranks_per_node))


def completed(folder: Path) -> dict[str, RunDir]:
    """Returns the runs of a folder that have completed, by what they train."""
    runs = [rundir.open_run(file.parent) for file in sorted(folder.glob("*/run.yaml"))]
    ended = [run for run in runs if (status := run.status()) and status.state == "completed"]
    return {facts(from_record(run.record()["config"])): run for run in ended}


class Started:
    """The ranks of one cell, forked from this process.

    Args:
        row: the cell.
        folder: where its run directory is made.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        made = plan.make(row.resolved)
        record = {
            "config": row.resolved.to_record(),
            "plan": made.to_record(),
            "provenance": provenance.collect(["benchmarks.async_study"], image=None),
        }
        self.row, self.run, self._began = row, rundir.create(folder, row.study, record), time.monotonic()
        self.run.attempt(1).logs.mkdir(parents=True)
        port = ports.lease(made.ports).hand_over()
        # cells whose port was taken in between fail and are run again by the same command
        self._ranks = {_fork(self.run, rank, made.world_size, port): rank for rank in range(made.world_size)}
        self._failed: list[int] = []

    def is_over(self) -> bool:
        """Returns whether all ranks have ended; the status is then written."""
        for pid, rank in list(self._ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._ranks[pid]
                self._failed += [rank] if status else []
        if self._ranks:
            return False
        result = self.run.attempt(1).finished_yaml
        if result.exists() and not self._failed:
            self.run.write_status(Status("completed", "", 1, result=rundir.read_yaml(result)))
        else:
            self.run.write_status(Status("failed", f"rank(s) {self._failed} failed; see the logs", 1))
        return True

    def __str__(self) -> str:
        status = self.run.status()
        took_s = time.monotonic() - self._began
        state = status.state if status else "unknown"
        seed, fold = self.row.replicate
        return f"{self.row.study} {self.row.label} seed={seed} fold={fold}: {state}, {took_s:.0f} s"


def _fork(run: RunDir, rank: int, ranks: int, port: int) -> int:
    """Starts one rank and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            DEVICE: "cpu",
            BACKEND: "gloo",
        }
        log = os.open(run.attempt(1).rank_log(rank, "err"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from hpcsngd.train import worker

        sys.argv = ["worker", str(run.path), "--attempt", "1"]
        worker.run()
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _import_for_all() -> None:
    """Imports, before the forks, what every rank would import."""
    import torch
    import torch._dynamo  # by the first step of any optimizer

    from hpcsngd.train import session, vision
    from hpcsngd.train.parameter_server import session as served

    vision.load()
    log = logging.getLogger(__name__)
    log.info("imported %s, %s", session.__name__, served.__name__)
    torch.set_num_threads(1)


def run_all(wanted: Sequence[Row], folder: Path, parallel: int, end: float) -> Iterator[Started]:
    """Yields the cells as they end, a few at once; starts none after ``end`` (of the monotonic clock)."""
    known = set(completed(folder))
    unique: dict[str, Row] = {}
    for row in wanted:
        unique.setdefault(facts(row.resolved), row)
    waiting = [row for key, row in unique.items() if key not in known]
    running: list[Started] = []
    while running or (waiting and time.monotonic() < end):
        while waiting and len(running) < parallel and time.monotonic() < end:
            running.append(Started(waiting.pop(0), folder))
        over = [each for each in running if each.is_over()]
        running = [each for each in running if each not in over]
        yield from over
        time.sleep(POLL_S)


def outcomes(wanted: Sequence[Row], folder: Path) -> pd.DataFrame:
    """Returns what each cell that has completed reached, one row per cell.

    Returns:
        ``study``, ``cell``, ``seed``, ``fold``, ``folds`` (0 without), ``accuracy`` (share, at the end; on
        the fold held out, where there are folds), ``staleness`` (mean over updates, NaN without a server that
        tells), ``updates`` and ``train_s``.
    """
    found = completed(folder)
    chosen = [(row, found[key]) for row in wanted if (key := facts(row.resolved)) in found]
    if not chosen:
        raise SystemExit(f"{folder}: no cell of the study has completed here")
    tables = load(list(dict.fromkeys(run.path for _, run in chosen)), ["eval", "staleness"]).tables
    last = tables["eval"].groupby("run").last()
    ages = tables["staleness"].groupby("run")["staleness"].mean()
    return pd.DataFrame(
        {
            "study": row.study,
            "cell": row.label,
            "seed": row.replicate[0],
            "fold": row.replicate[1],
            "folds": row.folds,
            "accuracy": last.loc[run.name, "accuracy"],
            "staleness": ages.get(run.name, float("nan")),
            "updates": last.loc[run.name, "step"],
            "train_s": last.loc[run.name, "train_s"],
        }
        for row, run in chosen
    )


def render(results: pd.DataFrame, baselines: Mapping[str, Sequence[str]]) -> str:
    """Returns a table per baseline: each cell, and its difference to the baseline on the same seeds."""
    blocks = []
    pairs = [(study, baseline) for study, several in baselines.items() for baseline in several]
    for study, baseline in pairs:
        part = results[results["study"] == study]
        if baseline not in set(part["cell"]):
            continue
        shown = part.groupby("cell", sort=False)[["accuracy", "staleness", "updates", "train_s"]].mean()
        lines = [f"{study}; baseline: {baseline}", _HEAD]
        lines += [_line(part, str(cell), baseline, mean) for cell, mean in shown.iterrows()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


_HEAD = "accuracy %   less baseline [95 %]               staleness  updates      s  cell"


def _line(part: pd.DataFrame, cell: str, baseline: str, mean: pd.Series[float]) -> str:
    by_replicate = part.pivot_table(index=["seed", "fold"], columns="cell", values="accuracy")
    difference, word = "", ""
    if cell != baseline:
        both = by_replicate[[cell, baseline]].dropna()
        folds = int(part["folds"].iloc[0]) or None
        found = stats.mean_interval((100 * (both[cell] - both[baseline])).to_list(), folds=folds)
        difference = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        word = verdict(found)
    return (
        f"{100 * mean['accuracy']:10.2f}  {difference:>22}  {word:>11}  {mean['staleness']:9.2f}  "
        f"{mean['updates']:7.0f}  {mean['train_s']:5.0f}  {cell}"
    )


def render_effects(wanted: Sequence[Row], results: pd.DataFrame, axes: Mapping[str, Sequence[str]]) -> str:
    """Returns what each level of each axis changes against the axis's first level, over all other axes.

    The differences of one seed, over all combinations of the other axes, are one replicate: combinations with
    a seed share its initial weights, so they are averaged before the interval is taken over seeds.

    Args:
        wanted: the cells of one study.
        results: of `outcomes`; cells that are missing leave out their pairs.
        axes: axis -> the keys that it sets.
    """
    found = results[results["study"] == wanted[0].study].set_index(["cell", "seed"])["accuracy"]
    lines = ["less the first, points [95 %]              pairs  accuracy %  level"]
    for axis, keys in axes.items():
        levels: dict[str, dict[tuple[str, int], float]] = {}
        for row in wanted:
            level = matrix.words({key: value for key, value in row.axes.items() if key in keys})
            others = matrix.words({key: value for key, value in row.axes.items() if key not in keys})
            if (key := (row.label, row.replicate[0])) in found.index:
                levels.setdefault(level, {})[others, row.replicate[0]] = 100 * float(found[key])
        lines += [f"{axis}:", *_levels(levels)]
    return "\n".join(lines)


def _levels(levels: Mapping[str, Mapping[tuple[str, int], float]]) -> Iterator[str]:
    """Yields a line for each level of an axis, given its results by the other axes and the seed."""
    first = next(iter(levels.values()), {})
    for level, values in levels.items():
        pairs = pd.Series({key: value - first[key] for key, value in values.items() if key in first})
        text = ""
        if values is not first:
            difference = stats.mean_interval(pairs.groupby(level=1).mean().to_list())
            text = f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
            text = f"{text:>22}  {verdict(difference)}"
        mean = sum(values.values()) / len(values)
        yield f"{text:<42}{len(pairs):>6}{mean:>12.2f}  {level}"


def verdict(difference: stats.Interval) -> str:
    """Returns what an interval of a difference says: ``higher``, ``lower`` or ``cannot tell``."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "cannot tell"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_study", description=__doc__)
    parser.add_argument("command", choices=["runs", "table"])
    parser.add_argument("folder", type=Path, help="where run directories are kept")
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--parallel", type=int, default=1, help="cells at once")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no cell after so long")
    options = parser.parse_args(arguments)
    study = Study.model_validate(strict.load(options.study).data)
    wanted = rows(study)
    if options.command == "runs":
        _import_for_all()
        end = time.monotonic() + 60 * options.minutes
        for ended in run_all(wanted, options.folder, options.parallel, end):
            print(f"{rundir.utc_now()[:19]} {ended}", flush=True)
    results = outcomes(wanted, options.folder)
    results.to_csv(options.folder / "runs.csv", index=False, float_format="%.6g")
    print(render(results, study.studies))
    for name, axes in study.effects.items():
        part = [row for row in wanted if row.study == name]
        print(f"\n{name}\n{render_effects(part, results, axes)}")


if __name__ == "__main__":
    main()
