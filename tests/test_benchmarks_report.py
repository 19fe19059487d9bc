"""The generator behind benchmarks/report.py writes runs such as a study leaves behind."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from hpcsngd_analysis.clocks import clocks
from hpcsngd_analysis.load import load


def test_generated_runs_load_with_their_failures_and_resumes(tmp_path: Path) -> None:
    report.make_runs(tmp_path, 10, 200)
    runs = load([tmp_path])
    assert [run.state for run in runs.records].count("completed") == 8
    states = {int(run.name[-4:]): run.state for run in runs.records}
    assert (states[3], states[7]) == ("failed", "no status yet")
    rows = {int(run.name[-4:]): run.rows["train"] for run in runs.records}
    assert (rows[0], rows[3], rows[5], rows[7]) == (200, 100, 200, 100)
    resumed = next(run for run in runs.records if run.name.endswith("0005"))
    assert resumed.dropped_rows["train"] == 5  # a fortieth of the rows was done again
    found = clocks(runs)
    assert found["restarts"].sum() == 1
    assert found.loc[resumed.name, "redone_s"] > 0
    assert (found["charged_s"] > found["train_s"]).all()
    assert resumed.not_finite == {}
    failed = next(run for run in runs.records if run.state == "failed")
    assert failed.not_finite["train"] == (1, 1000)


def test_measuring_reports_time_memory_and_size(tmp_path: Path) -> None:
    report.make_runs(tmp_path / "runs", 3, 100)
    found = report.measure(tmp_path / "runs", tmp_path / "page.html")
    assert found["page_mb"] == (tmp_path / "page.html").stat().st_size / 1e6
    assert found["cpu_s"] > 0
    assert found["peak_mb"] > 50
