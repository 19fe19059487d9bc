"""The command line: one module per verb or family of verbs, imported when it is called.

Every verb imports what it needs when it runs: ``--help`` costs click alone. A new verb is a module here with
a click command named like the verb, and a line in `VERBS`.

Exit codes: 0 ok, 1 the run failed, 2 usage or configuration, 3 refused before submission, 4 scheduler missing
or refusing, 130 interrupted while waiting (the run goes on).
"""

from __future__ import annotations

import importlib
import sys

import click

from hpcsngd import __version__
from hpcsngd.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, HpcsngdError, did_you_mean

VERBS = {
    "submit": "submit",
    "status": "status",
    "logs": "logs",
    "cancel": "runs",
    "resume": "runs",
    "rerun": "runs",
    "diff": "runs",
    "report": "report",
    "export": "export",
    "landscape": "landscape",
    "container": "container",
    "show": "configuration",
    "sites": "configuration",
    "experiments": "configuration",
    "doctor": "doctor",
    "rehearse": "rehearse",
}
"""Verb -> module of this package that has a command of that name; in the order of ``--help``."""

EPILOG = """\b
Exit codes: 0 ok, 1 run failed, 2 usage or configuration, 3 refused before submission,
4 scheduler missing or refusing, 130 interrupted while waiting (the run goes on).

\b
Shell completion: eval "$(_HPCSNGD_COMPLETE=bash_source hpcsngd)"  (or zsh_source, fish_source)."""


class _Verbs(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the verbs in the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command of a verb, or None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"hpcsngd.cli.{VERBS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the verb that the arguments begin with; an unknown one is answered with the closest."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            hint = did_you_mean(args[0], VERBS)
            ctx.fail(f"No such command {args[0]!r}{hint or '.'}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hpcsngd")
def cli() -> None:
    """Distributed second-order training experiments on HPC clusters."""


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
