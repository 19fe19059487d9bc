"""The command line. Every verb imports what it needs when it runs: ``--help`` costs click alone.

Exit codes: 0 ok, 1 the run failed, 2 usage or configuration, 3 refused before submission, 4 scheduler missing
or refusing, 130 interrupted while waiting (the run goes on).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from hpcsngd import __version__
from hpcsngd.errors import EXIT_OK, EXIT_RUN_FAILED, EXIT_USAGE, HpcsngdError

if TYPE_CHECKING:
    from hpcsngd.config.resolve import Override, Resolved
    from hpcsngd.rundir import RunDir, Status

EXIT_INTERRUPTED = 130
DIAGNOSTICS = ("profiling", "rank_analysis", "grad_norm", "grad_error")

EPILOG = """\b
Exit codes: 0 ok, 1 run failed, 2 usage or configuration, 3 refused before submission,
4 scheduler missing or refusing, 130 interrupted while waiting (the run goes on).

\b
Shell completion: eval "$(_HPCSNGD_COMPLETE=bash_source hpcsngd)"  (or zsh_source, fish_source)."""


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


def _configuration(command: Callable[..., None]) -> Callable[..., None]:
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


@click.group(
    epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="hpcsngd")
def cli() -> None:
    """Distributed second-order training experiments on HPC clusters."""


@cli.command()
@_configuration
@click.option("--dry-run", is_flag=True, help="Print the exact script and per-node command; write nothing.")
@click.option("--wait", "wait_for_it", is_flag=True, help="Stay until the run ends, then write its report.")
@click.option("--json", "as_json", is_flag=True, help="Print the run, job and result as JSON.")
def submit(*, dry_run: bool, wait_for_it: bool, as_json: bool, **choice: Any) -> None:
    """Submit an experiment to a site.

    The run directory is printed; it holds everything about the run. Without --wait the command returns as
    soon as the scheduler has the job.
    """
    resolved = _resolve(**choice)
    if dry_run:
        from hpcsngd.launch.scripts import dry_run as render

        click.echo(render(resolved))
        return
    from hpcsngd.launch.submit import submit as send

    submitted = send(resolved, argv=sys.argv[1:])
    run = submitted.run
    if not as_json:
        click.echo(f"submitted {run.name}: job {submitted.job_id} on site {resolved.site_name}")
        click.echo(f"run directory: {run.path}")
    status = _wait(run, resolved, quiet=as_json) if wait_for_it else None
    report_path = _write_own_report(run) if status else None
    if as_json:
        _print_json(_submission_record(run, submitted.job_id, status, report_path))
    elif status:
        _print_outcome(run, status, report_path)
    else:
        click.echo(f"follow it with: hpcsngd status {_shown(run.path)}")
    if status and status.state != "completed":
        raise SystemExit(EXIT_RUN_FAILED)


@cli.command()
@click.option("--site", type=SITE, help="A site, alone or with --exp.")
@click.option("--exp", type=EXPERIMENT, help="An experiment, alone or with --site.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable.")
@click.option("--origins", is_flag=True, help="Say where each value comes from.")
@click.option(
    "--schema", type=click.Choice(["site", "experiment"]), help="Print the JSON Schema, for editors."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(
    *,
    site: str | None,
    exp: str | None,
    sets: Sequence[str],
    origins: bool,
    schema: str | None,
    as_json: bool,
) -> None:
    """Show the configuration as it would run; variables such as ${SCRATCH} stay unexpanded."""
    from hpcsngd.config import present

    if schema:
        _print_json(present.json_schema(schema))
        return
    if site is None and exp is None:
        raise click.UsageError("give --site, --exp or both, or --schema")
    leaves = present.leaves(site, exp, _overrides(sets))
    if as_json:
        _print_json(present.nested(leaves, with_origins=origins))
    else:
        click.echo(present.text(leaves, with_origins=origins))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sites(*, as_json: bool) -> None:
    """List the known sites."""
    from hpcsngd.config import present

    _print_catalogue(present.sites(), as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def experiments(*, as_json: bool) -> None:
    """List the known experiments."""
    from hpcsngd.config import present

    _print_catalogue(present.experiments(), as_json)


@cli.command()
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--run-root", type=RUNS, default=Path("runs"), show_default=True, help="Used when no run is named."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(*, runs: tuple[Path, ...], run_root: Path, as_json: bool) -> None:
    """Say how runs are doing: the runs named, or all in the run root."""
    from hpcsngd import rundir
    from hpcsngd.launch.status import states

    paths = runs or tuple(sorted(file.parent for file in run_root.glob("*/run.yaml")))
    if not paths and not as_json:
        click.echo(f"no runs in {run_root}")
    found = [state.to_json() for state in states([rundir.open_run(path) for path in paths])]
    if as_json:
        _print_json(found)
        return
    for state in found:
        _print_state(state)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print every number on the page instead of writing it.")
def report(*, runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one offline HTML page about runs (run directories, or folders of them)."""
    from hpcsngd.errors import ConfigError

    try:
        from hpcsngd_analysis import report as page
    except ImportError as error:
        raise ConfigError(
            f"reports need the extra 'analysis': pip install 'hpcsngd[analysis]' ({error})"
        ) from error
    if as_json:
        _print_json(page.to_json(list(runs)))
        return
    click.echo(f"report: {page.write_report(list(runs), out)}")


