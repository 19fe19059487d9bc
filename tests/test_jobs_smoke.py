"""Every experiment in jobs/, scaled down: it starts, trains, checkpoints, resumes bit for bit and reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.config import matrix, resolve, smoke
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.resources import named_files
from hpcsngd.train import loop, tinydata
from hpcsngd_analysis.report import write_report
from tests.ranks import run_on_ranks
from tests.train import runs
from tests.train.parameter_server import runs as served

#: Where a run is cut: in the middle of its second epoch of two steps.
CUT = 3


def all_cells() -> Iterator[tuple[str, resolve.Resolved]]:
    """Yields the first cell of every file, and other cells whose method is another than all before.

    Backwards, as the same four variants of K-FAC take least time in the last file that has them.
    """
    seen: set[str] = set()
    for name in reversed(named_files("jobs")):
        cells = matrix.resolve("local", name, environment={})
        found = [cell.resolved for cell in cells.cells] if cells else [resolve.resolve("local", name)]
        for index, resolved in enumerate(found):
            method = smoke.scaled_down(resolved, "DATA").experiment.preconditioner
            key = method.model_dump_json(exclude={"damping"}) if method else ""
            if index == 0 or key not in seen:
                yield f"{name}-{index}" if index else name, resolved
            seen.add(key)


CELLS = dict(all_cells())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with every tiny data set in a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    for name, facts in DATASETS.items():
        if facts.needs_root:
            (root / name).mkdir()
            tinydata.write(name, root / name)
    return root


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_it_trains_resumes_bit_for_bit_and_reports(name: str, data: Path, tmp_path: Path) -> None:
    resolved = CELLS[name]
    small = smoke.scaled_down(resolved, str(data / resolved.experiment.data.name))
    record = {"config": small.to_record()}
    whole, cut = (rundir.create(tmp_path / part, small.exp_name, record) for part in ("whole", "cut"))
    if small.experiment.strategy == "parameter_server":
        serve_whole_and_cut(whole, cut)
    else:
        first_stop = 1 if small.experiment.strategy == "full_batch" else CUT  # of two steps, or of four
        run_on_ranks(train_whole_and_cut, smoke.RANKS, str(whole.path), str(cut.path), first_stop)
    runs.assert_same_weights(whole, cut)
    is_text = DATASETS[small.experiment.data.name].kind == "text"
    for table in ("train", "eval", *(["scores"] if is_text else [])):
        assert runs.rows(whole, table) == runs.rows(cut, table), table
    splits = Counter(row["split"] for row in runs.rows(whole, "eval"))
    assert set(splits.values()) == {small.experiment.epochs}
    page = write_report([whole.path, cut.path], tmp_path / "report.html").read_text()
    assert small.exp_name in page


def train_whole_and_cut(whole: str, cut: str, stop: int) -> None:
    """Trains one run to its end, the other with a stop and a resume between; on each rank."""
    assert runs.train(rundir.open_run(Path(whole)))
    sees = loop.Trainer._sees_stop_request
    loop.Trainer._sees_stop_request = lambda self: self.progress.step + 1 == stop  # type: ignore[method-assign]
    assert not runs.train(rundir.open_run(Path(cut)))
    loop.Trainer._sees_stop_request = sees  # type: ignore[method-assign]
    assert runs.train(rundir.open_run(Path(cut)), attempt=2)


def serve_whole_and_cut(whole: rundir.RunDir, cut: rundir.RunDir) -> None:
    """Does the same with a parameter server and one worker, in this process."""
    assert served.train(whole)
    assert not served.train(cut, stop_after=CUT)
    assert served.train(cut, attempt=2)


def test_every_file_has_a_run() -> None:
    assert {name for name in CELLS if name in named_files("jobs")} == set(named_files("jobs"))
    assert len(json.dumps(list(CELLS))) > 0
