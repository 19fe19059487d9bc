"""Small runs for tests: making their directories, training them on some ranks, comparing what they wrote."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd import rundir
from hpcsngd.config import resolve
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import loop, models, session
from hpcsngd.train.checkpoint import COMMON, LATEST, Checkpoints

CPU = torch.device("cpu")

EXPERIMENT = """\
description: a small run
model: {name: digits-cnn, args: {width: 4}}
data: {name: digits, train_limit: 200, test_limit: 60}
batch_size: 16
epochs: 2
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
checkpoint: {every_epochs: 1}
diagnostics: {log_every: 3}
seed: 3
"""

HYLO = {"preconditioner.name": "hylo", "preconditioner.damping": "0.3", "preconditioner.refresh_every": "3"}

#: Columns that no two runs have in common.
CHANGING = {"attempt", "utc", "train_s", "wall_s", "eval_s"}


def make_run(folder: Path, **settings: Any) -> RunDir:
    """Returns a new run of `EXPERIMENT`; settings are key paths with ``__`` for dots."""
    file = folder / "small.yaml"
    file.write_text(EXPERIMENT)
    changes = [
        resolve.override(name.replace("__", "."), str(value), "test") for name, value in settings.items()
    ]
    record = resolve.resolve("local", str(file), changes, environment={}).to_record()
    return rundir.create(folder / "runs", "small", {"config": record})


def train(run: RunDir, attempt: int = 1) -> bool:
    """Trains a run in this process, on the rank that it is."""
    return session.train(run, attempt, CPU, started=time.monotonic())


def train_with_dropout(run: RunDir, attempt: int = 1) -> bool:
    """Trains a net with dropout and batch norm in place of digits-cnn."""
    models.MODELS["digits-cnn"] = dropout_net
    return train(run, attempt)


def train_until_killed(run: RunDir, attempt: int, step: int, place: str) -> None:
    """Trains, with dropout, until every rank kills itself.

    Args:
        run: the run.
        attempt: number of the attempt.
        step: the step (counted from 1) in which it happens.
        place: ``step``, between backward and update; or ``checkpoint``, when the files are written and the
            folder does not have its name yet.
    """
    owner, name = {"step": (loop.Trainer, "_update"), "checkpoint": (Checkpoints, "_publish")}[place]
    original = getattr(owner, name)

    def deadly(self: Any, *args: Any) -> Any:
        now = self.progress.step + 1 if place == "step" else args[1]
        if now >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    setattr(owner, name, deadly)
    train_with_dropout(run, attempt)


def train_until_stopped(run: RunDir, step: int) -> None:
    """Trains until a stop request is seen in a step (counted from 1)."""
    loop.Trainer._sees_stop_request = (  # type: ignore[method-assign]
        lambda self: self.progress.step + 1 == step
    )
    assert not train(run)


def dropout_net(num_classes: int, in_channels: int, image_size: int, *, width: int) -> nn.Module:
    """Returns a net that needs everything a resume can forget: dropout, running statistics, branches."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Branches(width),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(width * image_size**2, num_classes),
    )


class _Branches(nn.Module):
    """Two convolutions used in another order than they are registered in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) + self.second(torch.relu(self.first(x)))
        return result


def weights(run: RunDir) -> dict[str, Tensor]:
    """Returns the model in the newest checkpoint."""
    name = (run.checkpoints_dir / LATEST).read_text().strip()
    common = torch.load(run.checkpoints_dir / name / COMMON, weights_only=True)
    model: dict[str, Tensor] = common["parts"]["model"]
    return model


def assert_same_weights(run: RunDir, other: RunDir) -> None:
    mine, others = weights(run), weights(other)
    assert mine.keys() == others.keys()
    different = [name for name in mine if not torch.equal(mine[name], others[name])]
    assert different == []


def rows(run: RunDir, table: str, rank: int | None = None) -> list[dict[str, Any]]:
    """Returns a table's rows in order, the last one per key, without the columns that always change."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rundir.read_rows(run.metrics(table, rank), TABLES[table]):
        kept[tuple(row[name] for name in TABLES[table].key)] = {
            name: value for name, value in row.items() if name not in CHANGING
        }
    return [kept[key] for key in sorted(kept)]
