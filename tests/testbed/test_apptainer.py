"""The rules of the Apptainer testbed: what it writes, refuses and skips, and that it works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testbed.images import SCRIPT, cache_folder

pytest_plugins = ["pytester"]


TEST = """
    import pytest

    {marker}
    def test_direct(busybox_image):
        pass
"""


def test_using_a_runtime_without_the_marker_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TEST.format(marker=""))
    result = pytester.runpytest_inprocess("-p", "tests.testbed.images", "--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*need @pytest.mark.apptainer: *::test_direct"])


def test_the_cache_can_be_moved() -> None:
    assert cache_folder({"HPCSNGD_TESTBED_CACHE": "/c"}) == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/hpcsngd-tests")


def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_wrong_usage_is_2() -> None:
    assert call("uninstall").returncode == 2
    assert call("foreign", "vax").returncode == 2


@pytest.mark.apptainer
@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to install an Apptainer")
def test_installing_again_does_nothing_and_a_strangers_folder_is_left_alone(
    apptainer: Path, tmp_path: Path
) -> None:
    version = subprocess.run([apptainer, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("apptainer version")
    (tmp_path / "thesis.tex").write_text("years")
    done = call("install", HPCSNGD_TESTBED_APPTAINER=str(tmp_path))
    assert done.returncode == 77
    assert "holds something else" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years"
