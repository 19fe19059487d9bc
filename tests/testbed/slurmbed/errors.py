"""What can go wrong, and the exit code that says so."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_UP = 3
EXIT_NO_SLURM_HERE = 77  # what test runners (automake, CTest, meson) read as "skipped"


class TestbedError(Exception):
    """The testbed could not do what was asked; the message says what, where, and what to do."""

    __test__ = False  # the name starts like a test class; pytest must not collect it
    exit_code = EXIT_FAILED


class UsageError(TestbedError):
    """An option or environment variable has a value that is not allowed."""

    exit_code = EXIT_USAGE


class NoSlurmHereError(TestbedError):
    """This machine cannot have a Slurm: not root, or the packages cannot be installed."""

    exit_code = EXIT_NO_SLURM_HERE
