"""What bsub is asked: options by flavor, arrays, dependencies, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.lsf import flavors, request

ASKED: dict[str, Any] = {
    "name": "resnet50 hylo [3]",
    "nodes": 2,
    "tasks_per_node": 4,
    "walltime_min": 125,
    "cores_per_node": 42,
    "gpus_per_node": 6,
    "account": "ABC123",
    "queue": "batch",
}


def words(flavor: flavors.Flavor, **more: Any) -> list[str]:
    return request.bsub_words(flavor, request.directives(flavor=flavor, **{**ASKED, **more}), "/s/job.sh")


def test_a_summit_style_job() -> None:
    assert words("csm", alloc_flags="smt4 nvme") == [
        *("bsub", "-J", "resnet50-hylo-3", "-P", "ABC123", "-q", "batch", "-W", "2:05"),
        *("-nnodes", "2", "-alloc_flags", "smt4 nvme", "/s/job.sh"),
    ]


def test_an_ibm_job_asks_for_slots_and_gpus() -> None:
    asked = words("ibm", mem_gb=1.5, exclusive=True)
    assert asked == [
        *("bsub", "-J", "resnet50-hylo-3", "-P", "ABC123", "-q", "batch", "-W", "2:05"),
        *("-n", "84", "-R", "rusage[mem=1536MB] span[ptile=42]", "-gpu", "num=6", "-x", "/s/job.sh"),
    ]


def test_a_compatible_scheduler_gets_what_it_knows() -> None:
    asked = words("compatible", cores_per_node=None)
    assert asked[9:] == ["-n", "8", "-R", "span[ptile=4]", "/s/job.sh"]
    with pytest.raises(ValueError, match="unit of -M and rusage"):
        words("compatible", mem_gb=4)


@pytest.mark.parametrize(
    ("flavor", "options", "said"),
    [
        ("compatible", {"alloc_flags": "smt4"}, "bsub of flavor compatible has no option -alloc_flags"),
        ("compatible", {"gpu": "num=1"}, "bsub of flavor compatible has no option -gpu"),
        ("ibm", {"nnodes": 2}, "bsub of flavor ibm has no option -nnodes"),
        ("ibm", {"qq": 2}, "bsub of flavor ibm has no option -qq"),
        ("csm", {"P": "A", "W": "1:00"}, "-nnodes is required: a number of nodes"),
        ("csm", {"W": "1:00", "nnodes": 1}, "-P is required: a project"),
        ("csm", {"P": "A", "W": "1:00", "nnodes": 1, "n": 4}, "-n is refused where jobs ask for whole nodes"),
        ("csm", {"P": "A", "W": "1:00", "nnodes": 1, "R": "x"}, "-R needs the expert mode, -csm y"),
        ("csm", {"P": "A", "W": "1:00", "csm": "y", "nnodes": 1}, "-nnodes does not go with -csm y"),
    ],
)
def test_foreign_options_are_refused_before_bsub_misreads_them(
    flavor: flavors.Flavor, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SchedulerError) as caught:
        request.bsub_words(flavor, options, "/s/job.sh")
    assert said in str(caught.value)


def test_expert_mode_and_a_user_group_for_a_project() -> None:
    options: dict[str, Any] = {"G": "guests", "W": "1:00", "csm": "y", "R": "1*{select[LN]}"}
    assert request.bsub_words("csm", options, "s.sh")[-1] == "s.sh"


def test_bare_options_and_removed_ones() -> None:
    assert request.bsub_words("ibm", {"H": True, "x": False}, "s.sh") == ["bsub", "-H", "s.sh"]


@pytest.mark.parametrize(("minutes", "text"), [(1, "0:01"), (59, "0:59"), (60, "1:00"), (1441, "24:01")])
def test_wall_time_has_no_seconds(minutes: int, text: str) -> None:
    assert request.walltime(minutes) == text


def test_no_wall_time_below_a_minute() -> None:
    with pytest.raises(ValueError, match="whole minutes, asked: 0"):
        request.walltime(0)


@pytest.mark.parametrize(
    ("given", "name"),
    [("a b", "a-b"), ("x[1-3]%2", "x-1-3-2"), ("été", "t"), ("[]", "job"), ("n" * 99, "n" * 64)],
)
def test_names_are_made_acceptable(given: str, name: str) -> None:
    assert request.job_name(given) == name


def test_arrays_count_from_one_and_keep_to_their_bounds() -> None:
    assert request.array_name("grid x", 20, 4) == "grid-x[1-20]%4"
    assert request.array_name("grid", 20, 20) == "grid[1-20]"
    assert request.array_name("grid", 1000, None) == "grid[1-1000]"
    for count in (0, 1001):
        with pytest.raises(ValueError, match="allowed: 1 to 1000"):
            request.array_name("grid", count, None)


def test_ids_and_dependencies() -> None:
    assert request.lsf_id("60_4") == "60[4]"
    assert request.after(["12", "60_4"], "done") == "done(12) && done(60[4])"
    for ids, condition in ((["12; rm"], "done"), (["12"], "afterok")):
        with pytest.raises(ValueError, match="is no dependency of LSF"):
            request.after(ids, condition)


@pytest.mark.parametrize(
    ("lsid", "programs", "flavor"),
    [
        ("IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022\nCopyright", {"jsrun"}, "csm"),
        ("IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022", {"blaunch"}, "ibm"),
        ("Platform LSF 9.1.3", set(), "ibm"),
        ("volclava project 2.2, Nov 21 2026", {"lsrun"}, "compatible"),
        ("openlava project 4.0", {"jsrun"}, "compatible"),
        ("", set(), "compatible"),
    ],
)
def test_the_flavor_is_in_the_first_line(lsid: str, programs: set[str], flavor: str) -> None:
    assert flavors.detect(lsid, programs.__contains__) == flavor


def test_launchers_of_the_flavors() -> None:
    found = {each: [flavors.default_launcher(each, nodes) for nodes in (1, 2)] for each in flavors.FLAVORS}
    assert found == {"ibm": ["none", "blaunch"], "compatible": ["none", "lsrun"], "csm": ["jsrun", "jsrun"]}
    with pytest.raises(ValueError, match="LSF flavor 'vax'; allowed: auto, ibm, compatible, csm"):
        flavors.checked("vax")
