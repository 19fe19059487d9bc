"""HyLo against SGD on Fashion-MNIST: tune on held-out training images, train on all, compare on test images.

Run: ``python -m benchmarks.fashion_mnist grid|runs|table FOLDER``. ``grid`` trains every cell of every
method's grid on one tuning seed and prints which are chosen; their settings belong into ``jobs/``. ``runs``
trains the experiments of ``jobs/`` on the seeds of the study, ``table`` compares them. Methods, grids, seeds
and target are in ``benchmarks/fashion_mnist.yaml``. Cells that have ended are skipped when a command is
repeated; every cell is an ordinary run directory.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks import fashion_mnist_numbers as numbers
from hpcsngd import rundir
from hpcsngd.config import strict
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.fields import Strict
from hpcsngd.config.resolve import Override, Resolved, from_record, resolve
from hpcsngd.errors import ConfigError
from hpcsngd.launch.submit import submit, wait
from hpcsngd.rundir import RunDir

STUDY = Path(__file__).with_suffix(".yaml")
PROSE = ("description", "paper", "reference", "corrections", "published")
"""Keys of an experiment that change nothing: rewording them does not ask for a new run."""

_HEADS_BYTES = {"images-idx3": 16, "labels-idx1": 8}


class Method(Strict):
    """A method: the experiment that ships it and the settings that the grid tries."""

    label: str
    experiment: str
    grid: list[dict[str, float]]


class Study(Strict):
    """The study; see the file itself for the protocol."""

    target: float = Field(ge=0, le=1)
    """Accuracy, a share."""
    held_out: int = Field(ge=1)
    """How many of the last training images the grid judges by instead of training on them."""
    tuning_seed: int
    """Seed of the grid; none of `seeds`."""
    seeds: list[int]
    """Seeds of the runs."""
    every: dict[str, Any]
    """Keys set in every cell."""
    methods: list[Method]
    """The first is the baseline."""


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        label: the method.
        experiment: name of its experiment.
        tuned: the keys that the grid varies; empty for the runs that are compared.
        sets: all keys set on top of the experiment.
    """

    label: str
    experiment: str
    tuned: Mapping[str, float]
    sets: Mapping[str, Any]

    def resolve(self) -> Resolved:
        """Returns the configuration on this machine."""
        overrides = [Override(f"experiment.{key}", value, "the study") for key, value in self.sets.items()]
        return resolve("local", self.experiment, overrides)

    def __str__(self) -> str:
        settings = {**self.tuned, "seed": self.sets["seed"]}
        return " ".join([self.label, *(f"{key}={value}" for key, value in settings.items())])


def read_study(path: Path) -> Study:
    """Returns the study in a YAML file."""
    return Study.model_validate(strict.load(path).data)


def grid_cells(study: Study, data_root: Path) -> list[Cell]:
    """Returns the cells of the grid, methods by turns so that drifts of the machine meet all alike."""
    shared = {**study.every, "seed": study.tuning_seed, "data.root": str(data_root)}
    per_method = [
        [Cell(method.label, method.experiment, tuned, {**shared, **tuned}) for tuned in method.grid]
        for method in study.methods
    ]
    turns = itertools.zip_longest(*per_method)
    return [cell for turn in turns for cell in turn if cell is not None]


def run_cells(study: Study) -> list[Cell]:
    """Returns the runs to compare, methods by turns, beginning with another method for each seed."""
    count = len(study.methods)
    return [
        Cell(method.label, method.experiment, {}, {**study.every, "seed": seed})
        for turn, seed in enumerate(study.seeds)
        for method in itertools.islice(itertools.cycle(study.methods), turn % count, turn % count + count)
    ]


def ended_run(folder: Path, cell: Cell) -> RunDir | None:
    """Returns the run of a cell that has ended: completed, or gone to NaN, which is a result as well."""
    wanted = cell.resolve()
    for file in sorted(folder.glob("*/run.yaml")):
        run = rundir.open_run(file.parent)
        if _is_same(run, wanted) and _has_result(run):
            return run
    return None


