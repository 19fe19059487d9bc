"""The site's limits: which queue is chosen, what is refused, and the rule that is quoted."""

from __future__ import annotations

from typing import Any

import pytest

from hpcsngd.launch import limits

from .conftest import Configure

SUMMIT_LIKE: dict[str, Any] = {
    "description": "bins",
    "scheduler": {"kind": "lsf"},
    "gpus_per_node": 6,
    "cpus_per_node": 42,
    "limits": [
        {"max_nodes": 45, "max_walltime": "2h", "queue": "batch"},
        {"min_nodes": 46, "max_nodes": 91, "max_walltime": "6h", "queue": "batch"},
        {"max_nodes": 4, "max_walltime": "4h", "queue": "small"},
        {"max_nodes": 91, "max_walltime": "1d", "queue": "killable", "on_request": True},
    ],
}


@pytest.mark.parametrize(
    ("nodes", "walltime", "queue"),
    [
        (1, "2h", "batch"),
        (50, "6h", "batch"),
        (4, "3h", "small"),
        (5, "3h", None),
        (50, "7h", None),
        (4000, "1h", None),
    ],
)
def test_the_first_queue_that_allows_a_job_is_chosen(
    configure: Configure, nodes: int, walltime: str, queue: str | None
) -> None:
    resolved = configure(SUMMIT_LIKE, nodes=nodes, walltime=walltime)
    assert limits.queue(resolved) == queue
    assert bool(list(limits.problems(resolved, "limits"))) is (queue is None)


def test_a_named_queue_is_kept_and_held_to_its_own_rows(configure: Configure) -> None:
    named = SUMMIT_LIKE | {"scheduler": {"kind": "lsf", "queue": "killable"}}
    assert limits.queue(configure(named, nodes=10, walltime="20h")) == "killable"
    assert list(limits.problems(configure(named, nodes=10, walltime="20h"), "limits")) == []
    batch = SUMMIT_LIKE | {"scheduler": {"kind": "lsf", "queue": "batch"}}
    found = list(limits.problems(configure(batch, nodes=10, walltime="20h"), "site x, limits (x.yaml:9)"))
    assert len(found) == 1
    assert found[0].startswith("site x, limits (x.yaml:9): 10 node(s) for 20:00:00 in batch fits no row")
    assert "{max_nodes: 45, max_walltime: 02:00:00, queue: batch}" in found[0]
    assert "{max_nodes: 91, max_walltime: 1-00:00:00, queue: killable, on_request: true}" in found[0]


def test_runs_that_may_be_chained_are_cut_to_the_limit(configure: Configure) -> None:
    asked = {"nodes": 10, "walltime": "9h", "restart__on": ["timeout"]}
    resolved = configure(SUMMIT_LIKE, **asked)
    assert limits.job_walltime_min(resolved) == 120
    assert limits.queue(resolved) == "batch"
    assert list(limits.problems(configure(SUMMIT_LIKE, **asked, restart__max_attempts=4), "limits")) == [
        "09:00:00 in jobs of 02:00:00 are 5 attempts, restart.max_attempts allows 4"
    ]


def test_without_rows_the_scheduler_decides(configure: Configure) -> None:
    site = {key: value for key, value in SUMMIT_LIKE.items() if key != "limits"}
    resolved = configure(site, nodes=5000, walltime="9d")
    assert limits.queue(resolved) is None
    assert list(limits.problems(resolved, "limits")) == []
