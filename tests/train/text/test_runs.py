"""Whole runs on text: they learn, count every token once, and go on where they were stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import rundir
from hpcsngd.config import resolve
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import carried, loop, session, tinydata
from hpcsngd.train.faults import SettingError
from hpcsngd.train.text.vocabulary import CACHE
from tests.ranks import run_on_ranks
from tests.train import runs

LM = """\
description: a small language model
task: language_modelling
model: {name: lstm-lm, args: {width: 16, hidden: 16, layers: 1, dropout: 0.0}}
data: {name: ptb, stream: {length: 8}}
batch_size: 8
eval_batch_size: 3
epochs: 2
optimizer: {name: adam, lr: 0.02}
loss: {average: tokens}
diagnostics: {log_every: 1}
seed: 3
"""

TRANSLATION = """\
description: a small translator
task: translation
model: {name: transformer, args: {width: 32, inner: 64, heads: 2, layers: 1, dropout: 0.0}}
data: {name: multi30k, translation: {min_count: 1, buckets: 2}}
batch_size: 12
epochs: 2
optimizer: {name: adam, lr: 5.0e-3}
loss: {average: tokens, label_smoothing: 0.1}
decoding: {beam: 2, max_words: 8, every_epochs: 100}
diagnostics: {log_every: 1}
seed: 3
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("ptb", "multi30k"):
        tinydata.write(name, folder)
    return folder


def make_run(folder: Path, root: Path, experiment: str, **settings: Any) -> RunDir:
    file = folder / "small.yaml"
    file.write_text(experiment)
    changes = [resolve.override(name, str(value), "test") for name, value in settings.items()]
    changes.append(resolve.override("data.root", str(root), "test"))
    record = resolve.resolve("local", str(file), changes, environment={}).to_record()
    return rundir.create(folder / "runs", "small", {"config": record})


def scores(run: RunDir) -> dict[tuple[str, str], float]:
    """Returns (split, metric) -> value of the last evaluation."""
    rows = rundir.read_rows(run.metrics("scores"), TABLES["scores"])
    return {(row["split"], row["metric"]): row["value"] for row in rows}


def test_a_language_model_learns_and_every_token_counts_once(tmp_path: Path, root: Path) -> None:
    run = make_run(tmp_path, root, LM, epochs=12)
    assert runs.train(run)
    evaluations = runs.rows(run, "eval")
    assert {(row["split"], row["count"]) for row in evaluations} == {("validation", 64), ("test", 64)}
    last = {row["split"]: row for row in evaluations[-2:]}
    for split, row in last.items():
        assert scores(run)[split, "perplexity"] == pytest.approx(math.exp(row["loss"]))
    # the even distribution has 12
    assert scores(run)["validation", "perplexity"] < 8
    steps = runs.rows(run, "train")
    assert [row["samples"] for row in steps[:4]] == [8, 16, 24, 32]
    finished = rundir.read_yaml(run.attempt(1).finished_yaml)
    assert finished["validation_perplexity"] == scores(run)["validation", "perplexity"]
    assert finished["test_perplexity"] == scores(run)["test", "perplexity"]
    assert finished["test_loss"] == last["test"]["loss"]


def test_translation_is_learned(tmp_path: Path, root: Path) -> None:
    run = make_run(tmp_path, root, TRANSLATION, epochs=40)
    assert runs.train(run)
    # only the last evaluation translates
    bleu = [
        row for row in rundir.read_rows(run.metrics("scores"), TABLES["scores"]) if row["metric"] == "bleu"
    ]
    assert [(row["epoch"], row["split"]) for row in bleu] == [(40, "validation"), (40, "test")]
    # one that has learned nothing has less than 2; 48 sentences are few
    assert all(row["value"] > 10 for row in bleu)


@pytest.mark.parametrize("cell", ["fused", "linear"])
@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_stopped_language_model_goes_on_with_its_states(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, cell: str, stop_after: int
) -> None:
    settings = {"model.args.cell": cell, "model.args.dropout": 0.3}
    whole, parted = (make_run(tmp_path, root, LM, **settings) for _ in range(2))
    assert runs.train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_sees_stop_request", lambda self: self.progress.step + 1 == stop_after)
        assert not runs.train(parted)
    assert runs.train(parted, attempt=2)
    runs.assert_same_weights(whole, parted)
    for table in ("train", "eval", "scores"):
        assert runs.rows(whole, table) == runs.rows(parted, table)


