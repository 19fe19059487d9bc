"""The lease of the rendezvous port: found free, held, handed over at the last moment.

A port drawn from a job id may be in use, and one in the kernel's ephemeral range may be taken by any outgoing
connection. So node 0 binds a port of the site's range, outside the ephemeral range as far as the two differ,
and lets go of it right before the process that will listen there starts. Between the two somebody else can
still take it; the agent then leases again (see `hpcsngd.launch.agent`).
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

EPHEMERAL_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PortTakenError(OSError):
    """No port of the range is free."""


class Lease:
    """A port that is held until `hand_over` or `close`."""

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        self.port: int = held.getsockname()[1]

    def hand_over(self) -> int:
        """Lets go of the port and returns it; the caller's process must listen there next."""
        self.close()
        return self.port

    def close(self) -> None:
        """Lets go of the port."""
        self._held.close()


def lease(ports: tuple[int, int], *, avoid: Iterable[int] = (), start: int | None = None) -> Lease:
    """Returns a held port of the range.

    Args:
        ports: first and last port allowed.
        avoid: ports that turned out to be taken; tried last.
        start: offset at which the search begins; default: random, so that jobs on one node do not race.

    Raises:
        PortTakenError: every port of the range is in use.
    """
    size = ports[1] - ports[0] + 1
    offset = secrets.randbelow(size) if start is None else start
    for port in candidates(ports, ephemeral_range(), avoid=frozenset(avoid), start=offset):
        with contextlib.suppress(PortTakenError):
            return Lease(_listen(port))
    where = f"port {ports[0]}" if size == 1 else f"every port in {ports[0]}-{ports[1]}"
    raise PortTakenError(errno.EADDRINUSE, f"{where} is in use on {socket.gethostname()}")


def candidates(
    ports: tuple[int, int], ephemeral: tuple[int, int], *, avoid: frozenset[int], start: int
) -> Iterator[int]:
    """Yields every port of the range once: round from ``start``, ephemeral ones later, avoided ones last."""
    size = ports[1] - ports[0] + 1
    turned = [ports[0] + (start + step) % size for step in range(size)]
    yield from sorted(turned, key=lambda port: (port in avoid, ephemeral[0] <= port <= ephemeral[1]))


def ephemeral_range() -> tuple[int, int]:
    """Returns the first and last port that the kernel gives to outgoing connections."""
    try:
        first, last = EPHEMERAL_FILE.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 32768, 60999  # Linux's default
    return int(first), int(last)


def _listen(port: int) -> socket.socket:
    """Returns a socket that listens on all addresses.

    It listens, and does not only bind: torch binds with SO_REUSEADDR, which ignores sockets that are merely
    bound, and so must we, or a port in TIME_WAIT would look taken for a minute after each run.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise PortTakenError(error.errno, f"port {port} is in use") from error
        raise
