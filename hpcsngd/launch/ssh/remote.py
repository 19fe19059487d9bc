"""What answers on a host: starts agents, says which live, ends them. ``python -m hpcsngd.launch.ssh.remote``.

One request as JSON on standard input, one answer as JSON on a marked line of standard output: a login shell
may print what it likes around it. A process is only touched if it is the one that was started: same process
id, same start, same boot of the machine, and the run directory in its command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcsngd import __version__
from hpcsngd.launch import environment, processes

MARK = "hpcsngd-ssh: "
AGENT = "hpcsngd.launch.ssh.agent"
PLACE = "HPCSNGD_SSH_PLACE"
"""Environment variable with an agent's `hpcsngd.launch.place.Place` as JSON."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
GONE_S = 10.0
"""How long a killed agent may take to be gone."""

Request = Mapping[str, Any]


class RefusedError(Exception):
    """This host cannot do what is asked; the message says why."""


def facts(request: Request) -> dict[str, Any]:
    """Returns what the submitter compares: versions, architecture, and whether a file is seen here.

    Args:
        request: ``file``: path of a file that the submitter sees; optional.
    """
    file = request.get("file")
    return {
        "hpcsngd": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "has_torch": importlib.util.find_spec("torch") is not None,
        "sees_file": None if file is None else Path(file).is_file(),
    }


def start(request: Request) -> dict[str, Any]:
    """Starts the agents of this host and returns how they are known.

    Args:
        request: ``run_dir``, ``attempt``, ``digest`` of run.yaml, ``version`` of the submitter, ``cwd``,
            ``env`` (variables that go along), ``places`` (one per agent), ``logs`` (paths without suffix).

    Raises:
        RefusedError: another version of hpcsngd, or the run directory is not here.
    """
    run_dir = Path(request["run_dir"])
    if request["version"] != __version__:
        raise RefusedError(
            f"hpcsngd {__version__} there, {request['version']} here; bring both to one version"
        )
    if not _is_same(run_dir / "run.yaml", request["digest"]):
        raise RefusedError(
            f"{run_dir} is not the same folder there; run_root must be on a file system that all hosts share"
        )
    if not os.access(run_dir, os.W_OK):
        raise RefusedError(f"{run_dir} cannot be written there")
    agents = [
        _start_agent(request, place, log)
        for place, log in zip(request["places"], request["logs"], strict=True)
    ]
    return {"agents": agents}


def _is_same(file: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == digest
    except OSError:
        return False


def _start_agent(request: Request, place: Mapping[str, Any], log: str) -> dict[str, Any]:
    """Starts an agent in a session of its own, which outlives the connection."""
    folder = request["cwd"] if Path(request["cwd"]).is_dir() else request["run_dir"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    words = [sys.executable, "-u", "-m", AGENT, request["run_dir"], str(request["attempt"])]
    with Path(f"{log}.out").open("ab") as out, Path(f"{log}.err").open("ab") as err:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment.clean(own) | dict(request["env"]) | {PLACE: json.dumps(place)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    return {"pid": process.pid, "start_ticks": processes.start_ticks(process.pid), "boot": boot()}


def alive(request: Request) -> dict[str, Any]:
    """Returns for each of some agents whether it runs.

    Args:
        request: ``agents``: dicts with ``pid``, ``start_ticks``, ``boot`` and ``run_dir``.
    """
    return {"alive": [is_alive(agent) for agent in request["agents"]]}


def end(request: Request) -> dict[str, Any]:
    """Asks agents to end, or kills them with all that they started; returns which of them ran.

    Args:
        request: ``agents`` as for `alive`; ``is_hard``: kill them, and wait until they are gone.
    """
    ran = [is_alive(agent) for agent in request["agents"]]
    for agent, is_running in zip(request["agents"], ran, strict=True):
        if is_running and request["is_hard"]:
            _kill(agent)
        elif is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent["pid"], signal.SIGTERM)
    return {"alive": ran}


def _kill(agent: Mapping[str, Any]) -> None:
    deadline = time.monotonic() + GONE_S
    tree = [agent["pid"], *processes.descendants(agent["pid"])]
    while is_alive(agent) and time.monotonic() < deadline:
        processes.kill(tree)
        time.sleep(0.02)


def is_alive(agent: Mapping[str, Any]) -> bool:
    """Returns whether the process with an agent's id is that agent."""
    if agent["boot"] != boot() or processes.start_ticks(agent["pid"]) != agent["start_ticks"]:
        return False
    try:
        words = Path(f"/proc/{agent['pid']}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(agent["run_dir"]) in words


def boot() -> str:
    """Returns what names this boot of this machine; empty where the kernel does not tell."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


VERBS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "facts": facts,
    "start": start,
    "alive": alive,
    "end": end,
}


def answer(text: str) -> str:
    """Returns the marked line that answers a request."""
    request = json.loads(text)
    try:
        said = VERBS[request["verb"]](request)
    except (RefusedError, OSError) as error:
        said = {"error": str(error)}
    return MARK + json.dumps(said)


def parse(lines: Sequence[str]) -> dict[str, Any] | None:
    """Returns the answer among the lines that a host printed; None if there is none."""
    marked = [line for line in lines if line.startswith(MARK)]
    found: dict[str, Any] | None = json.loads(marked[-1].removeprefix(MARK)) if marked else None
    return found


def main() -> None:
    """Answers one request."""
    sys.stdout.write(answer(sys.stdin.read()) + "\n")


if __name__ == "__main__":
    main()
