from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.config.catalogue import DatasetFacts
from hpcsngd.train import data, tinydata, vision
from hpcsngd.train.data.download import LOCK
from hpcsngd.train.data.idx import read_idx
from hpcsngd.train.faults import MissingDataError

PIXELS = (torch.arange(6 * 28 * 28) % 251).to(torch.uint8).reshape(6, 28, 28)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9], dtype=torch.uint8)


def config(**fields: Any) -> schema.Data:
    return schema.Data.model_validate({"name": "fashion-mnist", **fields})


def idx(values: Tensor) -> bytes:
    """Returns a tensor in the idx format."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.numpy().tobytes()


def write_fashion(folder: Path, *, gzipped: bool, samples: int = 6) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", samples), ("t10k", 2)):
        for kind, values in (("images-idx3", PIXELS[:count]), ("labels-idx1", LABELS[:count])):
            content = idx(values)
            name = f"{split}-{kind}-ubyte"
            if gzipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def no_system_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides a data set that the machine's package manager may have installed."""
    facts = DatasetFacts(**{**vars(CATALOGUE["fashion-mnist"]), "system_paths": ()})
    monkeypatch.setitem(CATALOGUE, "fashion-mnist", facts)


@pytest.mark.usefixtures("no_system_data")
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("place", ["FashionMNIST/raw", "fashion-mnist", "."])
def test_fashion_mnist_is_found_in_each_place(tmp_path: Path, place: str, gzipped: bool) -> None:
    write_fashion(tmp_path / "root" / place if place != "." else tmp_path / "root", gzipped=gzipped)
    splits = data.load(config(), str(tmp_path / "root"))
    assert (len(splits.train), len(splits.test), splits.num_classes) == (6, 2, 10)
    assert (splits.train.channels, splits.train.size) == (1, 28)
    images, labels = splits.train[[5, 0]]
    assert labels.tolist() == [9, 3]
    assert torch.allclose(images[0, 0], (PIXELS[5] / 255 - 0.2862) / 0.3529)


@pytest.mark.usefixtures("no_system_data")
def test_the_experiments_root_wins_over_the_sites(tmp_path: Path) -> None:
    write_fashion(tmp_path / "own", gzipped=True, samples=3)
    write_fashion(tmp_path / "site", gzipped=True)
    splits = data.load(config(root=str(tmp_path / "own")), str(tmp_path / "site"))
    assert len(splits.train) == 3


def test_the_system_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "system", gzipped=True)
    place = str(tmp_path / "system" / "train-images-idx3-ubyte.gz")
    facts = DatasetFacts(**{**vars(CATALOGUE["fashion-mnist"]), "system_paths": (place,)})
    monkeypatch.setitem(CATALOGUE, "fashion-mnist", facts)
    assert len(data.load(config(), None).train) == 6


@pytest.mark.usefixtures("no_system_data")
def test_missing_data_name_the_root_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError) as caught:
        data.load(config(), str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "dataset-fashion-mnist" in str(caught.value)
    assert "data.download=true" in str(caught.value)


@pytest.mark.usefixtures("no_system_data")
def test_a_download_goes_to_torchvisions_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        write_fashion(Path(root) / "FashionMNIST" / "raw", gzipped=False)

    monkeypatch.setattr(vision.load().datasets, "FashionMNIST", fetch)
    assert len(data.load(config(download=True), str(tmp_path)).train) == 6


@pytest.mark.usefixtures("no_system_data")
def test_a_failed_download_is_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, download: bool) -> None:
        raise OSError("no route")

    monkeypatch.setattr(vision.load().datasets, "FashionMNIST", fetch)
    with pytest.raises(MissingDataError, match=r"cannot download fashion-mnist .* no route"):
        data.load(config(download=True), str(tmp_path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (idx(PIXELS)[:-1], "4703 values where its head announces"),
        (
            b"\x00\x00\x0d\x01\x00\x00\x00\x00",
            "is not an idx file of unsigned bytes: it begins with 00000d01",
        ),
        (b"", "is not an idx file"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "images"
    file.write_bytes(content)
    with pytest.raises(MissingDataError, match=problem):
        read_idx(file)


def test_a_cut_off_gzip_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(idx(PIXELS))[:-20])
    with pytest.raises(MissingDataError, match="cannot read"):
        read_idx(file)


@pytest.mark.usefixtures("no_system_data")
def test_a_partial_folder_says_which_files_it_lacks(tmp_path: Path) -> None:
    write_fashion(tmp_path / "fashion-mnist", gzipped=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "fashion-mnist" / f"{name}.gz").unlink()
    with pytest.raises(MissingDataError, match="lacks t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"):
        data.load(config(), str(tmp_path))


@pytest.mark.usefixtures("no_system_data")
def test_a_download_that_another_run_has_made_meanwhile_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files appear between the first look and the lock, as when another run held it."""
    from hpcsngd.train.data import download

    original = download.locks.exclusive

    def lock(file: Path) -> Any:
        write_fashion(tmp_path / "FashionMNIST" / "raw", gzipped=True)
        return original(file)

    def fetch(root: str, download: bool) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(download.locks, "exclusive", lock)
    monkeypatch.setattr(vision.load().datasets, "FashionMNIST", fetch)
    assert len(data.load(config(download=True), str(tmp_path)).train) == 6
    assert (tmp_path / LOCK).exists()


def test_mnist_has_its_own_place_and_scale(tmp_path: Path) -> None:
    tinydata.write("mnist", tmp_path)
    splits = data.load(schema.Data(name="mnist"), str(tmp_path))
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 10)
    pixels = read_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz")
    assert torch.allclose(splits.train[[7]][0][0, 0], (pixels[7] / 255 - 0.1307) / 0.3081)
