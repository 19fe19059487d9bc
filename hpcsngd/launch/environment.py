"""Which environment variables travel: from the submitter to the scheduler, and from the agent to the workers.

A job that is submitted from inside another job inherits that job's variables, and both ``sbatch`` and
``srun`` obey them before the script. Workers that inherit a launcher's variables believe that they are its
ranks. So both are cleaned by the same list; site files add what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcsngd.handover import BACKEND, DEVICE
from hpcsngd.launch import container
from hpcsngd.launch.plan import Plan

SCHEDULER_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SALLOC_",
    "SRUN_",
    "SUBMITIT_",
    "LSB_",
    "LS_EXEC",
    "LS_JOBPID",
    "LS_SUBCWD",
    "BSUB_",
    "CSM_",
    "HPCSNGD_LSF_",
    "HPCSNGD_SSH_",
    "JSM_",
    "PMI_",
    "PMI2_",
    "PMIX_",
    "OMPI_",
    "MPI_",
    "TORCHELASTIC_",
)
RANK_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
# where the scheduler's own programs find their configuration: not a property of one job
KEPT = frozenset({"SLURM_CONF", "LSF_ENVDIR", "LSF_SERVERDIR"})

# what torchrun puts in front of each line that it passes on; its own default names the local rank
_LINE_PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"

DEVICE_LISTS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def is_leftover(name: str) -> bool:
    """Returns whether a variable belongs to one job or one launcher and must not reach another."""
    return name not in KEPT and (name in RANK_NAMES or name.startswith(SCHEDULER_PREFIXES))


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without scheduler and launcher leftovers."""
    return {name: value for name, value in environment.items() if not is_leftover(name)}


def worker_environment(agent: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Returns what all workers share: the agent's clean environment, our two words, then the site's own.

    ``OMP_NUM_THREADS`` becomes the cores of a rank unless the site or the submitter says otherwise: torchrun
    would set it to 1. With an image, also what is set inside it.
    """
    result = clean(agent)
    if plan.cpus_per_rank:
        result.setdefault("OMP_NUM_THREADS", str(plan.cpus_per_rank))
    result[DEVICE] = "cuda" if plan.gpus_per_node else "cpu"
    result[BACKEND] = plan.backend
    if not plan.starts_ranks:
        result[_LINE_PREFIX] = "[rank${rank}]: "
    inside = container.inner_environment(plan) if plan.image else {}
    return result | inside | plan.env


def rank_environment(
    shared: Mapping[str, str], plan: Plan, *, rank: int, local_rank: int, address: str, port: int
) -> dict[str, str]:
    """Returns the environment of one singly started rank, as ``torch.distributed`` reads it.

    Raises:
        ValueError: the rank should see one GPU, but the node's list has none for it.
    """
    result = dict(shared)
    result |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.ranks_per_node),
        "GROUP_RANK": str(rank // plan.ranks_per_node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if not plan.gpus_per_node:
        return result
    own = {DEVICE: f"cuda:{local_rank}"}
    if plan.gpu_visibility == "one":
        own = own_device(result, local_rank) | {DEVICE: "cuda:0"}
    # the site has the last word
    return result | own | {name: plan.env[name] for name in own if name in plan.env}


def own_device(environment: Mapping[str, str], local_rank: int) -> dict[str, str]:
    """Returns the device lists narrowed to one entry; a list of one entry is already the rank's own.

    Raises:
        ValueError: a list that is too short.
    """
    given = {name: environment[name].split(",") for name in DEVICE_LISTS if environment.get(name)}
    for name, devices in given.items():
        if 1 < len(devices) <= local_rank:
            raise ValueError(f"{name}={environment[name]} has no device for local rank {local_rank}")
    if not given:
        return {"CUDA_VISIBLE_DEVICES": str(local_rank)}
    return {name: devices[local_rank if len(devices) > 1 else 0] for name, devices in given.items()}
