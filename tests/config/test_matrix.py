"""The matrix: which cells it makes, what their ids depend on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcsngd.config import matrix, resolve
from hpcsngd.config.matrix import Matrix
from hpcsngd.errors import ConfigError

BASE = """\
extends: digits-hylo
description: a sweep
"""


def cells(
    folder: Path,
    text: str = "",
    *,
    given: tuple[str, ...] = (),
    sets: tuple[str, ...] = (),
    site: str = "local",
) -> Matrix | None:
    """Returns the matrix of an experiment that adds ``text`` to `BASE`."""
    file = folder / "sweep.yaml"
    file.write_text(BASE + text)
    overrides = [resolve.parse_set(item) for item in sets]
    return matrix.resolve(site, str(file), overrides, [matrix.parse(item) for item in given], environment={})


def made(*args: Any, **options: Any) -> Matrix:
    found = cells(*args, **options)
    assert found is not None
    return found


TWO_AXES = "matrix: {seed: [1, 2], preconditioner.damping: [0.1, 0.3, 1]}\n"


def test_cells_are_all_combinations_the_last_axis_fastest(tmp_path: Path) -> None:
    found = made(tmp_path, TWO_AXES)
    assert [str(cell) for cell in found.cells] == [
        f"seed={seed}, preconditioner.damping={damping}" for seed in (1, 2) for damping in (0.1, 0.3, 1)
    ]
    first = found.cells[1].resolved
    assert (first.experiment.seed, first.experiment.matrix) == (1, {})
    assert first.experiment.preconditioner is not None
    assert first.experiment.preconditioner.damping == 0.3
    assert first.origins["experiment.seed"].endswith("sweep.yaml:3")
    assert first.origins["experiment.epochs"].endswith("digits-hylo.yaml:7")


def test_nested_keys_are_the_same_as_dotted_ones(tmp_path: Path) -> None:
    nested = "matrix:\n  seed: [1, 2]\n  preconditioner:\n    damping: [0.1, 0.3, 1]\n"
    dotted = made(tmp_path, TWO_AXES)
    assert [cell.id for cell in made(tmp_path, nested).cells] == [cell.id for cell in dotted.cells]


def test_an_option_adds_an_axis_or_replaces_one(tmp_path: Path) -> None:
    found = made(tmp_path, TWO_AXES, given=("seed=5,6", "epochs=1,2"))
    assert [axis.keys for axis in found.axes] == [("seed",), ("preconditioner.damping",), ("epochs",)]
    assert [cell.axes["seed"] for cell in found.cells] == [5] * 6 + [6] * 6
    assert found.cells[0].resolved.origins["experiment.seed"] == "--matrix seed"


def test_a_set_value_takes_the_place_of_an_axis(tmp_path: Path) -> None:
    found = made(tmp_path, TWO_AXES, sets=("seed=9",))
    assert [axis.keys for axis in found.axes] == [("preconditioner.damping",)]
    assert {cell.resolved.experiment.seed for cell in found.cells} == {9}
    assert cells(tmp_path, TWO_AXES, sets=("seed=9", "preconditioner.damping=2")) is None


def test_without_axes_there_is_no_matrix(tmp_path: Path) -> None:
    assert cells(tmp_path) is None


def test_linked_values_are_one_axis(tmp_path: Path) -> None:
    text = """\
matrix:
  seed: [1, 2]
  include:
    - {optimizer.lr: 0.1, batch_size: 16}
    - {optimizer: {lr: 0.2}, batch_size: 32}
