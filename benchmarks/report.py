"""What a report on a thousand runs costs: time, memory and the size of the page.

Run: ``python -m benchmarks.report [--runs 1000] [--rows 10000] [--folder DIR] [--page FILE]``. Writes run
directories such as a study leaves behind (several methods and seeds, resumed, failed and unfinished runs)
through `hpcsngd.rundir`, then times ``hpcsngd report`` on them in a process of its own: wall time, CPU time,
peak memory, page. A folder that already holds the runs is used as it is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcsngd import rundir
from hpcsngd.config import resolve
from hpcsngd.launch import hardware, provenance
from hpcsngd.rundir import CsvWriter, RunDir, Status
from hpcsngd.tables import TABLES

METHODS = {"digits-sgd": 0.88, "digits-hylo": 0.94, "digits-kfac": 0.93}
"""Experiment -> the accuracy that its made-up runs tend to."""

EPOCHS = 100
_START = datetime.datetime(2026, 1, 5, tzinfo=datetime.timezone.utc)
_PHASES = ("data", "forward", "backward", "update")
_LAYERS = ("conv1", "conv2", "fc")


def make_runs(folder: Path, count: int, rows: int) -> None:
    """Writes runs with ``rows`` rows in train.csv each, and a tenth of that in the other tables together."""
    records = {name: resolve.resolve("local", name, [], environment={}).to_record() for name in METHODS}
    facts = provenance.collect(["benchmarks.report"])
    for index in range(count):
        method = list(METHODS)[index % len(METHODS)]
        config = copy.deepcopy(records[method])
        config["experiment"]["seed"] = index
        config["experiment"]["epochs"] = EPOCHS
        run = RunDir(folder / f"{method}-{index:04d}")
        rundir.write_yaml(run.run_yaml, {"schema": rundir.SCHEMA, "config": config, "provenance": facts})
        _fill(run, METHODS[method], rows, index)


def _fill(run: RunDir, level: float, rows: int, index: int) -> None:
    """Every 20th run failed, every 25th has not ended, every 10th was resumed and did a twentieth again."""
    random = np.random.default_rng(index)
    is_failed, is_running, is_resumed = index % 20 == 3, index % 25 == 7, index % 10 == 5
    frames = _frames(random, level, rows)
    if is_failed or is_running:
        frames = {name: frame[: len(frame) // 2] for name, frame in frames.items()}
    if is_failed:
        frames["train"].loc[frames["train"].index[-1], "loss"] = np.nan
    parts = _resumed(frames) if is_resumed else [frames]
    for number, part in enumerate(parts, 1):
        _write_attempt(run, number)
        for name, frame in part.items():
            _write(run, name, frame)
    if is_failed:
        fault = rundir.Fault("nan", "loss is nan", host="node0", rank=0, utc=_utc(0.0))
        run.write_status(
            Status("failed", fault.line(), len(parts), _utc(1000.0), fault=dataclasses.asdict(fault))
        )
    elif not is_running:
        run.write_status(Status("completed", "", len(parts), _utc(2400.0)))


def _frames(random: np.random.Generator, level: float, rows: int) -> dict[str, pd.DataFrame]:
    steps = np.arange(1, rows + 1) * 10
    epoch = steps / steps[-1] * EPOCHS
    noise = random.normal(0.0, 0.02, rows)
    curve = level * (1 - np.exp(-epoch / random.uniform(5.0, 15.0)))
    train_s = np.cumsum(random.gamma(20.0, 0.01, rows))
    clocks = {
        "train_s": train_s,
        "wall_s": 3.0 + 1.05 * train_s,
        "utc": [_utc(4 + 1.05 * t) for t in train_s],
    }
    train = pd.DataFrame(
        {
            "attempt": 1,
            "epoch": epoch,
            "step": steps,
            "samples": steps * 128,
            "loss": np.abs(2.3 * (1 - curve) + noise),
            "accuracy": np.clip(curve + noise, 0, 1),
            "lr": 0.1 * (1 - epoch / (EPOCHS + 1)),
            **clocks,
        }
    )
    every = train.iloc[rows // EPOCHS - 1 :: rows // EPOCHS].reset_index(drop=True)
    evaluation = every.drop(columns=["samples", "lr"]).assign(split="test", count=10000, eval_s=0.5)
    evaluation["accuracy"] = np.clip(evaluation["accuracy"] - 0.02, 0, 1)
    fifth = every[4::5]
    return {
        "train": train,
        "eval": evaluation,
        "profiling": pd.concat(
            fifth[["attempt", "step"]].assign(
                rank=rank, refresh=0, phase=phase, seconds=random.gamma(9, 0.01, len(fifth))
            )
            for rank in (0, 1)
            for phase in _PHASES
        ),
        "grad_norm": pd.concat(
            every[["attempt", "epoch", "step"]].assign(layer=name, norm=random.gamma(9, 0.1, len(every)))
            for name in _LAYERS
        ),
    }


def _resumed(frames: dict[str, pd.DataFrame]) -> list[dict[str, pd.DataFrame]]:
    """Returns what two attempts wrote: the second does the last twentieth of the first one's half again."""
    last = int(frames["train"]["step"].iloc[-1])
    first = {name: frame[frame["step"] <= last // 2] for name, frame in frames.items()}
    second = {name: frame[frame["step"] > last // 2 - last // 40].copy() for name, frame in frames.items()}
    for frame in second.values():
        frame["attempt"] = 2
        if "wall_s" in frame:
            # the second attempt begins 1200 s after the first, and its worker's clock at zero
            frame["wall_s"] += 3.0 - second["train"]["wall_s"].iloc[0]
            frame["utc"] = [_utc(1201.0 + wall_s) for wall_s in frame["wall_s"]]
    return [first, second]


def _write_attempt(run: RunDir, number: int) -> None:
    attempt, begin = run.attempt(number), 1200.0 * (number - 1)
    rundir.write_yaml(attempt.submitted_yaml, {"scheduler": "slurm", "job_id": "1", "utc": _utc(begin - 60)})
    started = {"hosts": ["node0"], "nodes": 1, "world_size": 2, "start": _utc(begin)}
    rundir.write_yaml(attempt.attempt_yaml, {**started, "hardware": hardware.facts()})
    if number > 1:
        ended = {"state": "preempted", "reason": "preempted", "next": "requeue", "utc": _utc(begin - 30)}
        rundir.write_yaml(run.attempt(number - 1).ended_yaml, ended)


def _write(run: RunDir, table: str, frame: pd.DataFrame) -> None:
    """Appends rows as `CsvWriter` would, which is slower because it flushes each of them."""
    parts = frame.groupby("rank") if TABLES[table].per_rank else [(0, frame)]
    for rank, part in parts:
        file = run.metrics(table, int(rank))
        CsvWriter(file, TABLES[table]).close()  # the header
        part[TABLES[table].header].to_csv(file, mode="a", header=False, index=False, na_rep="nan")


def _utc(seconds: float) -> str:
    return (_START + datetime.timedelta(seconds=float(seconds))).isoformat(timespec="milliseconds")


def measure(folder: Path, page: Path) -> dict[str, Any]:
    """Returns what ``hpcsngd report`` took: wall time, CPU time, peak memory and the size of the page."""
    command = [sys.executable, "-m", "hpcsngd", "report", str(folder), "--out", str(page)]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024,  # Linux counts in KiB
        "page_mb": page.stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the runs here, or use those that are there")
    parser.add_argument("--page", type=Path, help="keep the page here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "runs"
        if not folder.exists():
            begin = time.perf_counter()
            make_runs(folder, options.runs, options.rows)
            print(f"made {options.runs} runs of {options.rows:,} rows in {time.perf_counter() - begin:.0f} s")
        found = measure(folder, options.page or Path(temporary) / "report.html")
    print(f"{'wall s':>8} {'CPU s':>8} {'peak MB':>9} {'page MB':>9}")
    print("{wall_s:>8.1f} {cpu_s:>8.1f} {peak_mb:>9.0f} {page_mb:>9.1f}".format(**found))


if __name__ == "__main__":
    main()
