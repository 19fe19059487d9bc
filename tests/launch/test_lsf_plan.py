"""Plans and dry runs of LSF sites: what bsub is asked, what jsrun gets, and why each line is there."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import fingerprint
from hpcsngd.config import resolve
from hpcsngd.config.resolve import Override, Resolved
from hpcsngd.errors import ConfigError, PreflightError
from hpcsngd.launch import plan, scripts
from hpcsngd.launch.lsf.launchers import ResourceSets
from hpcsngd.launch.plan import Host, Plan

from .conftest import Configure
from .test_scripts import GOLDEN

CSM: dict[str, Any] = {
    "description": "LSF with jsrun",
    "scheduler": {"kind": "lsf", "flavor": "csm", "account": "abc", "alloc_flags": "smt4 nvme"},
    "gpus_per_node": 6,
    "cpus_per_node": 42,
}
PLAIN: dict[str, Any] = {
    "description": "plain LSF",
    "scheduler": {"kind": "lsf", "flavor": "ibm", "queue": "normal"},
    "gpus_per_node": 4,
    "cpus_per_node": 16,
}


@pytest.fixture
def fixed_python(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The golden files name one interpreter and one image."""
    monkeypatch.setattr("sys.executable", host.python)
    return host


def changed(site: dict[str, Any], **changes: Any) -> dict[str, Any]:
    merged = {
        key: site[key] | value if isinstance(value, dict) and key in site else value
        for key, value in changes.items()
    }
    return site | merged


def made(configure: Configure, host: Host, site: dict[str, Any], **overrides: Any) -> Plan:
    return plan.make(configure(site, **overrides), host=host)


def test_summits_words(configure: Configure, host: Host) -> None:
    found = made(configure, host, CSM, nodes=2, gpus_per_node=6, ranks_per_node=6)
    assert found.directives == {
        "J": "standin",
        "P": "abc",
        "W": "0:30",
        "nnodes": 2,
        "alloc_flags": "smt4 nvme",
    }
    assert (found.launcher, found.flavor, found.agents_per_node) == ("jsrun", "csm", 1)
    assert found.jsrun_sets == ResourceSets(1, 1, 6, 42, "none")
    assert Plan.from_record(found.to_record()) == found


def test_ranks_of_their_own_get_sets_by_what_they_may_see(configure: Configure, host: Host) -> None:
    single = {"mode": "per_rank"}
    asked = {"nodes": 2, "gpus_per_node": 6, "ranks_per_node": 6}
    shared = made(configure, host, changed(CSM, launch=single), **asked)
    assert shared.jsrun_sets == ResourceSets(1, 6, 6, 42, "packed:7")
    alone = made(configure, host, changed(CSM, launch=single | {"gpu_visibility": "one"}), **asked)
    assert alone.jsrun_sets == ResourceSets(6, 1, 1, 7, "packed:7")
    stated = {"per_host": 2, "tasks": 3, "gpus": 3, "cores": 21, "bind": "packed:7"}
    own = made(configure, host, changed(CSM, launch=single | {"resource_sets": stated}), **asked)
    assert own.jsrun_sets == ResourceSets(2, 3, 3, 21, "packed:7")


def test_plain_lsf_counts_slots(configure: Configure, host: Host) -> None:
    found = made(configure, host, PLAIN, nodes=2, gpus_per_node=4, ranks_per_node=4)
    assert found.directives == {
        "J": "standin",
        "q": "normal",
        "W": "0:30",
        "n": 32,
        "R": "span[ptile=16]",
        "gpu": "num=4",
    }
    assert (found.launcher, found.jsrun_sets) == ("blaunch", None)


@pytest.mark.parametrize(
    ("flavor", "nodes", "launcher"),
    [("ibm", 2, "blaunch"), ("compatible", 2, "lsrun"), ("ibm", 1, "none"), ("csm", 1, "jsrun")],
)
def test_launcher_and_flavor_are_found_or_set(
    configure: Configure, host: Host, flavor: Any, nodes: int, launcher: str
) -> None:
    here = dataclasses.replace(host, flavor=lambda: flavor)
    site = changed(CSM, scheduler={"flavor": "auto", "alloc_flags": None})
    found = made(configure, here, site, nodes=nodes, gpus_per_node=6, ranks_per_node=6)
    assert (found.flavor, found.launcher) == (flavor, launcher)


