from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata, vision
from hpcsngd.train.data import pickles
from hpcsngd.train.faults import MissingDataError


def load(name: str, root: Path, **fields: Any) -> data.Splits:
    return data.load(schema.Data.model_validate({"name": name, **fields}), str(root))


def original(name: str, root: Path, *files: str) -> np.ndarray:
    """Returns the pixels in the files as pickle itself reads them, ``(n, 3, 32, 32)``."""
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    parts = [pickle.loads((folder / file).read_bytes(), encoding="bytes")[b"data"] for file in files]
    return np.concatenate(parts).reshape(-1, 3, 32, 32)


def test_cifar10_joins_its_five_files(tmp_path: Path) -> None:
    tinydata.write("cifar10", tmp_path)
    splits = load("cifar10", tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 10)
    assert splits.evaluated == "test"
    pixels = original("cifar10", tmp_path, *(f"data_batch_{number}" for number in range(1, 6)))
    images, labels = splits.train[[47, 0]]
    assert labels.tolist() == [7, 0]
    mean, std = (
        torch.tensor(v).reshape(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    )
    assert torch.allclose(images[0], (torch.from_numpy(pixels[47]) / 255 - mean) / std, atol=1e-6)


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    tinydata.write("cifar100", tmp_path)
    splits = load("cifar100", tmp_path)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 100)
    assert splits.train.labels.tolist() == [number % 10 for number in range(48)]


def test_torchvision_reads_the_tiny_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written format is the true one: torchvision's own reader, but for its check sums, takes it."""
    tinydata.write("cifar100", tmp_path)
    known = vision.load().datasets.CIFAR100
    for name in ("_check_integrity", "_load_meta"):
        monkeypatch.setattr(known, name, lambda self: True)
    theirs = known(str(tmp_path), train=True)
    ours = load("cifar100", tmp_path).train
    assert theirs.targets == ours.labels.tolist()
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), original("cifar100", tmp_path, "train"))


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_missing_files_are_named(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(MissingDataError, match=rf"no {name} below the data root .*{folder}"):
        load(name, tmp_path)
    tinydata.write(name, tmp_path)
    gone = sorted((tmp_path / folder).iterdir())[1:3] if name == "cifar10" else [tmp_path / folder / "test"]
    for file in gone:
        file.unlink()
    with pytest.raises(MissingDataError, match=f"{folder} lacks {', '.join(file.name for file in gone)}$"):
        load(name, tmp_path)


def test_a_missing_root_is_named() -> None:
    with pytest.raises(MissingDataError, match="no data root for cifar10"):
        data.load(schema.Data(name="cifar10"), None)


def test_a_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        tinydata.write("cifar10", Path(root))

    monkeypatch.setattr(vision.load().datasets, "CIFAR10", fetch)
    assert len(load("cifar10", tmp_path, download=True).train) == 48


def spoil(file: Path, **changes: Any) -> None:
    content = pickle.loads(file.read_bytes(), encoding="bytes")
    file.write_bytes(pickle.dumps({**content, **{key.encode(): value for key, value in changes.items()}}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": [1, 2]}, r"data_batch_2: 10 images but 2 labels"),
        ({"labels": [10] * 10}, "labels are not all within 0 to 9"),
        (
            {"data": np.zeros((10, 3000), np.uint8)},
            r"data is uint8 of shape \(10, 3000\), not uint8 of shape",
        ),
        ({"data": np.zeros((10, 3072))}, r"data is float64 of shape"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    tinydata.write("cifar10", tmp_path)
    spoil(tmp_path / "cifar-10-batches-py" / "data_batch_2", **changes)
    with pytest.raises(MissingDataError, match=problem):
        load("cifar10", tmp_path)


class Attack:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


class TestPickles:
    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        file, trace = tmp_path / "data", tmp_path / "trace"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            file.write_bytes(pickle.dumps({"data": Attack(f"touch {trace}")}, protocol))
            with pytest.raises(
                MissingDataError, match=r"it wants (posix|os)\.system, which no data set needs"
            ):
                pickles.read(file)
        assert not trace.exists()

    @pytest.mark.parametrize("call", [eval, getattr, __import__, np.load, np.fromfile])
    def test_no_other_function_can_be_named(self, tmp_path: Path, call: Any) -> None:
        file = tmp_path / "data"
        file.write_bytes(pickle.dumps({"data": call}))
        with pytest.raises(MissingDataError, match="which no data set needs"):
            pickles.read(file)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_arrays_come_back_in_every_protocol(self, tmp_path: Path, protocol: int) -> None:
        file, array = tmp_path / "data", np.arange(250, dtype=np.uint8).reshape(5, 50)
        content = {"data": array, "mean": np.float64(3.5), "labels": [1, 2]}
        file.write_bytes(pickle.dumps(content, protocol))
        read = pickles.read(file)
        assert np.array_equal(read["data"], array)
        assert (read["mean"], read["labels"]) == (3.5, [1, 2])

    def test_a_file_of_python_2_is_read(self, tmp_path: Path) -> None:
        tinydata.write("cifar100", tmp_path)
        file = tmp_path / "cifar-100-python" / "test"
        named = {arg for op, arg, _ in pickletools.genops(file.read_bytes()) if op.name == "GLOBAL"}
        assert named == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
        assert np.array_equal(pickles.fields(file, "data")[0], tinydata.images(16, (3072,), seed=1)[0])

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "cannot read"),
            (b"no pickle", "cannot read"),
            (pickle.dumps({"data": np.zeros(1000)})[:-200], "cannot read"),
            (pickle.dumps([1, 2]), "holds no dictionary but a list"),
            (pickle.dumps({"fine_labels": []}), "has no data; it has: fine_labels"),
        ],
    )
    def test_damage_is_named(self, tmp_path: Path, content: bytes, problem: str) -> None:
        file = tmp_path / "some_file"
        file.write_bytes(content)
        with pytest.raises(MissingDataError, match=f"some_file.*{problem}|{problem}.*some_file"):
            pickles.fields(file, "data")

    def test_bytes_in_another_encoding_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "data"
        file.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
        with pytest.raises(MissingDataError, match="it wants bytes in rot13"):
            pickles.read(file)
