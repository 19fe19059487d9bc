"""What is refused before a submission: partitions and accounts, folders, torch, secrets; and the probe."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcsngd.errors import EXIT_PREFLIGHT, EXIT_USAGE, ConfigError, PreflightError
from hpcsngd.launch import partitions, plan, preflight, probe, scripts, secrets
from hpcsngd.launch.partitions import Request
from hpcsngd.launch.plan import Host

from .conftest import LOCAL_SITE, Configure
from .test_submit import SITE, path, program

__all__ = ["path"]  # the fixture

RECORDED = Path(__file__).parents[1] / "data" / "slurm"
ASSOCIATIONS = "physics||normal,long\nchemistry||normal\n"
CONFIG = "AccountingStorageBackupHost = (null)\nAccountingStorageEnforce = associations,limits,qos\n"


def against(**asked: Any) -> list[str]:
    known = partitions.parse_partitions((RECORDED / "partitions.txt").read_text())
    return list(partitions.partition_problems(Request(**{"nodes": 1, "walltime_min": 5} | asked), known))


def test_recorded_partitions() -> None:
    known = partitions.parse_partitions((RECORDED / "partitions.txt").read_text())
    assert sorted(known) == ["debug", "high", "short"]
    short = known["short"]
    assert (short.max_nodes, short.max_minutes, short.is_default, short.is_up) == (1, 5, False, True)
    assert (known["debug"].max_nodes, known["debug"].max_minutes, known["debug"].is_default) == (
        None,
        None,
        True,
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, []),
        ({"partition": "short"}, []),
        (
            {"partition": "shrot"},
            ["no partition 'shrot'; did you mean 'short'?; this cluster has debug, high"],
        ),
        ({"partition": "short", "walltime_min": 6}, ["at most 00:05:00, asked: 00:06:00"]),
        ({"partition": "short", "nodes": 2, "walltime_min": 6}, ["at most 1 node(s), asked: 2", "00:06:00"]),
        ({"nodes": 3}, ["partition debug gives a job at most 2 node(s), asked: 3"]),
        ({"partition": "short,debug", "walltime_min": 6}, []),
    ],
)
def test_what_a_partition_refuses(asked: dict[str, Any], words: list[str]) -> None:
    found = against(**asked)
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text


def test_closed_partitions_and_their_lists() -> None:
    line = "PartitionName=gpu Default=NO State=DOWN MaxTime=1-00:00:00 AllowAccounts=physics DenyQos=debug"
    known = partitions.parse_partitions(line)
    request = Request(1, 1441, "gpu", "chemistry", "debug", {"account": "site.yaml:4"})
    assert list(partitions.partition_problems(request, known)) == [
        "scheduler.partition: partition gpu is down",
        "scheduler.partition: partition gpu gives a job at most 1-00:00:00, asked: 1-00:01:00",
        "scheduler.account (site.yaml:4): partition gpu takes physics, not chemistry",
        "scheduler.qos: partition gpu refuses debug",
    ]
    assert list(partitions.partition_problems(Request(1, 1), known)) == [
        "scheduler.partition: this cluster has no default partition; allowed: gpu"
    ]


@pytest.mark.parametrize(
    ("account", "qos", "words"),
    [
        ("physics", "long", None),
        (None, "long", None),
        ("phisics", None, "no account 'phisics'; did you mean 'physics'?; yours: chemistry, physics"),
        ("chemistry", "long", "no quality of service 'long'; yours: normal"),
    ],
)
def test_accounts_and_qualities_of_service(account: str | None, qos: str | None, words: str | None) -> None:
    enforced = partitions.parse_enforced(CONFIG)
    request = Request(1, 1, account=account, qos=qos)
    found = list(partitions.association_problems(request, ASSOCIATIONS, enforced))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    assert list(partitions.association_problems(request, "", enforced)) == []  # cannot tell


def test_accounts_count_only_where_the_cluster_enforces_them(configure: Configure, path: Path) -> None:
    site = SITE | {"scheduler": SITE["scheduler"] | {"account": "nobody"}}
    tables = f'case "$2" in config) printf "{CONFIG}";; partition) exit 1;; esac'
    program(path, "scontrol", tables)
    program(path, "sacctmgr", f'printf "{ASSOCIATIONS}"')
    assert "no account 'nobody'" in preflight.scheduler_problems(configure(site))[0]
    program(path, "scontrol", 'echo "AccountingStorageEnforce = none"')
    assert preflight.scheduler_problems(configure(site)) == []


def test_a_scheduler_that_cannot_be_asked_refuses_nothing(configure: Configure, path: Path) -> None:
    assert preflight.scheduler_problems(configure(SITE)) == []


def test_everything_is_told_at_once(configure: Configure, path: Path, tmp_path: Path) -> None:
    program(path, "scontrol", f"cat {RECORDED / 'partitions.txt'}")
    site = SITE | {"scheduler": {"kind": "slurm", "partition": "tiny"}}
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError) as refused:
        preflight.check(configure(site, nodes=5), run_root=tmp_path / "file" / "runs")
    text = str(refused.value)
    assert refused.value.exit_code == EXIT_PREFLIGHT
    assert "limits" in text
    assert "no partition 'tiny'" in text
    assert "is not a folder" in text


def test_little_space_and_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(preflight.folder_problems(tmp_path / "new" / "runs")) == []
    tight = SimpleNamespace(f_blocks=10**6, f_bavail=255, f_frsize=2**20, f_files=10**6, f_favail=999)
    monkeypatch.setattr(os, "statvfs", lambda place: tight)
    space, files = preflight.folder_problems(tmp_path)
    assert "255 MB are free there, a run needs 256 MB" in space
    assert "room for 999 files only" in files
    tight.f_bavail, tight.f_files, tight.f_favail = 256, 0, 0
    assert list(preflight.folder_problems(tmp_path)) == []
    tight.f_blocks, tight.f_bavail = 0, 0  # a file system that does not tell
    assert list(preflight.folder_problems(tmp_path)) == []


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the kernel's answer is made up
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    [text] = preflight.folder_problems(tmp_path / "runs")
    assert f"no permission in {tmp_path}" in text


def test_a_python_without_torch(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=f"torch is not installed for {sys.executable}"):
        preflight.check(configure(), run_root=tmp_path)
    brought = LOCAL_SITE | {"preload": ["true"]}
    assert preflight.check(configure(brought), run_root=tmp_path).preload == ("true",)


TOKEN = "hf_" + "a1B2c3D4e5" * 3


@pytest.mark.parametrize(
    ("site", "key"),
    [
        ({"env": {"WANDB_API_KEY": "0123456789abcdef"}}, "site.env.WANDB_API_KEY"),
        ({"env": {"PGPASSWORD": "let me in"}}, "site.env.PGPASSWORD"),
        ({"env": {"MARK": TOKEN}}, "site.env.MARK"),
        ({"preload": ["true", f"export HF={TOKEN}"]}, "site.preload"),
        ({"preload": ["export DB_PASSWORD='let me in'"]}, "site.preload"),
        ({"env": {"PROXY": "http://me:pass1@proxy:3128"}}, "site.env.PROXY"),
    ],
)
def test_secrets_are_refused_by_key(
    configure: Configure, tmp_path: Path, site: dict[str, Any], key: str
) -> None:
    resolved = configure(LOCAL_SITE | site)
    for attempt in (lambda: preflight.check(resolved, run_root=tmp_path), lambda: scripts.dry_run(resolved)):
        with pytest.raises(ConfigError) as refused:
            attempt()
        assert refused.value.exit_code == EXIT_USAGE
        text = str(refused.value)
        assert text.startswith(f"{key} (")
        for value in ("0123456789abcdef", TOKEN, "let me in", "pass1"):
            assert value not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("WANDB_API_KEY", ""),
        ("HF_TOKEN_PATH", "/home/me/.token"),
        ("HF_TOKEN", "$(cat ~/.token)"),
        ("NCCL_SOCKET_IFNAME", "ib0"),
        ("PROXY", "http://proxy:3128"),
        ("COMMIT", "0123456789abcdef0123456789abcdef01234567"),
        ("sort_key", "x"),
    ],
)
def test_harmless_settings_are_let_through(name: str, value: str) -> None:
    assert not secrets.is_secret(name, value)


def test_shipped_sites_hold_nothing_that_looks_like_a_secret(configure: Configure) -> None:
    from hpcsngd.config import resolve
    from hpcsngd.resources import named_files

    environment = {"MIST_ACCOUNT": "a", "SCRATCH": "/s", "PROJECT": "p", "HOME": "/h"}
    for name in ("local", "slurm", "mist"):
        assert name in named_files("site_configs")
        secrets.refuse(resolve.resolve(name, "digits-sgd", environment=environment))


def test_text_is_blanked_around_its_secrets() -> None:
    diff = f'+TOKEN = "{TOKEN}"\n+my_password: hunter2hunter2\n+lr = 0.1\n'
    assert (
        secrets.redact(diff) == f"+TOKEN = {secrets.REDACTED}\n+my_password: {secrets.REDACTED}\n+lr = 0.1\n"
    )


def test_the_probe_on_slurm_asks_for_one_node_with_the_sites_terms(
    configure: Configure, host: Host, path: Path
) -> None:
    site = SITE | {"scheduler": {"kind": "slurm", "account": "a", "partition": "p", "skip_options": ["mem"]}}
    site |= {"mem_gb_per_node": 8, "container": {"image": "/i/a.sif"}}
    made = plan.make(configure(site, nodes=2), host=host)
    words = probe.command(made, Path("/runs"))
    assert words[:4] == ["srun", "--job-name=hpcsngd-probe", "--nodes=1", "--ntasks=1"]
    assert {"--account=a", "--partition=p"} <= set(words)
    assert not any(word.startswith("--mem") for word in words)
    assert words[words.index("/i/a.sif") :][:2] == ["/i/a.sif", "python"]


def test_a_local_probe(configure: Configure, tmp_path: Path) -> None:
    import torch

    made = plan.make(configure())
    assert probe.probe(made, tmp_path).split()[1] == torch.__version__
    without = dataclasses.replace(made, env={"PYTHONPATH": "/nowhere"}, python="/usr/bin/env")
    with pytest.raises(PreflightError, match="the probe failed: "):
        probe.probe(without, tmp_path)
