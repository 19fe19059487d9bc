"""The verb ``landscape``: its options arrive, and several ranks go on with work that was ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpcsngd import rundir
from hpcsngd.cli.landscape import landscape
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from tests.train import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = runs.make_run(tmp_path_factory.mktemp("landscape"), epochs=3, checkpoint__keep=10)
    assert runs.train(made)
    return made


def grid(run: RunDir) -> list[dict[str, object]]:
    return list(rundir.read_rows(run.metrics("landscape"), TABLES["landscape"]))


def test_a_landscape_is_written_and_said(run: RunDir) -> None:
    words = [str(run.path), "--points", "2", "--split", "train", "--samples", "40"]
    done = CliRunner().invoke(landscape, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert f"landscape: {run.metrics('landscape')}, plane " in done.output
    assert "4 of 4 points" in done.output
    rows = grid(run)
    assert {(row["kind"], row["split"], row["count"]) for row in rows} == {("pca", "train", 40)}
    assert len(rows) == 4


@pytest.mark.dist
def test_ranks_of_this_machine_go_on_with_it(run: RunDir) -> None:
    words = [str(run.path), "--points", "2", "--kind", "random", "--seed", "3"]
    CliRunner().invoke(landscape, words, catch_exceptions=False)
    whole = grid(run)
    path = run.metrics("landscape")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    command = [sys.executable, "-m", "hpcsngd", "landscape", *words, "--ranks", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 4 points" in done.stderr
    for mine, other in zip(whole, grid(run), strict=True):
        assert (mine["plane"], mine["row"], mine["column"]) == (other["plane"], other["row"], other["column"])
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-5)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpcsngd", "landscape", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "has no run.yaml: it is not a run directory" in done.stderr
