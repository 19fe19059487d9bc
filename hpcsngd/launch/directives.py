"""What a scheduler is asked for a plan, in its own names without dashes. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import PreflightError
from hpcsngd.launch import limits
from hpcsngd.launch.lsf import flavors, request

if TYPE_CHECKING:
    from hpcsngd.launch.plan import Directive, Plan


def wanted(resolved: Resolved, plan: Plan) -> dict[str, Directive]:
    """Returns the directives of a plan; none without a scheduler.

    Raises:
        PreflightError: the scheduler cannot be asked that.
    """
    if plan.scheduler == "lsf":
        return _lsf(resolved, plan)
    return _slurm(resolved, plan) if plan.scheduler == "slurm" else {}


def _slurm(resolved: Resolved, plan: Plan) -> dict[str, Directive]:
    """Returns what Slurm is asked, name without dashes -> value; ``True`` stands for a bare option.

    The site's ``options`` come last and win; ``false`` there removes a directive.
    """
    scheduler = resolved.site.scheduler
    wanted: dict[str, Directive | None] = {
        "job-name": plan.job_name,
        "nodes": plan.nodes,
        "ntasks-per-node": plan.agents_per_node,
        "cpus-per-task": plan.cpus_per_agent,
        "mem": memory(resolved.site.mem_gb_per_node),
        "time": plan.walltime_min,
        "account": scheduler.account,
        "partition": limits.queue(resolved),
        "qos": scheduler.qos,
        "constraint": scheduler.constraint,
        "reservation": scheduler.reservation,
        "wckey": scheduler.wckey,
        "exclusive": scheduler.exclusive or None,
        # the scheduler's own restart, after a node's failure
        "requeue" if "node_failure" in plan.restart_on else "no-requeue": True,
        "signal": f"USR2@{math.ceil(plan.stop_margin_s)}" if plan.stop_margin_s else None,
        **_gpus(scheduler.gpu_request, plan.gpus_per_node),
        **scheduler.options,
    }
    if scheduler.options.get("no-requeue"):
        wanted["requeue"] = None
    return {name: value for name, value in wanted.items() if value is not None and value is not False}


def _lsf(resolved: Resolved, plan: Plan) -> dict[str, Directive]:
    """Returns what bsub is asked, option without dash -> value; ``True`` stands for a bare option.

    The site's ``options`` come last and win; ``false`` there removes an option, ``skip_options`` does, too.

    Raises:
        PreflightError: this flavor of LSF cannot be asked that.
    """
    site, scheduler = resolved.site, resolved.site.scheduler
    try:
        wanted: dict[str, Directive] = request.directives(
            flavor=flavors.checked(plan.flavor),
            name=plan.job_name,
            nodes=plan.nodes,
            tasks_per_node=plan.agents_per_node,
            cores_per_node=site.cpus_per_node,
            gpus_per_node=plan.gpus_per_node if scheduler.gpu_request != "none" else 0,
            mem_gb=site.mem_gb_per_node,
            walltime_min=plan.walltime_min,
            account=scheduler.account,
            queue=limits.queue(resolved),
            exclusive=scheduler.exclusive,
            alloc_flags=scheduler.alloc_flags,
        )
    except ValueError as error:
        raise PreflightError(f"site {resolved.site_name}: {error}") from error
    wanted |= scheduler.options
    found = {
        name: value for name, value in wanted.items() if value is not False and name not in plan.skip_options
    }
    if problems := list(flavors.problems(flavors.checked(plan.flavor), found)):
        raise PreflightError("\n".join(f"site {resolved.site_name}: {problem}" for problem in problems))
    return found


def memory(mem_gb: float | None) -> str | None:
    """Returns memory in Slurm's words: ``0`` for all, whole GB or else MB; None asks for nothing."""
    if mem_gb is None:
        return None
    if mem_gb == int(mem_gb):
        return f"{int(mem_gb)}G" if mem_gb else "0"
    return f"{round(mem_gb * 1024)}M"


def _gpus(request: str, gpus_per_node: int) -> dict[str, Directive | None]:
    if not gpus_per_node or request == "none":
        return {}
    return {"gres": f"gpu:{gpus_per_node}"} if request == "gres" else {"gpus-per-node": gpus_per_node}
