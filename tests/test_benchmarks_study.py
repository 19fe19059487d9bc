"""The Fashion-MNIST study: what it runs, what it skips, and its numbers from tiny run directories."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import fashion_mnist as study
from benchmarks import fashion_mnist_numbers as numbers
from hpcsngd import rundir
from hpcsngd.resources import named_files
from hpcsngd.rundir import RunDir, Status
from hpcsngd.train.data.idx import read_idx
from tests.analysis.runs import make_run

BENCHMARKS = Path(study.__file__).parent
COMPLETED = Status("completed", "", 1)
DIVERGED = Status("failed", "nan: loss is nan", 1, fault={"kind": "nan"})
TINY = """
target: 0.01
held_out: 8
tuning_seed: 9
seeds: [1, 2]
every: {epochs: 1, data.train_limit: 64, data.test_limit: 32, resources.ranks_per_node: 1}
methods:
  - {label: SGD, experiment: digits-sgd, grid: [{optimizer.lr: 0.01}]}
"""


@pytest.fixture(scope="module")
def shipped() -> study.Study:
    return study.read_study(study.STUDY)


@pytest.fixture
def cell() -> study.Cell:
    return study.Cell("SGD", "digits-sgd", {}, {"seed": 3, "epochs": 2})


def run_of(cell: study.Cell, folder: Path, name: str, status: Status | None = COMPLETED) -> RunDir:
    """Returns a run directory as if the cell had been trained."""
    run = RunDir(folder / name)
    rundir.write_yaml(run.run_yaml, {"schema": 1, "config": cell.resolve().to_record()})
    if status:
        run.write_status(status)
    return run


def run_with(folder: Path, name: str, accuracies: Iterable[float], status: Status = COMPLETED) -> RunDir:
    """Returns a run that took 10 s for each epoch."""
    rows = [
        {"step": step, "epoch": float(step), "train_s": 10.0 * step, "split": "test", "accuracy": accuracy}
        for step, accuracy in enumerate(accuracies, start=1)
    ]
    return make_run(folder, name, status=status, tables={"eval": rows})


def results(**epochs: list[float]) -> pd.DataFrame:
    """Returns runs on seeds 1, 2, ...: epochs to the target, or infinity where it was not reached."""
    rows = [
        {"method": method, "seed": seed, "reached": value < math.inf, "epochs": min(value, 9.0)}
        for method, values in epochs.items()
        for seed, value in enumerate(values, start=1)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(train_s=10 * frame["epochs"], final_accuracy=0.9 + frame["epochs"] / 1000)


def cells_of(line: str) -> list[str]:
    """Returns the cells of a printed row, which stand at least two spaces apart."""
    return re.split(r" {2,}", line)


def test_every_method_is_a_shipped_experiment_with_the_same_budget(shipped: study.Study) -> None:
    assert {method.experiment for method in shipped.methods} <= set(named_files("jobs"))
    assert len({len(method.grid) for method in shipped.methods}) == 1
    assert shipped.tuning_seed not in shipped.seeds
    assert len(set(shipped.seeds)) >= 3


def test_the_grid_sets_what_it_says(shipped: study.Study, tmp_path: Path) -> None:
    cells = study.grid_cells(shipped, tmp_path)
    assert len(cells) == sum(len(method.grid) for method in shipped.methods)
    assert [cell.label for cell in cells[:2]] == [method.label for method in shipped.methods[:2]]
    for cell in cells:
        experiment = cell.resolve().experiment
        assert experiment.optimizer.lr == cell.tuned["optimizer.lr"]
        assert (experiment.seed, experiment.data.root) == (shipped.tuning_seed, str(tmp_path))


def test_each_seed_begins_with_another_method(shipped: study.Study) -> None:
    cells = study.run_cells(shipped)
    pairs = {(cell.label, cell.sets["seed"]) for cell in cells}
    assert len(pairs) == len(cells) == len(shipped.methods) * len(shipped.seeds)
    first = [cells[turn * len(shipped.methods)].label for turn in range(len(shipped.seeds))]
    assert first == [method.label for method in shipped.methods[: len(shipped.seeds)]]


def test_the_experiments_ship_what_the_kept_grid_chose(shipped: study.Study) -> None:
    kept = pd.read_csv(BENCHMARKS / "fashion_mnist_grid.csv")
    chosen = kept[kept["chosen"]].set_index("method")
    assert list(chosen.index) == [method.label for method in shipped.methods]
    for method in shipped.methods:
        experiment = study.Cell(method.label, method.experiment, {}, {"seed": 1}).resolve().experiment
        assert experiment.optimizer.lr == chosen.loc[method.label, "optimizer.lr"]
        if experiment.preconditioner is not None:
            assert experiment.preconditioner.damping == chosen.loc[method.label, "preconditioner.damping"]


@pytest.mark.parametrize("document", ["README.md", "benchmarks/RESULTS.md"])
def test_documents_show_the_table_of_the_kept_runs(shipped: study.Study, document: str) -> None:
    kept = pd.read_csv(BENCHMARKS / "fashion_mnist_runs.csv")
    table = numbers.render(kept, shipped.target, shipped.methods[0].label)
    assert table in (BENCHMARKS.parent / document).read_text()


@pytest.mark.parametrize("status", [COMPLETED, DIVERGED])
def test_a_run_that_ended_is_found_again(tmp_path: Path, cell: study.Cell, status: Status) -> None:
    run_of(replace(cell, sets={**cell.sets, "seed": 4}), tmp_path, "other seed")
    run_of(replace(cell, experiment="digits-hylo"), tmp_path, "other method")
    run = run_of(cell, tmp_path, "run", status)
    assert study.ended_run(tmp_path, cell) == run
    run_of(replace(cell, sets={**cell.sets, "description": "new words", "paper": "another"}), tmp_path, "a")
    assert study.ended_run(tmp_path, cell) is not None


def test_keys_added_since_a_run_do_not_ask_for_it_again(tmp_path: Path, cell: study.Cell) -> None:
    run = run_of(cell, tmp_path, "run")
    record = run.record()
    del record["config"]["experiment"]["clip_norm"]
    rundir.write_yaml(run.run_yaml, record)
    assert study.ended_run(tmp_path, cell) == run
    record["config"]["experiment"]["gone_since"] = 1
    rundir.write_yaml(run.run_yaml, record)
    assert study.ended_run(tmp_path, cell) is None


@pytest.mark.parametrize("status", [None, Status("failed", "out of memory", 1, fault={"kind": "memory"})])
def test_a_run_without_result_is_trained_again(
    tmp_path: Path, cell: study.Cell, status: Status | None
) -> None:
    run_of(cell, tmp_path, "run", status)
    assert study.ended_run(tmp_path, cell) is None


def test_ended_cells_are_skipped(
    tmp_path: Path, cell: study.Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit(*_arguments: object, **_options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(study, "submit", submit)
    run = run_of(cell, tmp_path, "run")
    assert list(study.run_all([cell], tmp_path)) == [run]
    assert "1/1 SGD seed=3: completed" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="trained again"):
        list(study.run_all([replace(cell, sets={"seed": 5})], tmp_path))


def test_holding_out_splits_the_training_images(tmp_path: Path) -> None:
    pixels, labels = torch.arange(5 * 4, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)
    heads = {"images-idx3": (3, (5, 2, 2), pixels), "labels-idx1": (1, (5,), labels)}
    for kind, (dimensions, shape, values) in heads.items():
        head = bytes([0, 0, 8, dimensions]) + b"".join(size.to_bytes(4, "big") for size in shape)
        file = tmp_path / f"train-{kind}-ubyte.gz"
        file.write_bytes(gzip.compress(head + bytes(values.tolist())))
    study.hold_out(tmp_path, tmp_path / "new", 2)
    raw = tmp_path / "new" / "FashionMNIST" / "raw"
    assert read_idx(raw / "train-labels-idx1-ubyte").tolist() == [0, 1, 2]
    assert read_idx(raw / "t10k-labels-idx1-ubyte").tolist() == [3, 4]
    assert torch.equal(read_idx(raw / "train-images-idx3-ubyte"), pixels[:12].reshape(3, 2, 2))
    assert torch.equal(read_idx(raw / "t10k-images-idx3-ubyte"), pixels[12:].reshape(2, 2, 2))


def test_outcomes_of_runs(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path, "reaches", [0.5, 0.7, 0.9]),
        run_with(tmp_path, "falls short", [0.5, 0.6]),
        run_with(tmp_path, "diverges later", [0.9], DIVERGED),
        run_with(tmp_path, "at once", [], DIVERGED),
    ]
    found = numbers.outcomes(runs, 0.8)
    assert found["reached"].to_list() == [True, False, True, False]
    assert found["state"].to_list() == ["completed", "completed", "failed", "failed"]
    assert found["epochs"].to_list()[:3] == pytest.approx([2.5, 2, 1])
    assert found["train_s"].to_list()[:3] == pytest.approx([25, 20, 10])
    assert found["final_accuracy"].to_list()[:2] == [0.9, 0.6]
    assert found["final_accuracy"].isna().to_list() == [False, False, True, True]


def test_the_grid_chooses_the_fastest_or_else_the_best(tmp_path: Path) -> None:
    cells = [("A", {"lr": 1.0}), ("B", {"lr": 1.0}), ("A", {"lr": 2.0}), ("B", {"lr": 2.0})]
    runs = [
        run_with(tmp_path, "slow to the target, best at the end", [0.5, 0.7, 0.95]),
        run_with(tmp_path, "worse", [0.5]),
        run_with(tmp_path, "fast", [0.8, 0.85]),
        run_with(tmp_path, "better", [0.6]),
    ]
    table = numbers.grid_table(cells, runs, 0.8)
    assert table["method"].to_list() == ["A", "A", "B", "B"]
    assert table["lr"].to_list() == [1.0, 2.0, 1.0, 2.0]
    assert table["chosen"].to_list() == [False, True, False, True]


def test_differences_pair_the_seeds() -> None:
    # differences -1, -2, -3: mean -2, standard deviation 1, half width 4.303 / sqrt(3) = 2.484
    found = numbers.compare(results(SGD=[4, 6, 8], M=[3, 4, 5]), "M", "SGD", numbers.EPOCHS)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((-2, -4.484, 0.484), abs=1e-3)


def test_a_seed_that_missed_the_target_forbids_a_verdict_on_time() -> None:
    frame = results(SGD=[2, 2, 2.1], M=[1, 1, math.inf])
    assert numbers.compare(frame, "M", "SGD", numbers.EPOCHS) is None
    assert numbers.compare(frame, "M", "SGD", numbers.FINAL) is not None
    assert numbers.compare(frame.iloc[:-1], "M", "SGD", numbers.FINAL) is None


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (-2.0, -1.0, -1, "supported"),
        (-2.0, -1.0, 1, "not supported"),
        (1.0, 2.0, 1, "supported"),
        (1.0, 2.0, -1, "not supported"),
        (-1.0, 2.0, 1, "cannot tell"),
        (math.nan, math.nan, 1, "cannot tell"),
    ],
)
def test_verdicts(low: float, high: float, better: int, expected: str) -> None:
    interval = numbers.stats.Interval((low + high) / 2, low, high, n=3)
    assert numbers.verdict(interval, better) == expected
    assert numbers.verdict(None, better) == "cannot tell"


def test_the_table_in_words() -> None:
    # SGD: mean 2, sd 0.1, half width 0.248; M less SGD: -1, -1.1, -0.9, the same half width
    text = numbers.render(results(SGD=[2, 2.1, 1.9], M=[1, 1, 1]), 0.89, "SGD")
    lines = text.splitlines()
    assert lines[0].startswith("Target 89 %")
    assert cells_of(lines[2]) == ["SGD", "3/3", "2.00 [1.75, 2.25]", "20 [18, 22]", "90.20 [90.18, 90.22]"]
    assert cells_of(lines[3])[:3] == ["M", "3/3", "1.00 [1.00, 1.00]"]
    assert cells_of(lines[-1]) == [
        *("M", "-1.00 [-1.25, -0.75]", "supported"),
        *("-10 [-12, -8]", "supported"),
        *("-0.10 [-0.12, -0.08]", "not supported"),
    ]


@pytest.mark.slow
@pytest.mark.dist
def test_runs_are_trained_once_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["runs", str(tmp_path), "--study", str(tmp_path / "tiny.yaml")]
    study.main(arguments)
    first = capsys.readouterr().out
    assert "1/2 SGD seed=1: completed" in first
    assert "SGD     2/2      1.00 [1.00, 1.00]" in first
    study.main(arguments)
    assert capsys.readouterr().out.splitlines()[2:] == first.splitlines()[2:]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert pd.read_csv(tmp_path / "runs.csv")["seed"].to_list() == [1, 2]


def test_a_table_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run of the study has ended"):
        study.main(["table", str(tmp_path)])
