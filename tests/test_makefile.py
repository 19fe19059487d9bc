"""`make figures`: every command of it is one that the command line takes, without training anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpcsngd.cli import cli
from hpcsngd_analysis import spec

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "analysis" / "reports").glob("*.yaml"))
#: In place of the program: writes down its arguments, one to a line, with an empty line after the last.
NOTING = '#!/bin/sh\nprintf "%s\\n" "$@" "" >> "$NOTED"\n'


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Returns the arguments of each command that the target gives to hpcsngd, in order."""
    folder = tmp_path_factory.mktemp("make")
    program = folder / "venv" / "bin" / "hpcsngd"
    program.parent.mkdir(parents=True)
    program.write_text(NOTING)
    program.chmod(0o755)
    (folder / "venv" / ".ready").touch()
    environment = os.environ | {"NOTED": str(folder / "noted")}
    subprocess.run(
        ["make", "--silent", "figures", f"VENV={folder / 'venv'}"], cwd=ROOT, env=environment, check=True
    )
    parts = (folder / "noted").read_text().removesuffix("\n\n").split("\n\n")
    return [part.split("\n") for part in parts]


def test_every_submission_can_be_planned(commands: list[list[str]]) -> None:
    submissions = [words for words in commands if words[0] == "submit"]
    assert len(submissions) == 7
    for words in submissions:
        planned = [*(word for word in words if word != "--wait"), "--dry-run"]
        result = CliRunner().invoke(cli, planned)
        assert result.exit_code == 0, (planned, result.output)


def test_every_other_command_is_understood(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    others = [words for words in commands if words[0] != "submit"]
    assert [words[0] for words in others] == ["landscape", *["report"] * len(SPECS)]
    for verb, *words in others:
        command = cli.get_command(None, verb)  # type: ignore[arg-type]  # the context is not looked at
        assert command is not None
        assert command.make_context(verb, list(words)).params["runs"]


def test_every_report_has_a_page_of_its_own(commands: list[list[str]]) -> None:
    reports = [words for words in commands if words[0] == "report"]
    named = [(ROOT / words[words.index("--spec") + 1], words[words.index("--out") + 1]) for words in reports]
    assert named == [(file, f"figures/{file.stem}.html") for file in SPECS]
    assert all(spec.read(file).sections for file in SPECS)
