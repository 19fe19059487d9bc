"""Every command and every example in the README is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)( cluster)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())
# What runs this very test cannot be run by it; both are what CI runs.
RUN_THIS_TEST = {"make check", "make test"}
HAS_VENV = (ROOT / ".venv" / ".ready").exists()


def commands(*, cluster: bool) -> list[str]:
    """Returns the README's shell lines, in order."""
    chosen = [text for language, mark, text in BLOCKS if language == "sh" and bool(mark) is cluster]
    return [line for text in chosen for line in text.splitlines() if line not in RUN_THIS_TEST]


def run(lines: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    script = "set -euo pipefail\n" + "\n".join(lines)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_the_readme_has_the_two_commands_a_newcomer_needs() -> None:
    text = "".join(text for _, _, text in BLOCKS)
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.skipif(
    not HAS_VENV, reason="the README's commands use the environment that make sets up in .venv"
)
def test_every_command_runs() -> None:
    done = run(commands(cluster=False))
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = re.search(r"test accuracy: (0\.\d+)", done.stdout)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 0.95
    report = re.search(r"^report: (/.*/report.html)$", done.stdout, re.MULTILINE)
    assert report, done.stdout
    assert Path(report[1]).stat().st_size > 100_000


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm_cluster")
def test_the_cluster_command_runs() -> None:
    done = run(commands(cluster=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test accuracy" in done.stdout


def test_the_library_example_runs() -> None:
    (code,) = [text for language, _, text in BLOCKS if language == "python"]
    namespace: dict[str, object] = {}
    exec(code, namespace)  # the README's own text
    assert namespace["preconditioner"].diagnostics() is not None


def test_every_path_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(
        re.findall(r"`((?:hpcsngd|analysis|site_configs|jobs|containers|benchmarks|tests)/[\w./-]*)`", text)
    )
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []
