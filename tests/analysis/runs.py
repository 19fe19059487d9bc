"""Run directories for these tests: those written by hand in tests/data/runs, and new ones made to measure."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcsngd import rundir
from hpcsngd.rundir import CsvWriter, RunDir, Status
from hpcsngd.tables import TABLES

EXAMPLES = Path(__file__).parents[1] / "data" / "runs"
UTC = "2026-01-05T10:00:00.000+00:00"


def make_run(
    root: Path,
    name: str = "run",
    *,
    experiment: str = "digits-sgd",
    settings: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    status: Status | None = None,
    tables: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> RunDir:
    """Returns a new run directory; rows need only the columns that matter, see `row`."""
    run = RunDir(root / name)
    config = {
        "site_name": "local",
        "exp_name": experiment,
        "site": {"scheduler": {"kind": "local"}},
        "experiment": {"epochs": 2, "seed": 1, **(settings or {})},
    }
    rundir.write_yaml(run.run_yaml, {"schema": 1, "config": config, "provenance": dict(provenance or {})})
    if status:
        run.write_status(status)
    for table, rows in (tables or {}).items():
        writer = CsvWriter(run.metrics(table, 0), TABLES[table])
        for cells in rows:
            writer.write(**row(table, **cells))
        writer.close()
    return run


def row(table: str, **cells: Any) -> dict[str, Any]:
    """Returns a full row: what is given, and plain values for the other columns."""
    plain = {"int": 1, "float": 1.0, "str": "x"}
    filled = {column.name: plain[column.dtype] for column in TABLES[table].columns}
    return {**filled, "utc": UTC, **cells} if "utc" in filled else {**filled, **cells}


def copy_of(example: str, folder: Path) -> Path:
    """Returns a copy of one of the hand-written runs, to be damaged."""
    return Path(shutil.copytree(EXAMPLES / example, folder / example))


def at(minutes: float) -> str:
    """Returns a time after ten o'clock."""
    whole, rest = divmod(minutes * 60, 60)
    return f"2026-01-05T10:{int(whole):02d}:{rest:06.3f}+00:00"


def clocked(
    attempt: int, step: int, train_s: float, wall_s: float, begun: float, **more: Any
) -> dict[str, Any]:
    """Returns a row of a worker that began so many minutes after ten."""
    utc = at(begun + wall_s / 60)
    return {"attempt": attempt, "step": step, "train_s": train_s, "wall_s": wall_s, "utc": utc, **more}


def resumed_run(root: Path) -> RunDir:
    """Two attempts: 90 s of training, of which 30 are done again, and 60 more; an evaluation of 5 s each."""
    first, second = 2.5, 11.0  # when the workers began
    run = make_run(
        root,
        status=Status("completed", "", 2, at(14.0)),
        tables={
            "train": [
                clocked(1, 10, 30, 40, first),
                clocked(1, 20, 60, 75, first),
                clocked(1, 30, 90, 105, first),
                clocked(2, 30, 88, 38, second),
                clocked(2, 40, 120, 70, second),
            ],
            "eval": [
                clocked(1, 20, 60, 74, first, eval_s=5.0, split="test"),
                clocked(2, 40, 120, 75, second, eval_s=5.0, split="test"),
            ],
        },
    )
    for number, (submitted, start) in enumerate(((0.0, 2.0), (None, 10.0)), 1):
        attempt = run.attempt(number)
        if submitted is not None:
            rundir.write_yaml(
                attempt.submitted_yaml, {"scheduler": "slurm", "job_id": "7", "utc": at(submitted)}
            )
        facts = {"nodes": 3, "world_size": 12, "start": at(start), "hardware": {"cpu": "POWER9"}}
        rundir.write_yaml(attempt.attempt_yaml, facts)
    rundir.write_yaml(run.attempt(1).ended_yaml, {"state": "preempted", "reason": "", "utc": at(5.0)})
    return run


