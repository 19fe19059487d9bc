"""Secrets stay out of run directories: refused in a configuration, blanked in diffs and command lines.

Everything that a run's configuration holds is written to ``run.yaml``, shown by dry runs and often shared.
A token needs no place there: variables of the submitter's environment reach the workers without being
recorded. Nothing here prints a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hpcsngd.config.resolve import Resolved, walk
from hpcsngd.errors import ConfigError

REDACTED = "<redacted>"

_SECRET_WORDS = ("token", "secret", "password", "passwd", "passphrase", "apikey", "credentials")
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key")})
# words that say where a secret is, or whether to use one
_HARMLESS_VALUE = re.compile(r"^(?:|\d{1,4}|true|false|yes|no|none|null|[~/.].*|\$.*)$", re.IGNORECASE)
_VALUES = (
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"github_pat_[A-Za-z0-9_]{20,}",
    r"glpat-[A-Za-z0-9_-]{16,}",
    r"hf_[A-Za-z0-9]{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"xox[abprs]-[A-Za-z0-9-]{10,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",
    r"AIza[0-9A-Za-z_-]{35}",
    r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"(?<=://)[^/\s:@]+:[^/\s:@$]+(?=@)",
    r"(?<=Bearer )[A-Za-z0-9._~+/=-]{16,}",
)
_VALUE = re.compile("|".join(f"(?:{pattern})" for pattern in _VALUES))
_ASSIGNMENT = re.compile(r"""(?P<name>\b[A-Za-z_][\w.-]*)\s*[=:]\s*(?P<value>"[^"]*"|'[^']*'|[^\s;&|]+)""")

_ADVICE = (
    "it looks like a secret, and the configuration is written to run.yaml. Leave it out: variables of your "
    "own environment reach the workers and are not recorded; or read it from a private file in a preload "
    'line: export NAME="$(cat ~/.name)"'
)


def refuse(resolved: Resolved) -> None:
    """Refuses a configuration that holds what looks like a secret.

    Raises:
        ConfigError: names each key and where it was written, never the value.
    """
    found = list(_suspicious(resolved))
    if found:
        raise ConfigError("\n".join(f"{key}: {_ADVICE}" for key in found))


def redact(text: str) -> str:
    """Returns text with what looks like a secret replaced by `REDACTED`."""
    return _ASSIGNMENT.sub(_blank, _VALUE.sub(REDACTED, text))


def is_secret(name: str, value: str) -> bool:
    """Returns whether a value looks like a secret, by itself or by the name that it has."""
    if _VALUE.search(value):
        return True
    return _names_a_secret(name) and not _HARMLESS_VALUE.match(value.strip("\"'"))


def _suspicious(resolved: Resolved) -> Iterator[str]:
    trees: Mapping[str, Any] = {name: resolved.to_record()[name] for name in ("site", "experiment")}
    for key, value in walk(trees):
        texts = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        name = key.rpartition(".")[2]
        if any(is_secret(name, text) or _assigns(text) for text in texts):
            origin = resolved.origins.get(key, "")
            yield f"{key} ({origin})" if origin else key


def _assigns(text: str) -> bool:
    return any(is_secret(match["name"], match["value"]) for match in _ASSIGNMENT.finditer(text))


def _blank(match: re.Match[str]) -> str:
    if not is_secret(match["name"], match["value"]):
        return match[0]
    return match[0][: match.start("value") - match.start()] + REDACTED


def _names_a_secret(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    # PGPASSWORD and authToken have no underscore
    return bool(words) and (words[-1].endswith(_SECRET_WORDS) or tuple(words[-2:]) in _SECRET_PAIRS)
