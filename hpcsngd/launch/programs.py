"""The one place where schedulers' programs are run: always with a time limit.

A controller that is down lets its clients hang for minutes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpcsngd.errors import SchedulerError


@dataclass(frozen=True)
class Said:
    """What a program printed, and its exit status."""

    out: str
    err: str
    status: int

    def words(self) -> str:
        """Returns its complaint in one line, or else its answer."""
        return _one_line(self.err or self.out)


def run(
    words: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, text: str = ""
) -> Said:
    """Runs a scheduler's program, whatever its exit status.

    Args:
        words: the command line.
        timeout_s: seconds that it may take.
        env: all its variables; default: ours.
        text: its standard input, never the caller's, which bsub without a command would read.

    Raises:
        SchedulerError: it is missing or does not answer in time.
    """
    name = words[0]
    try:
        done = subprocess.run(
            list(words),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=env,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise SchedulerError(f"{name} is not installed here or not in PATH; is this a login node?") from error
    except PermissionError as error:
        raise SchedulerError(f"{name} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{name} did not answer within {timeout_s:g} s") from error
    return Said(done.stdout, done.stderr, done.returncode)


def command_output(words: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    """Returns what a scheduler's program prints.

    Raises:
        SchedulerError: it is missing, fails or does not answer in time; with its own words.
    """
    said = run(words, timeout_s=timeout_s, env=env)
    if said.status:
        raise SchedulerError(f"{words[0]} refused: {said.words() or 'no reason given'}")
    return said.out


def _one_line(text: str) -> str:
    return " / ".join(_nonempty(text.splitlines()))


def _nonempty(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]
