"""Where the files that ship with hpcsngd lie, in a wheel or in a checkout.

``site_configs/``, ``jobs/`` and ``containers/`` are top-level folders of the project; a wheel carries them
in ``hpcsngd/_data/``. This module is the one place that knows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from hpcsngd.errors import ConfigError, did_you_mean

Kind = Literal["site_configs", "jobs", "containers"]
NamedKind = Literal["site_configs", "jobs"]

# A user's own folders, searched before ours; several are joined by os.pathsep.
USER_FOLDERS: dict[NamedKind, str] = {"site_configs": "HPCSNGD_SITES", "jobs": "HPCSNGD_JOBS"}
_WORD: dict[NamedKind, str] = {"site_configs": "site", "jobs": "experiment"}


def resource_dir(kind: Kind) -> Path:
    """Returns the folder that holds the shipped files of this kind.

    Raises:
        FileNotFoundError: the installation is damaged (neither a wheel's nor a checkout's folder exists).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"hpcsngd is installed without its folder {kind!r}; looked beside {package}")


def named_files(kind: NamedKind) -> dict[str, Path]:
    """Returns name -> YAML file of every known site or experiment; a user's own files win over ours."""
    folders = [Path(part) for part in os.environ.get(USER_FOLDERS[kind], "").split(os.pathsep) if part]
    found: dict[str, Path] = {}
    for folder in [*folders, resource_dir(kind)]:
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def find_named(kind: NamedKind, name_or_path: str) -> Path:
    """Returns the YAML file of a site or experiment given by name or by path.

    Anything with a path separator or a YAML suffix is a path.

    Raises:
        ConfigError: no such name or file; the message lists the closest names.
    """
    word = _WORD[kind]
    if os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"no {word} file at {path}")
        return path.resolve()
    files = named_files(kind)
    if name_or_path not in files:
        hint = did_you_mean(name_or_path, files)
        raise ConfigError(
            f"unknown {word} {name_or_path!r}{hint or '.'} Known: {', '.join(files)}. "
            f"A path to a YAML file works too; ${USER_FOLDERS[kind]} adds folders."
        )
    return files[name_or_path]