@pytest.mark.parametrize(
    ("site", "overrides", "words"),
    [
        (changed(CSM, launch={"launcher": "srun"}), {}, "srun does not work with lsf; allowed: jsrun"),
        (
            changed(PLAIN, launch={"launcher": "none"}),
            {"nodes": 2},
            "none starts agents on the first host only",
        ),
        (changed(CSM, cpus_per_node=None), {}, "jsrun is told the cores of a node"),
        (changed(CSM, scheduler={"options": {"n": 4}}), {}, "-n is refused where jobs ask for whole nodes"),
        (changed(CSM, scheduler={"account": None}), {}, "-P"),
        (
            changed(PLAIN, scheduler={"flavor": "compatible", "alloc_flags": "smt4"}),
            {},
            "bsub of flavor compatible has no option -alloc_flags",
        ),
        (
            changed(CSM, launch={"resource_sets": {"per_host": 6, "tasks": 1, "gpus": 1, "cores": 8}}),
            {},
            "6 sets of 8 cores do not fit the 42 cores",
        ),
        (
            changed(CSM, launch={"resource_sets": {"per_host": 2, "tasks": 1, "gpus": 3, "cores": 21}}),
            {},
            "2 x 1 tasks on a node, launch.mode torchrun starts 1",
        ),
    ],
)
def test_what_a_flavor_or_launcher_cannot_do_is_refused(
    configure: Configure, host: Host, site: dict[str, Any], overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(PreflightError) as caught:
        made(configure, host, site, **overrides)
    assert words in str(caught.value)


def test_options_can_be_added_replaced_and_left_out(configure: Configure, host: Host) -> None:
    scheduler = {"options": {"q": "debug", "core_isolation": 2}, "skip_options": ["alloc_flags"]}
    found = made(configure, host, changed(CSM, scheduler=scheduler)).directives
    assert (found["q"], found["core_isolation"]) == ("debug", "2")
    assert "alloc_flags" not in found


def summit(**overrides: Any) -> Resolved:
    layers = [
        Override(resolve.full_path(key.replace("__", "."), "test"), value, "test")
        for key, value in overrides.items()
    ]
    return resolve.resolve("summit", "resnet50-hylo", layers, environment={"USER": "me"})


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_dry_run_on_summit(mode: str, fixed_python: Host) -> None:
    changes = (
        {} if mode == "torchrun" else {"site__launch__mode": mode, "site__launch__gpu_visibility": "one"}
    )
    resolved = summit(nodes=50, gpus_per_node=6, ranks_per_node=6, walltime="6h", **changes)
    text = scripts.dry_run(resolved, host=fixed_python).replace(fingerprint.identity(), "CODE")
    golden = GOLDEN / f"summit-{mode.replace('_', '-')}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


def test_each_option_names_its_cause(fixed_python: Host) -> None:
    text = scripts.dry_run(summit(nodes=50, walltime="6h"), host=fixed_python)
    rows = {row.split()[0]: row for row in text.splitlines() if row.startswith("-")}
    file = Path("site_configs", "summit.yaml")
    lines = file.read_text().splitlines()

    def line(beginning: str) -> str:
        return (
            f"{file}:{next(n for n, row in enumerate(lines, start=1) if row.strip().startswith(beginning))}"
        )

    assert rows["-P"].endswith(line("account:"))
    assert rows["-alloc_flags"].endswith(line("alloc_flags:"))
    assert rows["-c"].endswith(line("cpus_per_node:"))
    assert "min_nodes: 46" in rows["-q"]
    assert rows["-q"].endswith(line("limits:"))
    assert "hpcsngd" in rows["-d"]


def test_a_retired_site_can_be_looked_at_but_not_used(host: Host) -> None:
    resolved = summit()
    with pytest.raises(PreflightError, match="the system is retired"):
        plan.make(resolved, host=host)
    shown = scripts.dry_run(resolved, host=host)
    assert "# a submission from here would be refused: site summit, status" in shown


def test_lassen_charges_a_bank() -> None:
    environment = {"LASSEN_BANK": "guests", "HPCSNGD_VENV": "/venv"}
    found = plan.make(
        resolve.resolve("lassen", "digits-hylo", [], environment=environment), is_dry=True
    ).directives
    assert (found["G"], found["q"], found["nnodes"], found["core_isolation"]) == ("guests", "pbatch", 1, "2")
    with pytest.raises(ConfigError, match="LASSEN_BANK"):
        resolve.resolve("lassen", "digits-hylo", [], environment={})
