"""Fixtures of the tests with a real sshd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import sshd


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Bed]:
    """Yields two hosts that answer to ssh."""
    with sshd.running(tmp_path_factory.mktemp("sshd") / "bed") as made:
        yield made
