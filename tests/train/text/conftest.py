"""The tiny encoder and its tokenizer, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcsngd.config.catalogue import SMALL_ENCODER
from hpcsngd.train.text import hub, tiny


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a data root with the tiny encoder, all tasks of GLUE and both versions of SQuAD."""
    folder = tmp_path_factory.mktemp("text")
    tiny.encoder(folder)
    for name in tiny.GLUE:
        tiny.glue(name, folder, (48, 16))
    for version in ("v1.1", "v2.0"):
        tiny.squad(version, folder, (48, 16))
    return folder


@pytest.fixture(scope="package")
def tokenizer(root: Path) -> Any:
    return hub.tokenizer(root / SMALL_ENCODER)
