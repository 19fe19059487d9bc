"""Which code this is: changes of what workers run are noticed, others are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import hpcsngd
from hpcsngd import fingerprint

PACKAGE = Path(hpcsngd.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "hpcsngd", ignore=shutil.ignore_patterns("__pycache__")))


def test_a_copy_is_the_same_code(copy: Path) -> None:
    assert fingerprint.identity(copy) == fingerprint.identity()
    assert fingerprint.identity() == f"{hpcsngd.__version__}+{fingerprint.digest()}"


@pytest.mark.parametrize("file", ["train/loop.py", "optim/hylo.py", "dist.py", "train/new.py"])
def test_a_change_of_what_workers_run_is_noticed(copy: Path, file: str) -> None:
    with (copy / file).open("a") as stream:
        stream.write("# changed\n")
    assert fingerprint.digest(copy) != fingerprint.digest()


@pytest.mark.parametrize(
    "file", ["cli/submit.py", "launch/plan.py", "train/__pycache__/loop.py", "notes.txt"]
)
def test_a_change_of_the_hosts_side_is_not(copy: Path, file: str) -> None:
    (copy / file).parent.mkdir(exist_ok=True)
    with (copy / file).open("a") as stream:
        stream.write("# changed\n")
    assert fingerprint.digest(copy) == fingerprint.digest()
