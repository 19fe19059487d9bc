"""Fixtures and plugins for all tests."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["tests.testbed.plugin", "tests.testbed.images"]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the developer's own HPCSNGD_* settings out of the tests."""
    for name in list(os.environ):
        if name.startswith("HPCSNGD_") and not name.startswith("HPCSNGD_TESTBED"):
            monkeypatch.delenv(name)
