"""The arguments and options that verbs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    _ParamType = click.ParamType[str]

    from hpcsngd.config.matrix import Matrix
    from hpcsngd.config.resolve import Override, Resolved
else:
    _ParamType = click.ParamType  # not a generic before click 8.2

RESOURCE_OPTIONS = ("nodes", "gpus_per_node", "ranks_per_node", "walltime")
DIAGNOSTICS = ("profiling", "rank_analysis", "grad_norm", "grad_error", "strength")


class _Name(_ParamType):
    """A site or experiment: a known name, completed by the shell, or a path."""

    def __init__(self, kind: str) -> None:
        self.name = {"site_configs": "site", "jobs": "experiment"}[kind]
        self._kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Returns the known names that begin with what was typed, or asks the shell for files."""
        from hpcsngd.resources import named_files

        names = named_files("jobs" if self._kind == "jobs" else "site_configs")
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]


SITE, EXPERIMENT = _Name("site_configs"), _Name("jobs")
RUNS = click.Path(path_type=Path)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def with_options(*options: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds options, in the order of ``--help``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


resources = with_options(
    click.option("--nodes", type=int, help="Nodes."),
    click.option("--gpus-per-node", type=int, help="GPUs to use on each node."),
    click.option("--ranks-per-node", type=int, help="Workers on each node; default: one per GPU."),
    click.option("--walltime", help="Wall time, such as 02:00:00, 90m or 2h."),
)
"""The options for resources; the verb receives them as keyword arguments."""

ordering = with_options(
    click.option("--after", multiple=True, type=RUNS, help="Start when this run has completed; repeatable."),
    click.option("--hold", is_flag=True, help="Submit, but wait for 'scontrol release' or 'bresume'."),
    click.option("--probe", is_flag=True, help="First import torch on a node, as the workers will."),
)
"""The options that say when a job may start."""

configuration = with_options(
    click.option("--site", type=SITE, help="Where to run: a name or a YAML file."),
    click.option("--exp", required=True, type=EXPERIMENT, help="What to run: a name or a YAML file."),
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable."),
    click.option(
        "--matrix",
        "axes",
        multiple=True,
        metavar="KEY=V1,V2,...",
        help="One run for each value; several make all combinations: a sweep.",
    ),
    click.option("--parallel", type=int, help="Cells of a sweep that run at once."),
    resources,
    click.option("--run-root", help="Folder for run directories; default: the site's."),
    click.option("--profiling", is_flag=True, help="Write seconds by phase, bytes, memory."),
    click.option("--rank-analysis", is_flag=True, help="Write the matrix rank of the kernels."),
    click.option("--grad-norm", is_flag=True, help="Write the gradient norm of each layer."),
    click.option("--grad-error", is_flag=True, help="Write the error against the exact method."),
    click.option("--strength", is_flag=True, help="Write how much each layer's gradient is preconditioned."),
)
"""The options that choose a configuration; the verb receives them as keyword arguments."""


def resolve_matrix(
    *, site: str | None, exp: str, sets: Sequence[str], axes: Sequence[str], **options: Any
) -> Matrix | None:
    """Returns the checked cells that the options of `configuration` ask for; None without a matrix.

    Raises:
        UsageError: no site.
        ConfigError: everything that is wrong with it, at once.
    """
    from hpcsngd.config import matrix

    given = [matrix.parse(text) for text in axes]
    return matrix.resolve(_required(site), exp, [*overrides(sets), *_flag_overrides(options)], given)


def resolve_choice(
    *, site: str | None, exp: str, sets: Sequence[str], axes: Sequence[str] = (), **options: Any
) -> Resolved:
    """Returns the checked configuration that the options of `configuration` ask for, without a matrix.

    Raises:
        UsageError: no site.
        ConfigError: everything that is wrong with it, at once.
    """
    from hpcsngd.config.resolve import resolve

    return resolve(_required(site), exp, [*overrides(sets), *_flag_overrides(options)])


def _required(site: str | None) -> str:
    """Returns the site; one verb can do without, so that click does not ask for it by itself."""
    if site is None:
        raise click.UsageError("Missing option '--site'.")
    return site


def overrides(sets: Sequence[str]) -> list[Override]:
    """Returns what ``--set`` options ask for."""
    from hpcsngd.config.resolve import parse_set

    return [parse_set(text) for text in sets]


def resource_overrides(options: dict[str, Any]) -> list[Override]:
    """Returns the options of `resources` that were given."""
    keys = {name: f"experiment.resources.{name}" for name in RESOURCE_OPTIONS}
    return _given(keys, options)


def _flag_overrides(options: dict[str, Any]) -> list[Override]:
    """Returns the options of `configuration` that stand for one key each."""
    keys = {
        "run_root": "site.run_root",
        "parallel": "site.scheduler.parallel_cells",
        **{name: f"experiment.diagnostics.{name}" for name in DIAGNOSTICS},
    }
    return [*resource_overrides(options), *_given(keys, options)]


def _given(keys: dict[str, str], options: dict[str, Any]) -> list[Override]:
    from hpcsngd.config.resolve import Override

    return [
        Override(path, options[name], "--" + name.replace("_", "-"))
        for name, path in keys.items()
        if options[name] is not None and options[name] is not False  # 0 is a value
    ]
