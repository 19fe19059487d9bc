"""What analysis/ says about itself: the list of tables, and the notebook example of its README."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hpcsngd.tables import TABLES
from hpcsngd_analysis import schema
from hpcsngd_analysis.load import load
from tests.analysis.runs import EXAMPLES

ANALYSIS = Path(__file__).parents[2] / "analysis"


def test_every_column_that_is_loaded_is_described_with_its_type() -> None:
    described, runs = schema.columns(), load([EXAMPLES])
    frames = {**runs.tables, "attempts": runs.attempts}
    assert set(described["table"]) == {*TABLES, "attempts"}
    for name, frame in frames.items():
        rows = described[described["table"] == name]
        assert rows["column"].tolist() == frame.columns.tolist()
        assert rows["dtype"].tolist() == [str(kind) for kind in frame.dtypes]
    assert (described["doc"] != "").all()


def test_the_file_of_tables_is_current() -> None:
    assert (ANALYSIS / "TABLES.md").read_text() == schema.markdown()


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ANALYSIS / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    shutil.copytree(EXAMPLES, tmp_path / "runs")
    (tmp_path / "runs" / "grad-norm.csv").write_text("\n0.5, 0.25,\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["runs"].records) == 5  # type: ignore[attr-defined]
