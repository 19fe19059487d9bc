"""Child processes: logs, tails, and that nothing survives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hpcsngd.launch import processes

STUBBORN = "trap '' TERM; sleep 600 & echo $! > grandchild; wait; sleep 600"


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "logs" / "out", tmp_path / "logs" / "err"


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_is_appended_and_the_tail_is_this_childs(logs: tuple[Path, Path]) -> None:
    for word in ("first", "second"):
        child = processes.Child(["bash", "-c", f"echo {word}; echo {word}-err >&2"], os.environ, *logs)
        wait_for(lambda child=child: child.poll() is not None)
        assert child.poll() == 0
    assert logs[0].read_text() == "first\nsecond\n"
    assert child.tail() == ["second", "second-err"]


def test_a_stubborn_child_ends_with_its_own_children(
    logs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    child = processes.Child(["bash", "-c", STUBBORN], os.environ, *logs)
    wait_for(lambda: (tmp_path / "grandchild").exists() and (tmp_path / "grandchild").read_text().strip())
    grandchild = int((tmp_path / "grandchild").read_text())
    assert processes.start_ticks(grandchild) is not None
    child.end(0.2)
    assert child.poll() == -9
    wait_for(lambda: processes.start_ticks(grandchild) is None)


def test_orphans_in_sessions_of_their_own_are_adopted_and_killed(tmp_path: Path) -> None:
    """As torchrun's workers after torchrun was killed."""
    script = textwrap.dedent("""
        import subprocess, sys, time
        from hpcsngd.launch import processes
        assert processes.adopt_orphans()
        subprocess.run(["bash", "-c", "setsid sleep 600 & echo $! > orphan"], check=True)
        pid = int(open("orphan").read())
        assert processes.start_ticks(pid) is not None
        processes.kill_descendants()
        assert processes.start_ticks(pid) is None
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_start_ticks_name_one_process() -> None:
    own = processes.start_ticks(os.getpid())
    assert own is not None
    assert processes.start_ticks(os.getpid()) == own
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert processes.start_ticks(ended.pid) is None
