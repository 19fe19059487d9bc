"""Dry runs, compared whole with golden files; regenerate with GOLDEN=write and read the diff."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import fingerprint
from hpcsngd.launch import executors, plan, scripts
from hpcsngd.launch.plan import Host

from .conftest import LOCAL_SITE, Configure

GOLDEN = Path(__file__).parents[1] / "data" / "scripts"
CLUSTER: dict[str, Any] = {
    "description": "a GPU cluster",
    "scheduler": {
        "kind": "slurm",
        "account": "abc123",
        "partition": "gpu",
        "qos": "normal",
        "constraint": "a100&nvme",
        "reservation": "course",
        "options": {"mail-type": "END", "hint": "nomultithread"},
    },
    "gpus_per_node": 4,
    "cpus_per_node": 32,
    "mem_gb_per_node": 0,
    "launch": {"args": ["--cpu-bind=cores"], "rendezvous_timeout_s": 120},
    "preload": ["module load cuda/12", "export NAME='with space'"],
    "env": {"NCCL_SOCKET_IFNAME": "hsn0"},
    "run_root": "/scratch/my runs",
}
PER_RANK = CLUSTER | {
    "launch": {"mode": "per_rank", "gpu_visibility": "one"},
    "scheduler": {
        "kind": "slurm",
        "gpu_request": "gres",
        "exclusive": True,
        "wckey": "k1",
        "skip_options": ["mem", "signal", "requeue", "cpus-per-task"],
    },
    "container": {
        "runtime": "apptainer",
        "image": "/images/train.sif",
        "gpu_flag": "--nv",
        "binds": ["/scratch:/scratch"],
    },
    "master_port": 29500,
}
CASES = {
    "local": (LOCAL_SITE | {"run_root": "/home/user/runs"}, {}),
    "slurm-torchrun": (CLUSTER, {"nodes": 2, "gpus_per_node": 4, "ranks_per_node": 4}),
    "slurm-per-rank": (PER_RANK, {"nodes": 2, "gpus_per_node": 4, "ranks_per_node": 4}),
}


@pytest.fixture
def fixed_python(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The golden files name one interpreter."""
    monkeypatch.setattr("sys.executable", host.python)
    return host


@pytest.mark.parametrize("name", CASES)
def test_dry_run(name: str, configure: Configure, fixed_python: Host, tmp_path: Path) -> None:
    site, overrides = CASES[name]
    before = sorted(tmp_path.rglob("*"))
    resolved = configure(site, **overrides)
    text = scripts.dry_run(resolved, host=fixed_python)
    text = text.replace(str(tmp_path), "TMP").replace(os.path.relpath(tmp_path), "TMP")
    text = text.replace(fingerprint.identity(), "CODE")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()
    written = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert written == {"testsite.yaml", "standin.yaml"}  # by the fixture


def test_the_dry_run_shows_what_is_submitted(
    configure: Configure, fixed_python: Host, tmp_path: Path
) -> None:
    resolved = configure(CLUSTER | {"run_root": str(tmp_path / "my runs")}, nodes=2)
    made = plan.make(resolved, host=fixed_python)
    run_dir = tmp_path / "my runs" / "r1"
    (run_dir / "submit").mkdir(parents=True)
    submitted = executors.SlurmSiteExecutor(run_dir / "submit", made).script
    shown = scripts.dry_run(resolved, host=fixed_python)
    assert submitted.replace(str(run_dir), str(run_dir.parent / scripts.RUN_DIR)).rstrip() in shown


def directives(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {line.removeprefix("#SBATCH --").partition("=")[0] for line in lines}


def test_any_directive_can_be_left_out(configure: Configure, fixed_python: Host, tmp_path: Path) -> None:
    made = plan.make(configure(CLUSTER, nodes=2, gpus_per_node=4), host=fixed_python)
    everything = directives(scripts.script(made, tmp_path))
    assert {"signal", "output", "error", "open-mode", "job-name", "time", "gpus-per-node"} <= everything
    for name in everything:
        bare = dataclasses.replace(made, skip_options=(name,))
        assert directives(scripts.script(bare, tmp_path)) == everything - {name}


def test_no_wckey_unless_the_site_sets_one(configure: Configure, fixed_python: Host, tmp_path: Path) -> None:
    plain = plan.make(configure(CLUSTER), host=fixed_python)
    assert "wckey" not in directives(scripts.script(plain, tmp_path))
    keyed = CLUSTER | {"scheduler": {"kind": "slurm", "wckey": "mine"}}
    assert "--wckey=mine" in scripts.script(plan.make(configure(keyed), host=fixed_python), tmp_path)


def test_options_replace_what_submitit_writes(
    configure: Configure, fixed_python: Host, tmp_path: Path
) -> None:
    options = {"open-mode": "truncate", "signal": "TERM@300", "output": "/dev/null"}
    site = CLUSTER | {"scheduler": {"kind": "slurm", "options": options}}
    text = scripts.script(plan.make(configure(site), host=fixed_python), tmp_path)
    for name, value in options.items():
        assert text.count(f"#SBATCH --{name}=") == 1
        assert f"#SBATCH --{name}={value}" in text


def test_srun_restates_the_cores_and_ends_the_job_with_its_first_failure(
    configure: Configure, fixed_python: Host
) -> None:
    made = plan.make(configure(CLUSTER, nodes=2, gpus_per_node=4, ranks_per_node=4), host=fixed_python)
    assert executors.srun_args(made) == [
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--cpus-per-task=32",
        "--cpu-bind=cores",
    ]
    skipping = dataclasses.replace(made, skip_options=("cpus-per-task",))
    assert "--cpus-per-task=32" not in executors.srun_args(skipping)


def test_without_srun_the_agent_runs_in_the_batch_step(
    configure: Configure, fixed_python: Host, tmp_path: Path
) -> None:
    site = CLUSTER | {"launch": {"launcher": "none"}}
    text = scripts.script(plan.make(configure(site), host=fixed_python), tmp_path)
    assert "\nsrun " not in text
    assert f"\n{fixed_python.python} -u -m submitit.core._submit" in text


def test_explain_names_file_and_line(configure: Configure, fixed_python: Host, tmp_path: Path) -> None:
    resolved = configure(CLUSTER, nodes=2)
    text = scripts.explain(scripts.script(plan.make(resolved, host=fixed_python), tmp_path), resolved)
    rows = {row.split()[0]: row for row in text.splitlines()}
    line = (tmp_path / "testsite.yaml").read_text().splitlines().index("  account: abc123") + 1
    assert f"testsite.yaml:{line}" in rows["--account"]
    assert "site.scheduler.account" in rows["--account"]
    assert rows["--nodes"].split()[1:] == ["experiment.resources.nodes", "test"]
    assert "site.scheduler.options.mail-type" in rows["--mail-type"]
