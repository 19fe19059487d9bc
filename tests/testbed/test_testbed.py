"""The testbed's rules, without a cluster: what it writes, refuses, skips, and whom it leaves alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.testbed.needs import require
from tests.testbed.plugin import run_script
from tests.testbed.slurmbed import claims, cli, cluster, config, layout, network, packages, processes
from tests.testbed.slurmbed.errors import NoSlurmHereError, TestbedError, UsageError
from tests.testbed.slurmbed.layout import Layout, Shape

pytest_plugins = ["pytester"]

SITE = config.Site(Layout(Path("/tmp/bed")), Shape(nodes=2, cpus=8, gpus=3), login="login1", network="netns")
LOOPBACK = config.Site(SITE.layout, Shape(nodes=2, gpus=0), login="login1", network="loopback")


def outcome(returncode: int, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(["slurm", "up"], returncode, stdout="", stderr=stderr)


# When tests are skipped, and when they fail


def test_a_cluster_that_is_up_lets_the_tests_run() -> None:
    reached = False
    with suppress(pytest.skip.Exception, pytest.fail.Exception):
        require(outcome(0), "slurm up", {"CI": "true"})
        reached = True
    assert reached


@pytest.mark.parametrize("env", [{}, {"CI": ""}, {"CI": "false"}])
def test_a_machine_without_slurm_skips_with_the_reason(env: dict[str, str]) -> None:
    with pytest.raises(pytest.skip.Exception, match="it takes root"):
        require(outcome(77, "no Slurm here: it takes root"), "slurm up", env)


def test_a_missing_install_fails_in_continuous_integration() -> None:
    with pytest.raises(pytest.fail.Exception, match="it takes root"):
        require(outcome(77, "no Slurm here: it takes root"), "slurm up", {"CI": "true"})


@pytest.mark.parametrize("code", [1, 2, 3, -9])
def test_a_broken_testbed_is_a_failure_never_a_skip(code: int) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"exit code {code}"):
        require(outcome(code), "slurm up", {})


TWO_TESTS = """
    import pytest

    @pytest.fixture
    def launcher(slurm_cluster):
        return slurm_cluster

    {marker}
    def test_direct(slurm_cluster):
        pass

    {marker}
    def test_through_a_fixture(launcher):
        pass
