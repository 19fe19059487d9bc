"""Jobs on this machine, through submitit's local executor: the whole way from submit to status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import rundir
from hpcsngd.launch import ports, processes, status, submit

from .conftest import LOCAL_SITE, STANDIN, Configure

PER_RANK = {"mode": "per_rank"}


def reports(run: rundir.RunDir) -> dict[int, dict[str, Any]]:
    files = sorted((run.path / "report").glob("rank*.json"))
    return {int(file.stem.removeprefix("rank")): json.loads(file.read_text()) for file in files}


def site(**changes: Any) -> dict[str, Any]:
    merged = dict(LOCAL_SITE)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def send(configure: Configure, **changes: Any) -> submit.Submitted:
    return submit.submit(configure(site(**changes)), argv=["test"], worker=STANDIN)


def run_to_end(configure: Configure, **changes: Any) -> tuple[rundir.RunDir, rundir.Status]:
    submitted = send(configure, **changes)
    return submitted.run, submit.wait(submitted.run, poll_s=0.2)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.05)


def controller(submitted: submit.Submitted) -> int:
    return int(submitted.job_id)


pytestmark = pytest.mark.usefixtures("standin")


def test_per_rank_job_completes_and_every_rank_knows_who_it_is(configure: Configure) -> None:
    run, ended = run_to_end(configure, launch=PER_RANK)
    assert (ended.state, ended.result) == ("completed", {"accuracy": 0.5})
    # these workers do not wait for each other, so rank 0 may end the run before rank 1 has begun
    wait_until(lambda: len(reports(run)) == 2, "the report of rank 1")
    table = reports(run)
    assert [table[rank]["RANK"] for rank in (0, 1)] == ["0", "1"]
    assert [table[rank]["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert {report["WORLD_SIZE"] for report in table.values()} == {"2"}
    assert {report["MASTER_ADDR"] for report in table.values()} == {"127.0.0.1"}
    assert len({report["MASTER_PORT"] for report in table.values()}) == 1
    assert {report["HPCSNGD_DEVICE"] for report in table.values()} == {"cpu"}
    assert all(report["foreign"] == [] for report in table.values())


def test_a_run_records_what_it_came_from(configure: Configure) -> None:
    submitted = send(configure, launch=PER_RANK)
    record = submitted.run.record()
    assert record["config"]["exp_name"] == "standin"
    assert (record["plan"]["nodes"], record["plan"]["ranks_per_node"]) == (1, 2)
    assert record["provenance"]["argv"] == ["test"]
    assert set(record["provenance"]) >= {"hpcsngd", "python", "host", "utc", "git"}
    facts = rundir.read_yaml(submitted.run.attempt(1).submitted_yaml)
    assert (facts["scheduler"], facts["job_id"]) == ("local", submitted.job_id)
    submit.wait(submitted.run, poll_s=0.2)


@pytest.mark.dist
def test_torchrun_job_meets_and_completes(configure: Configure) -> None:
    run, ended = run_to_end(configure, env={"STANDIN": "meet"})
    assert ended.state == "completed", ended.reason
    assert ended.result == {"accuracy": 0.5, "total": 1.0}
    facts = rundir.read_yaml(run.attempt(1).attempt_yaml)
    assert (facts["world_size"], facts["hosts"]) == (2, [socket.gethostname()])
    assert rundir.read_yaml(run.attempt(1).rendezvous_yaml)["generation"] == 1


@pytest.mark.dist
def test_per_rank_job_meets(configure: Configure) -> None:
    _, ended = run_to_end(configure, launch=PER_RANK, env={"STANDIN": "meet"})
    assert ended.result == {"accuracy": 0.5, "total": 1.0}, ended.reason


@pytest.mark.dist
def test_paths_with_spaces_and_quotes(configure: Configure, tmp_path: Path) -> None:
    root = tmp_path / """it's a "run" $HOME root"""
    preload = ['export MARK="it\'s preloaded"']
    run, ended = run_to_end(configure, run_root=str(root), preload=preload, env={"STANDIN": "meet"})
    assert ended.state == "completed", ended.reason
    assert run.path.parent == root
    assert {report["MARK"] for report in reports(run).values()} == {"it's preloaded"}


