"""Small decompositions on the CPU: one thread for each matrix rather than all threads for each in turn.

LAPACK's threads wait for one another at every column of a small matrix: two of them take two to three times
the CPU time of one (576 rows, symmetric eigenvalues), and longer by the clock where cores are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

#: Matrices with more rows are decomposed one after the other by all threads: there are few of them, and they
#: have work for all. Not measured; the gain of one thread each was, up to 576 rows.
MOST_ROWS = 1024

T = TypeVar("T")
R = TypeVar("R")


def runs_alone(matrices: Tensor) -> bool:
    """Returns whether each of these matrices ``(b, n, n)`` is better decomposed by one thread."""
    return matrices.device.type == "cpu" and 0 < matrices.shape[-1] <= MOST_ROWS


def one_thread_each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Returns ``function`` of every item, in order, as many items at a time as PyTorch has CPU threads.

    PyTorch's number of threads is 1 meanwhile and as before afterwards. Results do not depend on it.

    Args:
        function: is called on other threads, where gradients and autocast are as in a fresh thread.
        items: what to call it with.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
