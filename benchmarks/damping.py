"""Damping and learning rate of the corrected experiments, tuned on small networks and little data.

Run: ``python -m benchmarks.damping grid|table FOLDER [--networks LABEL...]``. ``grid`` trains every cell of
``damping.yaml``, which states the protocol, on every seed in this process, and writes a row for each to
``FOLDER/damping.csv``; rows that are there are not made again. ``table`` shows means and the chosen cells of
a folder, by default of the numbers kept here.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field

from benchmarks import phantoms
from hpcsngd import rundir
from hpcsngd.config import strict
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.fields import Strict
from hpcsngd.config.resolve import Override, Resolved, resolve
from hpcsngd.train import session
from hpcsngd.train.faults import NotFiniteError

STUDY = Path(__file__).with_suffix(".yaml")
KEPT = Path(__file__).parent
TABLE = "damping.csv"
KEYS = ["network", "method", "lr", "damping", "seed"]
TUNED = ("optimizer.lr", "preconditioner.damping")


class Method(Strict):
    """A method: its name in the table, the experiment that ships it, keys set in all its cells, its grid."""

    label: str
    experiment: str
    every: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[float]]


class Network(Strict):
    """A network: its name, keys set for all its methods, and its data if they are generated."""

    label: str
    every: dict[str, Any]
    methods: list[Method]
    phantoms: int = 0
    """How many patients to generate."""


class Study(Strict):
    """The study; see the file itself for the protocol."""

    seeds: list[int]
    networks: list[Network]


def read_study(path: Path = STUDY) -> Study:
    """Returns the study in a YAML file."""
    return Study.model_validate(strict.load(path).data)


def cells(method: Method) -> list[dict[str, float]]:
    """Returns the settings of each cell of a method's grid."""
    return [
        dict(zip(method.grid, values, strict=True)) for values in itertools.product(*method.grid.values())
    ]


def resolved(network: Network, method: Method, cell: dict[str, float], seed: int, root: str) -> Resolved:
    """Returns the configuration of a cell on one seed.

    Args:
        network: of the cell.
        method: of the cell.
        cell: its settings.
        seed: of the run.
        root: folder of the data.
    """
    settings = {**network.every, **method.every, **cell, "seed": seed, "data.root": root}
    changes = [Override(f"experiment.{key}", value, "the study") for key, value in settings.items()]
    return resolve("local", method.experiment, changes, environment={})


def trained(config: Resolved) -> dict[str, Any]:
    """Returns what a run of this process reached; no accuracy where its loss became infinite."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = rundir.create(Path(folder), config.exp_name, {"config": config.to_record()})
        try:
            if not session.train(run, 1, torch.device("cpu"), started=time.monotonic()):
                raise SystemExit("stopped before the end of a run")
            result = rundir.read_yaml(run.attempt(1).finished_yaml)
        except NotFiniteError:
            result = {}
    accuracy, loss = (result.get(f"validation_{what}", float("nan")) for what in ("accuracy", "loss"))
    return {"accuracy": accuracy, "loss": loss, "cpu_s": round(time.process_time() - began, 1)}


def run_grid(study: Study, folder: Path, labels: Sequence[str]) -> None:
    """Trains what has no row yet and adds its row; seeds last, so that all cells of the first come first."""
    file = folder / TABLE
    done = pd.read_csv(file, dtype={"seed": int}) if file.exists() else pd.DataFrame(columns=KEYS)
    # as text: nan, for methods without damping, equals nothing
    known = {str(tuple(row)) for row in done[KEYS].astype(object).to_numpy().tolist()}
    for keys, config in _runs(study, folder, labels):
        if str(tuple(keys.values())) in known:
            continue
        row = pd.DataFrame([{**keys, **trained(config)}])
        row.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.6g")
        print(row.to_string(index=False, header=False), flush=True)


def _runs(study: Study, folder: Path, labels: Sequence[str]) -> Iterator[tuple[dict[str, Any], Resolved]]:
    """Yields the key of each row and its configuration."""
    for seed, network in itertools.product(study.seeds, study.networks):
        if labels and network.label not in labels:
            continue
        root = _data(network, folder)
        for method in network.methods:
            for cell in cells(method):
                lr, damping = (float(cell.get(key, "nan")) for key in TUNED)
                keys = dict(zip(KEYS, (network.label, method.label, lr, damping, seed), strict=True))
                yield keys, resolved(network, method, cell, seed, str(root))


def _data(network: Network, folder: Path) -> Path:
    """Returns the data root, with generated data in it where the network has them."""
    if not network.phantoms:
        return Path(DATASETS["fashion-mnist"].system_paths[0]).parents[1]
    root = folder / f"phantoms-{network.phantoms}"
    if not root.exists():
        phantoms.write(root, patients=network.phantoms)
    return root


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean over seeds of each cell, and which of each method is best.

    Args:
        rows: of the file that the grid writes.

    Returns:
        A row for each cell in the order of the file: ``accuracy`` and ``loss`` (means over the seeds; NaN
        where a run diverged), ``spread`` (largest less smallest accuracy), ``seeds``, and ``chosen``: the
        best of those cells of a method that have all seeds.
    """
    by = rows.groupby(KEYS[:-1], sort=False, dropna=False)
    table = by.agg(
        accuracy=("accuracy", lambda column: column.mean(skipna=False)),
        loss=("loss", lambda column: column.mean(skipna=False)),
        spread=("accuracy", lambda column: column.max() - column.min()),
        seeds=("seed", "size"),
    ).reset_index()
    complete = table[table["seeds"] == rows["seed"].nunique()]
    ordered = complete.sort_values(["accuracy", "loss"], ascending=[False, True], kind="stable")
    best = ordered.groupby(["network", "method"], sort=False).head(1).index
    result: pd.DataFrame = table.assign(chosen=table.index.isin(best))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damping", description=__doc__)
    parser.add_argument("command", choices=["grid", "table"])
    parser.add_argument("folder", type=Path, nargs="?", default=KEPT)
    parser.add_argument("--networks", nargs="*", default=[], help="only these; default: all")
    options = parser.parse_args(arguments)
    if options.command == "grid":
        torch.set_num_threads(1)
        run_grid(read_study(), options.folder, options.networks)
    table = chosen(pd.read_csv(options.folder / TABLE))
    print(table.to_string(index=False, na_rep="-", float_format="{:.5g}".format))


if __name__ == "__main__":
    main()
