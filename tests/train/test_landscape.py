"""Landscapes: the rows are the loss of the model, wherever and however often they were begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import rundir
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import planes
from hpcsngd.train.checkpoint import Checkpoints
from hpcsngd.train.faults import SettingError
from hpcsngd.train.landscape import Landscape, Settings
from tests.ranks import run_on_ranks
from tests.train import runs

SMALL = Settings(points=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of three epochs that kept all its checkpoints, and so spans its plane."""
    run = runs.make_run(tmp_path_factory.mktemp("trained"), epochs=3, checkpoint__keep=10)
    assert runs.train(run)
    return run


@pytest.fixture
def run(trained: RunDir, tmp_path: Path) -> RunDir:
    """The same run without a landscape."""
    return RunDir(Path(shutil.copytree(trained.path, tmp_path / trained.name)))


def drawn(run: RunDir, settings: Settings = SMALL, *others: RunDir) -> list[dict[str, Any]]:
    Landscape([run, *others], settings, runs.CPU).evaluate()
    return table(run, "landscape")


def table(run: RunDir, name: str) -> list[dict[str, Any]]:
    return list(rundir.read_rows(run.metrics(name), TABLES[name]))


def test_checkpoints_have_the_loss_that_training_saw(run: RunDir) -> None:
    drawn(run)
    path, evaluation = table(run, "landscape_path"), table(run, "eval")
    assert [row["step"] for row in path] == [row["step"] for row in evaluation] == [13, 26, 39]
    for name in ("loss", "accuracy"):
        assert [row[name] for row in path] == pytest.approx([row[name] for row in evaluation], rel=1e-5)
    assert [row["distance"] for row in path] == pytest.approx([0, 0, 0], abs=1e-4)  # three make a plane


def test_a_grid_point_has_the_loss_of_the_weights_there(run: RunDir) -> None:
    rows = drawn(run)
    assert [(row["row"], row["column"]) for row in rows] == [(r, c) for r in range(3) for c in range(3)]
    landscape = Landscape([run], SMALL, runs.CPU)
    checkpoints = Checkpoints(run.checkpoints_dir, 10)
    weights = []
    for step in checkpoints.intact():
        landscape._model.load_state_dict(checkpoints.common(step, runs.CPU)["parts"]["model"])
        weights.append(torch.nn.utils.parameters_to_vector(landscape._model.parameters()).detach())
    plane = planes.through(weights)
    corner = plane.origin + rows[0]["a"] * plane.first + rows[0]["b"] * plane.second
    torch.nn.utils.vector_to_parameters(corner, landscape._model.parameters())
    data = landscape._splits.test
    images, labels = data[list(range(len(data)))]
    loss = torch.nn.functional.cross_entropy(landscape._model(images), labels)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert rows[0]["count"] == len(data) == 60
    assert rows[0]["share_a"] + rows[0]["share_b"] == pytest.approx(1)
    assert {row["buffers"] for row in rows} == {"none"}
    # the grid holds all checkpoints and a quarter of their range more
    places = [(row["a"], row["b"]) for row in table(run, "landscape_path")]
    for axis, name in enumerate("ab"):
        values = [place[axis] for place in places]
        wide = max(values) - min(values)
        ends = [row[name] for row in rows]
        assert min(ends) == pytest.approx(min(values) - wide / 4, rel=1e-3, abs=1e-4)
        assert max(ends) == pytest.approx(max(values) + wide / 4, rel=1e-3, abs=1e-4)


def test_a_second_call_goes_on_after_the_last_whole_row(run: RunDir) -> None:
    whole = drawn(run)
    path = run.metrics("landscape")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    seen: list[tuple[int, int]] = []
    Landscape([run], SMALL, runs.CPU).evaluate(lambda done, total: seen.append((done, total)))
    assert table(run, "landscape") == whole
    assert seen == [(done, 9) for done in range(4, 10)]
    before = path.read_text()
    assert drawn(run) == whole
    assert path.read_text() == before


