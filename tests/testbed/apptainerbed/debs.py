"""Debian packages: those of the machine's own release are installed, those of a newer suite only unpacked.

The newer suite is read by an apt of its own (state, lists and cache in a scratch folder) from the mirror that
the machine's apt is configured with, and checked against Debian's archive key.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .layout import NoApptainerHereError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
APT_GET = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300")


def run(argv: Sequence[str | Path], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program without input; the exit code is the caller's to judge."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        list(map(str, argv)),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def must(argv: Sequence[str | Path], what: str, *, cwd: Path | None = None) -> str:
    """Runs a program and returns its output.

    Raises:
        NoApptainerHereError: it failed; the message says what was not possible and quotes its last line.
    """
    done = run(argv, cwd=cwd)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NoApptainerHereError(f"no Apptainer here: {what}: {last}")
    return done.stdout


def install(packages: Sequence[str]) -> None:
    """Installs what is missing of some packages of the machine's own release; nothing missing, no apt.

    Raises:
        NoApptainerHereError: there is no apt, or it cannot install them.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoApptainerHereError(f"no Apptainer here: {', '.join(missing)} missing, and no apt-get")
    words = [*APT_GET, "install", "--no-install-recommends", *missing]
    if run(words).returncode != 0:  # often only because the package lists are missing or old
        run([*APT_GET, "update"])
        must(words, f"apt-get cannot install {', '.join(missing)}")


def _is_installed(package: str) -> bool:
    done = run(["dpkg-query", "-W", "-f", "${Status}", package])
    return done.returncode == 0 and done.stdout.startswith("install ok installed")


def mirror() -> str:
    """Returns the address from which apt gets this release's ``main``.

    Raises:
        NoApptainerHereError: apt has no such source.
    """
    for _ in range(2):
        rows = run(
            ["apt-get", "indextargets", "--format", "$(COMPONENT) $(REPO_URI)", "Identifier: Packages"]
        )
        found = [row.split()[1] for row in rows.stdout.splitlines() if row.startswith("main ")]
        if found:
            return found[0]
        run([*APT_GET, "update"])  # without lists apt names no targets
    raise NoApptainerHereError("no Apptainer here: apt has no source for Debian's main")


def fetch(suite: str, packages: Sequence[str], scratch: Path) -> list[Path]:
    """Downloads packages of another suite into a scratch folder; returns the files.

    Raises:
        NoApptainerHereError: the mirror has no such suite, or the suite no such package.
    """
    for folder in ("lists/partial", "cache/archives/partial", "state", "debs"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "state" / "status").touch()
    (scratch / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
    settings = {
        "Dir::Etc::SourceList": scratch / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State": scratch / "state",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": scratch / "state" / "status",
        "Dir::Cache": scratch / "cache",
        "APT::Sandbox::User": "root",  # apt's own user may not enter the scratch folder
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",  # a mirror may lag; the signature is checked
    }
    apt = ["apt-get", "-q", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    must([*apt, "update"], f"no package lists of {suite}")
    must([*apt, "download", *packages], f"{suite} lacks a package", cwd=scratch / "debs")
    return sorted((scratch / "debs").glob("*.deb"))


def unpack(deb: Path, folder: Path) -> None:
    """Unpacks a package's files into a folder, without installing it."""
    must(["dpkg-deb", "-x", deb, folder], f"cannot unpack {deb.name}")
