"""Containers: the words in front of a command, the variables that go in, and what a node must have."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import fingerprint
from hpcsngd.config.site import Container
from hpcsngd.launch import commands, container, environment, plan
from hpcsngd.launch.plan import Host, Plan

from .conftest import LOCAL_SITE, Configure

IMAGE = "/images/a.sif"


def site(**keys: Any) -> Container:
    return Container.model_validate({"image": IMAGE, **keys})


@pytest.fixture
def made(configure: Configure, host: Host) -> Plan:
    """A plan with an image and one bind of each kind."""
    section = {"image": IMAGE, "binds": ["/scratch:/s:ro"], "binds_if_present": ["/local"], "code": "bind"}
    return plan.make(configure(LOCAL_SITE | {"container": section}), host=host)


def test_the_words_in_order() -> None:
    words = container.exec_words(site(gpu_flag="--nv", args=["--no-home"]), "singularity")
    assert words == ("singularity", "exec", "--cleanenv", "--nv", "--no-home")


@pytest.mark.parametrize(
    ("runtime", "installed", "used"),
    [
        ("auto", None, "apptainer"),
        ("auto", "singularity", "singularity"),
        ("apptainer", "singularity", "apptainer"),
    ],
)
def test_runtime(runtime: str, installed: str | None, used: str) -> None:
    assert container.exec_words(site(runtime=runtime), installed) == (used, "exec", "--cleanenv")


def test_binds_come_without_repetition() -> None:
    assert container.binds(site(binds=["/a", "/b:/c:ro", "/a"]), ["/a"]) == ("/a", "/b:/c:ro")


def test_the_submitters_code_is_bound_over_that_of_the_image() -> None:
    package = Path(fingerprint.__file__).parent
    assert container.binds(site(code="bind"), []) == (f"{package}:/opt/hpcsngd/lib/hpcsngd:ro",)
    assert container.binds(site(code="image"), []) == ()


def test_a_folder_of_the_node_can_be_tmp() -> None:
    assert container.binds(site(tmp="/local ssd"), []) == ("/local ssd:/tmp",)


@pytest.mark.parametrize("path", ["/a b", "/it's", '/"', "/a,b", "/a:b", "/plain"])
def test_any_path_can_be_bound(path: str) -> None:
    assert container.source(f"{container.escaped(path)}:/inside:ro") == path
    assert container.source(container.escaped(path)) == path


def test_the_command_names_binds_working_directory_and_image(made: Plan) -> None:
    package = Path(fingerprint.__file__).parent
    words = commands.rank_command(made, "/runs/my run", 1)[4:]
    assert words == [
        *("apptainer", "exec", "--cleanenv"),
        *("--bind", f"{package}:/opt/hpcsngd/lib/hpcsngd:ro", "--bind", "/scratch:/s:ro"),
        *("--bind", "/local", "--bind", "/runs/my run", "--pwd", "/runs/my run", IMAGE),
        *("python", "-u", "-m", "hpcsngd.train.worker", "/runs/my run", "--attempt", "1"),
    ]


# What a node must have


def test_a_bind_that_a_node_may_lack_is_left_out(made: Plan) -> None:
    assert container.settle(made, exists=lambda path: path != "/local").binds_if_present == ()
    assert container.settle(made, exists=lambda path: True) == made


@pytest.mark.parametrize(
    ("lacking", "words"),
    [("/scratch", "/scratch does not exist on this node"), (IMAGE, f"no image at {IMAGE}")],
)
def test_what_must_be_there_is_named(made: Plan, lacking: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        container.settle(made, exists=lambda path: path != lacking)


def test_without_an_image_nothing_is_asked(made: Plan) -> None:
    bare = dataclasses.replace(made, image=None)
    assert container.settle(bare, exists=lambda path: False) == bare


# Variables


def exported(lines: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment after the lines, as bash has it."""
    script = "\n".join([*lines, "exec env -0"])
    done = subprocess.run(["bash", "-c", script], env=dict(given), capture_output=True, text=True, check=True)
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if item)


NASTY = 'it\'s "quoted" $HOME `id` $(id) \\ and\ntwo lines'


@pytest.mark.parametrize("prefix", ["APPTAINERENV_", "SINGULARITYENV_"])
def test_allowed_variables_go_in_and_others_do_not(prefix: str) -> None:
    given = {
        "PATH": os.environ["PATH"],
        "RANK": "3",
        "NCCL_SOCKET_IFNAME": NASTY,
        "LD_LIBRARY_PATH": "/host/lib",
        "MINE": "1",
        "MY_OTHER": "2",
        "CUDA_HOME": "/host/cuda",
    }
    after = exported(container.export_lines(container.passed_names(site(pass_env=["MY_*"]), ["MINE"])), given)
    inside = {name.removeprefix(prefix): value for name, value in after.items() if name.startswith(prefix)}
    assert inside == {"RANK": "3", "NCCL_SOCKET_IFNAME": NASTY, "MINE": "1", "MY_OTHER": "2"}


def test_what_a_preload_line_exports_goes_in() -> None:
    text = commands.shell_text(["export NCCL_DEBUG=INFO"], ["NCCL_*"])
    words = ["bash", "-c", text, "hpcsngd", "sh", "-c", 'echo "$APPTAINERENV_NCCL_DEBUG"']
    done = subprocess.run(words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    assert done.stdout == "INFO\n"


@pytest.mark.parametrize("word", ["A B", "A*B", "*", "A|B) rm", ""])
def test_only_names_can_be_passed(word: str) -> None:
    with pytest.raises(ValueError, match="is not a variable's name"):
        container.passed_names(site(pass_env=[word]), [])


def test_workers_in_an_image_are_told_which_code_submitted(made: Plan) -> None:
    env = environment.worker_environment({"SLURM_JOB_ID": "1"}, made)
    for prefix in ("APPTAINERENV_", "SINGULARITYENV_"):
        assert env[f"{prefix}HPCSNGD_CODE"] == fingerprint.identity()
        assert env[f"{prefix}PYTHONPATH"] == "/opt/hpcsngd/lib"
        assert env[f"{prefix}TMPDIR"] == "/tmp"
    assert env["APPTAINER_NO_EVAL"] == env["SINGULARITY_NO_EVAL"] == "1"
    assert "SLURM_JOB_ID" not in env


def test_without_an_image_the_environment_has_nothing_of_it(made: Plan) -> None:
    env = environment.worker_environment({}, dataclasses.replace(made, image=None))
    assert not [name for name in env if "APPTAINER" in name or "SINGULARITY" in name]
    assert "HPCSNGD_CODE" not in env


def test_a_plan_with_an_image_survives_its_record(made: Plan) -> None:
    assert Plan.from_record(made.to_record()) == made
    assert shlex.join(commands.rank_command(made, "/r", 1)) == shlex.join(
        commands.rank_command(Plan.from_record(made.to_record()), "/r", 1)
    )
