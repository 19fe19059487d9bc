"""Which logs a run has, and following them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.errors import RunDirError
from hpcsngd.launch import logs, plan
from hpcsngd.launch.logs import Choice, LogFile

from .conftest import Configure


@pytest.fixture
def run(configure: Configure, tmp_path: Path) -> rundir.RunDir:
    """A run of two nodes with two ranks each, through torchrun; its second attempt is the newest."""
    site = {"description": "x", "scheduler": {"kind": "slurm"}, "nodes": 2}
    made = plan.make(configure(site, nodes=2))
    made_run = rundir.create(tmp_path / "runs", "x", {"plan": made.to_record()})
    for number in (1, 2):
        attempt = made_run.attempt(number)
        for node in (0, 1):
            for stream in ("out", "err"):
                write(attempt.node_log(node, stream), f"attempt {number} node {node} {stream}\n")
            for local in (0, 1):
                kept = attempt.torchrun_logs(node) / "none_x" / "attempt_0" / str(local) / "stderr.log"
                write(kept, f"attempt {number} rank {2 * node + local}\n")
    rundir.write_yaml(made_run.attempt(1).submitted_yaml, {"job_id": "12"})
    write(made_run.submit_dir / "12_0_log.err", "agent 0\n")
    return made_run


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def texts(run: rundir.RunDir, choice: Choice) -> list[str]:
    return [log.path.read_text().strip() for log in logs.find(run, choice)]


def test_the_newest_attempt_of_all_nodes(run: rundir.RunDir) -> None:
    assert texts(run, Choice()) == [
        "attempt 2 node 0 out",
        "attempt 2 node 0 err",
        "attempt 2 node 1 out",
        "attempt 2 node 1 err",
    ]


def test_an_earlier_attempt_with_its_jobs_own_log(run: rundir.RunDir) -> None:
    assert texts(run, Choice(attempt=1, streams=("err",))) == [
        "attempt 1 node 0 err",
        "attempt 1 node 1 err",
        "agent 0",
    ]


def test_one_node_and_one_rank(run: rundir.RunDir) -> None:
    assert texts(run, Choice(node=1, streams=("out",))) == ["attempt 2 node 1 out"]
    assert texts(run, Choice(rank=3)) == ["attempt 2 rank 3"]
    assert texts(run, Choice(rank=1, attempt=1)) == ["attempt 1 rank 1"]


def test_ranks_that_were_started_singly(run: rundir.RunDir) -> None:
    record = run.record()
    made = dataclasses.replace(plan.Plan.from_record(record["plan"]), mode="per_rank")
    rundir.write_yaml(run.run_yaml, record | {"plan": made.to_record()})
    for rank in range(4):
        write(run.attempt(2).rank_log(rank, "err"), f"single {rank}\n")
    assert texts(run, Choice(node=1)) == ["single 2", "single 3"]
    assert texts(run, Choice(rank=1)) == ["single 1"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(rank=4), "there is no rank 4: the run has ranks 0 to 3"),
        (Choice(node=-1), "there is no node -1: the run has nodes 0 to 1"),
        (Choice(attempt=3), "has no attempt 3; it has 1, 2"),
    ],
)
def test_what_is_not_there_is_said(run: rundir.RunDir, choice: Choice, words: str) -> None:
    with pytest.raises(RunDirError, match=words):
        logs.find(run, choice)


def test_following_yields_whole_lines_new_files_and_the_rest(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("one\ntw")
    looks = 0

    def is_over() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            with first.open("a") as file:
                file.write("o\n")
            second.write_text("later")
        return looks == 3

    def files() -> list[LogFile]:
        return [LogFile(file.name, file) for file in (first, second) if file.exists()]

    found = list(logs.follow(files, is_over, pause_s=0.0))
    assert found == [("a", "one"), ("a", "two"), ("b", "later")]
