"""The main job inside a real image on the real cluster: two nodes, both launch modes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd import fingerprint, rundir
from hpcsngd.config.resolve import Resolved, parse_set, resolve
from hpcsngd.errors import PreflightError
from hpcsngd.launch import submit
from hpcsngd.launch.images import sif
from tests.slurm.conftest import site_data

pytestmark = [
    pytest.mark.apptainer,
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(2400),  # the first test may build the image
    pytest.mark.usefixtures("slurm_cluster"),
]

Inside = Callable[..., Resolved]


@pytest.fixture
def inside(torch_image: Path, tmp_path: Path) -> Inside:
    """Returns a function that resolves the cluster's site, with the image, and the digits."""

    def make(mode: str, *, code: str = "bind", env: dict[str, str] | None = None) -> Resolved:
        section: dict[str, Any] = {"runtime": "apptainer", "image": str(torch_image), "code": code}
        data = site_data(tmp_path / "my runs", mode, ranks_per_node=1, container=section)
        data["env"] = {"OMP_NUM_THREADS": "1", **(env or {})}
        data["launch"]["rendezvous_timeout_s"] = 300  # a loaded machine takes its time to import torch twice
        file = tmp_path / "cluster.yaml"
        file.write_text(yaml.safe_dump(data))
        sets = [parse_set(text) for text in ("epochs=2", "batch_size=32", "nodes=2")]
        return resolve(str(file), "digits-hylo", sets, environment={})

    return make


@pytest.mark.parametrize("mode", ["torchrun", "per_rank"])
def test_two_nodes_train_inside_the_image(inside: Inside, mode: str) -> None:
    run = submit.submit(inside(mode), argv=["test"]).run
    ended = submit.wait(run, poll_s=0.5)
    assert ended.state == "completed", ended.reason
    assert ended.result is not None
    assert ended.result["test_accuracy"] > 0.8
    assert len(rundir.read_yaml(run.attempt(1).attempt_yaml)["hosts"]) == 2


def test_an_image_with_another_hpcsngd_is_told_by_the_worker(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the host's code had changed between submission and start, or the image had no labels."""
    resolved = inside("torchrun", env={"HPCSNGD_CODE": "0.0.1+000000000000"})
    ended = submit.wait(submit.submit(resolved, argv=["test"]).run, poll_s=0.5)
    assert ended.state == "failed"
    assert f"the image has hpcsngd {fingerprint.identity()}, but 0.0.1+000000000000 submitted" in ended.reason


def test_an_image_without_code_is_refused_before_submission(inside: Inside) -> None:
    with pytest.raises(PreflightError, match=r"the image brings no hpcsngd .*set container\.code: bind"):
        submit.submit(inside("torchrun", code="image"), argv=["test"])


def test_the_image_says_what_it_is(torch_image: Path) -> None:
    found = sif.read(torch_image)
    assert found.arch == platform.machine()
    assert found.labels is not None
    assert found.labels["org.hpcsngd.base"] == "debian"
    assert found.labels["org.hpcsngd.pin.torch"] == "2.6.0"
    assert os.access(torch_image, os.R_OK)