LAYERS = ("conv1", "conv2", "fc")
PHASES = {"data": 1, "forward": 20, "backward": 40, "capture": 6, "gather": 8, "factorise": 5, "invert": 9}


def rich_run(
    root: Path, name: str, *, experiment: str, seed: int, ranks: int = 2, level: float = 0.8
) -> RunDir:
    """Returns a completed run of four epochs that has written every table there is."""
    rng = np.random.default_rng(seed)
    run = make_run(
        root,
        name,
        experiment=experiment,
        settings={**_settings(ranks), "seed": seed},
        provenance={"host": "node1", "git": {"sha": "a" * 40, "diff": "- old\n+ new"}},
        status=Status("completed", "", 1, at(14.0)),
        tables={**_progress(rng, level), **_cost(ranks), **_curvature(rng), **_model(rng)},
    )
    for rank in range(1, ranks):
        writer = CsvWriter(run.metrics("profiling", rank), TABLES["profiling"])
        for cells in _phases(rank):
            writer.write(**row("profiling", **cells))
        writer.close()
    facts = {"nodes": 1, "world_size": ranks, "start": at(0.5), "hardware": {"cpu": "POWER9", "cpus": 4}}
    rundir.write_yaml(run.attempt(1).submitted_yaml, {"scheduler": "slurm", "job_id": "7", "utc": at(0.0)})
    rundir.write_yaml(run.attempt(1).attempt_yaml, facts)
    return run


def _settings(ranks: int) -> dict[str, Any]:
    return {"batch_size": 64 // ranks, "model": {"name": "net"}, "data": {"name": "digits"}}


def _progress(rng: np.random.Generator, level: float) -> dict[str, list[dict[str, Any]]]:
    train, evaluation, scores = [], [], []
    for step in range(1, 21):
        part = 1 - np.exp(-step / 6) + 0.01 * rng.standard_normal()
        row_ = clocked(1, step, 2.0 * step, 2.5 * step, 1.0, epoch=step / 5, loss=float(2.3 - 2 * part))
        train.append({**row_, "samples": 64 * step, "accuracy": level * float(part), "lr": 0.1})
        if step % 5 == 0:
            evaluation.append({**row_, "split": "test", "accuracy": level * float(part), "eval_s": 1.0})
            score = {"split": "test", "metric": "perplexity", "value": float(np.exp(row_["loss"]))}
            scores.append({"step": step, "epoch": step / 5, **score})
    return {"train": train, "eval": evaluation, "scores": scores}


def _phases(rank: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "rank": rank,
            "refresh": int(step % 5 == 1),
            "phase": phase,
            "seconds": ms / 1000 * (1 + rank / 10),
        }
        for step in range(1, 21)
        for phase, ms in PHASES.items()
    ]


def _cost(ranks: int) -> dict[str, list[dict[str, Any]]]:
    refreshes = range(1, 21, 5)
    return {
        "profiling": _phases(0),
        "communication": [
            {"step": step, "phase": phase, "op": "all_gather", "size_bytes": size * ranks}
            for step in refreshes
            for phase, size in (("gather", 4096), ("broadcast", 1024))
        ],
        "memory": [
            {"step": step, "kind": kind, "size_bytes": size}
            for step in refreshes
            for kind, size in (("rows", 2**20), ("factors", 2**18))
        ],
    }


