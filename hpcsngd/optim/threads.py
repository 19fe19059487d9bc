"""Small work on the CPU by one thread: waking others costs more than they do.

LAPACK's threads wait for one another at every column of a small matrix: two of them take 1.5 times the CPU
time of one for the eigenvalues of 144 to 576 rows, and longer by the clock where cores are shared. The many
small products of a step of HyLo (ResNet-32, 128 rows) took 10.0 ms of CPU time with two, 7.9 with one, and
the interpolations of KID 41 with two and 17 with one, which was also faster by the clock (22 and 17).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

#: Matrices with more rows are decomposed one after the other by all threads: there are few of them, and they
#: have work for all. Not measured; the gain of one thread each was, up to 576 rows.
MOST_ROWS = 1024
#: Up to so many multiplications in all, one thread makes a series of products: about 4 ms of its time.
MOST_MULTIPLICATIONS = 2**27

#: The same for a series in which every product has at most so many; larger ones were not measured.
MOST_OF_EACH = 2**24

T = TypeVar("T")
R = TypeVar("R")


def runs_alone(matrices: Tensor) -> bool:
    """Returns whether each of these matrices ``(b, n, n)`` is better decomposed by one thread."""
    return matrices.device.type == "cpu" and 0 < matrices.shape[-1] <= MOST_ROWS


@contextmanager
def one_thread_if(is_small: bool) -> Iterator[None]:
    """Has PyTorch use one CPU thread inside the ``with`` block; changes nothing where work is not small."""
    threads = torch.get_num_threads()
    if is_small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread_each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Returns ``function`` of every item, in order, as many items at a time as PyTorch has CPU threads.

    PyTorch's number of threads is 1 meanwhile and as before afterwards. Results do not depend on it.

    Args:
        function: is called on other threads, where gradients and autocast are as in a fresh thread.
        items: what to call it with.
    """
    workers = max(1, min(torch.get_num_threads(), len(items)))
    # A thread learns PyTorch's number of threads when it first asks for it.
    with one_thread_if(True), ThreadPoolExecutor(workers, initializer=torch.get_num_threads) as pool:
        return list(pool.map(function, items))
