"""Which hosts compute: the variables in their order of trust, and the batch host that must not."""

from __future__ import annotations

import pytest

from hpcsngd.launch.lsf import hosts
from hpcsngd.launch.lsf.hosts import HostsError

PLAIN = {"LSB_HOSTS": "n3 n3 n2 n2", "LSB_MCPU_HOSTS": "n3 2 n2 2 "}
SUMMIT = {"LSB_MCPU_HOSTS": "batch3 1 c05n14 42 c05n15 42 "}


def find(environment: dict[str, str], nodes: int = 2, file: str | None = None, **more: object) -> list[str]:
    return hosts.compute_hosts(environment, lambda path: file, nodes=nodes, **more)  # type: ignore[arg-type]


def test_the_order_is_lsfs_and_blanks_at_the_end_are_no_host() -> None:
    assert find(PLAIN) == ["n3", "n2"]
    assert find({"LSB_MCPU_HOSTS": "n3 4 n2 1 n1 3 "}, 3) == ["n3", "n2", "n1"]


def test_the_host_file_is_trusted_most_and_lsb_hosts_least() -> None:
    told = PLAIN | {"LSB_DJOB_HOSTFILE": "/f"}
    assert find(told, file="a\na\nb\n") == ["a", "b"]
    assert find(told, file=None) == ["n3", "n2"]  # it cannot be read here
    assert hosts.allocated({"LSB_HOSTS": "x x y"}, lambda _: None) == ("LSB_HOSTS", {"x": 2, "y": 1})
    assert hosts.allocated(PLAIN | {"LSB_HOSTS": "other"}, lambda _: None)[0] == "LSB_MCPU_HOSTS"


def test_a_batch_host_computes_nothing() -> None:
    assert find(SUMMIT, has_jsrun=True) == ["c05n14", "c05n15"]
    assert find({"LSB_MCPU_HOSTS": "b 1 x 1"}, 1, batch_host="yes") == ["x"]
    assert find({"LSB_MCPU_HOSTS": "b 1 x 1 ", "CSM_ALLOCATION_ID": "7"}, 1) == ["x"]
    # one host too many, of equal slots, and its name
    assert find({"LSB_HOSTS": "login1 x"}, 1, has_jsrun=True) == ["x"]


def test_on_plain_lsf_the_first_host_computes() -> None:
    uneven = {"LSB_MCPU_HOSTS": "n1 1 n2 4 "}
    assert find(uneven) == ["n1", "n2"]
    assert find(uneven, batch_host="no", has_jsrun=True) == ["n1", "n2"]
    assert find({"LSB_MCPU_HOSTS": "batchy 1 "}, 1, has_jsrun=True) == ["batchy"]


def test_a_wrong_number_and_silence_are_errors() -> None:
    with pytest.raises(HostsError, match=r"asked for 3 node\(s\), LSB_MCPU_HOSTS names 2: n3, n2$"):
        find(PLAIN, 3)
    with pytest.raises(HostsError, match=r"names 3: batch3, c05n14, c05n15; batch3 only runs the script"):
        find(SUMMIT, 3, has_jsrun=True)
    with pytest.raises(HostsError, match="none of LSB_DJOB_HOSTFILE, LSB_MCPU_HOSTS, LSB_HOSTS names a host"):
        find({})
    with pytest.raises(HostsError, match="not a list of hosts and slots: n1 n2"):
        find({"LSB_MCPU_HOSTS": "n1 n2"})


def test_names_are_compared_without_domains() -> None:
    assert hosts.index_of("c2.summit.olcf.gov", ["c1", "c2"]) == 1
    assert hosts.index_of("c2", ["c1.a.b", "c2.a.b"]) == 1
    assert hosts.index_of("c3", ["c1", "c2"]) is None
    assert hosts.index_of("10.0.0.2", ["10.0.0.1", "10.0.0.2"]) == 1
