"""The study of L-BFGS: its cells, and the table of equal samples and equal time."""

from __future__ import annotations

from pathlib import Path

from benchmarks import lbfgs
from hpcsngd.rundir import Status, write_yaml
from tests.analysis.runs import make_run


def test_every_method_has_both_numbers_of_ranks_and_every_seed() -> None:
    one, two = lbfgs.cells(1), lbfgs.cells(2)
    assert len(one) == len(two) == 15
    assert len({cell.id for cell in (*one, *two)}) == 30
    for cell in one:
        (twin,) = [
            other
            for other in two
            if (
                other.resolved.experiment.optimizer,
                other.resolved.experiment.seed,
                other.resolved.experiment.strategy,
            )
            == (
                cell.resolved.experiment.optimizer,
                cell.resolved.experiment.seed,
                cell.resolved.experiment.strategy,
            )
        ]
        assert twin.resolved.experiment.batch_size * 2 == cell.resolved.experiment.batch_size == 128
    assert [cell.resolved.experiment.seed for cell in one] == [1] * 5 + [2] * 5 + [3] * 5


def test_the_table_compares_on_equal_seeds(tmp_path: Path) -> None:
    for name, batches, accuracy in (("sgd", "", 0.9), ("lbfgs", "step", 0.8)):
        for seed in (1, 2, 3):
            optimizer = {"name": name} | ({"batches": batches} if batches else {})
            row = {"step": 1, "accuracy": accuracy + seed / 100}
            run = make_run(
                tmp_path,
                f"{name}-{seed}",
                settings={"seed": seed, "optimizer": optimizer, "strategy": "ddp"},
                status=Status("completed", "", 1),
                tables={"train": [row | {"samples": 500}], "eval": [row | {"split": "test"}]},
            )
            write_yaml(run.attempt(1).attempt_yaml, {"world_size": 1, "hardware": {"cpu": "x"}})
    lines = lbfgs.table(tmp_path).splitlines()
    assert lines[0] == "500 samples: accuracy %, less sgd x 1, better?"
    assert lines[1].split()[:5] == ["sgd", "x", "1", "92.00", "[89.52,"]
    assert lines[2].split()[:5] == ["lbfgs", "step", "x", "1", "82.00"]
