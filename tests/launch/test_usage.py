"""What attempts have used, by Slurm's accounts (recorded from 22.05) and by the agents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.launch import usage
from hpcsngd.launch.context import Context
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.usage import Account
from hpcsngd.rundir import RunDir

from .test_steering import path, run
from .test_submit import program

__all__ = ["path", "run"]  # fixtures: the run is job 4711, of a Slurm without accounts

RECORDED = (Path(__file__).parents[1] / "data" / "slurm" / "sacct-usage.txt").read_text()


def test_each_time_that_a_job_ran_has_its_account() -> None:
    assert usage.parse(RECORDED) == {
        "12832423": [
            Account("REQUEUED", "0:0", 10),
            Account("FAILED", "3:0", 95, max_rss_mib=402.7, max_rss_node="hpcsngd-2"),
        ],
        "12832424": [Account("CANCELLED", "0:0", 0)],
    }


def test_other_words_are_no_accounts() -> None:
    assert usage.parse("sacct: error: no\n12.0|FAILED|1:0|4|7K|n1\n") == {}


def tell(path: Path, text: str) -> None:
    program(path, "sacct", f"echo x >> $0.asked; cat <<'END'\n{text}END")


def test_accounts_are_kept_with_their_attempts(run: RunDir, path: Path) -> None:
    """Job 4711 ran twice; attempt 3 is another's, and 4711 was given up when Slurm started it once more."""
    for number in (2, 3):
        rundir.write_yaml(run.attempt(number).attempt_yaml, {})
    rundir.write_yaml(run.attempt(3).submitted_yaml, {"scheduler": "slurm", "job_id": "8", "utc": "x"})
    twice = "4711|REQUEUED|0:0|7||\n4711|CANCELLED|0:15|9||\n4711|COMPLETED|0:0|1||\n"
    tell(path, twice + "8|COMPLETED|0:0|50||\n8.0|COMPLETED|0:0|50|2048K|n2\n")
    usage.settle(run)
    assert [(each["attempt"], each["elapsed_s"], each["exit_code"]) for each in usage.summary(run)] == [
        (1, 7, "0:0"),
        (2, 9, "0:15"),
        (3, 50, "0:0"),
    ]
    kept = rundir.read_yaml(run.attempt(3).accounting_yaml)
    assert (kept["job_id"], kept["max_rss_mib"], kept["max_rss_node"]) == ("8", 2.0, "n2")
    usage.settle(run)
    assert (path / "sacct.asked").read_text() == "x\n"


def test_accounts_that_lag_are_asked_for_again(run: RunDir, path: Path) -> None:
    tell(path, "4711|RUNNING|0:0|7||\n")
    usage.settle(run)
    assert usage.summary(run) == []
    tell(path, "4711|COMPLETED|0:0|8||\n")
    usage.settle(run)
    assert usage.line(usage.summary(run)[0]) == "attempt 1: 8 s, exit code 0:0 (by Slurm)"


@pytest.mark.parametrize("has_accounts", [False, True])
def test_agents_tell_where_accounts_are_missing_or_know_less(
    run: RunDir, path: Path, has_accounts: bool
) -> None:
    for agent, (status, memory) in enumerate([(0, 100.0), (1, 300.0)]):
        facts = {"elapsed_s": 5.0 + agent, "exit_status": status, "max_rss_mib": memory}
        rundir.write_yaml(run.attempt(1).usage_yaml(agent), facts)
    if has_accounts:
        tell(path, "4711|FAILED|1:0|8||\n")
    usage.settle(run)
    [used] = usage.summary(run)
    by_slurm = "attempt 1: 8 s, exit code 1:0, most memory of a process 300 MiB (by Slurm)"
    by_agents = "attempt 1: 6 s, exit code 1, most memory of a process 300 MiB (by agents)"
    assert usage.line(used) == (by_slurm if has_accounts else by_agents)


def test_an_agent_counts_its_workers_memory(run: RunDir) -> None:
    here = Place("4711", ("n0",), 0, 0, 0, 1, 0, "n0")
    context = Context(run, Plan.from_record(run.plan_record(1)), here, run.attempt(1))
    subprocess.run([sys.executable, "-c", "b'x' * 300_000_000"], check=True)
    usage.write_own(context, 3)
    told = rundir.read_yaml(run.attempt(1).usage_yaml(0))
    assert (told["host"], told["exit_status"]) == ("n0", 3)
    assert told["max_rss_mib"] > 286  # 300 MB
    assert told["elapsed_s"] >= 0
    assert told["cpu_s"] > 0
