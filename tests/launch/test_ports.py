"""The port lease, with real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from hpcsngd.launch import ports


def free_block(size: int) -> int:
    """Returns the first of ``size`` free ports in a row."""
    for first in range(21000, 29000, 50):
        try:
            for port in range(first, first + size):
                ports.lease((port, port)).close()
        except ports.PortTakenError:
            continue
        return first
    raise AssertionError("no free ports on this machine")


@pytest.fixture
def first() -> int:
    return free_block(3)


@pytest.fixture
def taken(first: int) -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", first))):
        yield first


def test_a_taken_port_is_passed_over(taken: int) -> None:
    lease = ports.lease((taken, taken + 2), start=0)
    assert lease.hand_over() == taken + 1


def test_a_fixed_port_that_is_taken_is_an_error(taken: int) -> None:
    with pytest.raises(ports.PortTakenError, match=f"port {taken} is in use on {socket.gethostname()}"):
        ports.lease((taken, taken))


def test_a_held_port_is_nobody_elses_until_it_is_handed_over(first: int) -> None:
    lease = ports.lease((first, first))
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", first))
    assert lease.hand_over() == first
    socket.create_server(("", first)).close()


def test_two_leases_of_one_range_differ(first: int) -> None:
    one, two = (ports.lease((first, first + 2), start=0) for _ in range(2))
    assert one.port != two.port
    one.close()
    two.close()


def test_a_port_in_time_wait_can_be_leased(first: int) -> None:
    with socket.create_server(("127.0.0.1", first)) as server:
        client = socket.create_connection(("127.0.0.1", first))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first waits
        client.close()
    assert ports.lease((first, first)).hand_over() == first


def test_search_order_ephemeral_later_and_known_taken_last() -> None:
    order = list(ports.candidates((10, 15), (12, 13), avoid=frozenset({14}), start=4))
    assert order == [15, 10, 11, 12, 13, 14]


def test_default_range_is_outside_the_ephemeral_one() -> None:
    low, high = ports.ephemeral_range()
    assert 0 < low < high < 65536
    port = ports.lease((20000, 29999)).hand_over()
    assert 20000 <= port <= 29999