def _resolve(*, site: str, exp: str, sets: Sequence[str], **options: Any) -> Resolved:
    from hpcsngd.config.resolve import resolve

    return resolve(site, exp, [*_overrides(sets), *_flag_overrides(options)])


def _overrides(sets: Sequence[str]) -> list[Override]:
    from hpcsngd.config.resolve import parse_set

    return [parse_set(text) for text in sets]


def _flag_overrides(options: dict[str, Any]) -> list[Override]:
    """Returns the options of `_configuration` that stand for one key each."""
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


def _wait(run: RunDir, resolved: Resolved, *, quiet: bool) -> Status:
    from hpcsngd.launch.submit import wait
    from hpcsngd.progress import progress

    try:
        with progress(resolved.experiment.epochs, quiet=quiet) as update:
            return wait(run, poll_s=resolved.site.scheduler.poll_s, on_update=update)
    except KeyboardInterrupt:
        click.echo(
            f"\nno longer waiting; the run goes on. Come back with: hpcsngd status {_shown(run.path)}",
            err=True,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None


def _write_own_report(run: RunDir) -> Path | None:
    try:
        from hpcsngd_analysis.report import write_report
    except ImportError:
        click.echo("no report: it needs the extra 'analysis' (pip install 'hpcsngd[analysis]')", err=True)
        return None
    return write_report([run.path], run.report_html)


def _submission_record(
    run: RunDir, job_id: str, status: Status | None, report_path: Path | None
) -> dict[str, Any]:
    import dataclasses

    return {
        "run": run.name,
        "path": str(run.path),
        "job_id": job_id,
        "status": dataclasses.asdict(status) if status else None,
        "report": str(report_path) if report_path else None,
    }


def _print_outcome(run: RunDir, status: Status, report_path: Path | None) -> None:
    if status.state == "completed":
        result = status.result or {}
        click.echo(f"test accuracy: {result['test_accuracy']:.4f} after {result['epochs']:g} epochs")
        click.echo(f"time: {result['train_s']:.1f} s of training, {result['wall_s']:.1f} s in all")
    else:
        click.echo(f"{status.state}: {status.reason}", err=True)
        click.echo(f"logs: {_shown(run.attempt(status.attempt).logs)}", err=True)
    click.echo(f"run directory: {run.path}")
    if report_path:
        click.echo(f"report: {report_path}")


def _print_catalogue(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        facts = f"  [{row['facts']}]" if row["facts"] else ""
        click.echo(f"{row['name']:<{width}}  {row['description']}{facts}")


def _print_state(state: dict[str, Any]) -> None:
    parts = [f"{state['state']:<10} {state['run']}"]
    if state["epoch"] is not None:
        parts.append(f"epoch {state['epoch']:.1f}/{state['epochs']}")
    if state["accuracy"] is not None:
        parts.append(f"accuracy {state['accuracy']:.4f}")
    if state["reason"]:
        parts.append(state["reason"])
    click.echo("  ".join(parts))


def _print_json(data: Any) -> None:
    import json

    click.echo(json.dumps(data, indent=2, default=str))


def _shown(path: Path) -> str:
    import shlex

    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def main() -> None:
    """Runs the command line; a user's mistake ends with a message and its exit code, without traceback."""
    try:
        code = cli.main(prog_name="hpcsngd", standalone_mode=False)
    except click.exceptions.Abort:
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = EXIT_USAGE
    except HpcsngdError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        code = EXIT_OK
    sys.exit(code)
