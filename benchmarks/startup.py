"""What the command line costs before it does anything: time over a bare Python, and what it imports.

Run: ``python -m benchmarks.startup [--repeats 15]``. Interleaves the commands so that noise hits all alike,
and prints the median and smallest time of each, in milliseconds, and the difference to ``python -c pass``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

HEAVY = ("torch", "pandas", "submitit", "pydantic", "yaml", "rich", "plotly")
HPCSNGD = [sys.executable, "-m", "hpcsngd"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "hpcsngd --help": [*HPCSNGD, "--help"],
    "hpcsngd sites": [*HPCSNGD, "sites"],
    "hpcsngd show": [*HPCSNGD, "show", "--site", "local", "--exp", "digits-hylo"],
    "hpcsngd submit --dry-run": [*HPCSNGD, "submit", "--site", "local", "--exp", "digits-hylo", "--dry-run"],
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Returns the wall times of each command in milliseconds, one list per command."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
            times[name].append(1000 * (time.perf_counter() - begin))
    return times


def imported(command: list[str]) -> list[str]:
    """Returns which of the heavy packages a command imports."""
    probe = [command[0], "-X", "importtime", *command[1:]]
    lines = subprocess.run(probe, check=True, capture_output=True, text=True).stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines}
    return [name for name in HEAVY if name in modules]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    times = measure(parser.parse_args().repeats)
    base = statistics.median(times["python -c pass"])
    print(f"{'command':<28} {'median ms':>10} {'min ms':>8} {'over bare':>10}  heavy imports")
    for name, values in times.items():
        median = statistics.median(values)
        heavy = ", ".join(imported(COMMANDS[name])) or "-"
        print(f"{name:<28} {median:>10.0f} {min(values):>8.0f} {median - base:>10.0f}  {heavy}")


if __name__ == "__main__":
    main()
