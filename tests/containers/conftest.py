"""Fixtures of the launcher's tests, for tests with a real runtime."""

from tests.launch.conftest import configure

__all__ = ["configure"]
