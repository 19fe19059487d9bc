"""Field types of the site and the experiment schema: text, wall time, port; expansion of ``${NAME}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from hpcsngd.config.strict import WrittenFloat, WrittenInt
from hpcsngd.errors import ConfigError

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)$")
_UNITS = re.compile(r"(?:(?P<days>\d+)d)?(?:(?P<hours>\d+)h)?(?:(?P<minutes>\d+)m)?$")
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class Strict(BaseModel):
    """Base of every schema class: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _to_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    return str(value) if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_to_text), WithJsonSchema({"type": ["string", "number", "boolean"]})]


def walltime_minutes(value: str | int) -> int:
    """Returns a wall time in whole minutes, rounded up.

    Accepted: minutes as a number, ``H:MM:SS``, ``D-HH:MM:SS``, ``90m``, ``2h``, ``1h30m``, ``1d``. ``2:00``
    is refused because Slurm reads it as two minutes and LSF as two hours.

    Raises:
        ValueError: anything else, or zero.
    """
    text = str(value).strip()
    match = _CLOCK.match(text) or (_UNITS.match(text) if text else None)
    if text.isdigit():
        minutes = int(text)
    elif match:
        part = {name: int(number or 0) for name, number in match.groupdict().items()}
        minutes = part["days"] * 1440 + part["hours"] * 60 + part["minutes"] + (part.get("seconds", 0) > 0)
    else:
        raise ValueError(
            f"{text!r} is not a wall time; allowed: 02:30:00, 1-12:00:00, 90m, 2h, 1h30m, or minutes"
        )
    if minutes < 1:
        raise ValueError("a wall time must be at least one minute")
    return minutes


def walltime_text(minutes: int) -> str:
    """Returns minutes as ``HH:MM:00``, or with days as ``D-HH:MM:00``."""
    hours, rest = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    return f"{days}-{hours_of_day:02}:{rest:02}:00" if days else f"{hours:02}:{rest:02}:00"


def _to_walltime(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected a wall time such as 02:30:00, 90m or 2h")  # noqa: TRY004 - pydantic's protocol
    return walltime_text(walltime_minutes(value))


Walltime = Annotated[str, BeforeValidator(_to_walltime), WithJsonSchema({"type": ["string", "integer"]})]


def port_range(value: str | int) -> tuple[int, int]:
    """Returns the first and last port that ``auto``, a number or ``first-last`` allows.

    ``auto`` is 20000-29999: above the privileged ports and below Linux's ephemeral range (32768 up).

    Raises:
        ValueError: not one of those, or outside 1024-65535.
    """
    text = str(value)
    if text == "auto":
        return 20000, 29999
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not a port; allowed: auto, a number, or a range such as 20000-20100")
    first = int(match[1])
    last = int(match[2] or first)
    if not 1024 <= first <= last <= 65535:
        raise ValueError(f"ports {text} are outside 1024-65535 or in the wrong order")
    return first, last


def _to_port(value: Any) -> str:
    port_range(value)
    return str(value)


Port = Annotated[
    str, BeforeValidator(_to_port), WithJsonSchema({"type": ["string", "integer"], "examples": ["auto"]})
]


def expand(text: str, environment: Mapping[str, str], where: str) -> str:
    """Returns the text with ``${NAME}`` and ``${NAME:-default}`` replaced; ``$${`` stands for ``${``.

    ``$NAME`` without braces is left to the shell on the node.

    Raises:
        ConfigError: a variable is unset and has no default.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name in environment:
            return environment[name]
        if default is None:
            raise ConfigError(
                f"{where}: the environment variable {name} is not set; "
                f"export it or write ${{{name}:-default}}"
            )
        return default

    return _VARIABLE.sub(replace, text)