def _curvature(rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    def at_refreshes(**cells: Any) -> list[dict[str, Any]]:
        return [
            {"step": step, "epoch": step / 5, "layer": layer, **cells}
            for step in range(1, 21, 5)
            for layer in LAYERS
        ]

    def some() -> float:
        return float(rng.uniform(0.1, 1.0))

    return {
        "rank_analysis": [
            {
                **each,
                "samples": 64,
                "share": 0.9,
                "low_rank": int(rng.integers(2, 30)),
                "top_eigenvalue": some(),
                "damping": 0.3,
            }
            for each in at_refreshes()
        ],
        "kept": at_refreshes(method="kid", rule="ratio", samples=64, kept=6),
        "switches": [
            {"step": 5 * epoch, "epoch": epoch, "method": "kis" if epoch == 2 else "kid", "lr": 0.1}
            for epoch in range(4)
        ],
        "grad_norm": [
            {"step": step, "epoch": step / 5, "layer": layer, "norm": some()}
            for step in range(1, 21)
            for layer in LAYERS
        ],
        "grad_error": [
            {**each, "relative_error": some(), "cosine": some()}
            for method in ("kid", "kis")
            for each in at_refreshes(method=method)
        ],
        "quantify": [
            {
                "step": step,
                "epoch": step / 5,
                "norm_ratio": 2 + some(),
                "angle_deg": 20 * some(),
                "q50": some(),
            }
            for step in range(1, 21, 2)
        ],
        "lbfgs": [
            {
                "step": step,
                "epoch": step / 5,
                "objective": 2.0 / step,
                "iterations": step,
                "evaluations": 2 * step + step // 3,
                "kept": step - step // 4,
                "damped": step // 5,
                "skipped": step // 4,
                "resets": step // 15,
            }
            for step in range(1, 21)
        ],
        "staleness": [
            {
                "step": step,
                "epoch": step / 5,
                "worker": 1 + step % 2,
                "pulled": step - 1 - step % 3,
                "staleness": step % 3,
                "work": step - 1,
                "delay_ms": 30.0,
            }
            for step in range(3, 21)
        ],
    }


def _model(rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    shapes = zip(LAYERS, ("Conv2d", "Conv2d", "Linear"), (9, 144, 512), (16, 32, 10), strict=True)
    grid = np.linspace(-1, 1, 7)
    plane = {"plane": "p1", "split": "test"}
    return {
        "layers": [
            {"layer": layer, "kind": kind, "d_in": d_in, "d_out": d_out, "has_bias": 1,
             "parameters": (d_in + 1) * d_out}
            for layer, kind, d_in, d_out in shapes
        ],
        "confusion": [
            {"step": 20, "epoch": 4.0, "split": "test", "label": label, "predicted": predicted,
             "count": int(count)}
            for label in range(3)
            for predicted, count in enumerate(rng.integers(1, 5, 3) + 20 * np.eye(3, dtype=int)[label])
        ],
        "landscape": [
            {**plane, "kind": "pca", "row": i, "column": j, "a": a, "b": b, "loss": a * a + 2 * b * b + 0.1,
             "accuracy": 0.5, "count": 100, "share_a": 0.7, "share_b": 0.2, "buffers": "recomputed"}
            for i, b in enumerate(map(float, grid))
            for j, a in enumerate(map(float, grid))
        ],
        "landscape_path": [
            {**plane, "step": step, "a": 1 - step / 20, "b": 0.5 - step / 40, "distance": 0.1,
             "loss": 1 - step / 25, "accuracy": 0.5}
            for step in (5, 10, 15, 20)
        ],
    }  # fmt: skip


def rich_runs(root: Path) -> Path:
    """Returns a folder of runs that have everything: two methods, three seeds, 1 to 4 ranks, one failed."""
    for seed in (1, 2, 3):
        rich_run(root, f"sgd-{seed}", experiment="net-sgd", seed=seed, level=0.80 + 0.002 * seed)
        rich_run(root, f"hylo-{seed}", experiment="net-hylo", seed=seed, level=0.95 + 0.001 * seed)
    for ranks in (1, 4):
        rich_run(root, f"hylo-ranks-{ranks}", experiment="net-hylo", seed=1, ranks=ranks, level=0.95)
    make_run(
        root,
        "failed",
        experiment="net-sgd",
        settings={**_settings(2), "seed": 4},
        status=Status("failed", "nan: loss is nan", 1),
    )
    return root
