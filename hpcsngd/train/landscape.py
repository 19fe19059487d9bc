"""The loss on a plane through the checkpoints of runs, or around the last one, as landscape.csv.

Every rank evaluates its share of the data at every point, so the ranks of a job need no more memory than one,
and one point is done after another: each becomes a row at once, and a second call goes on where the first was
ended. Augmentation is off and labels are not smoothed.

Batch norm's running statistics belong to the weights they were collected with and fit no others. By default
they are collected anew at each point, from the same training samples; ``keep`` leaves those of the first
run's last checkpoint. Checkpoints themselves are evaluated with their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hpcsngd import dist, rundir
from hpcsngd.config import resolve
from hpcsngd.config.resolve import Resolved
from hpcsngd.rundir import CsvWriter, RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import data, devices, loop, planes, session, tasks
from hpcsngd.train.checkpoint import Checkpoints
from hpcsngd.train.faults import SettingError
from hpcsngd.train.metrics import Sums
from hpcsngd.train.planes import Plane

# how samples come into memory, and how training changes them, does not show here
_APART = ("root", "workers", "download", "stage", "augment", "resolution")

Tick = Callable[[int, int], None]
"""Is told how many points are done, and of how many."""


@dataclass(frozen=True)
class Settings:
    """What to draw.

    Attributes:
        kind: ``pca``: through all checkpoints of the runs; ``random``: two filter-normalised directions
            around the last checkpoint of the first run.
        split: ``train``, or ``test``: what the run evaluates on.
        points: grid points along each axis, at least 2.
        margin: of a pca plane, beyond the checkpoints on every side, as a share of their range.
        span: of a random plane, in lengths of the directions to each side.
        samples: evaluate this many samples only; None for all.
        buffers: batch norm's statistics: ``recompute`` or ``keep``.
        batches: training batches to recompute them from.
        seed: of the random directions.
    """

    kind: Literal["pca", "random"] = "pca"
    split: Literal["train", "test"] = "test"
    points: int = 25
    margin: float = 0.25
    span: float = 1.0
    samples: int | None = None
    buffers: Literal["recompute", "keep"] = "recompute"
    batches: int = 10
    seed: int = 0


@dataclass(frozen=True)
class _Snapshot:
    """One checkpoint: of which run (by position), its step, and its weights as one vector on the CPU."""

    run: int
    step: int
    weights: Tensor


class Landscape:
    """A plane of some runs, and what is needed to evaluate on it; making one is collective.

    Args:
        runs: run directories; the first owns the grid, and its data and model are used.
        settings: what to draw.
        device: where this rank computes.

    Raises:
        SettingError: runs of different models or data, too few checkpoints, or a setting out of its range.
    """

    def __init__(self, runs: Sequence[RunDir], settings: Settings, device: torch.device) -> None:
        if settings.points < 2:
            raise SettingError(f"a grid needs at least 2 points along each axis, not {settings.points}")
        self._runs, self._settings, self._device = runs, settings, device
        self._resolved = _common_config(runs)
        config = self._resolved.experiment
        self._splits = data.load(config.data, self._resolved.site.data_root, seed=config.seed)
        self._model = session.build_model(config, self._splits, device)
        norms = (module for module in self._model.modules() if isinstance(module, _BatchNorm))
        self._norms = [module for module in norms if module.track_running_stats]
        self._checkpoints = [Checkpoints(run.checkpoints_dir, keep=1) for run in runs]
        self._snapshots = list(self._read_snapshots())
        self._plane = self._make_plane()
        self._shown = self._splits.train if settings.split == "train" else self._splits.test
        if settings.samples is not None:
            self._shown = self._shown.limited(settings.samples)
        self._shown = self._shown.laid_out(config.eval_batch_size or config.batch_size)
        self._task = tasks.build(config, self._splits.num_classes, self._shown)
        self._batches = session.evaluation_batches(self._shown, config, device, workers=0)

    @property
    def name(self) -> str:
        """Returns the plane's identity: equal for equal runs, checkpoints and settings."""
        facts = asdict(self._settings) | {
            "runs": [run.name for run in self._runs],
            "steps": [[snapshot.run, snapshot.step] for snapshot in self._snapshots],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def path(self) -> Path:
        """Returns the file of the grid."""
        return self._runs[0].metrics("landscape")

    def evaluate(self, tick: Tick = lambda done, total: None) -> None:
        """Writes the rows that are missing of the checkpoints and the grid; collective."""
        self._write_paths()
        table, run = TABLES["landscape"], self._runs[0]
        known = {(row["row"], row["column"]) for row in self._written(run, "landscape")}
        points = [point for point in self._grid() if point[:2] not in known]
        total = self._settings.points**2
        self._restore(self._last())
        writer = CsvWriter(run.metrics("landscape"), table) if dist.rank() == 0 else None
        for place, (row, column, a, b) in enumerate(points):
            tick(total - len(points) + place, total)
            self._move_to(self._plane.at(a, b))
            sums = self._sums()
            if writer is not None:
                writer.write(row=row, column=column, a=a, b=b, **self._measured(sums), **self._facts())
        tick(total, total)
        if writer is not None:
            writer.close()

    def _read_snapshots(self) -> Iterator[_Snapshot]:
        for place, checkpoints in enumerate(self._checkpoints):
            for step in dist.broadcast_object(checkpoints.intact() if dist.rank() == 0 else None):
                self._restore_step(place, step)
                yield _Snapshot(place, step, parameters_to_vector(self._model.parameters()).detach().cpu())

    def _restore(self, snapshot: _Snapshot) -> None:
        """Gives the model all that a checkpoint holds of it."""
        self._restore_step(snapshot.run, snapshot.step)

    def _restore_step(self, run: int, step: int) -> None:
        common = self._checkpoints[run].common(step, self._device)
        self._model.load_state_dict(common["parts"]["model"])

    def _last(self) -> _Snapshot:
        """Returns the first run's last checkpoint."""
        found = [snapshot for snapshot in self._snapshots if snapshot.run == 0]
        if not found:
            raise SettingError(f"{self._runs[0].path} has no checkpoint")
        return found[-1]

    def _make_plane(self) -> Plane:
        if self._settings.kind == "random":
            generator = torch.Generator().manual_seed(self._settings.seed)
            self._restore(self._last())
            return planes.filter_normalised([each.cpu() for each in self._model.parameters()], generator)
        try:
            plane = planes.through([snapshot.weights for snapshot in self._snapshots])
        except ValueError as error:
            raise SettingError(
                f"{error}; keep more of them with checkpoint.keep, or draw --kind random"
            ) from error
        # one bit of difference between machines could turn an axis around
        for tensor in (plane.origin, plane.first, plane.second):
            dist.broadcast(tensor)
        return plane

    def _grid(self) -> list[tuple[int, int, float, float]]:
        """Returns row, column and coordinates of all points."""
        if self._settings.kind == "random":
            ranges = [(-self._settings.span, self._settings.span)] * 2
        else:
            found = [self._plane.place(each.weights)[:2] for each in self._snapshots]
            places = torch.tensor(found, dtype=torch.float64)
            low, high = places.min(dim=0).values, places.max(dim=0).values
            wide = (high - low) * self._settings.margin
            ranges = list(zip((low - wide).tolist(), (high + wide).tolist(), strict=True))
        a, b = (torch.linspace(*ends, self._settings.points, dtype=torch.float64).tolist() for ends in ranges)
        return [(row, column, x, y) for row, y in enumerate(b) for column, x in enumerate(a)]

    def _write_paths(self) -> None:
        """Writes where the checkpoints lie and what they are worth, with their own buffers."""
        table = TABLES["landscape_path"]
        for place, run in enumerate(self._runs):
            known = {row["step"] for row in self._written(run, "landscape_path")}
            writer = CsvWriter(run.metrics("landscape_path"), table) if dist.rank() == 0 else None
            for each in self._snapshots:
                if each.run != place or each.step in known:
                    continue
                self._restore(each)
                measured = self._measured(self._sums())
                a, b, distance = self._plane.place(each.weights)
                if writer is not None:
                    del measured["count"]
                    writer.write(step=each.step, a=a, b=b, distance=distance, **measured)
            if writer is not None:
                writer.close()

    def _written(self, run: RunDir, table: str) -> list[dict[str, Any]]:
        """Returns the rows of this plane that an earlier call has written; alike on every rank."""
        rows: list[dict[str, Any]] | None = None
        if dist.rank() == 0:
            path = run.metrics(table)
            found = rundir.read_rows(path, TABLES[table]) if path.exists() else iter(())
            rows = [row for row in found if (row["plane"], row["split"]) == (self.name, self._split)]
        return dist.broadcast_object(rows)

    def _move_to(self, weights: Tensor) -> None:
        """Gives the model other weights, and batch norm the statistics that go with them."""
        vector_to_parameters(weights.to(self._device), self._model.parameters())
        if self._norms and self._settings.buffers == "recompute":
            self._recompute()

    @torch.no_grad()
    def _recompute(self) -> None:
        """Collects batch norm's statistics as plain means over the same batches on every rank."""
        self._model.eval()  # dropout stays off
        momenta = [module.momentum for module in self._norms]
        for module in self._norms:
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
            module.train()
        size = self._resolved.experiment.batch_size
        for batch in range(min(self._settings.batches, -(-len(self._splits.train) // size))):
            stop = min((batch + 1) * size, len(self._splits.train))
            *inputs, _ = self._to_device(self._splits.train[list(range(batch * size, stop))])
            with devices.autocast(self._resolved.experiment.precision, self._device):
                self._model(*inputs)
        for module, momentum in zip(self._norms, momenta, strict=True):
            module.momentum = momentum

    def _sums(self) -> Sums:
        config = self._resolved.experiment
        evaluation = self._task.evaluation(self._device, is_full=False)
        return loop.evaluate(
            self._model, self._batches, evaluation, move=self._to_device, precision=config.precision
        ).sums

    def _measured(self, sums: Sums) -> dict[str, Any]:
        return {
            "plane": self.name,
            "split": self._split,
            "loss": sums.mean_loss,
            "accuracy": sums.accuracy,
            "count": sums.count,
        }

    def _facts(self) -> dict[str, Any]:
        kept = {"recompute": "recomputed", "keep": "kept"}[self._settings.buffers]
        return {
            "kind": self._settings.kind,
            "share_a": self._plane.share_first,
            "share_b": self._plane.share_second,
            "buffers": kept if self._norms else "none",
        }

    @property
    def _split(self) -> str:
        return "train" if self._settings.split == "train" else self._splits.evaluated

    def _to_device(self, batch: data.Batch) -> data.Batch:
        is_last = self._resolved.experiment.model.channels_last
        return loop.to_device(batch, self._device, is_channels_last=is_last)


def _common_config(runs: Sequence[RunDir]) -> Resolved:
    """Returns the first run's configuration, if the others have the same model, task and data."""
    found = [resolve.from_record(run.record()["config"]) for run in runs]
    first = _compared(found[0])
    for run, resolved in zip(runs, found, strict=True):
        for key, value in _compared(resolved).items():
            if value != first[key]:
                raise SettingError(
                    f"runs on one plane need the same {key}: {run.name} differs from {runs[0].name}"
                )
    return found[0]


def _compared(resolved: Resolved) -> dict[str, Any]:
    data_alone = resolved.experiment.data.model_dump(exclude=set(_APART))
    return {"model": resolved.experiment.model, "data": data_alone, "task": resolved.experiment.task}
