"""How runs look to people."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from hpcsngd import progress
from hpcsngd.launch.status import RunState

RUNNING = RunState(
    run="/r/a",
    name="a",
    exp="e",
    site="s",
    state="running",
    reason="",
    attempt=1,
    scheduler="slurm",
    job_id="12",
    epoch=2.5,
    epochs=10,
    loss=0.25,
    accuracy=0.9,
    time_left_s=95.4,
    limit_left_s=600.0,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min 0 s"), (95, "1 min 35 s"), (7260, "2 h 1 min"), (180000, "2 d 2 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_a_line_has_what_is_known() -> None:
    facts = "epoch 2.5/10, loss 0.2500, accuracy 0.9000"
    assert progress.line(RUNNING) == f"running    a  {facts}  1 min 35 s left"
    short = dataclasses.replace(RUNNING, limit_left_s=30.0)
    assert progress.line(short).endswith("1 min 35 s left, the wall time ends in 30 s")
    waiting = RunState("/r/b", "b", "e", "s", "pending", "Priority", 1, "slurm", "13")
    assert progress.line(waiting) == "pending    b  Priority"


def test_a_table_takes_a_reason_for_text() -> None:
    from rich.console import Console

    failed = dataclasses.replace(RUNNING, state="failed", reason="[bold]x[/nonsense]", time_left_s=None)
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.table([RUNNING, failed]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1 min 35 s left" in text
    assert "[bold]x[/nonsense]" in text
    assert "━" in text


def test_watching_tells_changes_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpcsngd import rundir

    record = {"config": {"site": {"scheduler": {"poll_s": 0.01}}}}
    run = rundir.create(tmp_path, "x", record)
    looks = [
        RUNNING,
        RUNNING,
        dataclasses.replace(RUNNING, epoch=3.0),
        dataclasses.replace(RUNNING, state="completed"),
    ]
    monkeypatch.setattr("hpcsngd.launch.status.states", lambda runs: [looks.pop(0)])
    run.write_status(rundir.Status("completed", "", 1))
    found = progress.watch([run], quiet=False)
    assert [state.state for state in found] == ["completed"]
    assert looks == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "running    a  epoch 2.5/10",
        "running    a  epoch 3.0/10",
    ]


def test_watching_does_not_believe_the_first_word_of_a_lost_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is gone may have a status on its way, or another attempt."""
    from hpcsngd import rundir

    run = rundir.create(tmp_path, "x", {"config": {"site": {"scheduler": {"poll_s": 0.01}}}})
    words = ["running", "lost", "pending", "lost", "lost", "lost"]
    looks = [dataclasses.replace(RUNNING, state=word) for word in words]
    monkeypatch.setattr("hpcsngd.launch.status.states", lambda runs: [looks.pop(0)])
    [state] = progress.watch([run], quiet=True)
    assert (state.state, looks) == ("lost", [])
