"""Runs on hosts that a real sshd stands for: started, watched, cancelled, and ended without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd import rundir
from hpcsngd.config.resolve import Override, parse_set, resolve
from hpcsngd.config.site import Site
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import logs, processes, scripts, status, submit
from hpcsngd.launch.cancel import cancel
from hpcsngd.launch.doctor import ssh as doctor_ssh
from hpcsngd.launch.doctor.machine import Machine
from hpcsngd.launch.resume import resume
from hpcsngd.launch.ssh import jobs as ssh_jobs
from hpcsngd.tables import TABLES
from tests.launch.conftest import EXPERIMENT, STANDIN, Configure
from tests.launch.test_local import reports, wait_until

from .sshd import HOSTS, Bed

pytestmark = pytest.mark.usefixtures("standin")

TORCHRUN = {"mode": "torchrun", "rendezvous_timeout_s": 120}
SINGLY = {"mode": "per_rank", "rendezvous_timeout_s": 120}


def site(bed: Bed, standin: str = "ok", **changes: Any) -> dict[str, Any]:
    env = {"OMP_NUM_THREADS": "1", "STANDIN": standin}
    common = {"description": "two hosts", "nodes": 2, "launch": SINGLY}
    return {**common, "scheduler": bed.scheduler(), "env": env, **changes}


def send(configure: Configure, given: dict[str, Any]) -> rundir.RunDir:
    return submit.submit(configure(given, nodes=2), argv=["test"], worker=STANDIN).run


def all_started(run: rundir.RunDir) -> None:
    wait_until(lambda: len(reports(run)) == 4, "the start of all ranks", 120)


def of_run(root: Path) -> list[int]:
    """Returns the processes that have a path below a folder in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(root) in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return [pid for pid in found if processes.start_ticks(pid) is not None]


def pids(run: rundir.RunDir) -> list[int]:
    return [agent["pid"] for agent in rundir.read_yaml(run.attempts()[-1].submitted_yaml)["agents"]]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    try:
        wait_until(lambda: not of_run(tmp_path / "runs"), "the end of all processes of the runs", 60)
    finally:
        processes.kill(of_run(tmp_path / "runs"))


@pytest.mark.dist
def test_two_hosts_meet_and_complete(configure: Configure, bed: Bed) -> None:
    run = send(configure, site(bed, "meet", launch=TORCHRUN))
    ended = submit.wait(run)
    assert (ended.state, ended.result) == ("completed", {"accuracy": 0.5, "total": 6.0}), ended.reason
    facts = rundir.read_yaml(run.attempt(1).attempt_yaml)
    assert (facts["hosts"], facts["world_size"]) == (list(HOSTS), 4)
    assert {report["MASTER_ADDR"] for report in reports(run).values()} == {HOSTS[0]}
    assert all(report["foreign"] == [] for report in reports(run).values())
    labels = {found.label for found in logs.find(run, logs.Choice())}
    assert labels >= {"node0.err", "node1.err", "job.0.err", "job.1.err"}


def test_ranks_that_are_started_singly_know_their_places(configure: Configure, bed: Bed) -> None:
    run = send(configure, site(bed))
    ended = submit.wait(run)
    assert ended.state == "completed", ended.reason
    # these workers do not wait for each other
    all_started(run)
    found = {rank: (each["LOCAL_RANK"], each["MASTER_ADDR"]) for rank, each in reports(run).items()}
    assert found == {rank: (str(rank % 2), HOSTS[0]) for rank in range(4)}


@pytest.mark.slow
@pytest.mark.dist
def test_digits_on_two_hosts_equal_digits_on_one(bed: Bed, tmp_path: Path) -> None:
    def train(name: str, **keys: Any) -> tuple[list[Any], list[Any]]:
        file = tmp_path / f"{name}.yaml"
        env = {"OMP_NUM_THREADS": "1"}
        common = {"description": name, "env": env, "run_root": str(tmp_path / "runs")}
        file.write_text(yaml.safe_dump(common | keys))
        sets = ("batch_size=16", "epochs=2", "seed=3")
        run = submit.submit(
            resolve(str(file), "digits-hylo", [parse_set(each) for each in sets]), argv=["t"]
        ).run
        ended = submit.wait(run, poll_s=1.0)
        assert ended.state == "completed", ended.reason
        losses = [row["loss"] for row in rundir.read_rows(run.metrics("train"), TABLES["train"])]
        scores = [row["accuracy"] for row in rundir.read_rows(run.metrics("eval"), TABLES["eval"])]
        return losses, scores

    two = train("hosts", scheduler=bed.scheduler(), nodes=2, ranks_per_node=2)
    one = train("one", scheduler={"kind": "local", "poll_s": 0.5}, nodes=1, ranks_per_node=4)
    assert two == one
    assert len(two[0]) > 0