def test_other_settings_are_another_plane(run: RunDir) -> None:
    first = drawn(run)
    both = drawn(run, Settings(points=2, split="train", samples=50))
    assert both[:9] == first
    assert len(both) == 13
    assert len({row["plane"] for row in both}) == 2
    assert {(row["split"], row["count"]) for row in both[9:]} == {("train", 50)}


def test_random_directions_go_through_the_last_checkpoint(run: RunDir) -> None:
    rows = drawn(run, Settings(kind="random", points=3, span=0.5))
    assert [row["a"] for row in rows[:3]] == [-0.5, 0, 0.5]
    assert rows[4]["loss"] == pytest.approx(table(run, "eval")[-1]["loss"], rel=1e-5)  # the middle
    assert table(run, "landscape_path")[-1]["distance"] == pytest.approx(0, abs=1e-6)


def test_two_runs_share_a_plane(run: RunDir, tmp_path: Path) -> None:
    other = runs.make_run(tmp_path, epochs=3, checkpoint__keep=10, seed=9)
    assert runs.train(other)
    rows = drawn(run, SMALL, other)
    names = {row["plane"] for row in [*rows, *table(run, "landscape_path"), *table(other, "landscape_path")]}
    assert len(names) == 1
    assert not other.metrics("landscape").exists()
    wider = runs.make_run(tmp_path, model__args__width=8)
    with pytest.raises(SettingError, match="need the same model"):
        Landscape([run, wider], SMALL, runs.CPU)


def test_what_cannot_be_drawn_is_refused(run: RunDir, tmp_path: Path) -> None:
    few = runs.make_run(tmp_path)
    with pytest.raises(SettingError, match=r"there are 0; keep more of them with checkpoint\.keep"):
        Landscape([few], SMALL, runs.CPU)
    with pytest.raises(SettingError, match="has no checkpoint"):
        Landscape([few], Settings(kind="random"), runs.CPU)
    with pytest.raises(SettingError, match="at least 2 points"):
        Landscape([run], Settings(points=1), runs.CPU)


def test_batch_norms_statistics_are_collected_anew_or_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.models.MODELS, "digits-cnn", runs.dropout_net)
    run = runs.make_run(tmp_path, epochs=3, checkpoint__keep=10)
    assert runs.train(run)
    anew, kept = drawn(run), drawn(run, Settings(points=3, buffers="keep"))[9:]
    assert {row["buffers"] for row in anew} == {"recomputed"}
    assert {row["buffers"] for row in kept} == {"kept"}
    assert all(row["loss"] != other["loss"] for row, other in zip(anew, kept, strict=True))
    landscape = Landscape([run], Settings(points=3, batches=2), runs.CPU)
    (norm,) = landscape._norms
    landscape._move_to(landscape._plane.at(1.0, 0.0))
    # the plain mean over the first two batches of training images, without dropout
    with torch.no_grad():
        batches = [landscape._splits.train[list(range(start, start + 16))][0] for start in (0, 16)]
        means = [landscape._model[0](images).mean(dim=(0, 2, 3)) for images in batches]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
    assert norm.momentum == 0.1


def draw(run: RunDir) -> None:
    """Draws, on the rank that this process is."""
    Landscape([run], SMALL, runs.CPU).evaluate()


@pytest.mark.dist
def test_ranks_share_the_work_and_write_the_same(run: RunDir) -> None:
    alone = drawn(run)
    paths = table(run, "landscape_path")
    run.metrics("landscape").unlink()
    run.metrics("landscape_path").unlink()
    run_on_ranks(draw, 2, run)
    for mine, others in ((alone, table(run, "landscape")), (paths, table(run, "landscape_path"))):
        for row, other in zip(mine, others, strict=True):
            numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
            assert {name: other[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-4)
            assert other["plane"] == row["plane"]
