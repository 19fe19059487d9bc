"""What workers and schedulers inherit, and what not."""

from __future__ import annotations

import dataclasses

import pytest

from hpcsngd.launch import environment, plan
from hpcsngd.launch.plan import Host, Plan

from .conftest import Configure

POISON = {
    "SLURM_JOB_ID": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SBATCH_TIMELIMIT": "5",
    "SRUN_CPUS_PER_TASK": "1",
    "PMIX_RANK": "3",
    "PMI_RANK": "3",
    "OMPI_COMM_WORLD_RANK": "3",
    "MPI_LOCALRANKID": "3",
    "LSB_JOBID": "9",
    "JSM_NAMESPACE_RANK": "3",
    "TORCHELASTIC_RUN_ID": "x",
    "SUBMITIT_FOLDER": "/x",
    "RANK": "3",
    "WORLD_SIZE": "7",
    "MASTER_PORT": "1",
}
HARMLESS = {"PATH": "/bin", "SLURM_CONF": "/etc/s.conf", "CUDA_VISIBLE_DEVICES": "0,1", "NCCL_DEBUG": "INFO"}


@pytest.fixture
def gpu_plan(configure: Configure, host: Host) -> Plan:
    site = {
        "description": "x",
        "scheduler": {"kind": "slurm"},
        "gpus_per_node": 4,
        "cpus_per_node": 16,
        "launch": {"mode": "per_rank", "gpu_visibility": "one"},
        "env": {"A": "1"},
    }
    return plan.make(configure(site, nodes=2, gpus_per_node=4, ranks_per_node=4), host=host)


def test_leftovers_of_schedulers_and_launchers_go_the_rest_stays() -> None:
    assert environment.clean(POISON | HARMLESS) == HARMLESS


def test_workers_get_the_sites_words_last(gpu_plan: Plan) -> None:
    shared = environment.worker_environment(HARMLESS | POISON, gpu_plan)
    ours = {"A": "1", "OMP_NUM_THREADS": "4", "HPCSNGD_DEVICE": "cuda", "HPCSNGD_BACKEND": "nccl"}
    assert shared == HARMLESS | ours
    chosen = dataclasses.replace(gpu_plan, env={"OMP_NUM_THREADS": "2"})
    assert environment.worker_environment({"OMP_NUM_THREADS": "9"}, gpu_plan)["OMP_NUM_THREADS"] == "9"
    assert environment.worker_environment({"OMP_NUM_THREADS": "9"}, chosen)["OMP_NUM_THREADS"] == "2"


def test_a_single_rank_knows_itself_and_sees_one_gpu(gpu_plan: Plan) -> None:
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    own = environment.rank_environment(given, gpu_plan, rank=6, local_rank=2, address="n1", port=20001)
    assert own == {
        "CUDA_VISIBLE_DEVICES": "6",
        "HPCSNGD_DEVICE": "cuda:0",
        "RANK": "6",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20001",
    }


def test_with_all_gpus_visible_the_device_is_the_local_rank(gpu_plan: Plan) -> None:
    shown = dataclasses.replace(gpu_plan, gpu_visibility="all")
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    own = environment.rank_environment(given, shown, rank=2, local_rank=2, address="n1", port=1)
    assert (own["CUDA_VISIBLE_DEVICES"], own["HPCSNGD_DEVICE"]) == ("4,5,6,7", "cuda:2")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, {"ROCR_VISIBLE_DEVICES": "3"}),
    ],
)
def test_own_device(given: dict[str, str], expected: dict[str, str]) -> None:
    assert environment.own_device(given, 1) == expected


def test_a_list_without_a_device_for_the_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0,1 has no device for local rank 2"):
        environment.own_device({"CUDA_VISIBLE_DEVICES": "0,1"}, 2)
