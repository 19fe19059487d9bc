"""Whole runs on data in files: masks, changed images, files of which one is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import dist
from hpcsngd.rundir import RunDir
from hpcsngd.train import tinydata
from hpcsngd.train.sampler import EvaluationSampler
from hpcsngd.train.tasks import Evaluated, Segmentation
from tests.ranks import run_on_ranks
from tests.train.runs import HYLO, assert_same_weights, make_run, rows, train, weights
from tests.train.test_session import finished, request_stop_at

AUGMENT = {"data.augment": "{crop: 1, flip: true, cutout: 2}"}


def data_of(name: str, folder: Path, **fields: Any) -> dict[str, str]:
    """Returns the setting for a tiny data set, which is written once."""
    root = folder / "tiny"
    if not root.exists():
        tinydata.write(name, root)
    pairs = {"name": name, "root": str(root), **fields}
    return {"data": "{" + ", ".join(f"{key}: {value}" for key, value in pairs.items()) + "}"}


def unet(folder: Path, epochs: int) -> RunDir:
    images = data_of(
        "lgg-mri",
        folder,
        size=32,
        validation_patients=2,
        augment="{scale: 0.05, rotate: 15, flip: true}",
    )
    common = {
        "task": "segmentation",
        "model": "{name: unet, args: {width: 4}}",
        "loss": "{name: dice}",
        "optimizer.lr": "0.02",
        "batch_size": 8,
        "preconditioner.rescale": "norm",
        "epochs": epochs,
    }
    return make_run(folder, **HYLO, **images, **common)


def test_a_segmentation_run_writes_what_it_promises(tmp_path: Path) -> None:
    run = unet(tmp_path, epochs=4)
    assert train(run)
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses[-1] < losses[0] - 0.05
    patients = rows(run, "dice")
    assert [(row["step"], row["slices"]) for row in patients] == [
        (step, 8) for step in (6, 12, 18, 24) for _ in range(2)
    ]
    evaluations = rows(run, "eval")
    assert [(row["split"], row["count"]) for row in evaluations] == [("validation", 16)] * 4
    last = [row["dice"] for row in patients if row["step"] == 24]
    assert evaluations[-1]["accuracy"] == pytest.approx(sum(last) / 2)
    result = finished(run)
    assert result["validation_accuracy"] == evaluations[-1]["accuracy"]
    assert result["validation_accuracy"] > 0.3


def test_a_stopped_segmentation_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = unet(tmp_path, epochs=2), unet(tmp_path, epochs=2)
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, 8)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    for table in ("train", "eval", "dice"):
        assert rows(whole, table) == rows(parted, table)


@pytest.mark.parametrize("stop_after", [5, 13])
def test_changes_of_images_go_on_as_if_nothing_had_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    whole, parted, plain = (make_run(tmp_path, **settings) for settings in (AUGMENT, AUGMENT, {}))
    assert train(whole)
    assert train(plain)
    with monkeypatch.context() as patch:
        request_stop_at(patch, stop_after)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    assert rows(whole, "train") == rows(parted, "train")
    assert rows(whole, "train") != rows(plain, "train")


def test_files_of_which_one_is_in_memory_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **data_of("imagenet32", tmp_path, classes=10, augment="{crop: 4, flip: true}"),
        "model": "{name: resnet20, args: {width: 4}}",
        "batch_size": 8,
    }
    whole, parted = (make_run(tmp_path, **settings) for _ in range(2))
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, 8)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    assert [row["count"] for row in rows(whole, "eval")] == [16, 16]


@pytest.mark.slow
def test_loader_processes_change_images_alike(tmp_path: Path) -> None:
    alone, helped = make_run(tmp_path, **AUGMENT), make_run(tmp_path, **AUGMENT, **{"data.workers": 2})
    for run in (alone, helped):
        assert train(run)
    assert_same_weights(alone, helped)


def test_stored_features_are_learned_by_a_linear_model(tmp_path: Path) -> None:
    settings = {**data_of("features", tmp_path), "model": "{name: linear}", "epochs": 20}
    run = make_run(tmp_path, **settings)
    assert train(run)
    assert finished(run)["validation_accuracy"] > 0.8


def test_channels_last_computes_nearly_the_same(tmp_path: Path) -> None:
    for settings in (HYLO, {"preconditioner": "{name: kfac, damping: 0.1}", "optimizer.lr": "0.01"}):
        plain = make_run(tmp_path, epochs=1, **settings)
        last = make_run(tmp_path, epochs=1, **settings, **{"model.channels_last": "true"})
        assert train(plain)
        assert train(last)
        for name, value in weights(plain).items():
            # sums in another order, in float32, over 13 steps
            torch.testing.assert_close(weights(last)[name], value, rtol=2e-3, atol=2e-5)


def test_blurpool_reaches_the_model(tmp_path: Path) -> None:
    settings = {
        **data_of("cifar10", tmp_path),
        "model": "{name: resnet20, args: {width: 16}, blurpool: true}",
        "epochs": 1,
    }
    run = make_run(tmp_path, **settings)
    assert train(run)
    assert [name for name in weights(run) if "conv1.conv" in name] == [
        "6.conv1.conv.weight",
        "9.conv1.conv.weight",
    ]


def evaluate() -> Evaluated:
    """Returns the evaluation of five patients, whose outputs follow from their indices, on these ranks."""
    groups = {"a": 3, "b": 1, "c": 4, "d": 2, "e": 3}
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(13, 1, 6, 6, generator=generator)
    masks = (torch.rand(13, 1, 6, 6, generator=generator) > 0.5).float()
    evaluation = Segmentation(1.0, groups).evaluation(torch.device("cpu"))
    sampler = EvaluationSampler(
        13, 2, rank=dist.rank(), ranks=dist.world_size(), groups=list(groups.values())
    )
    for indices in sampler:
        evaluation.add(indices, outputs[indices], masks[indices])
    return evaluation.result()


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_patients_on_several_ranks_count_once(ranks: int) -> None:
    alone = evaluate()
    assert len(alone.patients) == 5
    for result in run_on_ranks(evaluate, ranks):
        assert result.patients == alone.patients
        assert result.sums.loss == pytest.approx(alone.sums.loss, rel=1e-6)
        assert (result.sums.accuracy, result.sums.count) == (alone.sums.accuracy, 13)
