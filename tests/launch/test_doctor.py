"""What the doctor says about machines that are in order and machines that are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hpcsngd import __version__
from hpcsngd.config.site import Site
from hpcsngd.launch.doctor import examine, scheduler
from hpcsngd.launch.doctor.finding import Finding
from hpcsngd.launch.doctor.machine import Machine, Output

SINFO = """debug|up|1-00:00:00|2|4|gpu:4(S:0-1)
debug|up|1-00:00:00|1|8+|(null)
big|down|infinite|100|64|gpu:a100:2,gpu:h100:2
"""
WORKER = {
    "hpcsngd": __version__,
    "torch": "2.6.0",
    "cuda": "12.4",
    "hip": None,
    "backends": ["gloo", "nccl"],
    "torchvision": "0.21.0",
}
SLURM = {
    "description": "a cluster",
    "scheduler": {"kind": "slurm", "partition": "debug"},
    "nodes": 2,
    "cpus_per_node": 4,
    "walltime": "2h",
}


class Standin(Machine):
    """A machine made of answers: program -> output; what is not named is not installed."""

    def __init__(
        self,
        answers: Mapping[str, Output] | None = None,
        worker: Mapping[str, Any] = WORKER,
        *,
        paths: Sequence[str] = ("/dev/shm", "/data"),
        interfaces: Sequence[str] = ("eth0",),
        address: str | None = "10.0.0.7",
        free_gb: float = 100.0,
        is_writable: bool = True,
        amd_gpus: Sequence[dict[str, str]] = (),
    ) -> None:
        self._amd_gpus = amd_gpus
        self._answers = dict(answers or {})
        self._worker = json.dumps(worker)
        self._paths, self._interfaces, self._address = paths, interfaces, address
        self._free_gb, self._is_writable = free_gb, is_writable

    def find(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self._answers else None

    def run(self, words: Sequence[str], timeout_s: float) -> Output:
        if words[0] == "bash":
            return self._answers.get("bash", Output(0, f"module loaded\n{self._worker}\n"))
        return self._answers.get(words[0], Output(-1, "No such file or directory"))

    def exists(self, path: str) -> bool:
        return path in self._paths

    def is_writable(self, folder: str) -> bool:
        return self._is_writable

    def free_gb(self, folder: str) -> float:
        return self._free_gb

    def interfaces(self) -> dict[str, bool]:
        return dict.fromkeys(self._interfaces, True)

    def amd_gpus(self) -> list[dict[str, str]]:
        return list(self._amd_gpus)

    def own_address(self) -> str | None:
        return self._address


def slurm_answers(**changed: Output) -> dict[str, Output]:
    answers = dict.fromkeys(scheduler.SLURM_PROGRAMS, Output(0, ""))
    answers |= {"sbatch": Output(0, "slurm 23.02.6\n"), "sinfo": Output(0, SINFO), "sacct": Output(0, "")}
    return answers | changed


def findings(machine: Machine, site: Mapping[str, Any] | None = None, **env: str) -> dict[str, Finding]:
    loaded = Site.model_validate(site) if site else None
    report = examine("mine" if site else None, loaded, machine, env)
    found = {finding.name: finding for finding in report.findings}
    assert len(found) == len(report.findings)
    assert report.is_broken == any(finding.verdict == "broken" for finding in report.findings)
    return found


def test_a_machine_in_order() -> None:
    found = findings(Standin(slurm_answers()), SLURM)
    assert {finding.verdict for finding in found.values()} == {"ok"}
    assert found["scheduler"].text == "slurm 23.02.6"
    assert found["partition"].text == "debug: 3 nodes, as the site file says"
    assert found["torch"].text.startswith("2.6.0 for CUDA 12.4, gloo/nccl")


def test_without_a_site_only_the_machine_is_looked_at() -> None:
    found = findings(Standin())
    assert set(found) == {
        *("python", "packages", "torch", "torchvision", "scheduler", "gpus"),
        *("shared memory", "interfaces", "host name"),
    }
    assert found["scheduler"].text == "none here; site local runs jobs on this machine"


def test_sinfo_lines() -> None:
    first, second, third = scheduler.parse_sinfo(SINFO + "torn|up\n")
    assert dataclasses.astuple(first) == ("debug", True, 24 * 60, 2, 4, 4)
    assert (second.cpus, second.gpus) == (8, 0)
    assert (third.is_up, third.max_minutes, third.gpus) == (False, None, 4)


@pytest.mark.parametrize(
    ("limit", "minutes"), [("30:00", 30), ("2:00:00", 120), ("7-00:00:00", 10080), ("infinite", None)]
)
def test_time_limits(limit: str, minutes: int | None) -> None:
    assert scheduler.parse_sinfo(f"p|up|{limit}|1|1|(null)")[0].max_minutes == minutes


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"partition": "debgu"}, "broken", "debgu is not among big, debug"),
        ({"partition": "big"}, "broken", "big is down"),
    ],
)
def test_a_partition_that_takes_no_jobs(change: dict[str, str], verdict: str, words: str) -> None:
    site = SLURM | {"scheduler": {"kind": "slurm", **change}}
    report = examine("mine", Site.model_validate(site), Standin(slurm_answers()), {})
    first = next(finding for finding in report.findings if finding.name == "partition")
    assert (first.verdict, first.text) == (verdict, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 4}, "nodes 4, but it has 3"),
        ({"cpus_per_node": 16}, "cpus_per_node 16, but nodes have 8"),
        ({"gpus_per_node": 8}, "gpus_per_node 8, but Slurm knows of 4"),
        ({"walltime": "2d"}, "walltime 2-00:00:00, but its limit is 1-00:00:00"),
        (
            {"limits": [{"max_nodes": 2, "max_walltime": "3d"}]},
            "walltime 3-00:00:00, but its limit is 1-00:00:00",
        ),
    ],
)
def test_a_file_that_promises_more_than_the_partition_has(change: dict[str, Any], words: str) -> None:
    finding = findings(Standin(slurm_answers()), SLURM | change)["partition"]
    assert finding.verdict == "warning"
    assert words in finding.text
    assert "site_configs/mine.yaml" in finding.advice


def test_a_scheduler_that_is_missing_or_down() -> None:
    missing = findings(Standin(), SLURM)["scheduler"]
    assert missing.verdict == "broken"
    assert "no sbatch, squeue" in missing.text
    down = Output(1, "slurm_load_partitions: Unable to contact slurm controller\n")
    silent = findings(Standin(slurm_answers(sinfo=down)), SLURM)["scheduler"]
    assert silent.verdict == "broken"
    assert "Unable to contact slurm controller" in silent.text


def test_accounting_that_is_switched_off_is_no_obstacle() -> None:
    off = Output(1, "Slurm accounting storage is disabled\n")
    finding = findings(Standin(slurm_answers(sacct=off)), SLURM)["accounting"]
    assert (finding.verdict, finding.text) == ("warning", "sacct: Slurm accounting storage is disabled")


@pytest.mark.parametrize(("kind", "verdict"), [("local", "broken"), ("slurm", "warning")])
def test_a_preload_line_that_fails(kind: str, verdict: str) -> None:
    failed = Output(98, "hpcsngd: preload line 1 failed: module load cuda\n")
    site = {"description": "d", "scheduler": {"kind": kind}, "preload": ["module load cuda"]}
    finding = findings(Standin(slurm_answers(bash=failed)), site)["torch"]
    assert finding.verdict == verdict
    assert "module load cuda" in finding.text


def test_workers_without_torch_or_with_another_version() -> None:
    bare = {"hpcsngd": "0.0.1", "torch_error": "ModuleNotFoundError: No module named 'torch'"}
    local = {"description": "d", "scheduler": {"kind": "local"}}
    assert findings(Standin(worker=bare), local)["torch"].verdict == "broken"
    assert findings(Standin(worker=bare))["torch"].verdict == "warning"
    old = findings(Standin(worker=WORKER | {"hpcsngd": "0.0.1"}), local)["hpcsngd"]
    assert old.verdict == "broken"
    assert old.text == f"workers have 0.0.1, you submit with {__version__}"


def test_an_image_that_is_missing_and_its_runtime() -> None:
    site = SLURM | {"container": {"image": "/images/a.sif"}}
    found = findings(Standin(slurm_answers()), site)
    assert (found["image"].verdict, found["runtime"].verdict) == ("broken", "warning")
    assert found["torch"].text == "comes from the image"
    there = Standin(slurm_answers(apptainer=Output(0, "apptainer version 1.4.5")), paths=("/images/a.sif",))
    found = findings(there, site)
    assert (found["image"].verdict, found["runtime"].text) == ("ok", "apptainer version 1.4.5")


def test_an_image_that_gets_no_driver_on_a_site_with_gpus() -> None:
    section = {"image": "/images/a.sif"}
    site = SLURM | {"gpus_per_node": 4, "container": section}
    assert "container.gpu_flag" in findings(Standin(slurm_answers()), site)["gpus in image"].advice
    for fine in (site | {"gpus_per_node": 0}, site | {"container": section | {"gpu_flag": "--nv"}}):
        assert "gpus in image" not in findings(Standin(slurm_answers()), fine)


def test_gpus() -> None:
    two = Output(0, "NVIDIA H100, 550.54\nNVIDIA H100, 550.54\n")
    site = {"description": "d", "scheduler": {"kind": "local"}, "gpus_per_node": 2}
    assert findings(Standin({"nvidia-smi": two}), site)["gpus"].text == "2 x NVIDIA H100, driver 550.54"
    amd = [{"name": "AMD INSTINCT MI250X", "mem_mib": "65536", "driver": "6.7.0"}] * 2
    shown = findings(Standin(amd_gpus=amd), site)["gpus"].text
    assert shown == "2 x AMD INSTINCT MI250X, driver 6.7.0"
    few = findings(Standin(), site)["gpus"]
    assert (few.verdict, few.text) == ("broken", "0 here, the site says 2")


@pytest.mark.parametrize(
    ("value", "kind", "verdict"),
    [
        ("hsn0", "local", "broken"),
        ("hsn0,hsn1", "slurm", "warning"),
        ("eth", "local", "ok"),
        ("=eth0", "local", "ok"),
        ("^docker", "local", "ok"),
    ],
)
def test_interfaces_that_the_site_names(value: str, kind: str, verdict: str) -> None:
    site = {"description": "d", "scheduler": {"kind": kind}, "env": {"NCCL_SOCKET_IFNAME": value}}
    assert findings(Standin(slurm_answers()), site)["interfaces"].verdict == verdict


def test_a_host_name_that_is_the_loopback() -> None:
    assert findings(Standin(address="127.0.1.1"))["host name"].verdict == "warning"
    assert findings(Standin(address=None))["host name"].verdict == "warning"


def test_ports_in_the_ephemeral_range() -> None:
    site = {"description": "d", "scheduler": {"kind": "local"}, "master_port": "40000-40010"}
    assert findings(Standin(), site)["ports"].verdict == "warning"
    assert findings(Standin(), site | {"master_port": "20000-20010"})["ports"].verdict == "ok"


def test_folders() -> None:
    site = {"description": "d", "scheduler": {"kind": "local"}, "data_root": "/nowhere", "run_root": "/runs"}
    found = findings(Standin(is_writable=False), site)
    assert (found["run root"].verdict, found["data root"].verdict) == ("broken", "warning")
    assert findings(Standin(free_gb=1.0), site)["run root"].verdict == "warning"


def test_variables_that_are_not_set_are_named_once() -> None:
    site = {
        "description": "d",
        "scheduler": {"kind": "local", "account": "${PROJECT}"},
        "run_root": "/scratch/${PROJECT}",
        "data_root": "/data",
    }
    found = findings(Standin(), site)
    assert found["variables"].verdict == "broken"
    assert "PROJECT is not set" in found["variables"].text
    assert found["run root"].verdict == "warning"
    assert "variables" not in findings(Standin(), site, PROJECT="abc")


def test_what_is_true_of_this_machine() -> None:
    found = findings(Machine())
    assert found["python"].verdict == "ok"
    assert found["torch"].verdict == "ok"
    assert found["torchvision"].verdict == "ok"
