"""Strict YAML reads what a person means and refuses the rest with file and line."""

from __future__ import annotations

import math

import pytest

from hpcsngd.config import strict
from hpcsngd.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("12:00:00", "12:00:00"),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"),
        ("'5'", "5"),
        ('"true"', "true"),
        ("-.inf", -math.inf),
        ("[1, no, 1e2]", [1, "no", 100.0]),
    ],
)
def test_plain_scalars_follow_the_core_schema(written: str, value: object) -> None:
    found = strict.loads(f"key: {written}", "f.yaml").data["key"]
    assert found == value
    assert isinstance(found, type(value))


def test_nan_is_nan() -> None:
    assert math.isnan(strict.loads("a: .nan", "f").data["a"])


def test_numbers_remember_how_they_were_written() -> None:
    data = strict.loads("version: 1.10\nport: 29500", "f").data
    assert (data["version"].text, data["port"].text) == ("1.10", "29500")


def test_lines_of_nested_keys_and_items() -> None:
    document = strict.loads("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "f.yaml")
    assert document.where("a.b") == "f.yaml:2"
    assert document.where("a.c.1.y") == "f.yaml:5"
    assert document.where("a.c.9.z") == "f.yaml:3"  # the nearest written parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"f.yaml:3: the key 'a' is written twice \(first in line 1\)"),
        ("a:\n  b: 1\n  b: 2", "f.yaml:3: the key 'a.b' is written twice"),
        ("a: [1, 2", "f.yaml:1: not valid YAML"),
        ("- 1\n- 2", "f.yaml:1: expected keys and values"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1: the tag"),
        ("a: !mine 3", "f.yaml:1: the tag !mine is not allowed"),
        ("? [1]\n: 2", "f.yaml:1: a key must be plain text"),
    ],
)
def test_refusals_name_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strict.loads(text, "f.yaml")


def test_unreadable_file_is_a_clear_error(tmp_path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        strict.load(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        strict.load(tmp_path / "missing.yaml")


def test_empty_file_is_an_empty_mapping() -> None:
    assert strict.loads("# nothing\n", "f").data == {}
