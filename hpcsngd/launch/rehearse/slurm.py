"""What a played Slurm gives its jobs and their tasks."""

from __future__ import annotations

from pathlib import Path

from hpcsngd.launch.rehearse.book import Job
from hpcsngd.launch.rehearse.cluster import Cluster


def environment(job: Job, cluster: Cluster, folder: Path) -> dict[str, str]:
    """Returns the variables of a job's script (sbatch(1), output environment variables).

    Args:
        job: the job, with its hosts.
        cluster: the cluster.
        folder: the cluster's folder.
    """
    tasks = job.nodes * job.tasks_per_node
    values = {
        "SLURM_JOB_ID": str(job.id if job.index is None else 10 * job.id + job.index),
        "SLURM_JOB_NAME": job.name,
        "SLURM_JOB_NODELIST": ",".join(job.hosts),
        "SLURM_NODELIST": ",".join(job.hosts),
        "SLURM_JOB_NUM_NODES": str(job.nodes),
        "SLURM_NNODES": str(job.nodes),
        "SLURM_JOB_PARTITION": job.queue,
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(job.tasks_per_node),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURMD_NODENAME": job.hosts[0],
        "SLURM_SUBMIT_DIR": job.cwd,
    }
    values["SLURM_JOBID"] = values["SLURM_JOB_ID"]
    if job.restarts:
        values["SLURM_RESTART_COUNT"] = str(job.restarts)
    if job.index is not None:
        values |= {"SLURM_ARRAY_JOB_ID": str(job.id), "SLURM_ARRAY_TASK_ID": str(job.index)}
    return values
