"""pytest fixtures ``apptainer``, ``busybox_image``, ``torch_image``: a real runtime, and images built by it.

Tests that use them carry the marker ``apptainer``; collection fails otherwise. Where Apptainer cannot be had
the tests are skipped with the reason, except in continuous integration (``CI=true``): there it is a failure.

The image with torch takes minutes, so it is kept in ``$HPCSNGD_TESTBED_CACHE`` (default
``$XDG_CACHE_HOME/hpcsngd-tests``) under the digest of its definition, and built again when that changes. It
brings no hpcsngd: the code under test is bound over it, so a change of code builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hpcsngd.launch.images import definition, machines

from .needs import EXIT_NOT_HERE, refuse_unmarked, require

SCRIPT = Path(__file__).parent / "apptainer"
INSTALL = "tests/testbed/apptainer install"
DEFAULT_PREFIX = "/opt/hpcsngd-apptainer"
FIXTURES = frozenset({"apptainer", "busybox_image", "torch_image"})
APPLETS = ("sh", "env", "cat", "ls", "printf", "mount", "touch", "pwd", "uname")
BUSYBOX = """\
Bootstrap: scratch

%setup
    cd "$SINGULARITY_ROOTFS"
    mkdir -p bin dev proc sys tmp etc root opt var/tmp
    echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
    echo 'root:x:0:' >etc/group
    cp /bin/busybox bin/busybox
    for applet in @APPLETS@; do ln -s busybox "bin/$applet"; done

%labels
    org.hpcsngd.base busybox
    org.hpcsngd.code bind
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses tests that would install Apptainer without saying so."""
    refuse_unmarked(items, FIXTURES, "apptainer")


@pytest.fixture(scope="session")
def apptainer() -> Iterator[Path]:
    """A real Apptainer, first in PATH of this process: the machine's own, or the testbed's."""
    if found := shutil.which("apptainer"):
        yield Path(found)
        return
    words = [sys.executable, str(SCRIPT), "install"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    require(done, INSTALL, os.environ)
    folder = Path(os.environ.get("HPCSNGD_TESTBED_APPTAINER", DEFAULT_PREFIX)) / "bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield folder / "apptainer"


@pytest.fixture(scope="session")
def busybox_image(apptainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of one megabyte that has a shell and nothing else; made in a second."""
    folder = tmp_path_factory.mktemp("busybox")
    (folder / "busybox.def").write_text(BUSYBOX.replace("@APPLETS@", " ".join(APPLETS)))
    words = [str(apptainer), "build", "busybox.sif", "busybox.def"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "busybox.sif"


def cache_folder(env: Mapping[str, str]) -> Path:
    """Returns where images are kept between sessions."""
    base = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(env.get("HPCSNGD_TESTBED_CACHE") or base / "hpcsngd-tests")


def torch_request() -> definition.Request:
    """Returns what the image with torch is."""
    machine = machines.find(platform.machine())
    return definition.Request("debian", machine, code="bind", mirror=definition.apt_mirror())


@pytest.fixture(scope="session")
def torch_image(apptainer: Path) -> Path:
    """The Debian image with torch, built by ``hpcsngd container build`` unless it is kept from before."""
    if definition.apt_mirror() is None:
        reason = "no image with torch: apt here has no Debian mirror to build from"
        require(subprocess.CompletedProcess([], EXIT_NOT_HERE, "", reason), INSTALL, os.environ)
    digest = hashlib.sha256(definition.render(torch_request()).encode()).hexdigest()[:16]
    folder = cache_folder(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"debian-{platform.machine()}-{digest}.sif"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one session builds, the others wait
        if not image.exists():
            _build(image, folder)
    return image


def _build(image: Path, folder: Path) -> None:
    words = [sys.executable, "-m", "hpcsngd", "container", "build", str(image), "--base", "debian"]
    words += ["--code", "bind", "--compression", "zstd", "--quiet"]
    env = {**os.environ, "APPTAINER_TMPDIR": str(folder)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
