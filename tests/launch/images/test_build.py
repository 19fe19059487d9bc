"""Builds, with a runtime that is a shell script: what it is told, what it leaves, what a failure leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcsngd.config.site import ImageBuild
from hpcsngd.errors import ConfigError, RunFailedError
from hpcsngd.launch.images import build, machines
from hpcsngd.launch.images.build import Job
from hpcsngd.launch.images.definition import Request

from . import sifs

MIRROR = "http://deb.example.org/debian"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named apptainer, first in PATH, that runs ``script`` and writes an image for x86_64."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sifs.write(tmp_path / "made.sif")
    (tmp_path / "script").write_text("")
    program = folder / "apptainer"
    program.write_text(
        '#!/bin/bash\nset -e\nprintf "%s\\n" "$@" >"$SEEN/words"\nenv >"$SEEN/env"\n'
        'for definition; do :; done\ncp "$definition" "$SEEN/image.def"\n'
        'target=("${@: -2:1}")\necho "INFO:    Starting build..."\n. "$SEEN/script"\n'
        'cp "$SEEN/made.sif" "$target"\necho "INFO:    Build complete"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def job(target: Path, *, arch: str = "x86_64", is_forced: bool = False, **options: object) -> Job:
    request = Request("debian", machines.find(arch), mirror=MIRROR)
    return Job(request, target, "apptainer", ImageBuild.model_validate(options), is_forced)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


def test_an_image_is_built_and_its_log_kept(runtime: Path, tmp_path: Path) -> None:
    target, lines = tmp_path / "my images" / "a.sif", []
    target.parent.mkdir()
    took_s = build.build(job(target), machine="x86_64", on_line=lines.append)
    assert took_s >= 0
    assert target.read_bytes() == (tmp_path / "made.sif").read_bytes()
    assert lines == ["INFO:    Starting build...\n", "INFO:    Build complete\n"]
    log = (target.parent / "a.sif.log").read_text()
    assert log.startswith("# apptainer build ")
    assert log.endswith("Build complete\n")
    assert leftovers(target.parent) == []


def test_the_definition_names_a_wheel_that_is_there(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("""test -s "$(grep -o '/[^ ]*/hpcsngd-[^ ]*whl' "$definition")"\n""")
    build.build(job(tmp_path / "a.sif"), machine="x86_64", on_line=lambda line: None)
    assert "Bootstrap: debootstrap" in (tmp_path / "image.def").read_text()


def test_the_sites_options_reach_the_runtime(runtime: Path, tmp_path: Path) -> None:
    certificates = tmp_path / "my certificates"
    certificates.mkdir()
    options = {
        "how": "fakeroot",
        "binds": [str(certificates)],
        "args": ["--notest"],
        "tmp": "/big/tmp",
        "compression": "zstd",
    }
    build.build(job(tmp_path / "a.sif", **options), machine="x86_64", on_line=lambda line: None)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:6] == ["build", "--force", "--fakeroot", "--bind", str(certificates), "--notest"]
    assert words[6].endswith(".partial.sif")
    env = (tmp_path / "env").read_text().splitlines()
    for prefix in ("APPTAINER", "SINGULARITY"):
        assert f"{prefix}_TMPDIR=/big/tmp" in env
        assert f"{prefix}_MKSQUASHFS_ARGS=-comp zstd -Xcompression-level 3" in env


@pytest.mark.parametrize("script", ["echo 'FATAL:   no space'; exit 255\n", "echo half >$target; exit 1\n"])
def test_a_build_that_fails_leaves_the_old_image(runtime: Path, tmp_path: Path, script: str) -> None:
    target = tmp_path / "a.sif"
    target.write_text("old")
    (tmp_path / "script").write_text(script)
    with pytest.raises(RunFailedError, match=r"the build ended with \d+; log: .*a\.sif\.log\n") as failed:
        build.build(job(target, is_forced=True), machine="x86_64", on_line=lambda line: None)
    assert "Starting build" in str(failed.value)
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_an_image_for_another_machine_is_not_kept(runtime: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.sif"
    with pytest.raises(RunFailedError, match="made an image for x86_64, not aarch64"):
        build.build(job(target, arch="aarch64"), machine="aarch64", on_line=lambda line: None)
    assert not target.exists()
    assert leftovers(tmp_path) == []


def test_another_architecture_is_asked_of_debootstrap(runtime: Path, tmp_path: Path) -> None:
    sifs.write(tmp_path / "made.sif", arch=b"06")
    real = runtime / "debootstrap"
    real.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$SEEN/debootstrap"\n')
    real.chmod(0o755)
    (tmp_path / "script").write_text("debootstrap --variant=minbase --arch=amd64 trixie '/root fs' URL\n")
    build.build(job(tmp_path / "a.sif", arch="ppc64le"), machine="x86_64", on_line=lambda line: None)
    words = (tmp_path / "debootstrap").read_text().splitlines()
    assert words == ["--variant=minbase", "--arch=ppc64el", "trixie", "/root fs", "URL"]


def test_an_image_that_is_there_is_not_replaced_unasked(runtime: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.sif"
    target.write_text("old")
    with pytest.raises(ConfigError, match="--force replaces it"):
        build.build(job(target), machine="x86_64", on_line=lambda line: None)
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"how": "remote"}, "Apptainer has no build --remote"),
        ({"binds": ["/no/such:/x"]}, "/no/such does not"),
    ],
)
def test_what_cannot_be_built_is_refused(
    runtime: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build.build(job(tmp_path / "a.sif", **options), machine="x86_64", on_line=lambda line: None)
    assert not (tmp_path / "words").exists()


def test_a_folder_that_is_not_there_is_named(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*/none"):
        build.build(job(tmp_path / "none" / "a.sif"), machine="x86_64", on_line=lambda line: None)


def test_a_folder_that_cannot_be_written_is_named(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="no permission to write the image"):
        build.build(job(tmp_path / "a.sif"), machine="x86_64", on_line=lambda line: None)


def test_a_machine_without_a_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no apptainer or singularity in PATH"):
        build.find_runtime("auto")


def test_ctrl_c_ends_the_build_and_leaves_nothing(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "script").write_text('echo $$ >"$SEEN/pid"; sleep 60 & wait\n')
    code = (
        # tests in the background of a shell inherit an ignored SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; import sys; from tests.launch.images.test_build import build, job\n"
        "build.build(job(Path(sys.argv[1])), machine='x86_64', on_line=print)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.sif")]
    with subprocess.Popen(words, cwd=Path(__file__).parents[3], stderr=subprocess.PIPE) as process:
        late = threading.Timer(60, process.kill)
        late.start()
        while not (tmp_path / "pid").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait()
        late.cancel()
    assert process.returncode == -signal.SIGINT
    assert leftovers(tmp_path) == []
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_the_dry_run_says_everything_and_does_nothing(tmp_path: Path) -> None:
    text = build.show(job(tmp_path / "a.sif", how="fakeroot", compression="zstd"), machine="x86_64")
    assert "Bootstrap: debootstrap" in text
    assert f"apptainer build --force --fakeroot {tmp_path}/a.sif IMAGE.def" in text
    assert "'APPTAINER_MKSQUASHFS_ARGS=-comp zstd -Xcompression-level 3'" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "how", "words"),
    [
        ("cuda", "plain", "apptainer build --force --arch arm64 a.sif"),
        ("cuda", "remote", "apptainer build --force --remote --arch arm64 a.sif"),
        ("debian", "plain", "--arch=arm64\napptainer build --force a.sif"),
        ("debian", "remote", "text above\napptainer build --force --remote --arch arm64 a.sif"),
    ],
)
def test_another_architecture_is_asked_of_whoever_provides_it(base: str, how: str, words: str) -> None:
    request = Request(base, machines.find("aarch64"), mirror=MIRROR)
    options = ImageBuild.model_validate({"how": how})
    wanted = Job(request, Path("a.sif"), "apptainer", options)
    assert words in build.show(wanted, machine="x86_64")
    assert "--arch" not in build.show(wanted, machine="aarch64")