def test_states_are_part_of_a_checkpoint(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them a resumed run would be another one: what the test above would see."""
    whole, parted = (make_run(tmp_path, root, LM) for _ in range(2))
    assert runs.train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_sees_stop_request", lambda self: self.progress.step + 1 == 3)
        assert not runs.train(parted)
    monkeypatch.setattr(session.carried, "restore", lambda model, found: carried.reset(model))
    assert runs.train(parted, attempt=2)
    with pytest.raises(AssertionError):
        runs.assert_same_weights(whole, parted)


def test_streams_cannot_be_accumulated(tmp_path: Path, root: Path) -> None:
    with pytest.raises(SettingError, match=r"lstm-lm goes on from step to step .* accumulate must be 1"):
        runs.train(make_run(tmp_path, root, LM, accumulate=2))


@pytest.mark.parametrize(("average", "factor"), [("tokens", 1.0), ("samples", 1 / 8), ("none", 1 / 64)])
def test_losses_are_averaged_as_stated(tmp_path: Path, root: Path, average: str, factor: float) -> None:
    """Samples are 8 of 8 tokens, so that rates in these ratios make the same steps."""
    changes = {"optimizer": "{name: sgd, lr: 1.0}", "epochs": 1}
    reference, other = (
        make_run(tmp_path, root, LM, **changes, **{"loss.average": kind, "optimizer.lr": 0.5 * rate})
        for kind, rate in (("tokens", 1.0), (average, factor))
    )
    for run in (reference, other):
        assert runs.train(run)
    for name, weight in runs.weights(reference).items():
        torch.testing.assert_close(runs.weights(other)[name], weight, rtol=1e-5, atol=1e-6)


def test_a_rate_falls_where_the_loss_does_not(tmp_path: Path, root: Path) -> None:
    # nothing is learned at this rate, so each evaluation after the first is no better
    run = make_run(
        tmp_path,
        root,
        LM,
        epochs=4,
        optimizer="{name: sgd, lr: 1.0e-30}",
        schedule="{kind: plateau, gamma: 0.5}",
    )
    assert runs.train(run)
    rates = {row["epoch"]: row["lr"] for row in runs.rows(run, "train") if row["epoch"] % 1 == 0}
    assert rates == {1: 1e-30, 2: 1e-30, 3: 5e-31, 4: 2.5e-31}


@pytest.mark.parametrize(
    "method", ["{name: hylo, damping: 0.1}", "{name: kfac, damping: 0.01}", "{name: mfac}"]
)
def test_preconditioners_change_what_is_learned(tmp_path: Path, root: Path, method: str) -> None:
    """On one rank: the direction is not the plain gradient's, and the loss falls."""
    settings = {"model.args.layers": 1, "preconditioner": method, "diagnostics.quantify_every": 1}
    kind = {"diagnostics.strength": "true"} if "kfac" in method else {}
    run = make_run(
        tmp_path, root, TRANSLATION, **settings, **kind, epochs=4, optimizer="{name: sgd, lr: 1.0e-3}"
    )
    assert runs.train(run)
    cosines = [row["cosine"] for row in rundir.read_rows(run.metrics("quantify"), TABLES["quantify"])]
    assert min(cosines) < 0.95
    assert min(cosines) > 0
    losses = [row["loss"] for row in runs.rows(run, "eval") if row["split"] == "validation"]
    assert losses[-1] < losses[0]
    if kind:
        found = list(rundir.read_rows(run.metrics("strength"), TABLES["strength"]))
        layers = {row["layer"] for row in found}
        assert {"source", "projection", "encoder.0.attention.query", "decoder.0.memory_norm"} <= layers
        assert max(row["strength"] for row in found) > 0.5


@pytest.mark.dist
@pytest.mark.parametrize("experiment", [LM, TRANSLATION], ids=["lm", "translation"])
def test_two_ranks_are_one(tmp_path: Path, root: Path, experiment: str) -> None:
    """The same global batch: the same losses, and evaluations of every token once."""
    alone = make_run(tmp_path, root, experiment, **{"decoding.every_epochs": 1})
    half = {"lm": 4, "translation": 6}["lm" if experiment is LM else "translation"]
    shared = make_run(tmp_path, root, experiment, batch_size=half, **{"decoding.every_epochs": 1})
    assert runs.train(alone)
    caches = list(root.glob(f"*/{CACHE}/*"))
    for file in caches:
        file.unlink()
    run_on_ranks(train_on_ranks, 2, str(shared.path))
    for table in ("train", "eval", "scores"):
        mine, theirs = runs.rows(alone, table), runs.rows(shared, table)
        assert len(mine) == len(theirs) > 0
        for row, other in zip(mine, theirs, strict=True):
            # sums in another order, in float32
            for name, value in row.items():
                close = value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
                assert other[name] == close, name
    # the ranks have made the vocabularies that one of them needs, once and whole
    made = list(root.glob(f"*/{CACHE}/*"))
    assert 0 < len(made) <= len(caches)
    assert {file.name for file in made} <= {file.name for file in caches}


def train_on_ranks(path: str) -> None:
    assert runs.train(rundir.open_run(Path(path)))
