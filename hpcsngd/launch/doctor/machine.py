"""The machine as the doctor sees it: programs, files, network. Tests put another in its place."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd.launch import hardware

INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Output:
    """What a program printed, and its exit status; -1 if it could not be started or took too long."""

    status: int
    text: str


class Machine:
    """This machine."""

    @property
    def architecture(self) -> str:
        """Returns the architecture, such as ``x86_64``."""
        return platform.machine()

    @property
    def python(self) -> str:
        """Returns the interpreter that runs us."""
        return sys.executable

    @property
    def python_version(self) -> tuple[int, int, int]:
        """Returns the version of that interpreter."""
        return sys.version_info[:3]

    def find(self, program: str) -> str | None:
        """Returns where a program is, or None."""
        return shutil.which(program)

    @contextlib.contextmanager
    def mark(self, folder: str) -> Iterator[str | None]:
        """Yields the path of a file that lies in a folder meanwhile; None where none can be made."""
        with contextlib.ExitStack() as stack:
            try:
                place = Path(folder).expanduser().absolute()
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=place, prefix=".hpcsngd-doctor-"))
            except OSError:
                yield None
                return
            yield file.name

    def run(self, words: Sequence[str], timeout_s: float, text: str = "") -> Output:
        """Runs a program with a text as its input; everything that can go wrong becomes an `Output`."""
        try:
            done = subprocess.run(
                list(words),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
                errors="replace",
                input=text,
            )
        except subprocess.TimeoutExpired:
            return Output(-1, f"no answer within {timeout_s:g} s")
        except OSError as error:
            return Output(-1, str(error.strerror))
        return Output(done.returncode, done.stdout if done.returncode == 0 else done.stderr or done.stdout)

    def exists(self, path: str) -> bool:
        """Returns whether a path exists."""
        return Path(path).expanduser().exists()

    def is_writable(self, folder: str) -> bool:
        """Returns whether a folder, or the nearest one above it that exists, can be written."""
        return os.access(self._nearest(folder), os.W_OK | os.X_OK)

    def free_gb(self, folder: str) -> float:
        """Returns the free space at a folder, or at the nearest one above it that exists, in 10^9 bytes."""
        return shutil.disk_usage(self._nearest(folder)).free / 1e9

    def interfaces(self) -> dict[str, bool]:
        """Returns network interface -> whether it is up; without the loopback."""
        found = {}
        for folder in sorted(INTERFACES.glob("*")):
            if folder.name != "lo":
                found[folder.name] = (folder / "operstate").read_text(encoding="ascii").strip() == "up"
        return found

    def amd_gpus(self) -> list[dict[str, str]]:
        """Returns name, memory and driver of each GPU of AMD's kernel driver."""
        return hardware.amd_gpus(Path("/sys"))

    def own_address(self) -> str | None:
        """Returns the IPv4 address that this machine's host name stands for; None if for none."""
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return None

    @staticmethod
    def _nearest(folder: str) -> Path:
        path = Path(folder).expanduser().absolute()
        return next(parent for parent in (path, *path.parents) if parent.exists())
