"""Fixtures and plugins for all tests, and which of them may run at the same time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.testbed.plugin", "tests.testbed.images"]

#: Folders whose tests use what a machine has only once: a Slurm cluster, an Apptainer, a server of images.
ALONE = {"slurm", "containers", "testbed"}
#: Files of many long tests that share nothing: they are dealt out one by one.
DEALT = {"test_jobs_smoke.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tells pytest-xdist what belongs to one process: tests of one file, and all that need the cluster."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    tests = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(tests)
        is_marked = any(item.get_closest_marker(name) for name in ("slurm", "apptainer"))
        if place.name not in DEALT:
            item.add_marker(
                pytest.mark.xdist_group("machine" if is_marked or place.parts[0] in ALONE else str(place))
            )


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the developer's own HPCSNGD_* settings out of the tests."""
    for name in list(os.environ):
        if name.startswith("HPCSNGD_") and not name.startswith("HPCSNGD_TESTBED"):
            monkeypatch.delenv(name)
