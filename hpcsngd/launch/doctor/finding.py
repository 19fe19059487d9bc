"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        verdict: ``broken`` if jobs cannot work like this, ``warning`` if they may not.
        text: what was found.
        advice: what to do about it; empty if nothing.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str = ""


def ok(name: str, text: str) -> Finding:
    """Returns a finding that asks for nothing."""
    return Finding(name, "ok", text)


def warning(name: str, text: str, advice: str) -> Finding:
    """Returns a finding that may matter."""
    return Finding(name, "warning", text, advice)


def broken(name: str, text: str, advice: str) -> Finding:
    """Returns a finding that keeps jobs from working."""
    return Finding(name, "broken", text, advice)
