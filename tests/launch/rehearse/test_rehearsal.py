"""Rehearsals: the stage that a site makes, and the whole play on Summit's layout and on Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd.config import resolve
from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import PreflightError
from hpcsngd.launch import plan
from hpcsngd.launch.rehearse import stage
from hpcsngd.launch.rehearse.cluster import Cluster


def played(site: str, **environment: str) -> tuple[Resolved, Cluster]:
    resolved = resolve.resolve(site, "digits-hylo", [], environment={"USER": "me", **environment})
    return resolved, stage.cluster(resolved, plan.make(resolved, is_dry=True), 2)


def test_summit_is_played_with_its_batch_host_rules_and_launcher() -> None:
    _, cluster = played("summit")
    assert (cluster.kind, cluster.flavor, cluster.batch_host) == ("lsf", "csm", "batch1")
    assert (cluster.slots, cluster.gpus, cluster.launchers) == (42, 6, ("jsrun",))
    assert cluster.queues == ("batch", "killable", "batch-hm", "debug")
    assert cluster.is_project_needed
    assert cluster.refusal(nodes=50, walltime_min=360, queue="batch") is None
    assert cluster.refusal(nodes=45, walltime_min=121, queue="batch")
    assert cluster.addresses["c01"] != cluster.addresses["batch1"]


def test_slurm_is_played_without_a_batch_host() -> None:
    _, cluster = played("slurm")
    assert (cluster.kind, cluster.batch_host, cluster.launchers) == ("slurm", "", ())
    assert len(cluster.hosts) == 3


def test_what_this_machine_lacks_is_left_out_and_the_rest_is_kept() -> None:
    resolved, _ = played("summit")
    made = plan.make(resolved, is_dry=True)
    small = stage.scaled(resolved, made, run_root="/r", nodes=2, ranks=2)
    kept = plan.make(small, is_dry=True)
    assert (kept.image, kept.preload, kept.backend, kept.python) == (None, (), "gloo", kept.agent_python)
    assert kept.env["HPCSNGD_DEVICE"] == "cpu"
    assert (kept.launcher, kept.launch_args, kept.batch_host) == ("jsrun", ("--smpiargs=off",), "yes")
    assert kept.directives["alloc_flags"] == made.directives["alloc_flags"]
    assert (kept.nodes, kept.ranks_per_node, kept.gpus_per_node) == (2, 2, 2)


def test_a_site_without_a_scheduler_cannot_be_played() -> None:
    with pytest.raises(PreflightError, match="no scheduler to be played"):
        played("local")


def rehearse(folder: Path, site: str, *scenes: str) -> tuple[int, dict[str, Any], str]:
    words = ["rehearse", "--site", site, "--exp", "digits-hylo", "--folder", str(folder), "--json"]
    chosen = [word for scene in scenes for word in ("--scene", scene)]
    done = subprocess.run(
        [sys.executable, "-c", "from hpcsngd.cli import main; main()", *words, *chosen],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


# in parts: a loaded machine needs five minutes for all of them
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("site", "scenes", "held"),
    [
        (
            "summit",
            ("policy", "completion"),
            [
                "at its full size",
                "quotes the rule",
                "too",
                "completes",
                "compute nodes alone",
                "the master",
                "rank",
            ],
        ),
        (
            "summit",
            ("preemption", "limit"),  # the second goes by the time that the first one's start took
            ["trains", "preemption", "stays cancelled", "left running", "time limit", "told from"],
        ),
        ("summit", ("failure",), ["trains", "killed worker"]),
        ("slurm", ("completion",), ["completes", "compute nodes alone", "the master", "rank"]),
    ],
)
def test_a_play_holds(tmp_path: Path, site: str, scenes: tuple[str, ...], held: list[str]) -> None:
    status, told, errors = rehearse(tmp_path / "r", site, *scenes)
    assert status == 0, (told, errors)
    assert told["passed"]
    names = [check["name"] for check in told["checks"]]
    assert len(names) == len(held) + 1
    assert all(words in name for words, name in zip(held, names, strict=False)), names
    assert names[-1] == "nothing of it is left running"


def test_a_rehearsal_that_fails_says_so(tmp_path: Path) -> None:
    site = tmp_path / "odd.yaml"
    facts: dict[str, Any] = {
        "description": "a site with an option that its scheduler does not know",
        "scheduler": {"kind": "slurm", "options": {"frobnicate": "1"}},
    }
    site.write_text(yaml.safe_dump(facts))
    status, told, _ = rehearse(tmp_path / "r", str(site), "policy")
    assert status == 1
    assert not told["passed"]
    assert "unrecognized option '--frobnicate=1'" in told["checks"][0]["detail"]
