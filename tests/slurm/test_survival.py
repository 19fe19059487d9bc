"""Runs that are stopped, killed and moved on the real cluster, and go on as if nothing had happened.

Each scenario trains the same digits experiment on 2 nodes x 2 ranks, slowed down so that it can be hit
between its steps; where a run goes on, its metrics and weights equal those of a run that nobody disturbed,
bit for bit. Scenarios that do not disturb each other share a test: their time is mostly waiting.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from hpcsngd import rundir
from hpcsngd.config.resolve import Override, Resolved, full_path, resolve
from hpcsngd.launch import order, sending, submit
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.resume import resume
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from tests.testbed.slurmbed import services
from tests.testbed.slurmbed.cluster import read_facts
from tests.testbed.slurmbed.config import Site
from tests.testbed.slurmbed.layout import Layout, login_name

from .conftest import STANDIN, Configure, site_data

if TYPE_CHECKING:
    from tests.testbed.plugin import SlurmCluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("slurm_cluster"),
]

WORKERS = Path(__file__).parent / "workers"
SLOW = "slow_worker"
SETTINGS = {
    "epochs": 4,
    "batch_size": 16,
    "data.train_limit": 512,
    "data.test_limit": 128,
    "diagnostics.log_every": 1,
}
STEPS = 32


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.2)


def rows(run: RunDir, table: str) -> dict[int, dict[str, Any]]:
    """Returns step -> row, the last attempt's, without clocks."""
    clocks = {"train_s", "wall_s", "eval_s", "utc", "attempt"}
    return {
        int(row["step"]): {name: value for name, value in row.items() if name not in clocks}
        for row in rundir.read_rows(run.metrics(table), TABLES[table])
    }


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    folder = run.checkpoints_dir / run.newest_checkpoint()
    assert folder.name == f"step_{STEPS}"
    saved = torch.load(folder / "common.pt", weights_only=True)
    model: dict[str, torch.Tensor] = saved["parts"]["model"]
    return model


