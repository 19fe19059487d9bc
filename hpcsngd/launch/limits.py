"""The site's table of limits: which queue takes a job, for how long, and which rule refuses it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hpcsngd.config.fields import walltime_minutes, walltime_text
from hpcsngd.config.resolve import Resolved
from hpcsngd.config.site import Limit

CHAINED = ("slurm", "lsf")
"""Schedulers under which a run can go on in another job."""


def job_walltime_min(resolved: Resolved) -> int:
    """Returns the minutes to ask for one job: the run's, or the site's limit where jobs may be chained."""
    asked = resolved.walltime_min
    allowed = [walltime_minutes(row.max_walltime) for row in resolved.site.limits if _is_about(row, resolved)]
    may_chain = resolved.site.scheduler.kind in CHAINED and "timeout" in resolved.experiment.restart.on
    return min(asked, max(allowed)) if allowed and may_chain else asked


def named_queue(resolved: Resolved) -> str | None:
    """Returns the partition or queue that the site or the user names."""
    return resolved.site.scheduler.partition or resolved.site.scheduler.queue


def queue(resolved: Resolved) -> str | None:
    """Returns the job's queue: the one that is named, else that of the first row that allows the job."""
    if named := named_queue(resolved):
        return named
    row = chosen_row(resolved)
    return row.queue if row else None


def chosen_row(resolved: Resolved) -> Limit | None:
    """Returns the first row of the limits that allows the job; None without limits, or if none does."""
    minutes = job_walltime_min(resolved)
    fits = (row for row in resolved.site.limits if _is_about(row, resolved))
    return next((row for row in fits if minutes <= walltime_minutes(row.max_walltime)), None)


def problems(resolved: Resolved, rule: str) -> Iterator[str]:
    """Yields why the limits refuse a request, with the rows that it was held against.

    Args:
        resolved: the checked configuration.
        rule: name and place of the table, for the messages.
    """
    rows = resolved.site.limits
    minutes, asked_min = job_walltime_min(resolved), resolved.walltime_min
    if rows and chosen_row(resolved) is None:
        named = named_queue(resolved)
        asked = f"{resolved.nodes} node(s) for {walltime_text(asked_min)}{f' in {named}' if named else ''}"
        allowed = "; ".join(row_text(row) for row in rows)
        is_only_long = any(_is_about(row, resolved) for row in rows)
        advice = "; longer as a chain of jobs: restart.on: [timeout]" if is_only_long else ""
        yield f"{rule}: {asked} fits no row; allowed: {allowed}{advice}"
    jobs, most = math.ceil(asked_min / minutes), resolved.experiment.restart.max_attempts
    if jobs > most:
        yield (
            f"{walltime_text(asked_min)} in jobs of {walltime_text(minutes)} are {jobs} attempts, "
            f"restart.max_attempts allows {most}"
        )


def row_text(row: Limit) -> str:
    """Returns a row as the site file has it."""
    written = row.model_dump(exclude_defaults=True)
    return (
        "{"
        + ", ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in written.items()
        )
        + "}"
    )


def _is_about(row: Limit, resolved: Resolved) -> bool:
    """Returns whether a row is about this number of nodes, and about the job's queue or one to choose."""
    named = named_queue(resolved)
    right_queue = row.queue is None or (not row.on_request if named is None else row.queue == named)
    return right_queue and row.min_nodes <= resolved.nodes <= row.max_nodes
