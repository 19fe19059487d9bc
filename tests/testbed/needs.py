"""What the fixtures of this folder share: how a test ends without what it needs, and its marker."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Mapping, Sequence

import pytest

from .slurmbed.errors import EXIT_NO_SLURM_HERE, EXIT_OK

#: What both testbed commands exit with where the machine cannot have what they install.
EXIT_NOT_HERE = EXIT_NO_SLURM_HERE


def require(done: subprocess.CompletedProcess[str], command: str, env: Mapping[str, str]) -> None:
    """Ends a test unless a testbed's command succeeded: skips where it cannot, fails where it should.

    Args:
        done: the command's outcome.
        command: as people type it.
        env: the environment; ``CI=true`` is continuous integration.

    Raises:
        pytest.skip.Exception: on exit code 77, outside continuous integration.
        pytest.fail.Exception: on exit code 77 where ``CI`` is ``true``, and on every other failure.
    """
    if done.returncode == EXIT_OK:
        return
    reason = done.stderr.strip() or f"{command}: exit code {done.returncode}"
    if done.returncode == EXIT_NOT_HERE and env.get("CI", "").lower() != "true":
        pytest.skip(reason)
    pytest.fail(reason, pytrace=False)


def refuse_unmarked(items: Sequence[pytest.Item], fixtures: Collection[str], marker: str) -> None:
    """Refuses tests that would install something without saying so.

    Args:
        items: collected tests.
        fixtures: that install it, used directly or through another fixture.
        marker: that such tests must have.

    Raises:
        pytest.UsageError: with the tests' names.
    """
    names = [
        item.nodeid
        for item in items
        if not set(fixtures).isdisjoint(getattr(item, "fixturenames", ()))
        and item.get_closest_marker(marker) is None
    ]
    if names:
        raise pytest.UsageError(f"tests that use {marker} need @pytest.mark.{marker}: {', '.join(names)}")
