"""The main job on the real cluster: 2 nodes x 2 ranks, in both launch modes, as on 1 node x 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.config.resolve import parse_set, resolve
from hpcsngd.launch import submit
from hpcsngd.tables import TABLES

from .conftest import Configure

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm_cluster")]

SETTINGS = {"epochs": 2, "batch_size": 16}


def metrics(run: rundir.RunDir) -> list[dict[str, Any]]:
    """Returns the rows of train.csv and eval.csv, numbers only, without clocks."""
    left_out = {"train_s", "wall_s", "eval_s", "utc", "split"}
    return [
        {name: value for name, value in row.items() if name not in left_out}
        for table in ("train", "eval")
        for row in rundir.read_rows(run.metrics(table), TABLES[table])
    ]


def run_to_end(resolved: Any) -> rundir.RunDir:
    run = submit.submit(resolved, argv=["test"]).run
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "completed", ended.reason
    return run


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the metrics of one node with four ranks."""
    sets = [f"{key}={value}" for key, value in SETTINGS.items()]
    sets += ["ranks_per_node=4", f"run_root={tmp_path_factory.mktemp('one')}"]
    return metrics(run_to_end(resolve("local", "digits-hylo", [parse_set(text) for text in sets])))


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_two_nodes_train_as_one(configure: Configure, one_node: list[dict[str, Any]], mode: str) -> None:
    overrides = {**SETTINGS, "nodes": 2, "ranks_per_node": 2}
    run = run_to_end(configure(mode, experiment="digits-hylo", overrides=overrides))
    found = metrics(run)
    assert len(found) == len(one_node) > 4
    for ours, theirs in zip(found, one_node, strict=True):
        assert ours == pytest.approx(
            theirs, rel=1e-4
        )  # float32; the sums over ranks may be ordered otherwise
    assert found[-1]["accuracy"] > 0.8
    assert len(rundir.read_yaml(run.attempt(1).attempt_yaml)["hosts"]) == 2
