"""What a sweep would submit and run, as text: its dry run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcsngd.config.matrix import Matrix
from hpcsngd.launch import arrays, cells, scripts, sweep
from hpcsngd.launch.plan import WITHOUT_QUEUE, Directive, Host
from hpcsngd.launch.sweep import Placed
from hpcsngd.sweepdir import SweepDir


def dry_run(
    found: Matrix,
    *,
    host: Host | None = None,
    run_root: Path | None = None,
    directives: Mapping[str, Directive] | None = None,
) -> str:
    """Returns the cells, the script of the first array and the first cell's command; writes nothing.

    Args:
        found: the checked cells.
        host: the machine that submits; default: this one.
        run_root: folder of the sweep directory; default: the site's.
        directives: more directives for this submission.

    Raises:
        ConfigError: a cell's configuration holds what looks like a secret.
        PreflightError: what the site's rules refuse; a submission also asks the scheduler.
    """
    place = sweep.directory(found, run_root)
    placed = sweep.place(found, sweep.make_plans(found, host=host), place)
    due = [each for each in placed if each.is_due]
    head = [_headline(placed, due, place), _cells(placed)]
    if not due:
        return "\n\n".join(head) + "\n"
    bsub: list[str] = []
    first, parallel = due[0], due[0].cell.resolved.site.scheduler.parallel_cells
    if first.plan.scheduler in WITHOUT_QUEUE:
        sent = shlex.join(cells.command(place, place.next_array(), parallel or 1))
    else:
        group = [each for each in due if arrays.key(each.plan) == arrays.key(first.plan)]
        asked = dataclasses.replace(first.plan, directives=first.plan.directives | dict(directives or {}))
        array = arrays.executor(place, place.next_array(), asked, len(group), parallel=parallel)
        sent, bsub = array.script, array.command_line(place.submit_dir / scripts.SCRIPT)
    blocks = scripts.details(first.cell.resolved, first.plan, first.run.path, sent, bsub)
    return "\n\n".join([*head, f"# the first cell, {first.run.name}:", *blocks]) + "\n"


def _headline(placed: Sequence[Placed], due: Sequence[Placed], place: SweepDir) -> str:
    plans = {arrays.key(each.plan) for each in due}
    parallel = placed[0].cell.resolved.site.scheduler.parallel_cells
    limit = f", {parallel} at once" if parallel else ""
    kinds = f" of {len(plans)} kinds, an array for each" if len(plans) > 1 else ""
    first = placed[0].plan
    return (
        f"# sweep of {first.exp_name} on {first.site_name}: {len(placed):,} cells, "
        f"{len(due):,} to submit{kinds}{limit}\n# directory: {place.path}\n# Nothing was written."
    )


def _cells(placed: Sequence[Placed]) -> str:
    width = max(len(each.run.name) for each in placed)
    rows = [f"{each.run.name:<{width}}  {each.state:<9}  {each.cell}" for each in placed]
    return "\n".join(["# --- cells", *rows])