def test_cancel_lets_the_workers_leave_and_resume_goes_on(configure: Configure, bed: Bed) -> None:
    run = send(configure, site(bed, "stop"))
    all_started(run)
    assert status.states([run])[0].state == "running"
    [done] = cancel([run])
    assert (done.was_sent, done.state) == (True, "running")
    assert "its workers are asked to leave" in done.text
    ended = submit.wait(run)
    assert ended.state == "cancelled", ended.reason
    assert ended.reason.startswith("cancelled by ")
    wait_until(lambda: not of_run(run.path), "the end of the first attempt")
    resume(run, [Override("site.env.STANDIN", "ok", "test")], argv=["test"])
    assert submit.wait(run).state == "completed"
    assert [attempt.number for attempt in run.attempts()] == [1, 2]


def test_an_agent_that_cannot_be_reached_reads_the_request(configure: Configure, bed: Bed) -> None:
    run = send(configure, site(bed, "stop"))
    all_started(run)
    facts = {"utc": rundir.utc_now(), "host": "elsewhere", "user": "somebody"}
    rundir.write_yaml(run.attempt(1).cancel_request, facts)
    ended = submit.wait(run)
    assert ended.state == "cancelled", ended.reason
    assert "cancelled by somebody on elsewhere" in ended.reason


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ([HOSTS[0], "127.0.0.3"], "host 127.0.0.3 cannot be reached: "),
        ([HOSTS[0], f"no-such-user@{HOSTS[1]}"], "cannot be reached: "),
    ],
)
def test_a_host_that_cannot_be_reached_is_named_and_nothing_runs(
    configure: Configure, bed: Bed, tmp_path: Path, hosts: list[str], words: str
) -> None:
    scheduler = bed.scheduler(hosts=hosts)
    if "@" in hosts[1]:
        del scheduler["user"]
    given = site(bed) | {"scheduler": scheduler}
    with pytest.raises(SchedulerError, match=hosts[1]) as told:
        send(configure, given)
    assert words in str(told.value)
    assert told.value.exit_code == 4
    [run] = [rundir.open_run(path) for path in (tmp_path / "runs").iterdir()]
    found = run.status()
    assert found is not None
    assert (found.state, hosts[1] in found.reason) == ("failed", True)
    assert of_run(tmp_path / "runs") == []


def test_a_python_that_is_not_there_is_named(configure: Configure, bed: Bed) -> None:
    given = site(bed) | {"scheduler": bed.scheduler(python="/no/such/python")}
    with pytest.raises(
        SchedulerError, match=r"host 127.0.0.1 does not answer as hpcsngd does: .*/no/such/python"
    ):
        send(configure, given)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("killed", [0, 1])
def test_an_agent_that_is_killed_ends_the_run_with_a_cause(
    configure: Configure, bed: Bed, killed: int
) -> None:
    run = send(configure, site(bed, "linger", launch=TORCHRUN))
    wait_until(lambda: len(list(run.attempt(1).path.glob("met*"))) == 4, "the first collective", 120)
    wait_until(lambda: _watching(run) == [True, True], "the first look of both agents")
    processes.kill([pids(run)[killed]])
    ended = submit.wait(run)
    assert ended.state == "failed", ended.reason
    assert (ended.fault or {})["host"] == HOSTS[killed]
    assert f"node {killed}" in ended.reason


def _watching(run: rundir.RunDir) -> list[bool]:
    folder = run.attempt(1).heartbeats
    return [(folder / f"agent{index}.json").exists() for index in (0, 1)]


