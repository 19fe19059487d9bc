from __future__ import annotations

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.data import staging
from hpcsngd.train.faults import MissingDataError, SettingError

HOW = schema.Stage(to="$NODE_DISK/data")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a data root with CIFAR-100; the node's disk is beside it."""
    tinydata.write("cifar100", tmp_path / "shared")
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node"))
    return tmp_path / "shared"


def pack(root: Path, *, inside: bool) -> str:
    """Makes an archive of CIFAR's folder, or of what is inside of it."""
    with tarfile.open(root / "cifar.tar", "w") as tar:
        tar.add(root / "cifar-100-python", arcname="." if inside else "cifar-100-python")
    return "cifar.tar"


def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []
    copy = staging._copy

    def note(source: Path, place: Path) -> None:
        made.append(source)
        copy(source, place)

    monkeypatch.setattr(staging, "_copy", note)
    return made


def test_a_folder_is_copied_and_read_from_there(root: Path, tmp_path: Path) -> None:
    config = schema.Data(name="cifar100", stage=HOW)
    staged = data.load(config, str(root))
    plain = data.load(schema.Data(name="cifar100"), str(root))
    assert torch.equal(staged.train[[3, 9]][0], plain.train[[3, 9]][0])
    copy = tmp_path / "node" / "data" / "cifar-100-python"
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in (root / "cifar-100-python").iterdir()
    }


@pytest.mark.parametrize("inside", [False, True])
def test_an_archive_is_unpacked(root: Path, tmp_path: Path, inside: bool) -> None:
    how = HOW.model_copy(update={"archive": pack(root, inside=inside)})
    assert staging.stage(how, "cifar100", root) == tmp_path / "node" / "data"
    folder = tmp_path / "node" / "data" / "cifar-100-python"
    assert sorted(file.name for file in folder.iterdir()) == ["test", "train"]
    left = {path.name for path in (tmp_path / "node" / "data").iterdir()}
    assert left == {"cifar-100-python", staging.LOCK, f"{staging.MARKER}-cifar-100-python"}


def test_a_copy_is_used_again_until_its_source_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = copies(monkeypatch)
    for _ in range(3):
        staging.stage(HOW, "cifar100", root)
    assert len(made) == 1
    (root / "cifar-100-python" / "more").write_text("x")
    target = staging.stage(HOW, "cifar100", root)
    assert len(made) == 2
    assert (target / "cifar-100-python" / "more").read_text() == "x"


def test_what_an_interrupted_copy_left_is_not_taken_for_a_copy(root: Path, tmp_path: Path) -> None:
    half = tmp_path / "node" / "data" / "cifar-100-python"
    half.mkdir(parents=True)
    (half / "train").write_text("half")
    (half.parent / ".cifar-100-python.unfinished").mkdir()
    staging.stage(HOW, "cifar100", root)
    assert (half / "train").read_bytes() == (root / "cifar-100-python" / "train").read_bytes()
    assert not (half.parent / ".cifar-100-python.unfinished").exists()


def test_of_several_at_once_one_copies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock belongs to an open file, so that threads stand in for a node's processes."""
    made = copies(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        targets = list(pool.map(lambda _: staging.stage(HOW, "cifar100", root), range(4)))
    assert len(set(targets)) == 1
    assert len(made) == 1


@pytest.mark.parametrize("is_archive", [False, True])
def test_a_copy_that_differs_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_archive: bool
) -> None:
    """A disk that returns other bytes than it was given: every file ends in another byte."""
    how = HOW.model_copy(update={"archive": pack(root, inside=False)}) if is_archive else HOW
    digest = staging._digest

    def broken(stream: Any, out: Any = None) -> bytes:
        value = digest(stream, out)
        if out is not None:
            out.seek(-1, os.SEEK_END)
            out.write(b"?")
        return value

    monkeypatch.setattr(staging, "_digest", broken)
    with pytest.raises(MissingDataError, match=r"(test|train) differs from what was read from"):
        staging.stage(how, "cifar100", root)
    monkeypatch.undo()
    assert not (tmp_path / "node" / "data" / "cifar-100-python").exists()


def test_an_archive_cannot_write_elsewhere(root: Path, tmp_path: Path) -> None:
    (tmp_path / "evil").write_text("x")
    with tarfile.open(root / "evil.tar", "w") as tar:
        tar.add(tmp_path / "evil", arcname="../../evil2")
    with pytest.raises(MissingDataError, match=r"a member outside of its folder: \.\./\.\./evil2"):
        staging.stage(HOW.model_copy(update={"archive": "evil.tar"}), "cifar100", root)
    assert not list(tmp_path.rglob("evil2"))


class TestProblems:
    def test_no_source(self, tmp_path: Path, root: Path) -> None:
        with pytest.raises(MissingDataError, match=r"nothing to copy at .*cifar-10-batches-py"):
            staging.stage(HOW, "cifar10", root)
        with pytest.raises(MissingDataError, match=r"data\.stage\.archive: no file .*all\.tar"):
            staging.stage(HOW.model_copy(update={"archive": "all.tar"}), "cifar100", root)
        with pytest.raises(MissingDataError, match="no data root to copy cifar100 from"):
            staging.stage(HOW, "cifar100", None)

    def test_a_variable_that_the_node_does_not_set(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NODE_DISK")
        with pytest.raises(SettingError, match=r"data\.stage\.to: this node does not set \$NODE_DISK"):
            staging.stage(HOW, "cifar100", root)

    def test_no_archive_or_an_empty_one(self, root: Path) -> None:
        (root / "text.tar").write_text("this is no archive")
        with pytest.raises(MissingDataError, match=r"cannot copy .*text\.tar"):
            staging.stage(HOW.model_copy(update={"archive": "text.tar"}), "cifar100", root)
        with tarfile.open(root / "empty.tar", "w"):
            pass
        with pytest.raises(MissingDataError, match=r"empty\.tar holds no file"):
            staging.stage(HOW.model_copy(update={"archive": "empty.tar"}), "cifar100", root)

    def test_a_data_set_without_files(self) -> None:
        with pytest.raises(ValueError, match="stage: not for data set digits"):
            schema.Data(name="digits", stage=HOW)
