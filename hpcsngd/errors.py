"""Errors that a user can act on, and the exit codes of the command line.

A message says what is wrong, where, and what is allowed. The command line prints these as they are,
without a traceback; everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_PREFLIGHT = 3
EXIT_SCHEDULER = 4
EXIT_INTERRUPTED = 130


class HpcsngdError(Exception):
    """A user's mistake or a refusal; ``exit_code`` is what the command line ends with."""

    exit_code = EXIT_USAGE


class ConfigError(HpcsngdError):
    """A site, an experiment or an override that cannot be understood."""


class RunDirError(HpcsngdError):
    """A run directory that is missing, damaged or of an unknown schema."""


class PreflightError(HpcsngdError):
    """A request that is well formed but would fail on this site; nothing was submitted."""

    exit_code = EXIT_PREFLIGHT


class SchedulerError(HpcsngdError):
    """The scheduler is missing, refused the job or did not answer."""

    exit_code = EXIT_SCHEDULER


class RunFailedError(HpcsngdError):
    """The run itself ended without success."""

    exit_code = EXIT_RUN_FAILED


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest allowed names, or an empty string."""
    by_lower = {word.lower(): word for word in allowed}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    if not close:
        return ""
    words = " or ".join(f"'{by_lower[word]}'" for word in close)
    return f"; did you mean {words}?"
