"""Plans: what is asked for, and what is refused before anybody is asked."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.errors import PreflightError
from hpcsngd.launch import directives, plan, preflight
from hpcsngd.launch.plan import Host, Plan

from .conftest import Configure

SLURM_SITE: dict[str, Any] = {
    "description": "cluster",
    "arch": "x86_64",
    "scheduler": {"kind": "slurm", "account": "abc", "partition": "gpu"},
    "gpus_per_node": 4,
    "cpus_per_node": 32,
    "limits": [
        {"max_nodes": 4, "max_walltime": "2h", "queue": "gpu"},
        {"min_nodes": 5, "max_nodes": 16, "max_walltime": "30m", "queue": "gpu"},
        {"max_nodes": 64, "max_walltime": "24h", "queue": "big"},
    ],
}


def changed(**changes: Any) -> dict[str, Any]:
    return SLURM_SITE | {
        key: (SLURM_SITE[key] | value if isinstance(value, dict) and key in SLURM_SITE else value)
        for key, value in changes.items()
    }


def refusal(configure: Configure, host: Host, site: dict[str, Any], **overrides: Any) -> str:
    with pytest.raises(PreflightError) as caught:
        plan.make(configure(site, **overrides), host=host)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_plan_counts_ranks_cores_and_agents(configure: Configure, host: Host) -> None:
    made = plan.make(configure(SLURM_SITE, nodes=2, gpus_per_node=4, ranks_per_node=4), host=host)
    assert (made.world_size, made.cpus_per_rank, made.agents_per_node, made.cpus_per_agent) == (8, 8, 1, 32)
    assert (made.backend, made.launcher, made.ports) == ("nccl", "srun", (20000, 29999))
    single = plan.make(configure(changed(launch={"mode": "per_rank"}), nodes=2, ranks_per_node=4), host=host)
    assert (single.agents_per_node, single.cpus_per_agent) == (4, 8)


def test_a_plan_survives_its_record(configure: Configure, host: Host) -> None:
    made = plan.make(configure(changed(preload=["module load x"], env={"A": "b"})), host=host)
    assert Plan.from_record(made.to_record()) == made


@pytest.mark.parametrize(
    ("name", "expected"),
    [("digits-hylo", "digits-hylo"), ("a b/ç", "a-b"), ("x" * 80, "x" * 64), ("///", "hpcsngd")],
)
def test_job_names_are_what_schedulers_accept(name: str, expected: str) -> None:
    assert plan.job_name(name) == expected


@pytest.mark.parametrize(("gb", "text"), [(None, None), (0, "0"), (480, "480G"), (1.5, "1536M")])
def test_memory_in_slurms_words(gb: float | None, text: str | None) -> None:
    assert directives.memory(gb) == text


@pytest.mark.parametrize(
    ("request_kind", "expected"),
    [("gpus-per-node", ("gpus-per-node", 4)), ("gres", ("gres", "gpu:4")), ("none", None)],
)
def test_gpus_are_asked_for_as_the_site_says(
    configure: Configure, host: Host, request_kind: str, expected: tuple[str, str | int] | None
) -> None:
    site = changed(scheduler={"gpu_request": request_kind})
    asked = plan.make(configure(site, gpus_per_node=4, ranks_per_node=4), host=host).directives
    found = {key: value for key, value in asked.items() if "gpu" in str(value) or key == "gpus-per-node"}
    found.pop("partition", None)
    assert found == (dict([expected]) if expected else {})


def test_options_win_and_false_removes(configure: Configure, host: Host) -> None:
    site = changed(scheduler={"options": {"time": "7", "account": False, "mail-type": "END", "hold": True}})
    asked = plan.make(configure(site), host=host).directives
    assert (asked["time"], asked["mail-type"], asked["hold"]) == ("7", "END", True)
    assert "account" not in asked
    assert asked["requeue"] is True
    fixed = changed(scheduler={"options": {"no-requeue": True}})
    assert "requeue" not in plan.make(configure(fixed), host=host).directives


def test_limits_are_refused_with_every_row_and_its_place(configure: Configure, host: Host) -> None:
    text = refusal(configure, host, SLURM_SITE, nodes=8, walltime="01:00:00")
    assert "8 node(s) for 01:00:00 in gpu fits no row" in text
    assert "{max_nodes: 4, max_walltime: 02:00:00, queue: gpu}; {max_nodes: 16" in text
    assert "max_walltime: 00:30:00, min_nodes: 5, queue: gpu}" in text
    assert "testsite.yaml:" in text
    assert plan.make(configure(SLURM_SITE, nodes=8, walltime="30m"), host=host).nodes == 8


def test_all_refusals_come_at_once(configure: Configure, host: Host) -> None:
    text = refusal(configure, host, SLURM_SITE, nodes=99, gpus_per_node=8, ranks_per_node=48)
    assert "a node has 4 GPUs, asked: 8" in text
    assert "48 ranks per node need as many GPUs, asked: 8" in text
    assert "a node has 32 cores, asked: 48 ranks" in text
    assert "99 node(s)" in text
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("site", "overrides", "words"),
    [
        (changed(status="retired"), {}, "the system is retired"),
        (changed(scheduler={"kind": "ssh", "hosts": ["a"]}), {"nodes": 2}, "ssh has 1 host(s), asked: 2"),
        (changed(launch={"launcher": "jsrun"}), {}, "jsrun does not work with slurm"),
        (changed(launch={"launcher": "none"}), {"nodes": 2}, "none starts one agent, but this job needs 2"),
        (changed(launch={"gpu_visibility": "one"}), {"gpus_per_node": 2}, "one needs launch.mode: per_rank"),
        (changed(scheduler={"kind": "local"}, limits=[]), {"nodes": 2}, "local is one node, asked: 2"),
        (
            changed(scheduler={"kind": "local"}, arch="ppc64le"),
            {},
            "nodes are ppc64le, this machine is x86_64",
        ),
    ],
)
def test_refusals(
    configure: Configure, host: Host, site: dict[str, Any], overrides: dict[str, Any], words: str
) -> None:
    assert words in refusal(configure, host, site, **overrides)


def test_missing_files_are_refused(configure: Configure, host: Host) -> None:
    bare = dataclasses.replace(host, exists=lambda path: False)
    with_image = changed(container={"image": "/images/a.sif"})
    text = refusal(configure, bare, with_image)
    assert "no image at /images/a.sif" in text
    words = shlex.split(text.partition("make it with: ")[2])
    assert words[:4] == ["hpcsngd", "container", "build", "--site"]
    assert Path(words[4]).name == "testsite.yaml"  # known by its path alone
    assert Path(words[4]).is_file()
    with_python = changed(launch={"python": "/opt/py/bin/python"})
    assert "no Python at /opt/py/bin/python" in refusal(configure, bare, with_python)


def test_the_remedy_names_a_known_site_by_its_name(
    configure: Configure, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCSNGD_SITES", str(tmp_path))
    other = dataclasses.replace(host, image_arch=lambda path: "aarch64")
    text = refusal(configure, other, changed(container={"image": "/images/a.sif"}))
    assert "hpcsngd container build --site testsite --force" in text


def test_an_image_of_another_architecture_is_refused(configure: Configure, host: Host) -> None:
    other = dataclasses.replace(host, image_arch=lambda path: "aarch64")
    text = refusal(configure, other, changed(container={"image": "/images/a.sif"}))
    assert "the image is built for aarch64, the nodes are x86_64" in text


def test_a_missing_encoder_is_refused(configure: Configure, host: Host) -> None:
    asked = {
        "data__name": "rte",
        "data__tokenizer": "bert-base-uncased",
        "model__name": "encoder",
        "model__args": {},
        "preconditioner": None,
    }
    found = {"/data/RTE/train.tsv", "/data/RTE/dev.tsv"}
    without = dataclasses.replace(host, exists=found.__contains__)
    text = refusal(configure, without, changed(data_root="/data"), **asked)
    assert "experiment data.tokenizer: no encoder in /data/bert-base-uncased (site.data_root, " in text
    complete = found | {"/data/bert-base-uncased/config.json"}
    present = dataclasses.replace(host, exists=complete.__contains__)
    assert plan.make(configure(changed(data_root="/data"), **asked), host=present).nodes == 1


def test_missing_data_are_refused_with_the_way_to_get_them(configure: Configure, host: Host) -> None:
    bare = dataclasses.replace(host, exists=lambda path: False)
    text = refusal(configure, bare, changed(data_root="/data"), data__name="fashion-mnist")
    assert "data set fashion-mnist is not below /data" in text
    assert "dataset-fashion-mnist" in text
    for changes in ({"data__download": True}, {"data__name": "digits"}):
        asked = {"data__name": "fashion-mnist", **changes}
        assert plan.make(configure(changed(data_root="/data"), **asked), host=bare).nodes == 1
    present = dataclasses.replace(host, exists=lambda path: path.startswith("/data/fashion-mnist/"))
    assert (
        plan.make(configure(changed(data_root="/data"), data__name="fashion-mnist"), host=present).nodes == 1
    )


@pytest.mark.parametrize(
    ("name", "found", "lacking"),
    [
        (
            "cifar10",
            ("cifar-10-batches-py", "cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"),
            "/data/cifar-10-batches-py lacks data_batch_2, data_batch_3, data_batch_4, data_batch_5 (",
        ),
        ("imagenet", ("imagenet/train",), "/data/imagenet lacks val ("),
        ("imagenet", ("imagenet/train", "imagenet/validation"), ""),
        (
            "features",
            ("features_train.pt", "targets_train.pt", "features_val.pt"),
            "/data lacks targets_val.pt (",
        ),
    ],
)
def test_data_of_which_a_part_is_missing_are_refused_by_its_name(
    configure: Configure, host: Host, name: str, found: tuple[str, ...], lacking: str
) -> None:
    some = dataclasses.replace(host, exists=lambda path: path in {f"/data/{each}" for each in found})
    if lacking:
        text = refusal(configure, some, changed(data_root="/data"), data__name=name)
        assert f"data set {name}: {lacking}site.data_root" in text
    else:
        assert plan.make(configure(changed(data_root="/data"), data__name=name), host=some).nodes == 1


def test_an_archive_to_unpack_on_the_nodes_is_all_that_must_be_there(
    configure: Configure, host: Host
) -> None:
    stage = {"to": "$TMPDIR/data", "archive": "imagenet.tar"}
    asked = {"data__name": "imagenet", "data__stage": stage}
    packed = dataclasses.replace(host, exists=lambda path: path == "/data/imagenet.tar")
    assert plan.make(configure(changed(data_root="/data"), **asked), host=packed).nodes == 1
    bare = dataclasses.replace(host, exists=lambda path: False)
    text = refusal(configure, bare, changed(data_root="/data"), **asked)
    assert "data.stage.archive: no imagenet.tar below /data (site.data_root" in text


def test_data_that_only_nodes_see_are_not_looked_for(
    configure: Configure,
    host: Host,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # whatever scheduler this machine has
    bare = dataclasses.replace(host, exists=lambda path: False)
    site = changed(data_root="/data", data_root_on="nodes")
    resolved = configure(site, data__name="fashion-mnist")
    with caplog.at_level("WARNING"):
        assert preflight.check(resolved, run_root=tmp_path, host=bare).nodes == 1
    assert "data set fashion-mnist below /data was not looked for" in caplog.text
    assert "site testsite has data_root_on: nodes" in caplog.text
    # a local site's node is this machine
    here = {"description": "d", "scheduler": {"kind": "local"}, "data_root": "/data", "data_root_on": "nodes"}
    text = refusal(configure, bare, here, data__name="fashion-mnist")
    assert "data set fashion-mnist is not below /data" in text


def test_this_machine_describes_itself(tmp_path: Path) -> None:
    here = Host.here()
    assert here.python == sys.executable
    assert here.exists(str(tmp_path))
    assert not here.exists(str(tmp_path / "nothing"))
    assert here.image_arch(str(tmp_path / "nothing")) is None
