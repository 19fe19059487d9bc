"""What this host is called and where another is found: by the kernel and the resolver, or as in a rehearsal.

Hosts of a played cluster are this machine under other names, which no resolver knows.
"""

from __future__ import annotations

import os
import socket

from hpcsngd.launch.rehearse import cluster


def host_name() -> str:
    """Returns this host's name."""
    return os.environ.get(cluster.HOST) or socket.gethostname()


def address(host: str) -> str:
    """Returns where a host is found: its own name, but for one of a rehearsal."""
    placed = dict(word.split("=", 1) for word in os.environ.get(cluster.ADDRESSES, "").split())
    return placed.get(host, host)
