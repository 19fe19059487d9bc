"""Builds an image: the command, and the run of it with a log and without half images.

The image is built under a temporary name beside its place, looked at, and renamed: a failed, stopped or wrong
build leaves the old image as it was.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd.config.site import ImageBuild
from hpcsngd.errors import ConfigError, RunFailedError
from hpcsngd.launch.images import code, sif
from hpcsngd.launch.images.definition import Request, from_registry, needs_mirror, render
from hpcsngd.launch.images.machines import MACHINES, Machine

RUNTIMES = ("apptainer", "singularity")
TAIL_LINES = 15
_STOP_GRACE_S = 30.0
_ZSTD = "-comp zstd -Xcompression-level 3"

_SHIM = """\
#!/bin/sh
# Apptainer asks debootstrap for the architecture of its own program; this asks for the one that is wanted.
for word in "$@"; do
  shift
  case $word in --arch=*) word=--arch={arch} ;; esac
  set -- "$@" "$word"
done
exec {debootstrap} "$@"
"""


@dataclass(frozen=True)
class Job:
    """One build.

    Attributes:
        request: what the image should be.
        target: where the image goes.
        runtime: the program that builds.
        options: how the site builds.
        is_forced: whether an image that is there may be replaced.
    """

    request: Request
    target: Path
    runtime: str
    options: ImageBuild
    is_forced: bool = False

    @property
    def log(self) -> Path:
        """The log's path."""
        return self.target.with_name(self.target.name + ".log")


def command(job: Job, target: Path, definition: Path, *, machine: str) -> list[str]:
    """Returns the words that build a definition into a target. Options come first: the runtime insists.

    ``--force``, because without it the labels of a parent image win over ours; `build` looks after what is at
    the target. ``--arch``, because a registry and a remote builder are asked for this machine's images
    otherwise; debootstrap does not see it and has `_SHIM`.
    """
    words = [job.runtime, "build", "--force"]
    words += {"plain": [], "fakeroot": ["--fakeroot"], "remote": ["--remote"]}[job.options.how]
    is_asked_for = job.options.how == "remote" or from_registry(job.request.base)
    if is_asked_for and job.request.machine.kernel != machine:
        words += ["--arch", job.request.machine.go]
    for bind in job.options.binds:
        words += ["--bind", bind]
    return [*words, *job.options.args, str(target), str(definition)]


def environment(options: ImageBuild, given: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a build; each of the runtime's variables under both of its names."""
    ours = {}
    if options.tmp:
        ours["TMPDIR"] = str(Path(options.tmp).expanduser())
    if options.compression == "zstd":
        ours["MKSQUASHFS_ARGS"] = _ZSTD
    both = {
        f"{prefix}_{name}": value for name, value in ours.items() for prefix in ("APPTAINER", "SINGULARITY")
    }
    return {**given, **both}


def show(job: Job, *, machine: str) -> str:
    """Returns the definition and the command, as text that a shell could run; writes nothing.

    Args:
        job: the build.
        machine: architecture of this machine, in the kernel's name.
    """
    extra = environment(job.options, {})
    words = [f"{name}={value}" for name, value in sorted(extra.items()) if name.startswith("APPTAINER")]
    built = command(job, job.target, Path("IMAGE.def"), machine=machine)
    line = shlex.join([*(["env", *words] if words else []), *built])
    shim = ""
    if _needs_shim(job, machine):
        shim = f"# first in PATH: a debootstrap that asks for --arch={job.request.machine.debian}\n"
    return f"{render(job.request)}\n# --- built with, IMAGE.def being the text above\n{shim}{line}\n"


def find_runtime(asked: str) -> str:
    """Returns the program that builds images on this machine.

    Raises:
        ConfigError: there is none.
    """
    names = RUNTIMES if asked == "auto" else (asked,)
    for name in names:
        if shutil.which(name):
            return name
    raise ConfigError(
        f"no {' or '.join(names)} in PATH: load its module, or build elsewhere from `hpcsngd container def` "
        "and copy the image here"
    )


def build(job: Job, *, machine: str, on_line: Callable[[str], None]) -> float:
    """Builds an image; returns how long it took, in seconds.

    Args:
        job: the build.
        machine: architecture of this machine, in the kernel's name.
        on_line: told each line that the runtime writes.

    Raises:
        ConfigError: an image is there already, or a folder or bind source is missing.
        RunFailedError: the build failed, or its image is not what was asked for; the log has everything.
    """
    _refuse(job)
    started = time.monotonic()
    partial = job.target.with_name(f".{job.target.stem}.{os.getpid()}.partial.sif")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="hpcsngd-build-") as scratch,
            job.log.open("w", buffering=1) as log,
        ):
            words, env = _prepare(job, Path(scratch), partial, machine)
            log.write(f"# {shlex.join(words)}\n")
            status, tail = _run(words, env, log.write, on_line)
        if status != 0:
            last = "\n".join(tail)
            raise RunFailedError(f"the build ended with {status}; log: {job.log}\n{last}")
        _look_at(partial, job)
        partial.replace(job.target)
    finally:
        partial.unlink(missing_ok=True)
    return time.monotonic() - started


