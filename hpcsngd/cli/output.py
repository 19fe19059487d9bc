"""How verbs print."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click


def print_json(data: Any) -> None:
    """Prints data as JSON; what JSON does not know is printed as text."""
    click.echo(json.dumps(data, indent=2, default=str))


def shown(path: Path) -> str:
    """Returns a path as one would type it here: relative where it can be, quoted for a shell."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
