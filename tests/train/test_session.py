"""Whole runs on one rank, in this process."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsngd import rundir
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import loop, models, seeds
from hpcsngd.train.checkpoint import COMMON
from hpcsngd.train.faults import NotFiniteError, SettingError
from tests.train.runs import HYLO, assert_same_weights, dropout_net, make_run, rows, train, weights


def finished(run: RunDir, attempt: int = 1) -> dict[str, Any]:
    return rundir.read_yaml(run.attempt(attempt).finished_yaml)


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert train(run)
    # 200 samples in steps of 16: 12 steps and a rest of 8, which is half a batch and so a step
    assert [row["step"] for row in rows(run, "train")] == [3, 6, 9, 12, 13, 15, 18, 21, 24, 26]
    assert [row["samples"] for row in rows(run, "train")][-1] == 400
    evaluations = rows(run, "eval")
    assert [(row["epoch"], row["step"], row["count"]) for row in evaluations] == [(1, 13, 60), (2, 26, 60)]
    result = finished(run)
    assert result["steps"] == 26
    assert result["epochs"] == 2
    assert result["parameters"] == models.parameter_count(models.build_model("digits-cnn", 10, 1, 8, width=4))
    assert result["test_accuracy"] == evaluations[-1]["accuracy"]
    assert result["best_test_accuracy"] == max(row["accuracy"] for row in evaluations)
    assert 0 < result["train_s"] < result["wall_s"]
    assert "Conv2d" in run.summary_txt.read_text()
    written = sorted(path.name for path in run.metrics_dir.iterdir())
    assert written == ["confusion.csv", "eval.csv", "layers.csv", "train.csv"]


def test_cross_validation_evaluates_the_held_out_fold(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"data.folds": "{count: 4, index: 1}", "data.train_limit": "100"})
    assert train(run)
    evaluations = list(rundir.read_rows(run.metrics("eval"), TABLES["eval"]))
    assert [(row["split"], row["count"]) for row in evaluations] == [("validation", 25)] * 2
    result = finished(run)
    assert result["validation_accuracy"] == evaluations[-1]["accuracy"]
    assert result["best_validation_accuracy"] == max(row["accuracy"] for row in evaluations)
    assert not [name for name in result if "test" in name]


@pytest.mark.parametrize("preconditioner", [{}, HYLO | {"preconditioner.damping": "0.5"}])
def test_digits_are_learned(tmp_path: Path, preconditioner: dict[str, str]) -> None:
    settings = {"data.train_limit": "null", "data.test_limit": "null", "epochs": "5", "batch_size": "32"}
    lr = {"optimizer.lr": "0.02"} if preconditioner else {}
    run = make_run(tmp_path, **settings, **preconditioner, **lr, **{"schedule.kind": "cosine"})
    assert train(run)
    assert finished(run)["test_accuracy"] >= 0.95


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    for preconditioner in ({}, HYLO):
        whole = make_run(tmp_path, batch_size=32, **preconditioner)
        parts = make_run(tmp_path, batch_size=16, accumulate=2, **preconditioner)
        assert train(whole)
        assert train(parts)
        for name, value in weights(whole).items():
            # sums in another order, in float32, over 14 steps
            torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=1e-5)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first, again, other = (make_run(tmp_path, seed=seed, **HYLO) for seed in (1, 1, 2))
    for run in (first, again, other):
        assert train(run)
    assert_same_weights(first, again)
    assert rows(first, "train") == rows(again, "train")
    assert rows(first, "train") != rows(other, "train")


@pytest.mark.slow
def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    alone, helped = make_run(tmp_path), make_run(tmp_path, **{"data.workers": 2})
    for run in (alone, helped):
        assert train(run)
    assert_same_weights(alone, helped)
    assert rows(alone, "eval") == rows(helped, "eval")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("stop_after", [5, 13])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, stop_after: int
) -> None:
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    monkeypatch.setitem(models.MODELS, "digits-cnn", dropout_net)
    settings = {"optimizer.name": optimizer, "optimizer.lr": "0.01"} | HYLO
    whole, parted = make_run(tmp_path, **settings), make_run(tmp_path, **settings)
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, stop_after)
        assert not train(parted)
    assert not parted.attempt(1).finished_yaml.exists()
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    for table in ("train", "eval"):
        assert rows(whole, table) == rows(parted, table)
    # Adam's second moment and the clock go on too
    assert (
        finished(parted, 2)["train_s"]
        > rundir.last_row(parted.metrics("train"), TABLES["train"])["train_s"] * 0.99
    )


def test_a_stop_request_file_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).stop_request.touch()
    assert not train(run)
    assert [path.name for path in run.checkpoints_dir.glob("step_*")] == ["step_1"]
    assert train(run, attempt=2)


def test_a_time_limit_ends_a_run_with_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path, train_limit_s=1e-9)
    assert train(run)
    # the first step uses up the time, the second one notices
    assert [row["step"] for row in rows(run, "train")] == [2]
    assert [row["step"] for row in rows(run, "eval")] == [2]
    result = finished(run)
    assert (result["steps"], result["epochs"]) == (2, 2 / 13)
    assert run.newest_checkpoint() == "step_2"
    assert train(run, attempt=2)
    assert finished(run, 2)["steps"] == 2


def test_a_finished_run_only_repeats_its_result(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert train(run)
    before = run.metrics("train").read_text()
    assert train(run, attempt=2)
    assert run.metrics("train").read_text() == before
    kept = {name: value for name, value in finished(run).items() if name != "wall_s"}
    assert kept == {name: value for name, value in finished(run, 2).items() if name != "wall_s"}


def test_checkpoints_follow_their_rule(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, **{"checkpoint.every_steps": 10, "checkpoint.every_epochs": "null", "checkpoint.keep": 9}
    )
    assert train(run)
    names = sorted(path.name for path in run.checkpoints_dir.glob("step_*"))
    assert names == ["step_10", "step_20", "step_26"]


def test_another_global_batch_cannot_resume(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=1)
    assert train(run)
    record = run.record()
    record["config"]["experiment"]["batch_size"] = 8
    rundir.write_yaml(run.run_yaml, record)
    with pytest.raises(SettingError, match=r"global batch of 16 \(13 steps per epoch\); 1 ranks now make 8"):
        train(run, attempt=2)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"optimizer.lr": "1e30", "checkpoint.every_steps": 1})
    with pytest.raises(NotFiniteError, match=r"loss is nan at step \d+; lr 1e\+30 may be too large"):
        train(run)
    assert not run.attempt(1).finished_yaml.exists()
    for folder in run.checkpoints_dir.glob("step_*"):
        saved = torch.load(folder / COMMON, weights_only=True)["parts"]["model"]
        assert all(value.isfinite().all() for value in saved.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, **{"checkpoint.every_steps": 1})
    update = loop.Trainer._update

    def spoil(self: loop.Trainer, size: int, own_loss: torch.Tensor) -> int:
        used = update(self, size, own_loss)
        if self.progress.step == 1:
            next(self._parts.model.parameters()).data[0] = float("inf")
        return used

    monkeypatch.setattr(loop.Trainer, "_update", spoil)
    with pytest.raises(NotFiniteError, match=r"a weight is not finite after step 2; .* step 1 stays"):
        train(run)
    assert [path.name for path in run.checkpoints_dir.glob("step_*")] == ["step_1"]


def test_diagnostics_write_their_tables(tmp_path: Path) -> None:
    switches = ("profiling", "rank_analysis", "grad_norm", "grad_error")
    settings = {f"diagnostics.{name}": "true" for name in switches} | HYLO
    settings["diagnostics.rank_shares"] = "[0.5, 0.9]"
    run = make_run(tmp_path, epochs=1, **settings, **{"preconditioner.method": "kis"})
    assert train(run)
    phases = {row["phase"] for row in rows(run, "profiling", rank=0)}
    assert {"data", "forward", "backward", "capture", "factorise", "precondition", "update"} <= phases
    refreshes = {row["step"] for row in rows(run, "profiling", rank=0) if row["refresh"]}
    assert refreshes == {1, 4, 7, 10, 13}
    assert {row["step"] for row in rows(run, "rank_analysis")} == refreshes
    assert {row["share"] for row in rows(run, "rank_analysis")} == {0.5, 0.9}
    assert {row["step"] for row in rows(run, "grad_error")} == refreshes
    assert {row["layer"] for row in rows(run, "grad_norm")} == {"0", "2", "6", "8"}
    assert {row["step"] for row in rows(run, "grad_norm")} == set(range(1, 14))
    assert all(row["size_bytes"] > 0 for row in rows(run, "memory"))


def test_kfac_writes_the_phases_of_the_original_study(tmp_path: Path) -> None:
    """Compute and communicate factors, compute and communicate inverses: there taken away, here timed."""
    settings = {"diagnostics.profiling": "true", "diagnostics.strength": "true"}
    kfac = "{name: kfac, inverse_every: 4, factor_every: 2, damping: 0.5, rescale: damping}"
    run = make_run(tmp_path, epochs=1, **settings, preconditioner=kfac)
    assert train(run)
    timed: dict[str, set[int]] = {}
    for row in rows(run, "profiling", rank=0):
        timed.setdefault(row["phase"], set()).add(row["step"])
    refreshes = {1, 5, 9, 13}
    assert timed["capture"] == timed["reduce"] == {1, 3, 5, 7, 9, 11, 13}
    assert timed["invert"] == timed["broadcast"] == refreshes
    assert timed["precondition"] == set(range(1, 14))
    measured = rows(run, "strength")
    assert {(row["step"], row["layer"]) for row in measured} == {
        (step, layer) for step in refreshes for layer in ("0", "2", "6", "8")
    }
    # It preconditions, and one can tell from the numbers beside it why that much.
    assert all(row["strength"] > 0 and row["mean_eigenvalue"] > 0 for row in measured)
    assert {row["damping"] for row in measured} == {0.5}


WINDOWS = {
    "mfac": {"preconditioner": "{name: mfac, num_grads: 8, damping: 0.1}"},
    "sparse mfac": {"preconditioner": "{name: mfac, num_grads: 8, damping: 0.1, storage: sparse}"},
    "ggt": {"preconditioner": "{name: ggt, num_grads: 8, eps: 0.1}"},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_train_and_say_how_much_they_precondition(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, epochs=1, **WINDOWS[name], **{"diagnostics.quantify_every": "5"})
    assert train(run)
    measured = rows(run, "quantify")
    assert [row["step"] for row in measured] == [1, 6, 11]
    assert all(0 <= row["angle_deg"] <= 180 and row["norm_u"] > 0 for row in measured)


def test_profiling_and_norms_need_no_preconditioner(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=1, **{"diagnostics.profiling": "true", "diagnostics.grad_norm": "true"})
    assert train(run)
    assert {row["phase"] for row in rows(run, "profiling", rank=0)} == {
        "data",
        "forward",
        "backward",
        "update",
    }
    assert {row["layer"] for row in rows(run, "grad_norm")} == {"0", "2", "6", "8"}


def test_gradient_norms_are_those_of_the_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1, bias=False))
    model[0].weight.grad = torch.tensor([[2.0, 3.0]])
    model[0].bias.grad = torch.tensor([6.0])
    assert loop.gradient_norms(model) == {"0": 7.0}


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    settings = {"optimizer.momentum": 0, "optimizer.lr": 0.5, "epochs": 1, "data.train_limit": 16}
    run = make_run(tmp_path, clip_norm=0.01, **settings)
    torch.manual_seed(seeds.derive(3, "weights"))
    start = models.build_model("digits-cnn", 10, 1, 8, width=4).state_dict()
    assert train(run)
    moved = sum(float((value - start[name]).square().sum()) for name, value in weights(run).items()) ** 0.5
    # one step of lr times the largest norm
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_label_smoothing_counts_in_training_only(tmp_path: Path) -> None:
    plain, smooth = make_run(tmp_path), make_run(tmp_path, **{"loss.label_smoothing": 0.2})
    for run in (plain, smooth):
        assert train(run)
    assert rows(smooth, "train")[-1]["loss"] > rows(plain, "train")[-1]["loss"] + 0.1
    assert rows(smooth, "eval")[-1]["loss"] < rows(smooth, "train")[-1]["loss"]


def test_bf16_computes_nearly_the_same(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        run = make_run(tmp_path, precision=precision, epochs=1, **HYLO, **{"optimizer.lr": 0.02})
        assert train(run)
        losses.append(rows(run, "train")[0]["loss"])
    assert losses[0] != losses[1]
    # bfloat16 keeps 8 bits; three steps from the same weights
    assert losses[1] == pytest.approx(losses[0], rel=2**-7)


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="precision fp16 needs a GPU; this rank computes on cpu"):
        train(make_run(tmp_path, precision="fp16"))


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path, epochs=1, **{"diagnostics.tensorboard": "true"})
    assert train(run)
    assert [path for path in run.tensorboard_dir.glob("events.*") if path.stat().st_size > 100]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingError, match="needs the package tensorboard"):
        train(make_run(tmp_path, **{"diagnostics.tensorboard": "true"}))


def test_the_hybrid_method_follows_epochs_and_writes_its_decisions(tmp_path: Path) -> None:
    hybrid = {
        "preconditioner": "{name: hylo, method: hybrid, ratio: 0.5, rescale: norm, refresh_every: 2,"
        " switch: {windows: [[1, 2]]}}",
        "diagnostics.rank_analysis": "true",
        "epochs": 3,
    }
    run = make_run(tmp_path, **hybrid)
    assert train(run)
    assert [(row["epoch"], row["method"]) for row in rows(run, "switches")] == [
        (0, "kis"), (1, "kid"), (2, "kis"),
    ]  # fmt: skip
    kept = rows(run, "kept")
    assert {row["method"] for row in kept} == {"kid", "kis"}
    assert all(0 < row["kept"] <= row["samples"] // 2 + 1 for row in kept)


def test_damping_decays_by_epochs_and_exact_convolutions_train(tmp_path: Path) -> None:
    decay = "{initial: 1.0, target: 0.2, epochs: 3}"
    settings = f"{{name: hylo, damping: {decay}, refresh_every: 1, conv_mode: exact, rescale: norm}}"
    run = make_run(tmp_path, preconditioner=settings, epochs=3, **{"diagnostics.rank_analysis": "true"})
    assert train(run)
    dampings = list(dict.fromkeys(row["damping"] for row in rows(run, "rank_analysis")))
    assert dampings[0] == 1.0
    assert dampings == sorted(dampings, reverse=True)
    assert 0.2 <= dampings[-1] < 0.5


def test_progress_is_logged_once_per_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert train(make_run(tmp_path))
    lines = [line for line in caplog.messages if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


def test_all_random_streams_come_back() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]

    seeds.seed_streams(seeds.derive(1, "test"))
    draw()
    states = seeds.stream_states()
    expected = draw()
    draw()
    seeds.restore_streams(states)
    assert draw() == expected


def test_seeds_differ_by_purpose_and_are_the_same_everywhere() -> None:
    assert seeds.derive(1, "order", 2) == 6032129378265912794
    assert len({seeds.derive(*words) for words in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 0))}) == 4


def request_stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Lets a stop request be seen during the given step."""
    patch.setattr(loop.Trainer, "_sees_stop_request", lambda self: self.progress.step + 1 == step)


def test_without_torchinfo_the_model_describes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchinfo", None)
    run = make_run(tmp_path)
    assert train(run)
    text = run.summary_txt.read_text()
    assert "Conv2d" in text
    assert text.endswith(" parameters\n")
