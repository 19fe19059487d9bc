from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.train import checkpoint
from hpcsngd.train.checkpoint import COMMON, LATEST, MANIFEST, Checkpoints
from hpcsngd.train.faults import CheckpointError

CPU = torch.device("cpu")


def save(store: Checkpoints, step: int) -> None:
    store.save(step, {"weights": torch.full((50,), float(step)), "step": step}, {"stream": [step, None, "x"]})


def steps(folder: Path) -> list[str]:
    """Returns everything that lies in the folder."""
    return sorted(path.name for path in folder.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 7)
    loaded = store.load(CPU)
    assert loaded is not None
    assert (loaded.step, loaded.world_size) == (7, 1)
    assert torch.equal(loaded.common["weights"], torch.full((50,), 7.0))
    assert loaded.own == {"stream": [7, None, "x"]}


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=2).load(CPU) is None


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10):
        save(store, step)
    assert steps(tmp_path) == [LATEST, "step_10", "step_9"]
    assert (tmp_path / LATEST).read_text() == "step_10\n"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in (COMMON, "rank0.pt") for damage in (cut, flip_a_bit, remove)),
        (MANIFEST, cut),
        (MANIFEST, remove),
    ],
)
def test_a_damaged_newest_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Any
) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 5)
    save(store, 10)
    damage(tmp_path / "step_10" / file)
    with caplog.at_level(logging.WARNING):
        loaded = store.load(CPU)
    assert loaded is not None
    assert loaded.step == 5
    (message,) = caplog.messages
    assert "step_10" in message
    assert "step_5" in message


def test_it_is_an_error_if_all_are_damaged(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (5, 10):
        save(store, step)
        cut(tmp_path / f"step_{step}" / COMMON)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(step_10/common.pt has"):
        store.load(CPU)


def test_damaged_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 5)
    shutil.copytree(tmp_path / "step_5", tmp_path / "step_10")
    cut(tmp_path / "step_10" / COMMON)
    save(store, 8)
    assert steps(tmp_path) == [LATEST, "step_8"]
    loaded = store.load(CPU)
    assert loaded is not None
    assert loaded.step == 8


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 5)
    cut(tmp_path / "step_5" / COMMON)
    save(store, 5)
    loaded = store.load(CPU)
    assert loaded is not None
    assert loaded.step == 5


def test_an_unfinished_one_is_not_seen_and_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 5)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, 10)
    loaded = store.load(CPU)
    assert loaded is not None
    assert loaded.step == 5
    save(store, 15)
    assert steps(tmp_path) == [LATEST, "step_15", "step_5"]


def test_files_are_on_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (events.append("flush"), flush(handle))[1])
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append("rename"), rename(path, to))[1])
    save(Checkpoints(tmp_path, keep=2), 5)
    # rank0.pt, common.pt, the manifest and the folder; then the name; then the folder around it
    assert events == ["flush"] * 4 + ["rename", "flush"]


def test_nothing_but_plain_data_is_loaded(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    store.save(5, {"path": Path("x")}, {})
    with pytest.raises(Exception, match="weights_only"):
        store.load(CPU)


def test_an_unknown_schema_is_not_guessed_at(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 5)
    manifest = tmp_path / "step_5" / MANIFEST
    manifest.write_text(manifest.read_text().replace("schema: 1", "schema: 2"))
    with pytest.raises(CheckpointError, match="step_5 has schema 2, this version knows 1"):
        store.load(CPU)


@pytest.mark.parametrize(("what", "instead"), [("step: 5", "step: 6"), ("world_size: 1", "world_size: 2")])
def test_the_manifest_must_be_about_this_checkpoint(tmp_path: Path, what: str, instead: str) -> None:
    store = Checkpoints(tmp_path, keep=2)
    save(store, 5)
    manifest = tmp_path / "step_5" / MANIFEST
    manifest.write_text(manifest.read_text().replace(what, instead))
    with pytest.raises(CheckpointError, match="does not list the files of this checkpoint"):
        store.load(CPU)