def assert_equal(run: RunDir, unbroken: RunDir) -> None:
    """Asserts that a run was trained as if it had never been stopped."""
    for table, least in (("train", STEPS), ("eval", SETTINGS["epochs"])):
        assert rows(run, table) == rows(unbroken, table)
        assert len(rows(run, table)) == least
    ours, theirs = weights(run), weights(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def processes(run: RunDir) -> dict[int, dict[str, str]]:
    """Returns pid -> environment of all running processes of a run; nodes share the machine's pids."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if str(run.path).encode() not in (folder / "cmdline").read_bytes():
                continue
            pairs = (folder / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        if folder.joinpath("stat").exists():
            found[int(folder.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return found


def worker_pid(run: RunDir, rank: int) -> int:
    [pid] = [
        pid
        for pid, environment in processes(run).items()
        if environment.get("RANK") == str(rank) and "SUBMITIT_EXECUTOR" not in environment
    ]
    return pid


def agent_pid(run: RunDir, node: int) -> int:
    [pid] = [
        pid
        for pid, environment in processes(run).items()
        if environment.get("SLURM_NODEID") == str(node)
        and b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and not Path(f"/proc/{pid}/comm").read_text().startswith("srun")
    ]
    return pid


def step_of(run: RunDir) -> int:
    row = rundir.last_row(run.metrics("train"), TABLES["train"])
    return int(row["step"]) if row else 0


def end_of(run: RunDir, attempt: int) -> dict[str, Any]:
    """Returns what an attempt says about its end; nothing if its agent was killed first."""
    file = run.attempt(attempt).ended_yaml
    return rundir.read_yaml(file) if file.exists() else {}


def stopped_at(run: RunDir, attempt: int) -> int:
    file = run.attempt(attempt).stopped_yaml
    return int(rundir.read_yaml(file)["step"]) if file.exists() else STEPS


def assert_nothing_left(*runs: RunDir) -> None:
    for run in runs:
        wait_until(lambda run=run: not processes(run), f"the end of all processes of {run.name}", 30)  # type: ignore[misc]


@pytest.fixture
def slow(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Resolved]:
    """Returns a function that configures the slowed experiment; keywords as `configure`'s."""
    path = os.pathsep.join(filter(None, (str(WORKERS), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)

    def make(
        step_s: float,
        *,
        overrides: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        **site: Any,
    ) -> Resolved:
        variables = {"SLOW_STEP_S": str(step_s), **(env or {})}
        asked = {**SETTINGS, "nodes": 2, "ranks_per_node": 2, **(overrides or {})}
        return configure(experiment="digits-hylo", overrides=asked, env=variables, **site)

    return make


def send(resolved: Resolved) -> tuple[RunDir, str]:
    submitted = submit.submit(resolved, argv=["test"], worker=SLOW)
    return submitted.run, submitted.job_id


@pytest.fixture(scope="module")
def unbroken(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Returns the same training, undisturbed."""
    root = tmp_path_factory.mktemp("unbroken")
    file = root / "cluster.yaml"
    file.write_text(yaml.safe_dump(site_data(root / "runs")))
    wanted = {**SETTINGS, "nodes": 2, "ranks_per_node": 2}
    layers = [Override(full_path(key, "test"), value, "test") for key, value in wanted.items()]
    run = submit.submit(resolve(str(file), "digits-hylo", layers, environment={}), argv=["test"]).run
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "completed", ended.reason
    return run


def test_signals_requeues_and_preemption_do_not_change_a_run(
    slurm_cluster: SlurmCluster, slow: Callable[..., Resolved], unbroken: RunDir
) -> None:
    """One run is warned, put back in the queue by hand, and preempted; it goes on at the next step."""
    run, job_id = send(slow(0.4))
    wait_until(lambda: step_of(run) >= 3, "step 3 of attempt 1")
    slurm_cluster.run("scancel", "--signal=USR2", job_id)
    wait_until(lambda: len(run.attempts()) == 2 and step_of(run) > stopped_at(run, 1), "attempt 2")
    slurm_cluster.run("scontrol", "requeue", job_id)
    wait_until(lambda: len(run.attempts()) == 3 and step_of(run) > stopped_at(run, 2), "attempt 3")
    slurm_cluster.run("srun", "--partition=high", "--nodes=2", "--exclusive", "true", timeout_s=180)
    ended = submit.wait(run, poll_s=0.5)
    assert (ended.state, ended.attempt) == ("completed", 4), ended.reason
    warned, requeued, preempted = (end_of(run, number) for number in (1, 2, 3))
    assert (
        (warned["cause"], warned["next"])
        == (preempted["cause"], preempted["next"])
        == ("preempted", "requeue")
    )
    assert "SIGUSR2; the workers checkpointed and left" in warned["reason"]
    # Slurm kills soon after SIGTERM here: the checkpoint is sure to be in time, the agent's last word is not
    assert requeued.get("next", "scheduler") == "scheduler"
    assert all(run.attempt(number).stopped_yaml.exists() for number in (1, 2, 3))
    assert_equal(run, unbroken)
    assert_nothing_left(run)


def test_a_chain_past_the_limit_and_kills_beside_it(
    slurm_cluster: SlurmCluster,
    slow: Callable[..., Resolved],
    configure: Configure,
    unbroken: RunDir,
    tmp_path: Path,
) -> None:
    """A run is longer than the site allows and its submitter is gone; beside it, processes are killed.

    Another run was to start after it, and does so after the last job of the chain.
    """
    chain = submitted_and_orphaned(tmp_path)
    follower = submit.submit(
        configure(),
        argv=["test"],
        worker=STANDIN,
        directives=order.directives("slurm", after=[chain]),
        after=[chain],
    )
    shot_worker, _ = send(slow(1.0, overrides={"restart.on": ["killed"]}))
    wait_until(lambda: step_of(shot_worker) >= 2, "step 2 of the run whose worker is killed")
    os.kill(worker_pid(shot_worker, 3), signal.SIGKILL)
    wait_until(shot_worker.attempt(1).ended_yaml.exists, "the agent's notice of the killed worker")
    shot_agent, job_id = send(slow(1.0))
    wait_until(lambda: step_of(shot_agent) >= 2, "step 2 of the run whose agent is killed")
    os.kill(agent_pid(shot_agent, 1), signal.SIGKILL)
    ended = submit.wait(shot_agent, poll_s=0.5)
    assert (ended.state, ended.attempt) == ("failed", 1)
    second = rundir.read_yaml(shot_agent.attempt(1).attempt_yaml)["hosts"][1]
    words = f"killed: the agent of node 1 was killed (node 1 on {second}"
    assert ended.reason.startswith(words), ended.reason
    assert slurm_cluster.wait_state(job_id, {"FAILED", "COMPLETED"}) == "FAILED"
    assert_nothing_left(shot_agent)
    # a person may go on with what is not restarted by itself
    resume(shot_agent, argv=["test"])
    for shot in (shot_worker, shot_agent):
        ended = submit.wait(shot, poll_s=0.5)
        assert (ended.state, ended.attempt) == ("completed", 2), ended.reason
        assert_equal(shot, unbroken)
    told = end_of(shot_worker, 1)
    # resubmitted: without node_failure in restart.on the job has --no-requeue
    assert (told["cause"], told["next"]) == ("killed", "resubmit")
    assert "SIGKILL" in told["reason"]
    assert_nothing_left(shot_worker, shot_agent)
    ended = submit.wait(chain, poll_s=0.5)
    assert ended.state == "completed", ended.reason
    assert ended.attempt >= 2
    assert [end_of(chain, number)["cause"] for number in range(1, ended.attempt)] == ["timeout"] * (
        ended.attempt - 1
    )
    jobs = [rundir.read_yaml(attempt.submitted_yaml)["job_id"] for attempt in chain.attempts()]
    assert len(set(jobs)) == ended.attempt  # this job may not be requeued, so the agents submitted others
    assert end_of(chain, 1)["job_id"] == jobs[1]
    assert_equal(chain, unbroken)
    assert_nothing_left(chain)
    followed = submit.wait(follower.run, poll_s=0.5)
    assert (followed.state, followed.attempt) == ("completed", 1), followed.reason
    began = rundir.read_yaml(follower.run.attempt(1).attempt_yaml)
    assert began["start"] > ended.utc
    # it did not wait for the chain's first job alone
    assert began["job_id"] != follower.job_id


def submitted_and_orphaned(tmp_path: Path) -> RunDir:
    """Submits a run of six minutes where two are allowed, and kills the submitter with its process group."""
    limits = [{"max_nodes": 2, "max_walltime": "2m"}]
    # no warning by Slurm, whose time is uncertain by a minute: the agent warns itself
    options = {"options": {"no-requeue": True}, "skip_options": ["signal"]}
    site = site_data(tmp_path / "chain", limits=limits, scheduler=options, stop_margin_s=60)
    site["env"]["SLOW_STEP_S"] = "2.5"
    asked = {**SETTINGS, "nodes": 2, "ranks_per_node": 2, "walltime": "6m", "restart.on": ["timeout"]}
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(site))
    script = textwrap.dedent("""
        import json, sys, time
        from hpcsngd.config.resolve import Override, full_path, resolve
        from hpcsngd.launch import submit
        asked = json.loads(sys.argv[2])
        layers = [Override(full_path(key, "test"), value, "test") for key, value in asked.items()]
        resolved = resolve(sys.argv[1], "digits-hylo", layers, environment={})
        print(submit.submit(resolved, argv=["test"], worker="slow_worker").run.path, flush=True)
        time.sleep(600)
    """)
    path = os.pathsep.join(filter(None, (str(WORKERS), os.environ.get("PYTHONPATH", ""))))
    submitter = subprocess.Popen(
        [sys.executable, "-c", script, str(file), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert submitter.stdout is not None
    with submitter.stdout as output:
        run = rundir.open_run(Path(output.readline().strip()))
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.wait()
    assert Plan.from_record(run.record()["plan"]).walltime_min == 2
    return run


@pytest.fixture
def testbed(slurm_cluster: SlurmCluster) -> Iterator[Site]:
    """Returns the cluster's own description; node 2 is started again where a test has ended it."""
    layout = Layout.from_env()
    facts = read_facts(layout)
    assert facts is not None
    site = Site(layout, facts.shape, login_name(), facts.network)
    yield site
    for index in range(1, site.shape.nodes + 1):
        if slurmd(site, index).pid() is None:
            notice_loss(slurm_cluster, index)
            bring_back(slurm_cluster, site, index)


def slurmd(site: Site, index: int) -> Any:
    return services.daemon(site.layout, f"slurmd.{site.shape.node_names[index - 1]}")


def notice_loss(cluster: SlurmCluster, index: int) -> None:
    """Has Slurm notice that a node is gone, which would take minutes."""
    cluster.run("scontrol", "update", f"nodename={cluster.nodes[index - 1]}", "state=down", "reason=crashed")


def bring_back(cluster: SlurmCluster, site: Site, index: int) -> None:
    """Starts a node again whose loss Slurm has noticed."""
    name = cluster.nodes[index - 1]
    services.start_node(site, index)

    def is_back() -> bool:
        # with ReturnToService=2 it comes back by itself, and to resume it then is refused
        cluster.call("scontrol", "update", f"nodename={name}", "state=resume")
        return cluster.run("sinfo", "-h", "-n", name, "-o", "%t").split()[0] in ("idle", "mix", "alloc")

    wait_until(is_back, f"the return of {name}")


def crash(site: Site, index: int) -> None:
    """Kills all processes of a node at once, as a loss of power would."""
    pid = slurmd(site, index).pid()
    network = Path(f"/proc/{pid}/ns/net").readlink()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "ns" / "net").readlink() == network:
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # gone meanwhile, or the kernel's own
            continue


def test_a_rank_that_hangs(slurm_cluster: SlurmCluster, slow: Callable[..., Resolved]) -> None:
    on_first = {"options": {"nodelist": slurm_cluster.nodes[0]}}
    rule = {"nodes": 1, "restart.on": ["hang"], "restart.max_attempts": 2, "restart.hang_timeout_s": 8}
    hung, _ = send(slow(0.1, overrides=rule, env={"HANG_RANK": "1"}, scheduler=on_first))
    ended = submit.wait(hung, poll_s=0.5)
    assert (ended.state, ended.attempt, (ended.fault or {})["kind"]) == ("failed", 2, "hang")
    assert f"behind: rank 1 on {slurm_cluster.nodes[0]}: after step 3, between steps" in ended.reason
    assert ended.reason.endswith("not restarted: attempt 2 of restart.max_attempts 2")
    stacks = hung.attempt(1).node_log(0, "err").read_text()
    assert "has hung; its stacks:" in stacks
    assert "in slow_step" in stacks
    assert_nothing_left(hung)


def test_nodes_that_die(
    slurm_cluster: SlurmCluster, slow: Callable[..., Resolved], unbroken: RunDir, testbed: Site
) -> None:
    """A run loses its second node, goes on beside it, and loses the node on which its job's script runs."""
    if slurm_cluster.network != "netns":
        pytest.skip(
            "network namespaces are not permitted here: a node's processes cannot be told from others"
        )
    if len(slurm_cluster.nodes) < 3:
        pytest.skip("somebody has started the cluster with two nodes: there is none to go on with")
    first, second, spare = slurm_cluster.nodes[:3]
    bereft, job_id = send(slow(0.5))
    wait_until(lambda: step_of(bereft) >= 10, "step 10, after a checkpoint")
    crash(testbed, 2)
    wait_until(bereft.attempt(1).ended_yaml.exists, "the agent's notice of the lost node")
    told = end_of(bereft, 1)
    assert (told["cause"], told["next"], told["lost_hosts"]) == ("node_failure", "resubmit", [second])
    assert told["reason"].startswith(f"node failure: node 1 fell silent (node 1 on {second}")
    notice_loss(slurm_cluster, 2)
    wait_until(bereft.attempt(2).attempt_yaml.exists, "attempt 2, without the lost node")
    assert rundir.read_yaml(bereft.attempt(2).attempt_yaml)["hosts"] == [first, spare]
    assert slurm_cluster.state(job_id) == "CANCELLED"
    bring_back(slurm_cluster, testbed, 2)
    wait_until(lambda: step_of(bereft) >= 18, "step 18, after a checkpoint of attempt 2")
    crash(testbed, 1)
    wait_until(bereft.attempt(2).ended_yaml.exists, "the other agent's notice of the lost node")
    told = end_of(bereft, 2)
    assert (told["cause"], told["next"]) == ("node_failure", "scheduler")
    notice_loss(slurm_cluster, 1)
    bring_back(slurm_cluster, testbed, 1)
    ended = submit.wait(bereft, poll_s=0.5)
    assert (ended.state, ended.attempt) == ("completed", 3), ended.reason
    assert end_of(bereft, 1)["job_id"] == rundir.read_yaml(bereft.attempt(3).attempt_yaml)["job_id"]
    assert_equal(bereft, unbroken)
    assert_nothing_left(bereft)


def test_a_full_disk_costs_no_older_checkpoint(
    slurm_cluster: SlurmCluster, slow: Callable[..., Resolved], unbroken: RunDir, testbed: Site
) -> None:
    """The folder of the checkpoints has room for two; with more room the run goes on, bit for bit."""
    node = slurm_cluster.nodes[0]
    one = sum(file.stat().st_size for file in (unbroken.checkpoints_dir / f"step_{STEPS}").iterdir())
    asked = {"nodes": 1, "ranks_per_node": 2, "batch_size": 32}
    run, _ = send(slow(0.2, overrides=asked, scheduler={"options": {"nodelist": node}}))
    whole, _ = send(slow(0.0, overrides=asked))
    pid = slurmd(testbed, 1).pid()
    inside = ["nsenter", f"--target={pid}", "--mount"]
    seen = RunDir(Path(f"/proc/{pid}/root{run.path}"))
    run.checkpoints_dir.mkdir()
    mount = [
        *inside,
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={int(2.6 * one)}",
        "tmpfs",
        str(run.checkpoints_dir),
    ]
    subprocess.run(mount, check=True)
    try:
        ended = submit.wait(run, poll_s=0.5)
        assert (ended.state, (ended.fault or {})["kind"]) == ("failed", "quota"), ended.reason
        assert seen.newest_checkpoint() == "step_16"
        assert {path.name for path in seen.checkpoints_dir.glob("step_*")} == {"step_8", "step_16"}
        subprocess.run(
            [*inside, "mount", "-o", f"remount,size={8 * one}", str(run.checkpoints_dir)], check=True
        )
        sending.send(run, Plan.from_record(run.record()["plan"]), 2)
        ended = submit.wait(run, poll_s=0.5)
        assert ended.state == "completed", ended.reason
        assert submit.wait(whole, poll_s=0.5).state == "completed"
        assert_equal(seen, whole)
        resumed = [row["attempt"] for row in rundir.read_rows(run.metrics("train"), TABLES["train"])]
        assert resumed.count(2) == STEPS - 16
    finally:
        subprocess.run([*inside, "umount", "--lazy", str(run.checkpoints_dir)], check=True)
    assert_nothing_left(run)
