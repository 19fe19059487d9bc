"""The wheel that goes into images: complete, the same every time, and pip's idea of a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hpcsngd
from hpcsngd import fingerprint
from hpcsngd.launch.images import code


def test_the_wheel_is_the_running_code(tmp_path: Path) -> None:
    zipfile.ZipFile(code.write_wheel(tmp_path)).extractall(tmp_path / "lib")
    words = [sys.executable, "-c", "import hpcsngd.fingerprint as f; print(f.identity(), f.__file__)"]
    done = subprocess.run(
        words,
        env={"PYTHONPATH": str(tmp_path / "lib")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    identity, file = done.stdout.split()
    assert identity == fingerprint.identity()
    assert file == str(tmp_path / "lib" / "hpcsngd" / "fingerprint.py")


def test_the_wheel_has_what_workers_need(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(code.write_wheel(tmp_path)).namelist())
    info = f"hpcsngd-{hpcsngd.__version__}.dist-info"
    assert {"hpcsngd/train/worker.py", "hpcsngd/_data/jobs/digits-hylo.yaml", f"{info}/METADATA"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_same_code_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = code.write_wheel(tmp_path), code.write_wheel(tmp_path / "again")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_pip_installs_it(tmp_path: Path) -> None:
    wheel = code.write_wheel(tmp_path)
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "t")]
    subprocess.run([sys.executable, *words, str(wheel)], check=True, timeout=120)
    assert (tmp_path / "t" / "hpcsngd" / "train" / "worker.py").exists()