def _refuse(job: Job) -> None:
    if job.target.exists() and not job.is_forced:
        raise ConfigError(f"{job.target} exists: --force replaces it once the new image is complete")
    if not job.target.parent.is_dir():
        raise ConfigError(f"no folder {job.target.parent} for the image")
    if not os.access(job.target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"no permission to write the image into {job.target.parent}")
    if job.options.how == "remote" and job.runtime == "apptainer":
        raise ConfigError("Apptainer has no build --remote: use SingularityCE, or how: fakeroot")
    for bind in job.options.binds:
        source = bind.partition(":")[0]
        if not Path(source).exists():
            raise ConfigError(f"container.build.binds: {source} does not exist on this machine")


def _prepare(job: Job, scratch: Path, partial: Path, machine: str) -> tuple[list[str], dict[str, str]]:
    """Writes what the build reads, and for another architecture the shim; returns command and environment."""
    wheel = code.write_wheel(scratch)
    definition = scratch / "image.def"
    definition.write_text(render(job.request, wheel=str(wheel)), encoding="utf-8")
    env = environment(job.options, os.environ)
    if _needs_shim(job, machine):
        env["PATH"] = f"{_write_shim(scratch, job.request.machine)}:{env['PATH']}"
    return command(job, partial.absolute(), definition, machine=machine), env


def _needs_shim(job: Job, machine: str) -> bool:
    is_elsewhere = job.options.how == "remote"
    return not is_elsewhere and needs_mirror(job.request.base) and job.request.machine.kernel != machine


def _write_shim(scratch: Path, wanted: Machine) -> Path:
    debootstrap = shutil.which("debootstrap")
    if debootstrap is None:
        raise ConfigError("no debootstrap in PATH, and this base is made with it")
    shim = scratch / "bin" / "debootstrap"
    shim.parent.mkdir()
    shim.write_text(_SHIM.format(arch=wanted.debian, debootstrap=shlex.quote(debootstrap)))
    shim.chmod(0o755)
    return shim.parent


def _run(
    words: Sequence[str], env: Mapping[str, str], *sinks: Callable[[str], object]
) -> tuple[int, list[str]]:
    """Runs the build in a session of its own; returns exit status and last lines. Ctrl-C ends it all."""
    process = subprocess.Popen(
        list(words),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: list[str] = []
    with process, _ended_with_us(process):
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE above
        for line in process.stdout:
            for sink in sinks:
                sink(line)
            tail = [*tail, line.rstrip()][-TAIL_LINES:]
        return process.wait(), tail


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _look_at(partial: Path, job: Job) -> None:
    wanted = job.request.machine.kernel
    found = sif.read(partial).arch
    if found != wanted:
        names = {each.kernel: each.debian for each in MACHINES}
        raise RunFailedError(
            f"the build made an image for {found}, not {wanted} ({names[wanted]}): the parent image is of "
            f"another architecture; log: {job.log}"
        )
