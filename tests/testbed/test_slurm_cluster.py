"""The running testbed answers like a site's Slurm: nodes, accounting, limits, signals; and its life cycle."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.testbed.plugin import SCRIPT, SlurmCluster, run_script

pytestmark = pytest.mark.slurm


@pytest.fixture
def own_network(slurm_cluster: SlurmCluster) -> SlurmCluster:
    """The cluster, if its nodes have names and addresses of their own."""
    if slurm_cluster.network != "netns":
        pytest.skip("network namespaces are not permitted here: the nodes share the machine's host name")
    return slurm_cluster


def refused(slurm_cluster: SlurmCluster, *argv: str) -> str:
    """Runs a command that has to fail; returns its error output."""
    done = slurm_cluster.call(*argv)
    assert done.returncode != 0, f"accepted: {done.stdout}"
    return done.stderr


def wait_text(path: Path, pattern: str, timeout_s: float = 30) -> str:
    """Waits until a job's output file has ``pattern``; returns the file's text."""
    end = time.monotonic() + timeout_s
    text = ""
    while not re.search(pattern, text):
        assert time.monotonic() < end, f"no {pattern!r} within {timeout_s:.0f} s in: {text!r}"
        time.sleep(0.1)
        text = path.read_text() if path.exists() else ""
    return text


# Nodes


def test_every_node_runs_its_task(slurm_cluster: SlurmCluster) -> None:
    names = slurm_cluster.run("srun", "-N2", "printenv", "SLURMD_NODENAME").split()
    assert sorted(names) == sorted(slurm_cluster.nodes[:2])


def test_two_nodes_answer_with_their_own_host_names(own_network: SlurmCluster) -> None:
    assert sorted(own_network.run("srun", "-N2", "hostname").split()) == sorted(own_network.nodes[:2])


def test_nodes_and_login_node_resolve_each_other(own_network: SlurmCluster) -> None:
    first, second = own_network.nodes[:2]
    login = socket.gethostname()
    found = own_network.run("srun", "-w", first, "getent", "ahostsv4", second, login)
    from_node = {line.split()[-1]: line.split()[0] for line in found.splitlines() if len(line.split()) == 3}
    assert from_node[second] == socket.gethostbyname(second)
    assert not from_node[login].startswith("127."), "a node would take the login node for itself"


def test_nodes_reach_each_other(own_network: SlurmCluster) -> None:
    first, second = own_network.nodes[:2]
    serve = (
        "import socket as s; peer, _ = s.create_server(('', 23456)).accept();"
        " peer.sendall(s.gethostname().encode())"
    )
    ask = (
        "import socket as s, time\n"
        "for _ in range(100):\n"
        f"    try: print(s.create_connection(({first!r}, 23456)).recv(99).decode()); break\n"
        "    except ConnectionRefusedError: time.sleep(0.1)\n"
    )
    job = own_network.submit("-w", first, command=f'{sys.executable} -c "{serve}"')
    assert own_network.run("srun", "-w", second, sys.executable, "-c", ask).strip() == first
    assert own_network.wait_state(job, {"COMPLETED"}) == "COMPLETED"


def test_jobs_find_the_cluster_in_a_cleaned_environment(own_network: SlurmCluster) -> None:
    found = own_network.run("srun", "-N1", "env", "-i", "/usr/bin/sinfo", "-h", "-p", "debug", "-o", "%D")
    assert int(found) == len(own_network.nodes)


def test_gpus_are_counted_and_numbered(slurm_cluster: SlurmCluster) -> None:
    visible = slurm_cluster.run(
        "srun", "-N2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"
    ).split()
    assert visible == ["0,1", "0,1"]
    assert "not available" in refused(slurm_cluster, "srun", "--gpus-per-node=65", "true")


# States


@pytest.mark.parametrize(("command", "state"), [("true", "COMPLETED"), ("exit 3", "FAILED")])
def test_accounting_gives_final_states(slurm_cluster: SlurmCluster, command: str, state: str) -> None:
    job = slurm_cluster.submit(command=command)
    assert slurm_cluster.wait_state(job, {"COMPLETED", "FAILED"}) == state
    end = time.monotonic() + 30
    while (rows := slurm_cluster.accounted_states(job)) != [state]:
        assert time.monotonic() < end, f"sacct still says {rows}"
        time.sleep(0.2)


def test_a_cancelled_job_is_cancelled(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.submit(command="sleep 300")
    slurm_cluster.wait_state(job, {"RUNNING"})
    slurm_cluster.run("scancel", job)
    assert slurm_cluster.wait_state(job, {"CANCELLED"}) == "CANCELLED"


def test_waiting_in_vain_says_what_slurm_knows(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.submit("--hold", command="true")
    with pytest.raises(TimeoutError, match=f"job {job} is PENDING, not RUNNING, after 0 s"):
        slurm_cluster.wait_state(job, {"RUNNING"}, timeout_s=0.1)
    slurm_cluster.run("scancel", job)


def test_a_command_that_hangs_shows_its_output_and_the_queue(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(AssertionError, match=r"(?s)still running after 0 s.*half a line.*NODELIST"):
        slurm_cluster.call("sh", "-c", "printf 'half a line'; exec sleep 60", timeout_s=0.3)


# Limits, signals, requeue


@pytest.mark.parametrize(
    "options",
    [("--nodes=2",), ("--time=6",), ("--time=00:05:01",)],
    ids=["nodes", "time", "time-by-a-second"],
)
def test_requests_beyond_a_partition_are_refused(
    slurm_cluster: SlurmCluster, options: tuple[str, ...]
) -> None:
    error = refused(slurm_cluster, "sbatch", "--partition=short", *options, "--wrap=true")
    assert re.search("node count specification invalid|time limit is invalid", error, re.IGNORECASE)


def test_a_request_within_the_partition_runs(slurm_cluster: SlurmCluster) -> None:
    job = slurm_cluster.submit("--partition=short", "--nodes=1", "--time=00:05:00", command="true")
    assert slurm_cluster.wait_state(job, {"COMPLETED"}) == "COMPLETED"


def test_kill_on_bad_exit_ends_the_other_tasks(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    begin = time.monotonic()
    # The bad exit waits for the other task: the kill is lost on a node that has not launched its task yet.
    wait = f"until [ -e {tmp_path}/started ]; do sleep 0.1; done"
    task = f"[ $SLURM_PROCID = 1 ] && {{ {wait}; exit 9; }}; touch {tmp_path}/started; sleep 60"
    error = refused(slurm_cluster, "srun", "-N2", "--kill-on-bad-exit=1", "sh", "-c", task)
    assert "Exited with exit code 9" in error
    assert time.monotonic() - begin < 30


def test_without_it_the_other_tasks_go_on(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    task = f"[ $SLURM_PROCID = 1 ] && exit 9; sleep 3; touch {tmp_path}/went-on"
    refused(slurm_cluster, "srun", "-N2", "sh", "-c", task)
    assert (tmp_path / "went-on").exists()


def test_a_requeued_job_starts_again_within_seconds(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = "echo start ${SLURM_RESTART_COUNT:-0}; sleep 300"
    job = slurm_cluster.submit("--requeue", "--open-mode=append", f"--output={output}", command=command)
    wait_text(output, "start 0")
    slurm_cluster.run("scontrol", "requeue", job)
    # KillWait 5 s, cred_expire 5 s + 1 s, a scheduling interval of 2 s; by Slurm's defaults it were 151 s.
    wait_text(output, "start 1", timeout_s=40)
    slurm_cluster.run("scancel", job)
    assert slurm_cluster.wait_state(job, {"CANCELLED"}) == "CANCELLED"


def test_a_high_job_preempts_and_sends_the_signal(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    node = f"--nodelist={slurm_cluster.nodes[-1]}"  # one is enough: other sessions may have jobs, too
    command = "trap 'echo signalled; exit 0' USR2; echo ready; for i in $(seq 600); do sleep 0.1; done"
    low = slurm_cluster.submit(
        node, "--exclusive", "--signal=B:USR2@30", f"--output={output}", command=command
    )
    # Alone on its node, ours is the only job that can be preempted; another session's may have to end first.
    wait_text(output, "ready", timeout_s=120)
    high = slurm_cluster.submit(node, "--exclusive", "--partition=high", command="true")
    wait_text(output, "signalled", timeout_s=20)
    assert slurm_cluster.wait_state(high, {"COMPLETED"}) == "COMPLETED"
    slurm_cluster.run("scancel", low)


# The testbed's own life cycle


def test_up_again_changes_nothing(slurm_cluster: SlurmCluster) -> None:
    pid_files = sorted((slurm_cluster.conf.parents[2] / "run").glob("*.pid"))
    before = {path.name: path.read_text() for path in pid_files}
    done = run_script("up")
    assert done.returncode == 0
    assert "already up" in done.stdout
    assert f"export SLURM_CONF={slurm_cluster.conf}" in done.stdout
    assert {path.name: path.read_text() for path in pid_files} == before
    assert len(before) == 4 + len(slurm_cluster.nodes)


def test_status_of_a_running_cluster_is_0(slurm_cluster: SlurmCluster) -> None:
    done = run_script("status")
    assert done.returncode == 0
    assert "stopped" not in done.stdout
    assert all(f"slurmd.{name}" in done.stdout for name in slurm_cluster.nodes)


def test_down_refuses_while_a_session_uses_the_cluster(slurm_cluster: SlurmCluster) -> None:
    done = run_script("down")
    assert (done.returncode, "test sessions are using the cluster" in done.stderr) == (1, True)
    assert slurm_cluster.run("srun", "-N1", "echo", "still here") == "still here\n"


def test_another_shape_or_directory_does_not_replace_it(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    shape = run_script("up", "--nodes", str(len(slurm_cluster.nodes) + 1))
    assert (shape.returncode, "run 'down' first" in shape.stderr) == (1, True)
    other = run_script("up", env={**os.environ, "HPCSNGD_TESTBED_DIR": str(tmp_path / "bed")})
    assert (other.returncode, f"testbed of {slurm_cluster.conf.parents[2]} is up" in other.stderr) == (
        1,
        True,
    )
    stopped = run_script("down", env={**os.environ, "HPCSNGD_TESTBED_DIR": str(tmp_path / "bed")})
    assert (stopped.returncode, "nothing was up" in stopped.stdout) == (0, True)
    assert run_script("status").returncode == 0


# A machine of its own (namespaces for network, mounts, processes and host name), so that nothing here meets
# the session's cluster: own /run, /etc/slurm and /etc/hosts, and no process survives the end of the script.
PRIVATE_MACHINE = """\
set -e
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /etc/slurm
grep -v hpcsngd /etc/hosts >"$ROOT/hosts"
mount --bind "$ROOT/hosts" /etc/hosts
hash_before=$(cksum </etc/hosts)
code() { "$@" >>"$ROOT/log" 2>&1 && echo 0 || echo $?; }
pid() { cut -d ' ' -f 1 "$HPCSNGD_TESTBED_DIR/run/$1.pid"; }
daemons() { ps -eo stat=,comm= | grep -v ^Z | grep -cE 'slurm|munged|mariadbd'; }
jobs() { squeue -h -t pending,running | wc -l; }
count() { srun -N2 hostname | sort -u | wc -l; }
"""
LIFE = """\
timeout -s KILL 1 $SLURM up >>"$ROOT/log" 2>&1 || true
echo killed-half-way-up: $(code $SLURM up) hosts: $(count)
sbatch -N2 -o /dev/null --wrap 'srun sleep 300' >>"$ROOT/log"
sleep 1; kill -9 $(pid slurmctld) $(pid munged)
echo crashed-status: $(code $SLURM status)
echo crashed-up: $(code $SLURM up) hosts: $(count) jobs: $(jobs) daemons: $([ $(daemons) -ge 6 ] && echo all)
timeout -s TERM 1 $SLURM down >>"$ROOT/log" 2>&1 || true
echo down: $(code $SLURM down) status: $(code $SLURM status) again: $(code $SLURM down)
echo left: $(daemons) links: $(ip -o link show | grep -c hpcsngd) namespaces: $(ip netns | wc -l)
[ "$hash_before" = "$(cksum </etc/hosts)" ] && echo hosts restored
echo config: $(ls /etc/slurm | wc -l)
"""
SESSIONS = """\
session() { $PYTEST "$TESTS::test_every_node_runs_its_task" >>"$ROOT/log" 2>&1 && echo 0 || echo $?; }
echo session: $(session) status: $(code $SLURM status)
echo kept: $(HPCSNGD_TESTBED_KEEP=1 session) status: $(code $SLURM status)
echo was up before: $(session) status: $(code $SLURM status)
echo down: $(code $SLURM down)
"""


def on_a_private_machine(steps: str, root: Path) -> tuple[list[str], str]:
    """Runs shell steps there; returns the lines that they print, and a log to understand a failure."""
    env = {name: value for name, value in os.environ.items() if name != "HPCSNGD_TESTBED_KEEP"}
    env |= {"ROOT": str(root), "SLURM": f"{sys.executable} {SCRIPT}", "TESTS": __file__}
    env |= {"PYTEST": f"{sys.executable} -m pytest -p no:cacheprovider --basetemp={root}/inner"}
    # In the private /run: munged wants a path that all users can enter, and pytest's folders are not.
    env |= {"HPCSNGD_TESTBED_DIR": "/run/bed", "SLURM_CONF": "/run/bed/etc/slurm/slurm.conf"}
    unshare = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
    argv = (*unshare, "bash", "-c", PRIVATE_MACHINE + steps)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150, check=False)
    log = root / "log"
    return done.stdout.splitlines(), done.stderr + (log.read_text() if log.exists() else "")


@pytest.mark.slow
def test_up_recovers_from_kills_and_down_leaves_nothing(own_network: SlurmCluster, tmp_path: Path) -> None:
    assert own_network.nodes
    printed, log = on_a_private_machine(LIFE, tmp_path)
    assert printed == [
        "killed-half-way-up: 0 hosts: 2",
        "crashed-status: 3",
        "crashed-up: 0 hosts: 2 jobs: 0 daemons: all",  # so that counting none below means something
        "down: 0 status: 3 again: 0",
        "left: 0 links: 0 namespaces: 0",
        "hosts restored",
        "config: 0",
    ], log


@pytest.mark.slow
def test_a_session_takes_down_what_it_started(own_network: SlurmCluster, tmp_path: Path) -> None:
    assert own_network.nodes
    printed, log = on_a_private_machine(SESSIONS, tmp_path)
    assert printed == [
        "session: 0 status: 3",
        "kept: 0 status: 0",
        "was up before: 0 status: 0",
        "down: 0",
    ], log
