"""What a run says of its model and its predictions: layers.csv and confusion.csv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hpcsngd import rundir
from hpcsngd.tables import TABLES
from hpcsngd.train.layers import layer_rows
from hpcsngd.train.tasks import Classification
from tests.ranks import run_on_ranks
from tests.train import runs


def test_dimensions_of_layers_are_those_of_their_matrices() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Linear(7, 3)
    )
    rows = [tuple(row.values()) for row in layer_rows(model)]
    assert rows == [
        ("0", "Conv2d", 2 * 3 * 5, 6, 0, 180),
        ("1", "BatchNorm2d", 0, 0, 1, 12),
        ("3", "Linear", 7, 3, 1, 24),
    ]


def test_predictions_are_counted_by_label_and_class() -> None:
    evaluation = Classification(3).evaluation(runs.CPU)
    outputs = torch.tensor([[9.0, 1, 1], [0, 5, 4], [2, 2, 0], [0, 0, 1]])
    evaluation.add([0, 1], outputs[:2], torch.tensor([0, 2]))
    evaluation.add([2, 3], outputs[2:], torch.tensor([1, 2]))
    counts = evaluation.result().confusion
    assert counts is not None
    assert counts.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]  # of equal outputs the first


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_writes_the_confusion_of_its_end(tmp_path: Path, ranks: int) -> None:
    run = runs.make_run(tmp_path, batch_size=16 // ranks)
    run_on_ranks(runs.train, ranks, run)
    rows = list(rundir.read_rows(run.metrics("confusion"), TABLES["confusion"]))
    last = list(rundir.read_rows(run.metrics("eval"), TABLES["eval"]))[-1]
    assert {(row["step"], row["split"]) for row in rows} == {(last["step"], "test")}
    assert sum(row["count"] for row in rows) == last["count"] == 60
    correct = sum(row["count"] for row in rows if row["label"] == row["predicted"])
    assert correct / 60 == pytest.approx(last["accuracy"])
    assert all(row["count"] > 0 for row in rows)
    layers = list(rundir.read_rows(run.metrics("layers"), TABLES["layers"]))
    assert sum(row["parameters"] for row in layers) == 40 + 296 + 8256 + 650
