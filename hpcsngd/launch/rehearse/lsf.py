"""What a played LSF gives its jobs: the host lists in every form, the batch host first."""

from __future__ import annotations

from pathlib import Path

from hpcsngd.launch.rehearse.book import Job
from hpcsngd.launch.rehearse.cluster import Cluster

_LIST_BYTES = 4096
"""A longer LSB_HOSTS is not set at all (IBM's reference of LSF's environment variables)."""


def environment(job: Job, cluster: Cluster, folder: Path) -> dict[str, str]:
    """Returns the variables of a job's script.

    The OpenLava family has no LSB_DJOB_* variables.

    Args:
        job: the job, with its hosts.
        cluster: the cluster.
        folder: the cluster's folder, which gets the host file.
    """
    counts = host_slots(job, cluster)
    slots = [host for host, count in counts for _ in range(count)]
    values = {
        "LSB_JOBID": str(job.id),
        "LSB_JOBINDEX": str(job.index or 0),
        "LSB_JOBNAME": job.options.get("J", job.name),
        "LSB_QUEUE": job.queue,
        "LSB_SUB_HOST": job.options.get("from_host", "login1"),
        "LS_SUBCWD": job.cwd,
        # the blank at the end is LSF's
        "LSB_MCPU_HOSTS": "".join(f"{host} {count} " for host, count in counts),
    }
    listed = " ".join(slots)
    if len(listed) <= _LIST_BYTES:
        values["LSB_HOSTS"] = listed
    if cluster.flavor != "compatible":
        file = folder / "jobs" / f"{job.key}.hosts"
        file.write_text("".join(f"{host}\n" for host in slots), encoding="utf-8")
        values |= {"LSB_DJOB_HOSTFILE": str(file), "LSB_DJOB_RANKFILE": str(file)}
        values |= {"LSB_DJOB_NUMPROC": str(len(slots)), "LSB_BATCH_JID": job.key}
    if cluster.flavor == "csm":
        values["CSM_ALLOCATION_ID"] = str(30000 + job.id)
    return values


def host_slots(job: Job, cluster: Cluster) -> list[tuple[str, int]]:
    """Returns hosts and slots in LSF's order: a batch host counts one, and comes first."""
    per_host = cluster.slots if cluster.batch_host else max(1, job.slots // max(1, job.nodes))
    first = [(cluster.batch_host, 1)] if cluster.batch_host else []
    return first + [(host, per_host) for host in job.hosts]
