"""The arguments and options that verbs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from hpcsngd.config.resolve import Override, Resolved

DIAGNOSTICS = ("profiling", "rank_analysis", "grad_norm", "grad_error")


class _Name(click.ParamType[str]):
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


def configuration(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose a configuration; the verb receives them as keyword arguments."""
    for option in reversed(
        (
            click.option("--site", required=True, type=SITE, help="Where to run: a name or a YAML file."),
            click.option("--exp", required=True, type=EXPERIMENT, help="What to run: a name or a YAML file."),
            click.option(
                "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable."
            ),
            click.option("--nodes", type=int, help="Nodes."),
            click.option("--gpus-per-node", type=int, help="GPUs to use on each node."),
            click.option("--ranks-per-node", type=int, help="Workers on each node; default: one per GPU."),
            click.option("--walltime", help="Wall time, such as 02:00:00, 90m or 2h."),
            click.option("--run-root", help="Folder for run directories; default: the site's."),
            click.option("--profiling", is_flag=True, help="Write seconds by phase, bytes, memory."),
            click.option("--rank-analysis", is_flag=True, help="Write the matrix rank of the kernels."),
            click.option("--grad-norm", is_flag=True, help="Write the gradient norm of each layer."),
            click.option("--grad-error", is_flag=True, help="Write the error against the exact method."),
        )
    ):
        command = option(command)
    return command


def resolve_choice(*, site: str, exp: str, sets: Sequence[str], **options: Any) -> Resolved:
    """Returns the checked configuration that the options of `configuration` ask for.

    Raises:
        ConfigError: everything that is wrong with it, at once.
    """
    from hpcsngd.config.resolve import resolve

    return resolve(site, exp, [*overrides(sets), *_flag_overrides(options)])


def overrides(sets: Sequence[str]) -> list[Override]:
    """Returns what ``--set`` options ask for."""
    from hpcsngd.config.resolve import parse_set

    return [parse_set(text) for text in sets]


def _flag_overrides(options: dict[str, Any]) -> list[Override]:
    """Returns the options of `configuration` that stand for one key each."""
    from hpcsngd.config.resolve import Override

    keys = {
        "nodes": "experiment.resources.nodes",
        "gpus_per_node": "experiment.resources.gpus_per_node",
        "ranks_per_node": "experiment.resources.ranks_per_node",
        "walltime": "experiment.resources.walltime",
        "run_root": "site.run_root",
        **{name: f"experiment.diagnostics.{name}" for name in DIAGNOSTICS},
    }
    return [
        Override(path, options[name], "--" + name.replace("_", "-"))
        for name, path in keys.items()
        if options[name] not in (None, False)
    ]
