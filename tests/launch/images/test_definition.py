"""Definitions: whole texts against golden files, and what cannot be written into one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hpcsngd import fingerprint
from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError
from hpcsngd.launch.images import bases, code, definition, machines
from hpcsngd.launch.images.definition import Request

GOLDEN = Path(__file__).parents[2] / "data" / "definitions"
MIRROR = "http://deb.example.org/debian"
EVERY = [(name, arch) for name, base in bases.BASES.items() for arch in base.arches]


def request_for(base: str, arch: str, **more: object) -> Request:
    parent = "/images/torch.sif" if base == "local" else None
    options = {"mirror": MIRROR, "parent": parent} | more
    return Request(base, machines.find(arch), **options)  # type: ignore[arg-type]


def golden_text(base: str, arch: str) -> str:
    """Returns a definition without what changes with every commit."""
    text = definition.render(request_for(base, arch))
    text = re.sub(r"    org\.hpcsngd\.commit .*\n", "", text)
    return text.replace(fingerprint.identity(), "CODE")


@pytest.mark.parametrize(("base", "arch"), EVERY)
def test_golden(base: str, arch: str) -> None:
    text = golden_text(base, arch)
    golden = GOLDEN / f"{base}-{arch}.def"
    if os.environ.get("GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize(("base", "arch"), EVERY)
def test_every_definition_is_complete(base: str, arch: str) -> None:
    text = definition.render(request_for(base, arch))
    assert not re.search(r"@[A-Z_]+@", text)
    assert "%arguments" not in text  # Singularity 3.x does not know them
    assert "{{" not in text
    for section in ("%post", "%environment", "%test", "%runscript", "%labels", "%help", "%files"):
        assert re.search(rf"^{section}$", text, re.MULTILINE), section
    assert f'platform.machine() == "{machines.find(arch).kernel}"' in text
    assert f"    {code.WHEEL_NAME} /opt/hpcsngd/code.whl" in text


def test_labels_say_what_is_inside() -> None:
    labels = definition.labels(request_for("debian", "ppc64el"))
    assert labels["org.hpcsngd.arch"] == "ppc64le"
    assert labels["org.hpcsngd.code"] == fingerprint.identity()
    assert labels["org.hpcsngd.pin.torch"] == "2.6.0"


def test_without_its_own_code_the_definition_does_not_change_with_it() -> None:
    request = request_for("debian", "amd64", code="bind")
    text = definition.render(request)
    assert "%files" not in text
    assert fingerprint.identity() not in text
    assert "org.hpcsngd.commit" not in definition.labels(request)


def test_pins_replace_the_bases_own() -> None:
    text = definition.render(request_for("debian", "amd64", pins={"TORCH": "2.7.1"}))
    assert "'python3-torch=2.7.1*'" in text
    assert "org.hpcsngd.pin.torch 2.7.1" in text


@pytest.mark.parametrize(
    ("base", "arch", "more", "words"),
    [
        ("debain", "amd64", {}, "did you mean 'debian'"),
        ("cuda", "ppc64le", {}, "for ppc64le there are: debian, cuda-ppc64le, local"),
        ("debian", "amd64", {"pins": {"TROCH": "1"}}, "did you mean 'TORCH'"),
        ("debian", "amd64", {"pins": {"TORCH": "1; rm -rf /"}}, "one word"),
        ("debian", "amd64", {"parent": "x.sif"}, "has no parent"),
        ("local", "amd64", {"parent": None}, "needs a parent image"),
    ],
)
def test_requests_that_cannot_be(base: str, arch: str, more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        request_for(base, arch, **more)


@pytest.mark.parametrize(
    ("base", "more", "words"),
    [
        ("debian", {"mirror": None}, "which Debian mirror"),
        ("debian", {"mirror": "http://x/ $(id)"}, "the mirror is"),
        ("local", {"parent": "/a\n%post"}, "the parent image is"),
        ("local", {"parent": "/a#b"}, "one line without #"),
    ],
)
def test_values_that_cannot_be_written(base: str, more: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        definition.render(request_for(base, "amd64", **more))


def test_a_wheel_whose_path_has_a_space_cannot_be_named() -> None:
    with pytest.raises(ConfigError, match="wheel"):
        definition.render(request_for("debian", "amd64"), wheel="/my folder/a.whl")


@pytest.mark.parametrize("name", ["amd64", "x86_64", "X86_64"])
def test_names_of_architectures(name: str) -> None:
    assert machines.find(name).kernel == "x86_64"


def test_an_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ppc64le'"):
        machines.find("ppc64lee")


def site(**keys: object) -> Site:
    return Site.model_validate({"description": "x", "scheduler": {"kind": "slurm"}, **keys})


@pytest.mark.parametrize(
    ("keys", "base"),
    [
        ({}, "debian"),
        ({"arch": "ppc64le", "gpus_per_node": 4}, "cuda-ppc64le"),
        ({"arch": "aarch64", "gpus_per_node": 4}, "cuda"),
        ({"gpus_per_node": 4, "container": {"image": "a.sif", "gpu_flag": "--rocm"}}, "rocm"),
        ({"gpus_per_node": 4, "container": {"image": "a.sif", "gpu_flag": "--nv"}}, "cuda"),
        ({"container": {"image": "a.sif", "build": {"base": "local"}}}, "local"),
    ],
)
def test_the_base_that_a_site_calls_for(keys: dict[str, object], base: str) -> None:
    assert bases.for_site("mine", site(**keys)) == base


def test_gpus_of_unknown_make_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="--base cuda or --base rocm"):
        bases.for_site("mine", site(arch="x86_64", gpus_per_node=4))
