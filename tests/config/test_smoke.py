"""Scaling an experiment down: what shrinks, what stays, and what the command line keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.config import matrix, smoke
from hpcsngd.config.experiment import GGT, KFAC, MFAC, HyLo
from hpcsngd.config.resolve import Resolved, parse_set, resolve
from hpcsngd.resources import named_files


def small(name: str, *sets: str) -> Resolved:
    overrides = [parse_set(text) for text in sets]
    cells = matrix.resolve("local", name, overrides, environment={})
    resolved = cells.cells[0].resolved if cells else resolve("local", name, overrides, environment={})
    return smoke.scaled_down(resolved, "/tiny")


@pytest.mark.parametrize("name", named_files("jobs"))
def test_every_experiment_fits_two_cores(name: str) -> None:
    resolved = small(name)
    experiment = resolved.experiment
    assert (resolved.world_size, resolved.gpus_per_node, experiment.epochs) == (2, 0, 2)
    assert (experiment.precision, experiment.data.workers, experiment.data.download) == ("fp32", 0, False)
    assert experiment.batch_size * resolved.world_size <= 16
    # a line search finds its own length, and begins better with the file's
    is_searched = getattr(experiment.optimizer, "line_search", None) == "strong_wolfe"
    assert experiment.optimizer.lr <= (1.0 if is_searched else 1e-3)
    assert resolved.exp_name == f"{name}-smoke"


@pytest.mark.parametrize("name", named_files("jobs"))
def test_the_method_stays(name: str) -> None:
    cells = matrix.resolve("local", name, environment={})
    before = (cells.cells[0].resolved if cells else resolve("local", name, environment={})).experiment
    after = small(name).experiment
    for part in ("task", "strategy", "loss", "seed", "clip_norm"):
        assert getattr(after, part) == getattr(before, part), part
    assert after.model.name == before.model.name
    assert after.data.augment == before.data.augment
    assert after.schedule.kind == before.schedule.kind
    sizes = {
        "refresh_every",
        "factor_every",
        "inverse_every",
        "largest_factor",
        "num_grads",
        "switch",
        "damping",
    }
    if before.preconditioner is None:
        assert after.preconditioner is None
    else:
        assert after.preconditioner is not None
        kept, given = (
            each.model_dump(exclude=sizes) for each in (after.preconditioner, before.preconditioner)
        )
        assert kept == given


def test_periods_windows_and_factors_shrink() -> None:
    hylo = small("resnet32-hylo").experiment.preconditioner
    assert isinstance(hylo, HyLo)
    assert hylo.switch is not None
    assert (hylo.refresh_every, hylo.switch.windows) == (2, [(0, 1)])
    kfac = small("resnet50-kfac").experiment.preconditioner
    assert isinstance(kfac, KFAC)
    assert (kfac.factor_every, kfac.inverse_every, kfac.largest_factor) == (1, 2, 300)
    mfac = small("resnet20-cifar10-sparse-mfac").experiment.preconditioner
    ggt = small("logreg-sparse-ggt").experiment.preconditioner
    assert isinstance(mfac, MFAC)
    assert isinstance(ggt, GGT)
    assert mfac.num_grads == ggt.num_grads == 4


def test_epochs_of_schedules_shrink_with_the_run() -> None:
    schedule = small("resnet32-hylo").experiment.schedule
    assert schedule.milestones == pytest.approx([0.7, 1.5, 1.8])
    assert schedule.warmup_epochs == pytest.approx(0.1)
    damping = small("resnet50-imagenet-kfac").experiment.preconditioner
    assert isinstance(damping, KFAC)
    assert damping.damping.milestones == pytest.approx([80 / 55, 160 / 55])  # type: ignore[union-attr]


def test_images_and_their_growth_shrink() -> None:
    data = small("resnet18-imagenet-sgd").experiment.data
    assert (data.root, data.size, data.eval_size) == ("/tiny", 32, 32)
    assert data.resolution is not None
    assert (data.resolution.start, data.resolution.end, data.resolution.last_epoch) == (32, 64, 1)
    assert small("unet-hylo").experiment.data.validation_patients == 1


def test_encoders_and_windows_shrink() -> None:
    data = small("squad-bert-adamw").experiment.data
    assert (data.root, data.tokenizer, data.max_length, data.doc_stride) == ("/tiny", "tiny-bert", 32, 8)
    assert small("mnli-bert-adamw").experiment.data.doc_stride is None


def test_expressions_follow_the_two_ranks() -> None:
    resolved = small("resnet32-hylo")
    assert resolved.experiment.schedule.warmup_start == 0.5
    assert resolved.expressions["experiment.schedule.warmup_start"] == "1 / world_size"
    assert resolved.origins["experiment.optimizer.lr"] == "--smoke"


def test_what_was_set_by_hand_stays() -> None:
    experiment = small("resnet32-hylo", "epochs=5", "batch_size=4", "optimizer.lr=0.5").experiment
    assert (experiment.epochs, experiment.batch_size, experiment.optimizer.lr) == (5, 4, 0.5)


def test_a_file_of_ones_own_is_scaled_down_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "description: mine\nmodel: {name: digits-cnn}\ndata: {name: digits}\nbatch_size: 64\nepochs: 50\n"
        "optimizer: {name: muon, lr: 0.02, adamw_lr: 0.01}\naccumulate: 8\n"
    )
    experiment = small(str(tmp_path / "mine.yaml")).experiment
    assert (experiment.accumulate, experiment.data.train_limit) == (2, 32)
    assert experiment.optimizer.adamw_lr == 1e-3  # type: ignore[union-attr]
