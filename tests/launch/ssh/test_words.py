"""What a site says of its hosts becomes words of ssh, and a host's silence a cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.config.site import Scheduler
from hpcsngd.errors import ConfigError, SchedulerError
from hpcsngd.launch import plan
from hpcsngd.launch.plan import Host, Plan
from hpcsngd.launch.ssh import jobs, remote, words
from hpcsngd.launch.ssh.words import Ssh
from tests.launch.conftest import Configure


def ssh_site(**scheduler: Any) -> dict[str, Any]:
    return {"description": "x", "scheduler": {"kind": "ssh", "hosts": ["a", "me@b"], **scheduler}, "nodes": 2}


def test_user_port_and_options_are_ssh_s_own() -> None:
    options = {"ProxyJump": "gate", "Compression": True, "ConnectTimeout": "7"}
    site = Scheduler(kind="ssh", hosts=["a"], user="me", port=2222, options=options)
    line = Ssh.of(site, 1).words("a", ["python", "it's"], {"PYTHONPATH": "/x y"})
    assert line[:5] == ["ssh", "-T", "-l", "me", "-p"]
    assert {"BatchMode=yes", "ControlMaster=no", "ProxyJump=gate", "Compression=yes"} < set(line)
    assert [word for word in line if word.startswith("ConnectTimeout")] == ["ConnectTimeout=7"]
    assert line[-2] == "a"
    # the host's shell takes the text apart again
    done = subprocess.run(
        ["sh", "-c", f"printf '%s|' {line[-1]}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "env|PYTHONPATH=/x y|python|it's|"


@pytest.mark.parametrize(
    ("hosts", "complaint"),
    [(["-oProxyCommand=x"], "is no host"), (["a b"], "is no host"), (["a", "me@a"], "a stands there twice")],
)
def test_hosts_that_ssh_would_misread_are_refused(
    configure: Configure, hosts: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        configure(ssh_site(hosts=hosts))


def test_a_plan_remembers_its_hosts(configure: Configure, host: Host) -> None:
    scheduler = {"addresses": {"a": "10.0.0.1"}, "python": "/shared/python", "pass_env": ["HF_HOME"]}
    made = plan.make(configure(ssh_site(**scheduler), nodes=2), host=host)
    assert (made.python, made.agent_python) == ("/shared/python", "/shared/python")
    assert made.restart_on == ()
    again = Plan.from_record(json.loads(json.dumps(made.to_record())))
    assert again == made
    assert again.ssh is not None
    assert (again.ssh.names, again.ssh.address(0), again.ssh.address(1)) == (("a", "b"), "10.0.0.1", "b")
    assert words.passed(again.ssh, {"HF_HOME": "/h", "SECRET": "s"}) == {"HF_HOME": "/h"}


@pytest.mark.parametrize(
    ("out", "err", "status", "told"),
    [
        (
            "",
            "Permission denied (publickey).",
            255,
            "host a cannot be reached: Permission denied (publickey).",
        ),
        ("", "sh: python: not found", 127, "host a does not answer as hpcsngd does: sh: python: not found"),
        ("welcome\n", "", 0, "host a does not answer as hpcsngd does: welcome"),
        ('hpcsngd-ssh: {"error": "no room"}\n', "", 0, "host a: no room"),
    ],
)
def test_what_a_host_says_instead_of_an_answer(out: str, err: str, status: int, told: str) -> None:
    found = jobs.read("a", out, err, status)
    assert isinstance(found, SchedulerError)
    assert str(found) == told


def test_an_answer_is_found_among_what_a_login_prints() -> None:
    assert jobs.read("a", 'welcome\nhpcsngd-ssh: {"alive": [true]}\nbye\n', "", 0) == {"alive": [True]}


def test_a_folder_that_is_not_the_same_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("another: run\n")
    request = {"verb": "start", "run_dir": str(tmp_path), "digest": "0", "version": remote.__version__}
    said = remote.parse([remote.answer(json.dumps(request))])
    assert said is not None
    assert "must be on a file system that all hosts share" in said["error"]
    said = remote.parse([remote.answer(json.dumps(request | {"version": "0.0"}))])
    assert said is not None
    assert "bring both to one version" in said["error"]


def test_only_the_process_that_was_started_is_touched(tmp_path: Path) -> None:
    words_of_it = [sys.executable, "-c", "input()", str(tmp_path)]
    with subprocess.Popen(words_of_it, stdin=subprocess.PIPE) as process:
        ticks = remote.processes.start_ticks(process.pid)
        agent = {"pid": process.pid, "start_ticks": ticks, "boot": remote.boot(), "run_dir": str(tmp_path)}
        others = [
            agent | {"start_ticks": (ticks or 0) + 1},
            agent | {"boot": "another"},
            agent | {"run_dir": "/another"},
            agent | {"pid": os.getpid()},
        ]
        assert remote.end({"agents": others, "is_hard": True}) == {"alive": [False] * 4}
        assert process.poll() is None
        assert remote.alive({"agents": [agent]}) == {"alive": [True]}
        assert remote.end({"agents": [agent], "is_hard": False}) == {"alive": [True]}
        assert process.wait(60) == -signal.SIGTERM
        assert remote.alive({"agents": [agent]}) == {"alive": [False]}