def test_failing_import_is_told_in_one_line(configure: Configure) -> None:
    run, ended = run_to_end(configure, launch=PER_RANK, env={"STANDIN": "import"})
    assert ended.state == "failed"
    expected = "import error: ModuleNotFoundError: No module named 'no_such_module_anywhere' (rank "
    assert ended.reason.startswith(expected)
    assert "\n" not in ended.reason
    state = status.states([run])[0]
    assert (state.state, state.fault_kind) == ("failed", "import_error")


def test_a_failing_preload_line_is_the_cause(configure: Configure) -> None:
    _, ended = run_to_end(configure, preload=["true", "module load no-such-thing"])
    assert ended.reason.startswith(
        "configuration: preload line 2 failed: module load no-such-thing (node 0 on"
    )
    assert any("module: command not found" in line for line in (ended.fault or {})["evidence"])


def test_a_missing_worker_python_is_the_cause(configure: Configure) -> None:
    _, ended = run_to_end(configure, launch={"python": "no-such-python"})
    assert ended.reason.startswith("configuration: ")
    assert "no-such-python: not found" in ended.reason


@pytest.mark.slow
def test_a_worker_that_only_exits_has_not_finished(configure: Configure) -> None:
    _, ended = run_to_end(configure, launch=PER_RANK, env={"STANDIN": "silent"})
    assert ended.state == "failed"
    assert "did not report that training finished" in ended.reason


@pytest.mark.slow
def test_the_rank_that_told_its_fault_is_named_and_the_others_are_ended(configure: Configure) -> None:
    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "fault"})
    ended = submit.wait(submitted.run, poll_s=0.2)
    assert ended.reason.startswith("nan: loss is nan in step 7 (rank 1 on")
    assert (ended.fault or {})["rank"] == 1
    # rank 0 hangs in a collective; its agent ends it after its grace
    wait_until(lambda: processes.start_ticks(controller(submitted)) is None, "the end of the controller")


@pytest.mark.dist
def test_a_port_that_is_taken_after_the_lease_is_leased_again(configure: Configure, tmp_path: Path) -> None:
    """The first preload run takes the port that was just published; the second generation goes elsewhere."""
    thief = tmp_path / "thief.py"
    thief.write_text(
        textwrap.dedent("""
            import pathlib, re, socket, subprocess, sys
            run, mark = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
            if sys.argv[3:] == ["hold"]:
                text = (next(run.glob("*/attempts/1/rendezvous.yaml"))).read_text()
                held = socket.create_server(("", int(re.search(r"port: (\\d+)", text)[1])))
                print("held", flush=True)
                import time; time.sleep(20)
            elif not mark.exists():
                mark.touch()
                held = subprocess.Popen([sys.executable, *sys.argv, "hold"], stdout=subprocess.PIPE)
                held.stdout.readline()
        """)
    )
    steal = f"{sys.executable} '{thief}' '{tmp_path / 'runs'}' '{tmp_path / 'stolen'}'"
    run, ended = run_to_end(configure, preload=[steal], env={"STANDIN": "meet"})
    assert ended.state == "completed", ended.reason
    assert rundir.read_yaml(run.attempt(1).rendezvous_yaml)["generation"] == 2


