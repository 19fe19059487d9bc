"""The study of dampings: its cells are configurations, what it chooses, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import damping
from hpcsngd.config.experiment import HyLo
from hpcsngd.config.resolve import resolve

STUDY = damping.read_study()
METHODS = [(network, method) for network in STUDY.networks for method in network.methods]


@pytest.mark.parametrize(("network", "method"), METHODS, ids=lambda part: part.label)
def test_every_cell_is_a_configuration(network: damping.Network, method: damping.Method) -> None:
    cells = damping.cells(method)
    assert cells
    for cell in cells:
        config = damping.resolved(network, method, cell, 11, "/data").experiment
        assert (config.seed, config.data.root) == (11, "/data")
        assert config.optimizer.lr == cell["optimizer.lr"]
        found = getattr(config.preconditioner, "damping", None)
        assert found == cell.get("preconditioner.damping")


def row(method: str, damping_: float, seed: int, accuracy: float, loss: float = 1.0) -> dict[str, object]:
    keys = {"network": "net", "method": method, "lr": 0.1, "damping": damping_, "seed": seed}
    return {**keys, "accuracy": accuracy, "loss": loss, "cpu_s": 1.0}


def test_the_best_mean_of_complete_cells_is_chosen() -> None:
    rows = [
        row("HyLo", 0.1, 1, 0.5),
        row("HyLo", 0.1, 2, 0.7),
        row("HyLo", 1.0, 1, 0.9),
        row("HyLo", 1.0, 2, float("nan")),  # diverged
        row("HyLo", 3.0, 1, 0.95),  # one seed only
        row("SGD", float("nan"), 1, 0.4),
        row("SGD", float("nan"), 2, 0.4),
    ]
    table = damping.chosen(pd.DataFrame(rows))
    assert table["chosen"].tolist() == [True, False, False, True]
    assert table["accuracy"].tolist()[0] == pytest.approx(0.6)
    assert table["spread"].tolist()[0] == pytest.approx(0.2)
    assert pd.isna(table["accuracy"][1])


def test_equal_means_go_to_the_lower_loss() -> None:
    table = damping.chosen(pd.DataFrame([row("A", 1.0, 1, 0.5, 0.9), row("A", 2.0, 1, 0.5, 0.8)]))
    assert table["chosen"].tolist() == [False, True]


def test_it_trains_what_is_missing_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = damping.Network.model_validate(
        {
            "label": "digits",
            "every": {
                "data.train_limit": 160,
                "data.test_limit": 100,
                "data.folds": {"count": 4, "index": 0},
                "epochs": 1,
            },
            "methods": [{"label": "SGD", "experiment": "digits-sgd", "grid": {"optimizer.lr": [0.01, 1e30]}}],
        }
    )
    study = damping.Study(seeds=[1], networks=[network])
    damping.run_grid(study, tmp_path, [])
    rows = pd.read_csv(tmp_path / damping.TABLE)
    assert rows["lr"].tolist() == [0.01, 1e30]
    assert 0 <= rows["accuracy"][0] <= 1
    assert pd.isna(rows["accuracy"][1])  # such a rate diverges, which is a result

    def fail(config: object) -> dict[str, float]:
        raise AssertionError("trained again")

    monkeypatch.setattr(damping, "trained", fail)
    damping.run_grid(study, tmp_path, [])
    assert len(pd.read_csv(tmp_path / damping.TABLE)) == 2


@pytest.mark.parametrize(
    ("network", "method"), [("U-Net", "HyLo"), ("ResNet-32", "HyLo"), ("DenseNet", "SNGD")]
)
def test_the_chosen_damping_is_shipped(network: str, method: str) -> None:
    table = damping.chosen(pd.read_csv(damping.KEPT / damping.TABLE))
    found = table[(table["network"] == network) & (table["method"] == method) & table["chosen"]]
    (experiment,) = {each.experiment for net, each in METHODS if (net.label, each.label) == (network, method)}
    shipped = resolve("local", experiment, environment={}).experiment.preconditioner
    assert isinstance(shipped, HyLo)
    assert [shipped.damping] == found["damping"].tolist()


def test_the_kept_numbers_are_of_the_study() -> None:
    rows = pd.read_csv(damping.KEPT / damping.TABLE)
    assert set(rows["seed"]) == set(STUDY.seeds)
    table = damping.chosen(rows)
    for network, method in METHODS:
        mine = table[(table["network"] == network.label) & (table["method"] == method.label)]
        complete = mine[mine["seeds"] == len(STUDY.seeds)]
        for cell in damping.cells(method):
            wanted = cell.get("preconditioner.damping")
            same = complete["damping"].isna() if wanted is None else complete["damping"] == wanted
            assert (same & (complete["lr"] == cell["optimizer.lr"])).sum() == 1, (network.label, cell)
