"""Fixtures of the launcher's tests: site files in a temporary folder and the stand-in worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd.config import resolve
from hpcsngd.config.resolve import Override, Resolved
from hpcsngd.launch.plan import Host

WORKERS = Path(__file__).parent / "workers"
STANDIN = "standin_worker"

EXPERIMENT = {
    "description": "stand-in",
    "model": {"name": "digits-cnn"},
    "data": {"name": "digits"},
    "batch_size": 32,
    "epochs": 10,
    "optimizer": {"name": "sgd", "lr": 0.1},
    "resources": {"nodes": 1, "ranks_per_node": 2, "walltime": "30m"},
}
LOCAL_SITE = {
    "description": "this machine",
    "scheduler": {"kind": "local", "poll_s": 0.2},
    "env": {"OMP_NUM_THREADS": "1", "STANDIN": "ok"},
    "launch": {"rendezvous_timeout_s": 60},
}

Configure = Callable[..., Resolved]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Returns a function that resolves a site given as data, with overrides as dotted keys."""

    def make(site: dict[str, Any] | None = None, /, **overrides: Any) -> Resolved:
        site_file, exp_file = tmp_path / "testsite.yaml", tmp_path / "standin.yaml"
        site_file.write_text(yaml.safe_dump({"run_root": str(tmp_path / "runs"), **(site or LOCAL_SITE)}))
        exp_file.write_text(yaml.safe_dump(EXPERIMENT))
        layers = [
            Override(resolve.full_path(key.replace("__", "."), "test"), value, "test")
            for key, value in overrides.items()
        ]
        return resolve.resolve(str(site_file), str(exp_file), layers, environment={})

    return make


@pytest.fixture
def host() -> Host:
    """Returns a submitting machine that does not depend on the real one."""
    return Host(
        machine="x86_64",
        python="/opt/venv/bin/python",
        exists=lambda path: True,
        image_arch=lambda path: None,
        runtime="apptainer",
    )


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the stand-in worker importable in jobs and returns its module name."""
    path = os.pathsep.join(filter(None, (str(WORKERS), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)
    return STANDIN
