"""Wall times, ports and variables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsngd.config.fields import expand, port_range, walltime_minutes, walltime_text
from hpcsngd.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("12:00:00", 720),
        ("1-12:30:00", 2190),
        ("00:00:30", 1),
        ("90m", 90),
        ("2h", 120),
        ("1h30m", 90),
        ("1d", 1440),
        ("45", 45),
        (45, 45),
    ],
)
def test_walltime(written: str | int, minutes: int) -> None:
    assert walltime_minutes(written) == minutes


@pytest.mark.parametrize("written", ["2:00", "", "abc", "-5", "0", "0m", "1.5h", "12:60:00", "1e3"])
def test_walltime_refusals(written: str) -> None:
    with pytest.raises(ValueError, match="wall time"):
        walltime_minutes(written)


@given(st.integers(min_value=1, max_value=100_000))
def test_walltime_text_reads_back(minutes: int) -> None:
    assert walltime_minutes(walltime_text(minutes)) == minutes


@pytest.mark.parametrize(
    ("written", "expected"),
    [("auto", (20000, 29999)), (29500, (29500, 29500)), ("20000-20100", (20000, 20100))],
)
def test_port_range(written: str | int, expected: tuple[int, int]) -> None:
    assert port_range(written) == expected


@pytest.mark.parametrize("written", ["80", "70000", "20100-20000", "any", "1-2-3"])
def test_port_refusals(written: str) -> None:
    with pytest.raises(ValueError, match="port"):
        port_range(written)


def test_expand() -> None:
    env = {"USER": "ada", "EMPTY": ""}
    assert expand("/scratch/${USER}/x", env, "f:1") == "/scratch/ada/x"
    assert expand("${NONE:-/data}${EMPTY}", env, "f:1") == "/data"
    assert expand("$HOME and $${USER} stay", env, "f:1") == "$HOME and ${USER} stay"
    with pytest.raises(ConfigError, match=r"f:1: the environment variable NONE is not set; export it"):
        expand("${NONE}", env, "f:1")