def run_all(cells: Sequence[Cell], folder: Path) -> Iterator[RunDir]:
    """Yields the run of each cell, training those that have not ended, with a line of progress for each."""
    for number, cell in enumerate(cells, start=1):
        run, began = ended_run(folder, cell), time.monotonic()
        if run is None:
            run = submit(cell.resolve(), argv=["benchmarks.fashion_mnist", str(cell)], run_root=folder).run
            wait(run)
        status = run.status()
        outcome = "unknown" if status is None else status.state
        seconds = time.monotonic() - began
        print(f"{rundir.utc_now()[:19]} {number}/{len(cells)} {cell}: {outcome}, {seconds:.0f} s", flush=True)
        yield run


def hold_out(source: Path, root: Path, count: int) -> None:
    """Writes a data set whose test images are the last ``count`` training images of another.

    Args:
        source: folder with Fashion-MNIST's two gzipped training files.
        root: the new data root.
        count: images to hold out; the others are for training.
    """
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, head_bytes in _HEADS_BYTES.items():
        data = gzip.decompress((source / f"train-{kind}-ubyte.gz").read_bytes())
        total = int.from_bytes(data[4:8], "big")
        cut = len(data) - count * (len(data) - head_bytes) // total
        parts = {"train": (total - count, data[head_bytes:cut]), "t10k": (count, data[cut:])}
        for split, (size, values) in parts.items():
            head = data[:4] + size.to_bytes(4, "big") + data[8:head_bytes]
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + values)


def _is_same(run: RunDir, wanted: Resolved) -> bool:
    """Returns whether a run trained what is wanted; keys added since then count by their defaults."""
    try:
        found = from_record(run.record()["config"])
    except ConfigError:  # a key is gone or means something else
        return False
    return found.exp_name == wanted.exp_name and _facts(found) == _facts(wanted)


def _facts(resolved: Resolved) -> dict[str, Any]:
    return resolved.experiment.model_dump(exclude=set(PROSE))


def _has_result(run: RunDir) -> bool:
    status = run.status()
    if status is None:
        return False
    return status.state == "completed" or (status.fault or {}).get("kind") == "nan"


def _grid(study: Study, folder: Path, source: Path) -> None:
    data_root = (folder / "held-out").absolute()
    hold_out(source, data_root, study.held_out)
    cells = grid_cells(study, data_root)
    runs = list(run_all(cells, folder / "grid"))
    table = numbers.grid_table([(cell.label, cell.tuned) for cell in cells], runs, study.target)
    table.to_csv(folder / "grid.csv", index=False, float_format="%.6g")
    print(table.to_string(index=False))


def _table(study: Study, folder: Path) -> None:
    order = [method.label for method in study.methods]
    cells = sorted(run_cells(study), key=lambda cell: order.index(cell.label))
    found = [(cell, ended_run(folder / "runs", cell)) for cell in cells]
    missing = [str(cell) for cell, run in found if run is None]
    ended = [(cell, run) for cell, run in found if run is not None]
    if not ended:
        raise SystemExit(f"no run of the study has ended in {folder / 'runs'}: start them with `runs`")
    outcomes = numbers.outcomes([run for _, run in ended], study.target)
    outcomes.insert(0, "method", [cell.label for cell, _ in ended])
    outcomes.insert(1, "seed", [cell.sets["seed"] for cell, _ in ended])
    outcomes.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    print(numbers.render(outcomes, study.target, order[0]))
    if missing:
        print(f"not run yet: {', '.join(missing)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fashion_mnist", description=__doc__)
    parser.add_argument("command", choices=["grid", "runs", "table"])
    parser.add_argument("folder", type=Path, help="where run directories are kept")
    parser.add_argument("--study", type=Path, default=STUDY)
    packaged = Path(DATASETS["fashion-mnist"].system_paths[0]).parent
    parser.add_argument(
        "--data", type=Path, default=packaged, help="folder of the gzipped idx files, for grid"
    )
    options = parser.parse_args(arguments)
    study = read_study(options.study)
    if options.command == "grid":
        _grid(study, options.folder, options.data)
        return
    if options.command == "runs":
        for _ in run_all(run_cells(study), options.folder / "runs"):
            pass
    _table(study, options.folder)


if __name__ == "__main__":
    main()
