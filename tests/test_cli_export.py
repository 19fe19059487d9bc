"""The verb ``export``, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcsngd.errors import EXIT_OK, EXIT_USAGE
from hpcsngd_analysis.trackers.event_files import read_scalars
from tests.analysis.runs import EXAMPLES
from tests.test_cli import hpcsngd, modules_of

RUNS = [str(EXAMPLES / name) for name in ("complete", "resumed")]


def test_it_says_what_was_exported_and_where_to_look(tmp_path: Path) -> None:
    done = hpcsngd("export", *RUNS, "--to", "tensorboard", cwd=tmp_path)
    assert done.returncode == EXIT_OK, done.stderr
    assert "complete: " in done.stdout
    assert "look at them: tensorboard --logdir exports/tensorboard" in done.stdout
    again = hpcsngd("export", *RUNS, "--to", "tensorboard", "--json", cwd=tmp_path)
    found = json.loads(again.stdout)
    assert [(each["run"], each["state"], each["written"]) for each in found] == [
        ("complete", "completed", 0),
        ("resumed", "completed", 0),
    ]
    for each in found:
        scalars = dict(read_scalars(tmp_path / each["folder"]))
        assert max(step for _, step in scalars) == each["step"]


def test_live_ends_with_the_runs(tmp_path: Path) -> None:
    words = ("--to", "tensorboard", "--live", "--every", "0.1", "--out", str(tmp_path), "--json")
    done = hpcsngd("export", *RUNS, *words)
    assert done.returncode == EXIT_OK, done.stderr
    assert all(each["written"] > 0 for each in json.loads(done.stdout))


def test_wandb_is_offline_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    done = hpcsngd("export", RUNS[1], "--to", "wandb", cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == EXIT_OK, done.stderr
    assert "kept offline; to send them: wandb sync exports/wandb/*/wandb/offline-run-*" in done.stdout
    (file,) = tmp_path.glob("exports/wandb/resumed/wandb/offline-run-*/run-resumed.wandb")
    assert file.stat().st_size > 1000


def test_a_missing_package_and_a_folder_without_runs_end_with_advice(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no module named wandb')\n")
    done = hpcsngd("export", RUNS[0], "--to", "wandb", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "error: wandb is missing: pip install 'hpcsngd[wandb]'" in done.stderr
    done = hpcsngd("export", str(tmp_path), "--to", "tensorboard")
    assert done.returncode != EXIT_OK
    assert "is no run directory" in done.stderr


def test_the_other_tracker_is_not_imported(tmp_path: Path) -> None:
    found = modules_of("export", RUNS[0], "--to", "tensorboard", "--out", str(tmp_path))
    assert "tensorboard" in found
    assert found.isdisjoint({"wandb", "torch", "tensorflow"})
