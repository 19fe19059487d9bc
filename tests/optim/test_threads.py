"""One thread for each item: order, failures, and PyTorch's number of threads before, meanwhile and after."""

from __future__ import annotations

import pytest
import torch

from hpcsngd.optim.kfac_decompose import eigh_each
from hpcsngd.optim.threads import MOST_ROWS, one_thread_each, one_thread_if, runs_alone


@pytest.mark.parametrize("threads", [1, 2])
def test_results_come_in_order_and_threads_are_as_before(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = one_thread_each(lambda number: (2 * number, torch.get_num_threads()), range(5))
        assert found == [(2 * number, 1) for number in range(5)]
        assert one_thread_each(str, []) == []
        with pytest.raises(ZeroDivisionError):
            one_thread_each(lambda number: 1 // number, [1, 0])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_eigenvectors_do_not_depend_on_the_number_of_threads() -> None:
    root = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    factors, before, found = [root @ root.mT], torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            (pair,) = eigh_each(factors)
        finally:
            torch.set_num_threads(before)
        assert pair is not None
        assert pair[0] is not None
        found.append((pair[0], pair[1]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_only_small_matrices_on_the_cpu_run_alone() -> None:
    assert runs_alone(torch.empty(1, MOST_ROWS, MOST_ROWS, device="cpu"))
    assert not runs_alone(torch.empty(1, MOST_ROWS + 1, 1).expand(-1, -1, MOST_ROWS + 1))
    assert not runs_alone(torch.empty(1, 8, 8, device="meta"))


def test_one_thread_only_where_work_is_small() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for is_small, inside in ((True, 1), (False, 2)):
            with one_thread_if(is_small):
                assert torch.get_num_threads() == inside
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
