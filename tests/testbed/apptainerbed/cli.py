"""The command line: ``apptainer install``, ``apptainer foreign MACHINE``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from slurmbed import claims
from slurmbed.errors import EXIT_OK, TestbedError

from . import foreign, install
from .layout import DEFAULT_PREFIX, EXIT_NOT_HERE, Layout

EPILOG = f"""\
exit codes:
  0   done, or already so
  1   failed
  2   wrong usage
  {EXIT_NOT_HERE}  this machine cannot have an Apptainer; the reason is on stderr

environment:
  HPCSNGD_TESTBED_APPTAINER  where Apptainer is put (default {DEFAULT_PREFIX})
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apptainer",
        description="A real Apptainer on a Debian 12-like machine, for tests. Run as root.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="install|foreign")
    commands.add_parser("install", help="install Apptainer and its helpers; nothing if it works already")
    other = commands.add_parser("foreign", help="let the kernel run programs of another machine (qemu)")
    other.add_argument("machine", choices=("ppc64le", "aarch64", "x86_64"))
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(argv)
    os.umask(0o022)  # other users run it, too
    layout = Layout.from_env()
    begin = time.monotonic()
    try:
        with claims.exclusive():
            if options.command == "install":
                changed = install.install(layout)
            else:
                changed = foreign.register(options.machine)
    except TestbedError as error:
        print(f"hpcsngd testbed: {error}", file=sys.stderr)
        return error.exit_code
    how = f"done in {time.monotonic() - begin:.1f} s" if changed else "nothing to do"
    print(f"hpcsngd testbed: {options.command}: {how}")
    if options.command == "install":
        print(f"export PATH={layout.program.parent}:$PATH")
    return EXIT_OK
