"""Who computes what: every sample once, in the steps that all strategies make."""

from __future__ import annotations

from typing import Any

import pytest

from hpcsngd.train.parameter_server import replay
from hpcsngd.train.parameter_server.replay import Logged
from hpcsngd.train.parameter_server.work import Ledger, Work, caps

SIZES = [4, 4, 6]


def ledger(mode: Any = "async", workers: int = 2, **options: Any) -> Ledger:
    return Ledger(SIZES, mode, range(1, workers + 1), 2, **options)


def places(works: list[Work]) -> list[tuple[int, int, int, int]]:
    return [(work.step, work.epoch, work.start, work.count) for work in works]


def test_whoever_asks_gets_the_next_step() -> None:
    book = ledger()
    book.open(range(2, 5))
    found = [book.take(worker) for worker in (2, 2, 1)]
    assert places(found) == [(2, 0, 8, 6), (3, 1, 0, 4), (4, 1, 4, 4)]
    assert [(work.turn, work.before) for work in found] == [(0, 0), (1, 6), (0, 0)]
    assert [work.micro_batches for work in found] == [3, 2, 2]
    assert not book.has_work(1)
    assert not book.is_idle
    for worker in (1, 2):
        book.done(worker)
    assert book.is_idle


def test_a_synchronous_step_is_shared() -> None:
    book = ledger("sync")
    book.open(range(3))
    assert places([book.take(1), book.take(2)]) == [(0, 0, 0, 2), (0, 0, 2, 2)]
    book.take(1)
    book.hold()
    # the step that one has begun is finished by all
    assert book.has_work(2)
    assert not book.has_work(1)
    assert book.take(2).step == 1
    assert not book.has_work(2)
    assert book.remaining == [2]


def test_the_step_of_a_lost_worker_goes_to_another() -> None:
    book = ledger()
    book.open(range(3))
    assert (book.take(1).step, book.take(2).step) == (0, 1)
    book.lose(1)
    assert [book.take(2).step for _ in range(2)] == [0, 2]


def test_what_is_held_is_left_for_later() -> None:
    book = ledger()
    book.open(range(3))
    book.take(1)
    book.hold()
    assert book.remaining == [1, 2]
    assert not book.is_idle
    book.done(1)
    assert book.is_idle
    book.open(book.remaining)
    assert book.take(2).step == 1


def test_shares_are_kept_until_somebody_is_lost() -> None:
    book = ledger(caps={1: 1, 2: 2})
    book.open(range(3))
    book.take(1)
    assert not book.has_work(1)
    assert book.has_work(2)
    book.lose(2)
    assert book.has_work(1)


@pytest.mark.parametrize(("steps", "parts"), [(10, [1, 1, 1]), (7, [5, 1, 3]), (3, [1, 1, 1, 1])])
def test_shares_of_a_run_follow_the_sizes_of_the_parts(steps: int, parts: list[int]) -> None:
    found = caps(steps, dict(enumerate(parts, start=1)))
    assert sum(found.values()) == steps
    assert all(
        abs(found[worker] - steps * size / sum(parts)) < 1 for worker, size in enumerate(parts, start=1)
    )


def test_a_resumed_book_goes_on() -> None:
    book, again = ledger(), ledger()
    book.open(range(3))
    book.take(1)
    again.load_state_dict(book.state_dict())
    again.open([1, 2])
    assert (again.take(1).turn, again.take(2).turn) == (1, 0)


def test_a_replay_hands_out_what_was_logged() -> None:
    updates = [Logged(1, 2, 0, 1), Logged(2, 1, 0, 0), Logged(3, 2, 1, 2)]
    assert replay.events(updates) == [
        ("pull", 2),
        ("pull", 1),
        ("push", 2),
        ("pull", 2),
        ("push", 1),
        ("push", 2),
    ]
    assert replay.events(updates, version=2) == [("push", 2)]
    book = ledger(logged=replay.works(updates))
    book.open(range(3))
    assert [book.take(2).step, book.take(1).step, book.take(2).step] == [1, 0, 2]
    assert not book.has_work(1)