def test_a_job_without_agents_is_lost(configure: Configure, bed: Bed) -> None:
    run = send(configure, site(bed, "hang"))
    all_started(run)
    job = pids(run)
    processes.kill(job[2:])
    wait_until(lambda: status.states([run])[0].reason, "the loss of the second host's")
    assert status.states([run])[0].reason == f"agent 2 on {HOSTS[1]} is gone; agent 3 on {HOSTS[1]} is gone"
    assert status.states([run])[0].state == "running"
    processes.kill(job)
    wait_until(lambda: not of_run(run.path), "the end of all processes")
    state = status.states([run])[0]
    assert (state.state, state.fault_kind) == ("lost", "killed")
    assert submit.wait(run, poll_s=0.1).state == "failed"


def test_agents_of_a_submission_that_never_completes_leave(
    configure: Configure, bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ssh_jobs.start

    def interrupted(*given: Any) -> None:
        start(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(ssh_jobs, "start", interrupted)
    resolved = configure(site(bed) | {"scheduler": bed.scheduler(command_timeout_s=10.0)}, nodes=2)
    with pytest.raises(KeyboardInterrupt):
        submit.submit(resolved, argv=["test"], worker=STANDIN)
    root = Path(resolved.site.run_root)
    wait_until(lambda: not of_run(root), "the end of the agents", 120)
    [run] = [rundir.open_run(path) for path in root.iterdir()]
    assert run.status() is None
    assert any("did not succeed" in file.read_text() for file in run.submit_dir.glob("*_log.err"))


def test_a_dry_run_shows_the_commands_of_both_hosts(configure: Configure, bed: Bed) -> None:
    text = scripts.dry_run(configure(site(bed), nodes=2))
    commands = [line for line in text.splitlines() if line.startswith("ssh -T ")]
    assert [host in line for host, line in zip(HOSTS, commands, strict=True)] == [True, True]
    assert "BatchMode=yes" in commands[0]
    assert "hpcsngd.launch.ssh.remote" in commands[0]
    assert "# HOST0: the first of the site's hosts" in text


def test_cells_of_a_sweep_run_one_after_the_other(bed: Bed, tmp_path: Path) -> None:
    from hpcsngd.config import matrix
    from hpcsngd.launch import sweep

    site_file, exp_file = tmp_path / "hosts.yaml", tmp_path / "standin.yaml"
    site_file.write_text(yaml.safe_dump(site(bed) | {"run_root": str(tmp_path / "runs")}))
    exp_file.write_text(yaml.safe_dump(EXPERIMENT | {"matrix": {"seed": [1, 2]}}))
    cells = matrix.resolve(str(site_file), str(exp_file), (), {}, environment={})
    sent = sweep.submit(cells, argv=["test"], worker=STANDIN)
    runs = [cell.run for cell in sent.sweep.cells()]
    assert [submit.wait(run).state for run in runs] == ["completed"] * 2
    starts = [rundir.read_yaml(run.attempt(1).submitted_yaml) for run in runs]
    assert [facts["job_id"].startswith("ssh-") for facts in starts] == [True, True]
    first = rundir.read_yaml(runs[0].attempt(1).finished_yaml)
    assert first == {"accuracy": 0.5}
    assert starts[0]["utc"] < starts[1]["utc"]


def test_the_doctor_asks_every_host(bed: Bed, tmp_path: Path) -> None:
    scheduler = bed.scheduler(hosts=[*HOSTS, "127.0.0.3"])
    made = Site.model_validate({"description": "x", "scheduler": scheduler, "run_root": str(tmp_path)})
    found = {finding.name: finding for finding in doctor_ssh.check(made, Machine())}
    assert found["scheduler"].verdict == "ok"
    assert [found[f"host {host}"].verdict for host in HOSTS] == ["ok", "ok"]
    assert f"sees {tmp_path}" in found[f"host {HOSTS[0]}"].text
    assert found["host 127.0.0.3"].verdict == "broken"
    assert "cannot be reached" in found["host 127.0.0.3"].text
    assert list(tmp_path.iterdir()) == []
    lost = made.model_copy(update={"run_root": str(tmp_path / "not-there")})
    assert [finding.verdict for finding in doctor_ssh.check(lost, Machine())][1:3] == ["warning", "warning"]
