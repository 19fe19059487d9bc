"""Heartbeats in files, and a process that ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpcsngd import lifeline
from hpcsngd.launch import processes
from hpcsngd.lifeline import Beat


def test_a_beat_comes_back_as_it_was_written(tmp_path: Path) -> None:
    beat = Beat("rank3", "n1", 7, "data", step=4, beats=9, checkpoint_s=1.5, boundary_s=0.25, utc="now")
    lifeline.write_beat(tmp_path / "beats", beat)
    assert lifeline.read_beat(tmp_path / "beats", "rank3") == beat
    assert [file.name for file in (tmp_path / "beats").iterdir()] == ["rank3.json"]


def test_a_missing_or_torn_beat_is_none(tmp_path: Path) -> None:
    assert lifeline.read_beat(tmp_path, "rank0") is None
    for text in ("", "{", "[]", '{"name": "rank0", "colour": 1}'):
        (tmp_path / "rank0.json").write_text(text)
        assert lifeline.read_beat(tmp_path, "rank0") is None


def test_position_goes_by_step_then_phase() -> None:
    places = [(3, "update"), (3, "reduce"), (4, "between steps"), (3, "data"), (3, "evaluate")]
    beats = [Beat("rank0", "n0", 1, phase, step=step) for step, phase in places]
    in_order = [(beat.step, beat.phase) for beat in sorted(beats, key=lambda beat: beat.position)]
    later = [(3, "data"), (3, "reduce"), (3, "update"), (4, "between steps")]
    assert in_order == [(3, "evaluate"), *later]


def test_a_bound_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = "from hpcsngd import lifeline; lifeline.bind_to_parent(); print('bound', flush=True); input()"
    parent = (
        "import subprocess, sys\n"
        "pipe = subprocess.PIPE\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=pipe, stdout=pipe)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout as output:
        bound = int(output.readline())
        assert processes.start_ticks(bound) is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while processes.start_ticks(bound) is not None:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)
