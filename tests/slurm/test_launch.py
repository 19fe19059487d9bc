"""The launcher on a real Slurm with several nodes: every rank's place, ports, failures, hygiene."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hpcsngd import rundir
from hpcsngd.errors import PreflightError, SchedulerError
from hpcsngd.launch import status, submit

from .conftest import STANDIN, Configure, reports

if TYPE_CHECKING:
    from tests.testbed.plugin import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm_cluster")]


def run_to_end(resolved: Any) -> tuple[rundir.RunDir, str, rundir.Status]:
    submitted = submit.submit(resolved, argv=["test"], worker=STANDIN)
    return submitted.run, submitted.job_id, submit.wait(submitted.run, poll_s=0.5)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.2)


def needs_host_names(cluster: SlurmCluster) -> None:
    if cluster.network != "netns":
        pytest.skip("network namespaces are not permitted here: the nodes share the machine's host name")


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_every_rank_is_in_its_place(slurm_cluster: SlurmCluster, configure: Configure, mode: str) -> None:
    needs_host_names(slurm_cluster)
    run, job_id, ended = run_to_end(configure(mode))
    assert ended.state == "completed", ended.reason
    assert ended.result == {"accuracy": 0.5, "total": 6.0}  # 0 + 1 + 2 + 3 over all ranks
    hosts = rundir.read_yaml(run.attempt(1).attempt_yaml)["hosts"]
    assert len(set(hosts)) == 2
    meeting = rundir.read_yaml(run.attempt(1).rendezvous_yaml)
    assert meeting["address"] == hosts[0]
    assert 20000 <= meeting["port"] <= 29999
    columns = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "host")
    port = str(meeting["port"])
    assert [tuple(row[column] for column in columns) for row in reports(run)] == [
        ("0", "0", "4", "2", hosts[0], port, hosts[0]),
        ("1", "1", "4", "2", hosts[0], port, hosts[0]),
        ("2", "0", "4", "2", hosts[0], port, hosts[1]),
        ("3", "1", "4", "2", hosts[0], port, hosts[1]),
    ]
    assert all(row["foreign"] == [] for row in reports(run))
    assert slurm_cluster.wait_state(job_id, {"COMPLETED", "FAILED"}) == "COMPLETED"
    names = {file.name for file in run.attempt(1).logs.iterdir()}
    stems = ["node0", "node1"] if mode == "torchrun" else ["rank0", "rank1", "rank2", "rank3"]
    own = {"torchrun"} if mode == "torchrun" else set()  # its folder holds each rank's own log
    assert names == {f"{stem}.{stream}" for stem in stems for stream in ("out", "err")} | own


def test_single_ranks_see_one_gpu_each(configure: Configure) -> None:
    changes = {"mode": "per_rank", "gpu_visibility": "one", "backend": "gloo"}
    run, _, ended = run_to_end(configure("per_rank", gpus_per_node=2, launch=changes))
    assert ended.state == "completed", ended.reason
    rows = reports(run)
    assert [row["HPCSNGD_DEVICE"] for row in rows] == ["cuda:0"] * 4
    devices = [row["CUDA_VISIBLE_DEVICES"] for row in rows]
    assert all(device.isdigit() for device in devices)
    assert devices[0] != devices[1]
    assert devices[2] != devices[3]


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_a_port_taken_on_the_first_node_is_leased_again(
    configure: Configure, tmp_path: Path, mode: str
) -> None:
    """The first worker shell on node 0 takes the published port; all ranks meet at the next one."""
    thief = tmp_path / "thief.py"
    thief.write_text(
        textwrap.dedent("""
            import pathlib, re, socket, sys, time
            [file] = pathlib.Path(sys.argv[1]).glob("*/attempts/1/rendezvous.yaml")
            held = socket.create_server(("", int(re.search(r"port: (\\d+)", file.read_text())[1])))
            print("held", flush=True)
            sys.stdout.close()
            time.sleep(30)
        """)
    )
    steal = textwrap.dedent(f"""
        address=$(sed -n 's/^address: //p' {tmp_path}/runs/*/attempts/1/rendezvous.yaml)
        if [ "$(uname -n)" = "$address" ] && mkdir {tmp_path}/stolen 2>/dev/null; then
          ({sys.executable} {thief} {tmp_path}/runs > {tmp_path}/held 2>&1 &)
          until grep -q held {tmp_path}/held; do sleep 0.1; done
        fi
    """)
    run, _, ended = run_to_end(configure(mode, preload=[steal]))
    assert (tmp_path / "held").read_text() == "held\n"
    assert ended.state == "completed", ended.reason
    assert ended.result == {"accuracy": 0.5, "total": 6.0}
    assert rundir.read_yaml(run.attempt(1).rendezvous_yaml)["generation"] == 2
    assert {row["MASTER_PORT"] for row in reports(run)} == {
        str(rundir.read_yaml(run.attempt(1).rendezvous_yaml)["port"])
    }


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_a_failing_import_ends_the_job_with_its_cause(
    slurm_cluster: SlurmCluster, configure: Configure, mode: str
) -> None:
    run, job_id, ended = run_to_end(configure(mode, env={"STANDIN": "import"}))
    assert ended.state == "failed"
    assert ended.reason.startswith(
        "import error: ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    )
    assert "\n" not in ended.reason
    # every agent that sees a failure writes the same word, each at its own time
    last = run.status()
    assert last is not None
    assert dataclasses.replace(last, utc=ended.utc) == ended
    assert slurm_cluster.wait_state(job_id, {"COMPLETED", "FAILED"}) == "FAILED"


def test_the_first_cause_on_another_node_is_told(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    """Rank 1 tells its fault while the others hang; node 1 has nothing to say and must not be blamed."""
    run, job_id, ended = run_to_end(configure("torchrun", env={"STANDIN": "fault"}))
    assert ended.reason.startswith("nan: loss is nan in step 7 (rank 1 on")
    assert slurm_cluster.wait_state(job_id, {"COMPLETED", "FAILED"}) == "FAILED"
    assert run.attempt(1).faults()[0].rank == 1


def test_limits_refuse_before_sbatch_is_called(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\nexit 1\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    with pytest.raises(PreflightError, match="max_nodes: 2, max_walltime: 00:30:00"):
        submit.submit(configure(overrides={"nodes": 3}), argv=["test"], worker=STANDIN)
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "runs").exists()


def test_slurms_refusal_is_quoted(configure: Configure, tmp_path: Path) -> None:
    resolved = configure(scheduler={"constraint": "no-such-feature"})
    with pytest.raises(SchedulerError, match=r"sbatch refused: .*Invalid feature specification"):
        submit.submit(resolved, argv=["test"], worker=STANDIN)
    [file] = (tmp_path / "runs").glob("*/status.yaml")
    assert rundir.read_yaml(file)["state"] == "failed"


def test_outer_variables_do_not_leak(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "7",
        "SLURM_NTASKS_PER_NODE": "7",
        "SLURM_MEM_PER_NODE": "1",
        "SLURM_CPU_BIND": "mask_cpu:0x1",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_PARTITION": "no-such-partition",
        "PMI_RANK": "3",
        "RANK": "9",
        "WORLD_SIZE": "99",
        "MASTER_ADDR": "nowhere",
    }
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    run, _, ended = run_to_end(configure("torchrun"))
    assert ended.state == "completed", ended.reason
    assert [(row["RANK"], row["WORLD_SIZE"], row["foreign"]) for row in reports(run)] == [
        (str(rank), "4", []) for rank in range(4)
    ]


def test_a_job_can_be_submitted_from_inside_a_job(
    slurm_cluster: SlurmCluster, configure: Configure, tmp_path: Path
) -> None:
    configure("torchrun")  # writes the files
    script = tmp_path / "inner.py"
    script.write_text(
        textwrap.dedent(f"""
            from hpcsngd.config.resolve import resolve
            from hpcsngd.launch import submit
            resolved = resolve({str(tmp_path / "cluster.yaml")!r}, {str(tmp_path / "standin.yaml")!r})
            submitted = submit.submit(resolved, argv=["inner"], worker={STANDIN!r})
            print(submit.wait(submitted.run, poll_s=0.5).state)
        """)
    )
    options = ("--ntasks=1", "--cpus-per-task=1", "--mem=100", "--time=5", f"--output={tmp_path}/outer")
    outer = slurm_cluster.submit(*options, command=f"{sys.executable} {script}")
    assert slurm_cluster.wait_state(outer, {"COMPLETED", "FAILED"}, timeout_s=120) == "COMPLETED"
    assert (tmp_path / "outer").read_text().splitlines()[-1] == "completed"
    [file] = (tmp_path / "runs").glob("*/run.yaml")
    assert all(row["foreign"] == [] for row in reports(rundir.open_run(file.parent)))


def test_cancelled_by_slurm(configure: Configure) -> None:
    submitted = submit.submit(configure("torchrun", env={"STANDIN": "hang"}), argv=["test"], worker=STANDIN)
    wait_until(lambda: len(reports(submitted.run)) == 4, "the start of all ranks")
    assert status.states([submitted.run])[0].state == "running"
    subprocess.run(["scancel", submitted.job_id], check=True)
    ended = submit.wait(submitted.run, poll_s=0.5)
    assert ended.state == "cancelled"


def test_killed_without_a_word(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    submitted = submit.submit(configure("torchrun", env={"STANDIN": "hang"}), argv=["test"], worker=STANDIN)
    wait_until(lambda: len(reports(submitted.run)) == 4, "the start of all ranks")
    slurm_cluster.run("scancel", "--signal=KILL", f"{submitted.job_id}.0")
    ended = submit.wait(submitted.run, poll_s=0.5)
    assert ended.state in ("failed", "cancelled")
    assert "(Slurm: " in ended.reason


def test_a_requeued_job_is_a_new_attempt(slurm_cluster: SlurmCluster, configure: Configure) -> None:
    submitted = submit.submit(configure("torchrun", env={"STANDIN": "hang"}), argv=["test"], worker=STANDIN)
    run = submitted.run
    wait_until(lambda: len(reports(run)) == 4, "the start of all ranks")
    slurm_cluster.run("scontrol", "requeue", submitted.job_id)
    wait_until(run.attempt(2).rendezvous_yaml.exists, "the second attempt", timeout_s=90)
    facts = rundir.read_yaml(run.attempt(2).attempt_yaml)
    assert (facts["restarts"], facts["job_id"]) == (1, submitted.job_id)
    state = status.states([run])[0]
    assert (state.state, state.attempt) == ("running", 2)
    subprocess.run(["scancel", submitted.job_id], check=True)
    submit.wait(run, poll_s=0.5)