"""


def test_using_the_cluster_without_the_marker_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TWO_TESTS.format(marker=""))
    result = pytester.runpytest_inprocess("-p", "tests.testbed.plugin", "--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*need @pytest.mark.slurm: *::test_direct, *::test_through_a_fixture"])


def test_using_the_cluster_with_the_marker_is_accepted(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n  slurm: a real Slurm")
    pytester.makepyfile(TWO_TESTS.format(marker="@pytest.mark.slurm"))
    result = pytester.runpytest_inprocess(
        "-p", "tests.testbed.plugin", "--collect-only", "-q", "--strict-markers"
    )
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*2 tests collected*"])


# When there can be no Slurm


def test_who_is_not_root_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["up"]) == 77
    assert "it takes root" in capsys.readouterr().err


def test_a_machine_without_apt_has_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name, path=None: None)
    with pytest.raises(NoSlurmHereError, match=r"slurmctld, slurmd, .* missing, and no apt-get"):
        packages.ensure_installed()


def test_packages_that_apt_cannot_find_are_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def apt(argv: list[str]) -> subprocess.CompletedProcess[str]:
        asked.append("update" if "update" in argv else "install")
        return subprocess.CompletedProcess(
            argv, 100, stdout="", stderr="W: old\nE: Unable to locate package\n"
        )

    monkeypatch.setattr(packages, "missing_programs", lambda: ["slurmd"])
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/apt-get")
    monkeypatch.setattr(packages, "_apt", apt)
    with pytest.raises(NoSlurmHereError, match=r"cannot install .*: E: Unable to locate package"):
        packages.ensure_installed()
    assert asked == ["install", "update", "install"]


def test_with_everything_installed_apt_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(packages, "missing_programs", list)
    monkeypatch.setattr(packages, "_apt", asked.append)
    packages.ensure_installed()
    assert asked == []


# Exit codes of the script itself


def test_status_of_nothing_is_3(tmp_path: Path) -> None:
    done = run_script("status", env={**os.environ, "HPCSNGD_TESTBED_DIR": str(tmp_path / "none")})
    assert done.returncode == 3
    assert "slurmctld            stopped" in done.stdout


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["up", "--nodes", "0"], {}, "--nodes 0: allowed are 1 to 64"),
        (["up", "--gpus", "many"], {}, "invalid int value"),
        (["restart"], {}, "invalid choice"),
        (["status"], {"HPCSNGD_TESTBED_NET": "10.1"}, "HPCSNGD_TESTBED_NET=10.1: three bytes"),
        (["status"], {"HPCSNGD_TESTBED_DIR": "bed"}, "HPCSNGD_TESTBED_DIR=bed: an absolute path"),
        (["status"], {"HPCSNGD_TESTBED_DIR": "/tmp/my bed"}, "HPCSNGD_TESTBED_DIR=/tmp/my bed: an absolute"),
    ],
)
def test_wrong_usage_is_2(words: list[str], env: dict[str, str], message: str) -> None:
    done = run_script(*words, env={**os.environ, **env})
    assert done.returncode == 2
    assert message in done.stderr


def test_the_environment_chooses_directory_and_addresses() -> None:
    chosen = Layout.from_env({"HPCSNGD_TESTBED_DIR": "/srv/bed", "HPCSNGD_TESTBED_NET": "10.9.8"})
    assert chosen == Layout(Path("/srv/bed"), "10.9.8")
    assert Layout.from_env({}) == Layout(Path(layout.DEFAULT_DIR), layout.DEFAULT_NET)


def test_interface_names_fit_the_kernel() -> None:
    names = [layout.BRIDGE, *Shape(nodes=layout.MAX_NODES).node_names]
    assert max(len(name) for name in names) <= 15
    assert all(network.OWN_NAME.fullmatch(name) for name in names[1:])
    assert not network.OWN_NAME.match(layout.BRIDGE)


@pytest.mark.parametrize(("nodes", "cpus", "gpus"), [(65, 4, 4), (2, 0, 4), (2, 4, -1)])
def test_shapes_out_of_range_are_refused(nodes: int, cpus: int, gpus: int) -> None:
    with pytest.raises(UsageError, match="allowed are"):
        Shape(nodes, cpus, gpus)


# What it writes


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "Node", "Partition"))]
    return dict(line.split("=", 1) for line in lines)


def lines_of(text: str, key: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(key)]


def test_slurm_conf_names_nodes_with_their_own_addresses() -> None:
    text = config.slurm_conf(SITE, first_job_id=77)
    assert settings(text)["SlurmctldHost"] == "login1(10.214.88.254)"
    assert settings(text)["FirstJobId"] == "77"
    node = "NodeName=hpcsngd-{0} NodeHostname=hpcsngd-{0} NodeAddr=10.214.88.{0} Port=2682{0} CPUs=8"
    expected = [f"{node.format(index)} RealMemory=1000000 Weight={index} Gres=gpu:3" for index in (1, 2)]
    assert lines_of(text, "NodeName") == expected


def test_in_loopback_mode_only_the_ports_differ() -> None:
    text = config.slurm_conf(LOOPBACK, first_job_id=1)
    node = (
        "NodeName=hpcsngd-{0} NodeHostname=login1 NodeAddr=127.0.0.1 Port=2682{0} CPUs=4 "
        "RealMemory=1000000 Weight={0}"
    )
    assert lines_of(text, "NodeName") == [node.format(index) for index in (1, 2)]
    assert "gpu" not in text
    assert config.gres_conf(LOOPBACK.layout, 0) == ""


def test_each_partition_has_its_limits() -> None:
    text = config.slurm_conf(SITE, first_job_id=1)
    partitions = {line.split()[0]: line.split()[1:] for line in lines_of(text, "PartitionName")}
    assert "Default=YES" in partitions["PartitionName=debug"]
    assert {"MaxTime=00:05:00", "MaxNodes=1"} <= set(partitions["PartitionName=short"])
    assert "PriorityTier=10" in partitions["PartitionName=high"]
    assert settings(text)["EnforcePartLimits"] == "ALL"


def test_a_requeued_job_does_not_wait_two_minutes() -> None:
    auth = settings(config.slurm_conf(SITE, first_job_id=1))["AuthInfo"]
    assert auth == "socket=/tmp/bed/run/munge.socket,cred_expire=5"


def test_gpus_are_numbered_devices() -> None:
    assert config.gres_conf(SITE.layout, 3) == "Name=gpu File=/tmp/bed/dev/gpu[0-2]\n"


def test_nodes_know_the_login_node_by_the_bridge() -> None:
    expected = "127.0.0.1 localhost\n10.214.88.254 login1\n10.214.88.1 hpcsngd-1\n10.214.88.2 hpcsngd-2\n"
    assert config.node_hosts(SITE) == expected


@pytest.mark.parametrize(
    "before", ["127.0.0.1 localhost\n10.214.88.9 other # mine\n", "127.0.0.1 no-newline"]
)
def test_names_come_and_go_in_the_hosts_file(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(before)
    monkeypatch.setattr(network, "HOSTS", hosts)
    network.publish_names(SITE)
    assert f"10.214.88.2 hpcsngd-2 {network.HOSTS_MARK}\n" in hosts.read_text()
    network.withdraw_names()
    assert hosts.read_text().rstrip("\n") == before.rstrip("\n")


# Whom it leaves alone


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def test_a_daemon_is_stopped_by_its_pid_file(tmp_path: Path) -> None:
    daemon = processes.Daemon("sleeper", tmp_path, tmp_path)
    daemon.start(["sleep", "60"], os.environ, ready=lambda: True)
    pid = daemon.pid()
    assert pid is not None
    assert daemon.stop()
    assert processes.start_time(pid) is None
    assert not daemon.pid_file.exists()
    assert not daemon.stop()


def test_a_process_with_a_reused_id_is_left_alone(tmp_path: Path) -> None:
    daemon = processes.Daemon("stranger", tmp_path, tmp_path)
    with sleeper() as stranger:
        started = processes.start_time(stranger.pid)
        assert started is not None
        daemon.pid_file.write_text(f"{stranger.pid} {started - 1}\n")
        assert daemon.pid() is None
        assert not daemon.stop()
        assert stranger.poll() is None
        stranger.kill()


def test_a_zombie_does_not_count_as_running() -> None:
    with sleeper() as process:
        os.kill(process.pid, signal.SIGKILL)
        gone = processes.wait_for(lambda: processes.start_time(process.pid) is None, timeout_s=10)
        assert Path(f"/proc/{process.pid}").exists()  # not reaped yet
        assert gone


def test_a_daemon_that_ends_at_once_shows_its_last_words(tmp_path: Path) -> None:
    daemon = processes.Daemon("broken", tmp_path, tmp_path)
    with pytest.raises(TestbedError, match=r"(?s)broken ended with 4; see .*no such key"):
        daemon.start(["sh", "-c", "echo no such key; exit 4"], os.environ, ready=lambda: False)


def test_a_daemon_that_never_gets_ready_is_an_error(tmp_path: Path) -> None:
    daemon = processes.Daemon("slow", tmp_path, tmp_path)
    with pytest.raises(TestbedError, match="slow is not ready after 0 s"):
        daemon.start(["sleep", "60"], os.environ, ready=lambda: False, timeout_s=0.2)
    assert daemon.stop()


def test_a_directory_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(TestbedError, match="holds something else"):
        cluster._make_state_dir(Layout(tmp_path), Shape())
    assert (tmp_path / "thesis.tex").read_text() == "years"


# Several invocations


def test_a_second_invocation_waits_for_the_first(tmp_path: Path) -> None:
    second = claims.exclusive(tmp_path, timeout_s=0.1)
    with claims.exclusive(tmp_path), pytest.raises(TestbedError, match="another invocation holds"), second:
        pytest.fail("two at a time")
    with claims.exclusive(tmp_path, timeout_s=0.1):
        assert (tmp_path / "lock").exists()


def test_only_the_last_session_may_take_the_cluster_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with claims.usage(tmp_path) as first:
        with claims.usage(tmp_path) as second:
            assert not second.is_last()
        assert first.is_last()


def test_a_cluster_in_use_is_known_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with claims.usage(tmp_path):
        assert claims.in_use(tmp_path)
    assert not claims.in_use(tmp_path)


def test_a_session_without_root_never_takes_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with claims.usage(tmp_path) as only:
        assert not only.is_last()


def test_the_owner_is_remembered_until_it_stops(tmp_path: Path) -> None:
    claims.set_owner(Path("/srv/bed"), tmp_path)
    assert claims.owner(tmp_path) == Path("/srv/bed")
    claims.set_owner(None, tmp_path)
    assert claims.owner(tmp_path) is None
