"""Whole runs with L-BFGS: what is counted, what ranks agree on, what a resume repeats, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.config.resolve import ConfigError
from hpcsngd.rundir import RunDir
from hpcsngd.train import loop, models, tinydata
from hpcsngd.train.faults import NotFiniteError
from tests.ranks import run_on_ranks
from tests.train import runs
from tests.train.runs import assert_same_weights, make_run, rows, weights

#: Where batches and curvature come from, by a name: settings of a run, 48 samples of imagenet32 for files.
MODES: dict[str, dict[str, str]] = {
    "step": {"optimizer": "{name: lbfgs, iterations: 2}"},
    "overlap": {"optimizer": "{name: lbfgs, batches: overlap, overlap: 0.3, powell: 0.1}"},
    "file": {
        "optimizer": "{name: lbfgs, batches: file, iterations: 2}",
        "data": "{name: imagenet32, classes: 10}",
    },
    "full": {"optimizer": "{name: lbfgs, iterations: 3}", "strategy": "full_batch"},
    "plain": {"optimizer": "{name: lbfgs, line_search: none, lr: 0.2, iterations: 2}"},
}


class Counted(nn.Module):
    """Dropout, batch norm and convolutions in float64; notes how many samples it was trained on."""

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, *, width: int, drop: float
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=image_size // 8),
            nn.BatchNorm2d(width) if drop else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(drop),
            nn.Flatten(),
            nn.LazyLinear(num_classes),
        ).double()
        with torch.no_grad():
            self.inner.eval()(torch.zeros(1, in_channels, image_size, image_size, dtype=torch.float64))
        self.train()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x))
        result: Tensor = self.inner(x.double())
        return result


def new_run(folder: Path, mode: str, **settings: Any) -> RunDir:
    """Returns a new run in one of the modes."""
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"data.train_limit": 48, "data.test_limit": 16, "batch_size": 12}
    if mode == "file":
        tinydata.write("imagenet32", folder)
        common |= {"data.root": folder, "data.train_limit": "null", "data.test_limit": "null"}
    return make_run(folder, **(MODES[mode] | common | {"diagnostics.log_every": 1} | settings))


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """Puts nets with dropout in the place of digits-cnn; returns those that are built."""
    built: list[Counted] = []

    def build(num_classes: int, in_channels: int, image_size: int, *, width: int) -> nn.Module:
        built.append(Counted(num_classes, in_channels, image_size, width=width, drop=0.2))
        return built[-1]

    monkeypatch.setitem(models.MODELS, "digits-cnn", build)
    return built


@pytest.mark.parametrize("mode", MODES)
def test_every_evaluation_counts(mode: str, tmp_path: Path, net: list[Counted]) -> None:
    run = new_run(tmp_path, mode)
    assert runs.train(run)
    assert rows(run, "train")[-1]["samples"] == sum(net[0].seen)
    last = rows(run, "lbfgs")[-1]
    assert last["evaluations"] > last["iterations"] > 0
    assert last["kept"] + last["skipped"] == last["iterations"]
    if mode == "full":
        assert sum(net[0].seen) == 48 * last["evaluations"]


@pytest.mark.parametrize("mode", MODES)
def test_rows_tell_the_loss_at_each_step(mode: str, tmp_path: Path, net: list[Counted]) -> None:
    run = new_run(tmp_path, mode)
    assert runs.train(run)
    train, steps = rows(run, "train"), rows(run, "lbfgs")
    assert [row["step"] for row in train] == [row["step"] for row in steps]
    for mine, other in zip(train, steps, strict=True):
        assert mine["loss"] == pytest.approx(other["objective"], rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_bit_for_bit(
    mode: str, tmp_path: Path, net: list[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (new_run(tmp_path / name, mode) for name in ("whole", "parted"))
    assert runs.train(whole)
    last = rows(whole, "train")[-1]["step"]
    with monkeypatch.context() as patch:
        # within the second epoch, where it has more than one step
        stop = last - 1
        patch.setattr(loop.Trainer, "_sees_stop_request", lambda self: self.progress.step + 1 == stop)
        assert not runs.train(parted)
    assert runs.train(parted, attempt=2)
    assert_same_weights(whole, parted)
    for table in ("train", "eval", "lbfgs"):
        assert rows(whole, table) == rows(parted, table)


def test_running_statistics_advance_once_per_step(tmp_path: Path, net: list[Counted]) -> None:
    run = new_run(tmp_path, "full", batch_size=16)
    assert runs.train(run)
    # 48 samples in 3 micro-batches, 2 steps; evaluations of line searches leave no trace
    assert int(weights(run)["inner.1.num_batches_tracked"]) == 6
    assert rows(run, "lbfgs")[-1]["evaluations"] > 6


def test_pairs_without_enough_curvature_are_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path, "step", optimizer="{name: lbfgs, eps: 1.0}")
    assert runs.train(run)
    last = rows(run, "lbfgs")[-1]
    assert (last["kept"], last["skipped"]) == (0, last["iterations"])


def poison(patch: pytest.MonkeyPatch, step: int) -> None:
    """Makes every loss of a step (counted from 1) NaN."""
    micro_batch = loop.Trainer._micro_batch

    def poisoned(self: loop.Trainer, *arguments: Any) -> Tensor:
        sums = micro_batch(self, *arguments)
        return sums * math.nan if self.progress.step + 1 == step else sums

    patch.setattr(loop.Trainer, "_micro_batch", poisoned)


def test_a_batch_without_a_loss_costs_the_pairs_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path, "step")
    poison(monkeypatch, 3)
    assert runs.train(run)
    resets = [row["resets"] for row in rows(run, "lbfgs")]
    assert resets == [0, 0] + [1] * 6
    losses = [row["loss"] for row in rows(run, "train")]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False] + [True] * 5


def test_without_pairs_it_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1)
    with pytest.raises(NotFiniteError, match="loss is nan at step 1"):
        runs.train(new_run(tmp_path, "step"))


def test_digits_are_learned_from_full_batches(tmp_path: Path) -> None:
    settings = {"data.train_limit": 500, "data.test_limit": 200, "batch_size": 250, "epochs": 4}
    run = new_run(tmp_path, "full", **settings, **{"optimizer.iterations": 12})
    assert runs.train(run)
    assert rows(run, "eval")[-1]["accuracy"] > 0.85
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses == sorted(losses, reverse=True)  # a line search never goes up


def test_full_batches_serve_other_optimizers(tmp_path: Path) -> None:
    whole = new_run(tmp_path, "full", optimizer="{name: sgd, lr: 0.1}", batch_size=12)
    same = new_run(tmp_path, "full", optimizer="{name: sgd, lr: 0.1}", batch_size=48, strategy="ddp")
    for run in (whole, same):
        assert runs.train(run)
    assert [row["step"] for row in rows(whole, "train")] == [1, 2]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(same)[name], value, rtol=1e-5, atol=1e-6)


# Ranks


def float64_net(num_classes: int, in_channels: int, image_size: int, *, width: int) -> nn.Module:
    return Counted(num_classes, in_channels, image_size, width=width, drop=0.0)


def train_all(folders: list[Path]) -> None:
    """Trains one run after the other, without dropout."""
    models.MODELS["digits-cnn"] = float64_net
    for folder in folders:
        assert runs.train(RunDir(folder))


def runs_of_every_mode(folder: Path, batch_size: int) -> list[RunDir]:
    groups = {"optimizer.weight_decay": "0.01", "optimizer.no_decay": "[Linear]", "batch_size": batch_size}
    return [new_run(folder / mode, mode, **groups) for mode in MODES]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Returns finished runs of one process."""
    made = runs_of_every_mode(tmp_path_factory.mktemp("alone"), 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "digits-cnn", float64_net)
        train_all([run.path for run in made])
    return made


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_are_one_process_on_the_joined_batch(ranks: int, tmp_path: Path, alone: list[RunDir]) -> None:
    together = runs_of_every_mode(tmp_path, 12 // ranks)
    run_on_ranks(train_all, ranks, [run.path for run in together])
    for mine, others in zip(alone, together, strict=True):
        for name, value in weights(mine).items():
            # sums in another order, of which differences are taken: curvature pairs amplify their rounding
            torch.testing.assert_close(weights(others)[name], value, rtol=1e-6, atol=1e-8)
        for row, other in zip(rows(mine, "lbfgs"), rows(others, "lbfgs"), strict=True):
            assert row.pop("objective") == pytest.approx(other.pop("objective"), rel=1e-8)
            assert row == other
        samples, theirs = ([row["samples"] for row in rows(each, "train")] for each in (mine, others))
        assert samples == theirs


# Refusals


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"preconditioner.name": "kfac"}, "preconditioner: it has curvature of its own"),
        ({"clip_norm": 1.0}, "clip_norm: a clipped gradient"),
        ({"loss.average": "tokens"}, "loss.average tokens: it evaluates means over samples"),
        ({"precision": "bf16"}, "precision bf16: it needs fp32"),
        ({"schedule": "{warmup_epochs: 1, warmup_start: 0}"}, "a first step of 0"),
        ({"optimizer.batches": "file"}, "data set digits does not come in several files"),
        (
            {"optimizer.batches": "overlap", "strategy": "full_batch"},
            "batches overlap with strategy full_batch",
        ),
        (
            {"optimizer.batches": "file", "data": "{name: imagenet32}", "accumulate": 2},
            "batches file with accumulate",
        ),
        ({"strategy": "parameter_server"}, "all ranks must take the same step"),
        ({"optimizer.overlap": 0.5}, "overlap belongs to batches overlap, not step"),
        ({"optimizer.c1": 0.95}, "c1 must be below c2"),
        ({"strategy": "full_batch", "accumulate": 2}, "no accumulate"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        make_run(tmp_path, optimizer="{name: lbfgs}", **settings)
