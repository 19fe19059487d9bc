"""Fixtures for all tests. Those of the Slurm testbed are in tests/testbed/plugin.py."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the developer's own HPCSNGD_* settings out of the tests."""
    import os

    for name in list(os.environ):
        if name.startswith("HPCSNGD_") and not name.startswith("HPCSNGD_TESTBED"):
            monkeypatch.delenv(name)
