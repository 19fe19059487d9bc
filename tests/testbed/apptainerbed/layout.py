"""Where things are, and what can go wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmbed.errors import EXIT_NO_SLURM_HERE as EXIT_NOT_HERE
from slurmbed.errors import TestbedError

DEFAULT_PREFIX = "/opt/hpcsngd-apptainer"
SUITE = "sid"
"""The only Debian suite with an apptainer package."""


class NoApptainerHereError(TestbedError):
    """This machine cannot have an Apptainer: not root, or the packages cannot be had."""

    exit_code = EXIT_NOT_HERE


@dataclass(frozen=True)
class Layout:
    """The folder that holds Apptainer, and the files in it that others name."""

    prefix: Path = Path(DEFAULT_PREFIX)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Layout:
        """Returns the layout that ``HPCSNGD_TESTBED_APPTAINER`` asks for."""
        chosen = (os.environ if env is None else env).get("HPCSNGD_TESTBED_APPTAINER", DEFAULT_PREFIX)
        return cls(Path(chosen))

    @property
    def program(self) -> Path:
        """The program that users start."""
        return self.prefix / "bin" / "apptainer"

    @property
    def real_program(self) -> Path:
        """The program proper, behind `program`."""
        return self.prefix / "libexec" / "apptainer"

    @property
    def libc(self) -> Path:
        """The newer libc and the libraries beside it."""
        return self.prefix / "libc"

    @property
    def mark(self) -> Path:
        """A file that says that the folder is ours to replace."""
        return self.prefix / ".hpcsngd-testbed"