@pytest.mark.dist
def test_ranks_started_singly_follow_a_rendezvous_that_moves(configure: Configure, tmp_path: Path) -> None:
    """Rank 0 finds its port taken; the other rank, which already waits there, starts again with it."""
    (tmp_path / "thief.py").write_text(
        "import os, socket, time\n"
        "held = socket.create_server(('', int(os.environ['MASTER_PORT'])))\n"
        "time.sleep(20)\n"
    )
    steal = textwrap.dedent(f"""
        if [ "$RANK" = 0 ] && mkdir '{tmp_path}/stolen' 2>/dev/null; then
          {sys.executable} '{tmp_path}/thief.py' &
          sleep 0.5
        fi
    """)
    run, ended = run_to_end(configure, launch=PER_RANK, preload=[steal], env={"STANDIN": "meet"})
    assert ended.state == "completed", ended.reason
    assert rundir.read_yaml(run.attempt(1).rendezvous_yaml)["generation"] == 2
    assert run.attempt(1).faults() == []


def test_a_fixed_port_that_is_taken_is_a_clear_fault(configure: Configure) -> None:
    lease = ports.lease((20000, 29999))
    _, ended = run_to_end(configure, master_port=lease.port)
    lease.close()
    host = socket.gethostname()
    assert ended.reason.startswith(
        f"rendezvous: port {lease.port} is in use on {host}; site testsite allows master_port {lease.port}"
    )


def test_a_stop_signal_reaches_the_workers_as_a_request(configure: Configure) -> None:
    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "stop"})
    wait_until(lambda: len(reports(submitted.run)) == 2, "the start of both ranks")
    for agent in processes.descendants(controller(submitted)):
        if b"submitit.core._submit" in Path(f"/proc/{agent}/cmdline").read_bytes():
            os.kill(agent, signal.SIGUSR2)
    ended = submit.wait(submitted.run, poll_s=0.2)
    assert submitted.run.attempt(1).stop_request.exists()
    assert (ended.state, ended.reason) == (
        "preempted",
        "stopped by SIGUSR2; the workers checkpointed and left",
    )


@pytest.mark.dist
def test_torchrun_workers_that_leave_on_request_are_no_failure(configure: Configure) -> None:
    submitted = send(configure, env={"STANDIN": "stop"})
    wait_until(lambda: len(reports(submitted.run)) == 2, "the start of both ranks")
    [agent] = [
        pid
        for pid in processes.descendants(controller(submitted))
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(agent, signal.SIGTERM)
    ended = submit.wait(submitted.run, poll_s=0.2)
    assert (ended.state, ended.reason) == (
        "preempted",
        "stopped by SIGTERM; the workers checkpointed and left",
    )


def test_a_killed_job_is_lost_and_never_a_success(configure: Configure) -> None:
    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "hang"})
    wait_until(lambda: len(reports(submitted.run)) == 2, "the start of both ranks")
    assert status.states([submitted.run])[0].state == "running"
    job = [controller(submitted), *processes.descendants(controller(submitted))]
    processes.kill(job)
    wait_until(lambda: not any(processes.start_ticks(pid) for pid in job), "the end of all processes")
    assert status.states([submitted.run])[0].state == "lost"
    ended = submit.wait(submitted.run, poll_s=0.1)
    assert (ended.state, (ended.fault or {})["kind"]) == ("failed", "killed")
    assert f"process {submitted.job_id}" in ended.reason
    assert submitted.run.status() == ended


