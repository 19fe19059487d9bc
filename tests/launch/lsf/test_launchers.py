"""The commands of LSF's launchers: golden words, and the task that each launcher's variables name."""

from __future__ import annotations

import pytest

from hpcsngd.launch.lsf import launchers
from hpcsngd.launch.lsf.launchers import ResourceSets

HOSTS = ["c05n14", "c05n15"]
TASK = ["python", "-m", "task"]

# the three layouts of the archived Summit user guide: an agent, ranks that share a set, a set for each rank
LAYOUTS = [
    ((1, 6, 42, "all"), "-n 2 -r 1 -a 1 -g 6 -c 42 -b none -d packed"),
    ((6, 6, 42, "all"), "-n 2 -r 1 -a 6 -g 6 -c 42 -b packed:7 -d packed"),
    ((6, 6, 42, "one"), "-n 12 -r 6 -a 1 -g 1 -c 7 -b packed:7 -d packed"),
    ((2, 0, 42, "all"), "-n 2 -r 1 -a 2 -g 0 -c 42 -b packed:21 -d packed"),
]


@pytest.mark.parametrize(("layout", "options"), LAYOUTS)
def test_jsrun_states_its_resource_sets(layout: tuple[int, int, int, str], options: str) -> None:
    tasks, gpus, cores, visibility = layout
    sets = ResourceSets.usual(tasks, gpus, cores, "one" if visibility == "one" else "all")
    assert sets.misfit(cores=42, gpus=6) is None
    made = launchers.commands("jsrun", HOSTS, TASK, sets=sets, args=["--smpiargs=off"])
    assert [" ".join(words) for words in made] == [f"jsrun {options} --smpiargs=off python -m task"]


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("blaunch", ["blaunch -x c05n14 python -m task 0", "blaunch -x c05n15 python -m task 1"]),
        ("lsrun", ["lsrun -x -m c05n14 -- python -m task 0", "lsrun -x -m c05n15 -- python -m task 1"]),
    ],
)
def test_one_command_per_host_with_its_number(launcher: str, expected: list[str]) -> None:
    made = launchers.commands(launcher, HOSTS, TASK, args=["-x"])
    assert [" ".join(words) for words in made] == expected


def test_no_launcher_serves_one_host_only() -> None:
    assert launchers.commands("none", HOSTS[:1], TASK) == [[*TASK, "0"]]
    with pytest.raises(ValueError, match="none cannot start tasks on 2 hosts"):
        launchers.commands("none", HOSTS, TASK)


@pytest.mark.parametrize("launcher", ["jsrun", "blaunch", "lsrun", "none"])
@pytest.mark.parametrize("word", ["two words", "", "a\nb"])
def test_words_that_a_remote_shell_would_split_are_refused(launcher: str, word: str) -> None:
    with pytest.raises(ValueError, match="use words without blanks"):
        launchers.commands(launcher, HOSTS[:1], [word], sets=ResourceSets(1, 1, 0, 1, "none"))


def test_jsrun_without_sets_and_unknown_launchers_are_refused() -> None:
    with pytest.raises(ValueError, match="needs resource sets"):
        launchers.commands("jsrun", HOSTS, TASK)
    with pytest.raises(ValueError, match="launcher mpirun"):
        launchers.commands("mpirun", HOSTS, TASK)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (ResourceSets(6, 1, 1, 8, "packed:8"), "6 sets of 8 cores do not fit the 42 cores"),
        (ResourceSets(1, 1, 7, 42, "none"), "1 sets of 7 GPUs do not fit the 6 GPUs"),
        (ResourceSets(1, 6, 6, 42, "packed:8"), "6 tasks of 8 cores do not fit the 42 cores of their set"),
        (ResourceSets(1, 1, 6, 42, "packed"), "unknown binding packed"),
        (ResourceSets(1, 1, 6, 42, "rs:7"), "unknown binding rs:7"),
    ],
)
def test_sets_that_no_host_can_hold(sets: ResourceSets, words: str) -> None:
    assert words in (sets.misfit(cores=42, gpus=6) or "")


def family(prefix: str, *values: int) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {f"{prefix}{name}": str(value) for name, value in zip(names, values, strict=True)}


def test_jsms_word_goes_before_that_of_mpi() -> None:
    jsm = family("JSM_NAMESPACE_", 7, 12, 1, 6)
    mpi = family("OMPI_COMM_WORLD_", 0, 1, 0, 1)
    assert launchers.rank_from(jsm | mpi) == (7, 12, 1, 6)
    assert launchers.rank_from(mpi) == (0, 1, 0, 1)
    assert launchers.rank_from({"PMIX_RANK": "3", "LSF_PM_TASKID": "1"}) is None
    del jsm["JSM_NAMESPACE_LOCAL_SIZE"]
    assert launchers.rank_from(jsm) is None
