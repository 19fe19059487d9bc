"""Sites and runs for tests on the real cluster of tests/testbed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd import rundir
from hpcsngd.config import resolve
from hpcsngd.config.resolve import Override, Resolved

WORKERS = Path(__file__).parents[1] / "launch" / "workers"
STANDIN = "standin_worker"

Configure = Callable[..., Resolved]

EXPERIMENT = {
    "description": "stand-in",
    "model": {"name": "digits-cnn"},
    "data": {"name": "digits"},
    "batch_size": 32,
    "epochs": 1,
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def site_data(run_root: Path, mode: str = "torchrun", **changes: Any) -> dict[str, Any]:
    """Returns a site for the test cluster: two nodes of two ranks, at most two nodes and half an hour."""
    data: dict[str, Any] = {
        "description": "the test cluster",
        "scheduler": {"kind": "slurm", "poll_s": 0.5, "command_timeout_s": 30},
        "nodes": 2,
        "ranks_per_node": 2,
        "cpus_per_node": 2,
        "walltime": "10m",
        "launch": {"mode": mode, "rendezvous_timeout_s": 90},
        "env": {"OMP_NUM_THREADS": "1", "STANDIN": "meet"},
        "run_root": str(run_root),
        "limits": [{"max_nodes": 2, "max_walltime": "30m"}],
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    return data


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Returns a function that resolves the cluster's site, changed, with an experiment.

    Without ``experiment`` (a name or a path) it is one for the stand-in worker, which jobs can import.
    Keywords with dots written as ``__`` in ``overrides`` are ``--set`` values.
    """
    path = os.pathsep.join(filter(None, (str(WORKERS), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)

    def make(
        mode: str = "torchrun",
        *,
        experiment: str | None = None,
        overrides: dict[str, Any] | None = None,
        **site: Any,
    ) -> Resolved:
        site_file, exp_file = tmp_path / "cluster.yaml", tmp_path / "standin.yaml"
        site_file.write_text(yaml.safe_dump(site_data(tmp_path / "runs", mode, **site)))
        exp_file.write_text(yaml.safe_dump(EXPERIMENT))
        layers = [
            Override(resolve.full_path(key.replace("__", "."), "test"), value, "test")
            for key, value in (overrides or {}).items()
        ]
        chosen = experiment or str(exp_file)
        return resolve.resolve(str(site_file), chosen, layers, environment={})

    return make


def reports(run: rundir.RunDir) -> list[dict[str, Any]]:
    """Returns what the stand-in workers said about themselves, in the order of ranks."""
    files = sorted((run.path / "report").glob("rank*.json"))
    return [json.loads(file.read_text()) for file in files]
