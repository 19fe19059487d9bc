from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from hpcsngd import dist
from hpcsngd.train.data import locks
from hpcsngd.train.faults import MissingDataError
from tests.ranks import run_on_ranks


def work(folder: Path, succeeds: bool) -> str:
    """Returns what rank 0's work gives on this rank, or the error as text; counts who worked."""

    def count() -> str:
        (folder / f"rank{dist.rank()}").touch()
        if not succeeds:
            raise MissingDataError("the tape is lost")
        return "found"

    try:
        return locks.on_first_rank(count)
    except MissingDataError as error:
        return str(error)


@pytest.mark.dist
@pytest.mark.parametrize(("succeeds", "word"), [(True, "found"), (False, "the tape is lost")])
def test_one_rank_works_and_all_learn_how_it_went(tmp_path: Path, succeeds: bool, word: str) -> None:
    assert run_on_ranks(work, 2, tmp_path, succeeds) == [word, word]
    assert [file.name for file in tmp_path.iterdir()] == ["rank0"]


def test_without_ranks_the_work_is_done_here(tmp_path: Path) -> None:
    assert work(tmp_path, True) == "found"


def test_a_lock_lets_one_pass_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    is_inside, may_leave = Event(), Event()

    def first() -> None:
        with locks.exclusive(tmp_path / "deep" / "lock"):
            is_inside.set()
            assert may_leave.wait(60)
            order.append("first")

    def second() -> None:
        with locks.exclusive(tmp_path / "deep" / "lock"):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert is_inside.wait(60)
        other = pool.submit(second)
        assert not order
        may_leave.set()
        one.result(60)
        other.result(60)
    assert order == ["first", "second"]