def test_a_job_survives_ctrl_c_and_the_end_of_its_submitter(configure: Configure, tmp_path: Path) -> None:
    configure(site(launch=PER_RANK, env={"STANDIN": "stop"}))  # writes the files
    script = textwrap.dedent(f"""
        import signal
        from hpcsngd.config.resolve import resolve
        from hpcsngd.launch import submit
        # tests in the background of a shell inherit an ignored SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resolved = resolve({str(tmp_path / "testsite.yaml")!r}, {str(tmp_path / "standin.yaml")!r})
        submitted = submit.submit(resolved, argv=["x"], worker={STANDIN!r})
        try:
            print(submitted.run.path, flush=True)
            submit.wait(submitted.run, poll_s=0.1)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        run = rundir.open_run(Path(output.readline().strip()))
        wait_until(lambda: len(reports(run)) == 2, "the start of both ranks")
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends for Ctrl-C
        assert output.readline() == "interrupted\n"
    assert process.wait(timeout=20) == 0
    state = status.states([run])[0]
    assert (state.state, state.attempt) == ("running", 1)
    run.attempt(1).stop_request.touch()
    assert submit.wait(run, poll_s=0.2).state == "preempted"


def test_the_wall_time_ends_a_local_job(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute is the shortest wall time, so the controller is told a shorter one."""
    from hpcsngd.launch import executors

    real = executors._controller_environment
    short = {"SUBMITIT_LOCAL_TIMEOUT_S": "15", "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "2"}
    monkeypatch.setattr(executors, "_controller_environment", lambda *given: real(*given) | short)
    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "hang"})
    ended = submit.wait(submitted.run, poll_s=0.2)
    assert ended.state == "preempted"  # half an hour was planned, so this is not the plan's limit
    assert ended.reason.startswith("stopped by SIGUSR2, SIGINT; the workers were ended")
    wait_until(lambda: processes.start_ticks(controller(submitted)) is None, "the end of the controller")


def test_a_run_on_another_machine_is_not_declared_dead(configure: Configure) -> None:
    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "stop"})
    wait_until(lambda: len(reports(submitted.run)) == 2, "the start of both ranks")
    attempt = submitted.run.attempt(1)
    facts = rundir.read_yaml(attempt.submitted_yaml)
    rundir.write_yaml(attempt.submitted_yaml, facts | {"host": "elsewhere", "start_ticks": 1})
    state = status.states([submitted.run])[0]
    assert (state.state, state.reason) == ("running", "started on elsewhere; ask there")
    rundir.write_yaml(attempt.submitted_yaml, facts)
    attempt.stop_request.touch()
    submit.wait(submitted.run, poll_s=0.2)


def test_no_job_is_left_behind(configure: Configure) -> None:
    """The controller and its agents are gone, reaped, soon after the status is written."""
    submitted = send(configure, launch=PER_RANK)
    submit.wait(submitted.run, poll_s=0.2)
    wait_until(lambda: not Path(f"/proc/{submitted.job_id}").exists(), "the reaping of the controller")


def test_each_ranks_output_is_kept_beside_the_nodes(configure: Configure) -> None:
    run, ended = run_to_end(configure, env={"STANDIN": "import"})
    assert ended.state == "failed"
    attempt = run.attempt(1)
    kept = sorted(attempt.torchrun_logs(0).glob("*/attempt_0/*/stderr.log"))
    assert [file.parent.name for file in kept] == ["0", "1"]
    assert "no_such_module_anywhere" in kept[0].read_text() + kept[1].read_text()
    assert "[rank0]: " in attempt.node_log(0, "err").read_text()


def test_cancel_lets_the_workers_leave_and_resume_goes_on(configure: Configure) -> None:
    from hpcsngd.config.resolve import Override
    from hpcsngd.launch.cancel import cancel
    from hpcsngd.launch.resume import resume

    submitted = send(configure, launch=PER_RANK, env={"STANDIN": "stop"})
    run = submitted.run
    wait_until(lambda: len(reports(run)) == 2, "the start of both ranks")
    [done] = cancel([run])
    assert (done.state, done.was_sent) == ("running", True)
    ended = submit.wait(run, poll_s=0.2)
    assert ended.state == "cancelled"
    assert ended.reason.startswith("cancelled by ")
    wait_until(lambda: processes.start_ticks(controller(submitted)) is None, "the end of the controller")
    resume(run, [Override("site.env.STANDIN", "ok", "test")], argv=["test"])
    assert submit.wait(run, poll_s=0.2).state == "completed"
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    assert rundir.read_yaml(run.attempt(2).attempt_yaml)["hardware"]["cpus"] >= 1
