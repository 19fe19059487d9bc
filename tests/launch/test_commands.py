"""Commands: quoting proven by a real shell, preload lines, torchrun's words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from hpcsngd.launch import commands, plan
from hpcsngd.launch.plan import Host, Plan

from .conftest import Configure

NASTY = """/tmp/a dir/it's "quoted" $HOME `id` \\ end"""
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('MARK')]))"


@pytest.fixture
def made(configure: Configure, host: Host) -> Plan:
    return plan.make(configure(), host=host)


def run(preload: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", commands.shell_text(preload), "hpcsngd", sys.executable, "-c", SHOW, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_arguments_pass_the_shell_unchanged() -> None:
    arguments = [NASTY, "", "*", "a\nb", "--x=$(false)"]
    assert json.loads(run([], arguments).stdout)[0] == arguments


def test_preload_lines_set_the_environment_in_order() -> None:
    done = run(["export MARK=one", 'export MARK="${MARK} and it\'s two"'], [])
    assert json.loads(done.stdout)[1] == "one and it's two"


def test_preload_lines_may_fail_inside_and_define_functions() -> None:
    lines = ["false; true", "module() { export MARK=$2; }", "module load cuda", "test -n x"]
    assert json.loads(run(lines, []).stdout)[1] == "cuda"


def test_a_failing_preload_line_is_named_and_ends_it() -> None:
    done = run(["export MARK=1", "module load 'no such'", "export MARK=2"], [])
    assert done.returncode == commands.PRELOAD_FAILED
    assert "hpcsngd: preload line 2 failed: module load 'no such'" in done.stderr
    assert done.stdout == ""


def test_the_shell_shields_workers_from_the_warning_signal() -> None:
    text = "import signal; print(signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN)"
    words = ["bash", "-c", commands.shell_text([]), "hpcsngd", sys.executable, "-c", text]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


def test_torchrun_command(made: Plan) -> None:
    words = commands.node_command(made, NASTY, 3, node=1, address="node1", port=20007)
    assert words[:2] == ["bash", "-c"]
    assert words[3:] == [
        "hpcsngd",
        "/opt/venv/bin/python",
        "-u",
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--node-rank=1",
        "--master-addr=node1",
        "--master-port=20007",
        "--rdzv-conf=timeout=60",
        "--tee=3",
        f"--log-dir={NASTY}/attempts/3/logs/torchrun/node1",
        "-m",
        "hpcsngd.train.worker",
        NASTY,
        "--attempt",
        "3",
    ]


def test_the_run_directory_is_bound_into_the_image(made: Plan) -> None:
    inside = dataclasses.replace(
        made, container=("apptainer", "exec", "--nv"), image="/i/a.sif", python="python"
    )
    words = commands.rank_command(inside, "/runs/r1", 1)[4:]
    assert words[:5] == ["apptainer", "exec", "--nv", "--bind", "/runs/r1"]
    assert words[5:9] == ["--pwd", "/runs/r1", "/i/a.sif", "python"]
