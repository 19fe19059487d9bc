"""The main job on a played LSF: 2 hosts x 2 ranks train digits, are put back in the queue, and finish."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hpcsngd import rundir
from hpcsngd.config.resolve import parse_set, resolve
from hpcsngd.launch import status, submit
from hpcsngd.tables import TABLES

from .conftest import Play, left_over, wait_until
from .test_runs import SITE


@pytest.mark.slow
@pytest.mark.dist
def test_digits_are_learned_across_a_requeue(play: Play, tmp_path: Path) -> None:
    book = play("ibm")
    site = tmp_path / "plain-lsf.yaml"
    env = {"OMP_NUM_THREADS": "1"}
    site.write_text(yaml.safe_dump({**SITE, "env": env, "run_root": str(tmp_path / "runs")}))
    sets = ("nodes=2", "ranks_per_node=2", "batch_size=16", "epochs=8", "restart.on=[preempted]")
    resolved = resolve(str(site), "digits-hylo", [parse_set(each) for each in sets])
    run = submit.submit(resolved, argv=["test"]).run
    wait_until(lambda: (status.states([run])[0].step or 0) > 0, "the first step", 150)
    book.ask(book.jobs()[0].key, "signal 12")
    ended = submit.wait(run, poll_s=1.0)
    assert (ended.state, ended.attempt) == ("completed", 2), ended.reason
    assert list(rundir.read_rows(run.metrics("eval"), TABLES["eval"]))[-1]["accuracy"] > 0.8
    steps = [row["step"] for row in rundir.read_rows(run.metrics("train"), TABLES["train"])]
    assert steps == sorted(steps)
    first, second = (rundir.read_yaml(run.attempt(number).attempt_yaml) for number in (1, 2))
    assert first["job_id"] == second["job_id"]
    assert (second["restarts"], len(second["hosts"]), second["world_size"]) == (1, 2, 4)
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert (book.jobs()[0].state, left_over(book)) == ("done", [])