"""
    found = made(tmp_path, text)
    values = [(c.resolved.experiment.seed, c.resolved.experiment.optimizer.lr) for c in found.cells]
    assert values == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    assert [c.resolved.experiment.batch_size for c in found.cells] == [16, 32, 16, 32]
    with pytest.raises(ConfigError, match="batch_size is set from outside"):
        cells(tmp_path, text, sets=("batch_size=8",))


def test_sections_can_be_values(tmp_path: Path) -> None:
    text = "matrix: {preconditioner: [null, {name: hylo, damping: 0.5}]}\n"
    kinds = [cell.resolved.experiment.preconditioner for cell in made(tmp_path, text).cells]
    assert kinds[0] is None
    assert kinds[1] is not None
    assert (kinds[1].damping, kinds[1].refresh_every) == (0.5, 10)


def test_a_child_takes_replaces_and_removes_axes_of_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(BASE + TWO_AXES)
    child = tmp_path / "child.yaml"
    child.write_text("extends: parent\nmatrix: {seed: [7], epochs: [1, 2], preconditioner.damping: null}\n")
    found = matrix.resolve("local", str(child), environment={})
    assert found is not None
    assert [dict(cell.axes) for cell in found.cells] == [{"seed": 7, "epochs": 1}, {"seed": 7, "epochs": 2}]
    assert found.cells[0].resolved.origins["experiment.seed"].endswith("child.yaml:2")


def test_one_run_of_an_experiment_with_a_matrix_has_none(tmp_path: Path) -> None:
    made(tmp_path, TWO_AXES)
    resolved = resolve.resolve("local", str(tmp_path / "sweep.yaml"), environment={})
    assert resolved.experiment.matrix == {}
    shown = resolve.load_experiment(str(tmp_path / "sweep.yaml"))
    assert shown.matrix == {"seed": [1, 2], "preconditioner.damping": [0.1, 0.3, 1]}


class TestIds:
    def test_ids_follow_what_results_depend_on(self, tmp_path: Path) -> None:
        ids = [cell.id for cell in made(tmp_path, TWO_AXES).cells]
        assert len(set(ids)) == 6
        same = (
            "checkpoint.keep=5",
            "walltime=3h",
            "data.workers=1",
            "experiment.description=x",
            "diagnostics.log_every=1",
        )
        for item in same:
            assert [cell.id for cell in made(tmp_path, TWO_AXES, sets=(item,)).cells] == ids, item
        for item in ("epochs=3", "ranks_per_node=1", "data.train_limit=100", "optimizer.momentum=0.5"):
            assert not {cell.id for cell in made(tmp_path, TWO_AXES, sets=(item,)).cells} & set(ids), item

    def test_ids_do_not_depend_on_where_a_value_was_written(self, tmp_path: Path) -> None:
        by_option = made(tmp_path, "", given=("seed=1,2", "preconditioner.damping=0.1,0.3,1"))
        assert [cell.id for cell in by_option.cells] == [cell.id for cell in made(tmp_path, TWO_AXES).cells]
        default = [cell.id for cell in made(tmp_path, TWO_AXES, sets=("accumulate=1",)).cells]
        assert default == [cell.id for cell in by_option.cells]

    def test_an_axis_without_effect_on_results_still_tells_cells_apart(self, tmp_path: Path) -> None:
        found = made(
            tmp_path, given=("diagnostics.profiling=true,false", "site.launch.mode=torchrun,per_rank")
        )
        assert len({cell.id for cell in found.cells}) == 4

    def test_the_sweep_stays_the_same_when_an_axis_grows(self, tmp_path: Path) -> None:
        found, larger = made(tmp_path, TWO_AXES), made(tmp_path, TWO_AXES, given=("seed=1,2,3",))
        assert larger.base_id == found.base_id
        assert {cell.id for cell in found.cells} < {cell.id for cell in larger.cells}

    @pytest.mark.parametrize("change", ["epochs=3", "preconditioner.refresh_every=3", "ranks_per_node=1"])
    def test_another_base_is_another_sweep(self, tmp_path: Path, change: str) -> None:
        found = made(tmp_path, TWO_AXES)
        assert made(tmp_path, TWO_AXES, sets=(change,)).base_id != found.base_id

    def test_another_axis_is_another_sweep(self, tmp_path: Path) -> None:
        found = made(tmp_path, TWO_AXES)
        assert made(tmp_path, TWO_AXES, given=("epochs=1,2",)).base_id != found.base_id

    def test_another_size_is_the_same_sweep_if_sizes_are_an_axis(self, tmp_path: Path) -> None:
        small = made(tmp_path, given=("ranks_per_node=1,2",))
        assert made(tmp_path, given=("ranks_per_node=4,1",)).base_id == small.base_id


class TestRefusals:
    def test_every_bad_value_is_told_with_its_cells(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            cells(tmp_path, given=("optimizer.lr=0.1,-1", "epochs=1,0,2"))
        lines = str(caught.value).splitlines()
        assert lines == [
            "--matrix epochs: epochs: input should be greater than or equal to 1; found 0",
            "    in 2 cells: optimizer.lr=0.1, epochs=0; optimizer.lr=-1, epochs=0",
            "--matrix optimizer.lr: optimizer.lr: input should be greater than 0; found -1",
            "    in 3 cells: optimizer.lr=-1, epochs=1; optimizer.lr=-1, epochs=0; optimizer.lr=-1, epochs=2",
        ]

    def test_many_cells_are_counted(self) -> None:
        text = matrix.listed({"too large": [f"seed={n}" for n in range(1000)]})
        assert text == "too large\n    in 1,000 cells: seed=0; seed=1; seed=2; and 997 more"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("matrix: {seed: 3}\n", r"sweep.yaml:3: matrix.seed: expected a list of values, found 3"),
            ("matrix: {seed: []}\n", r"matrix.seed: expected a list of values"),
            ("matrix: {sede: [1]}\n", r"sweep.yaml:3: unknown key 'sede'; did you mean 'seed'"),
            ("matrix: [1]\n", r"sweep.yaml:3: matrix: expected keys with lists of values"),
            ("matrix: {}\n", r"matrix: expected keys with lists of values"),
            ("matrix: {seed: [1, 1]}\n", "the same cell twice: seed=1 and seed=1"),
            ("matrix: {include: [1]}\n", "matrix.include: expected a list of mappings"),
            ("matrix: {seed: [1], include: [{seed: 2}]}\n", "both seed and seed"),
            ("matrix: {preconditioner: [null], preconditioner.damping: [1]}\n", "one would undo the other"),
        ],
    )
    def test_what_a_file_may_not_say(self, tmp_path: Path, text: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            cells(tmp_path, text)

    @pytest.mark.parametrize("text", ["seed", "=1", "seed=", "include=1", "seed=[1"])
    def test_what_an_option_may_not_say(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--matrix"):
            matrix.parse(text)

    def test_values_of_an_option_are_yaml(self) -> None:
        assert matrix.parse("a.b=1, 1e-3,x,null,true,[1,2]") == ("a.b", [1, 1e-3, "x", None, True, [1, 2]])

    def test_set_cannot_change_the_matrix(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is set with --matrix"):
            cells(tmp_path, TWO_AXES, sets=("matrix.seed=[1]",))

    def test_more_cells_than_anybody_wants(self, tmp_path: Path) -> None:
        many = ",".join(map(str, range(400)))
        with pytest.raises(ConfigError, match="160,000 cells; at most 100,000"):
            cells(tmp_path, given=(f"seed={many}", f"epochs={many}"))
