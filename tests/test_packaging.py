"""A wheel carries sites, experiments, the report's template and type information, and finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, timeout=240)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_content(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "hpcsngd/_data/site_configs/mist.yaml",
        "hpcsngd/_data/jobs/digits-hylo.yaml",
        "hpcsngd/py.typed",
        "hpcsngd_analysis/py.typed",
        "hpcsngd_analysis/report.py",
    } <= names
    assert any(name.startswith("hpcsngd_analysis/") and name.endswith((".html", ".j2")) for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_unpacked_wheel_finds_its_files(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from hpcsngd.resources import named_files; print(*named_files('jobs').values(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert (
        str(tmp_path / "site" / "hpcsngd" / "_data" / "jobs" / "digits-sgd.yaml") in done.stdout.splitlines()
    )
