from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.models import build_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tinydata.write("features", tmp_path)
    return tmp_path


def load(root: Path) -> data.Splits:
    return data.load(schema.Data(name="features"), str(root))


@pytest.mark.parametrize("is_below", [True, False])
def test_features_are_images_of_one_pixel(root: Path, is_below: bool) -> None:
    splits = load(root if is_below else root / "features")
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 10)
    assert (splits.train.channels, splits.train.size) == (32, 1)
    images, labels = splits.train[[5, 2]]
    stored = torch.load(root / "features" / "features_train.pt", weights_only=True)
    assert torch.equal(images, stored[[5, 2]][:, :, None, None])
    assert labels.tolist() == [5, 2]
    assert build_model("linear", 10, 32, 1)(images).shape == (2, 10)


def test_missing_files_are_named(root: Path) -> None:
    for name in ("targets_train.pt", "features_val.pt"):
        (root / "features" / name).unlink()
    with pytest.raises(MissingDataError, match=r"features lacks targets_train\.pt, features_val\.pt$"):
        load(root)
    with pytest.raises(MissingDataError, match="no features below the data root"):
        load(root / "elsewhere")


class Attack:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("features_train.pt", torch.zeros(48), r"torch\.float32 of shape \(48,\), not floats \(n, d\)"),
        ("features_train.pt", torch.zeros(48, 3, dtype=torch.int64), r"torch\.int64 of shape"),
        ("features_val.pt", torch.zeros(16, 31), "32 features to train, 31 to evaluate"),
        ("targets_val.pt", torch.zeros(15, dtype=torch.int64), r"shape \(15,\), not 16 whole numbers"),
        ("targets_val.pt", torch.zeros(16), r"torch\.float32 of shape \(16,\)"),
        ("targets_val.pt", torch.full((16,), -1), "classes are counted from 0"),
        ("targets_val.pt", [1, 2], "holds a list, not a tensor"),
        ("features_val.pt", Attack(), "cannot read"),
    ],
)
def test_damaged_files_are_named(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, problem: str
) -> None:
    torch.save(content, root / "features" / name)
    with pytest.raises(MissingDataError, match=problem):
        load(root)
    assert "ran" not in capsys.readouterr().out
