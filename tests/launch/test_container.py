"""Containers: the words in front of a command, and what an image file says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.config.site import Container
from hpcsngd.launch import container


def test_prefix_names_runtime_flag_binds_and_arguments_in_order() -> None:
    site = Container(image="/i/a.sif", gpu_flag="--nv", binds=["/scratch:/s:ro", "/data"], args=["--no-home"])
    assert container.exec_prefix(site, ["/data", "/runs"], "singularity") == (
        *("singularity", "exec", "--nv"),
        *("--bind", "/data", "--bind", "/runs", "--bind", "/scratch:/s:ro"),
        "--no-home",
    )


@pytest.mark.parametrize(
    ("runtime", "installed", "used"),
    [
        ("auto", None, "apptainer"),
        ("auto", "singularity", "singularity"),
        ("apptainer", "singularity", "apptainer"),
    ],
)
def test_runtime(runtime: str, installed: str | None, used: str) -> None:
    site = Container.model_validate({"image": "a.sif", "runtime": runtime})
    assert container.exec_prefix(site, [], installed) == (used, "exec")


@pytest.mark.parametrize(
    ("code", "arch"), [(b"02", "x86_64"), (b"04", "aarch64"), (b"06", "ppc64le"), (b"99", None)]
)
def test_a_sif_header_names_its_architecture(tmp_path: Path, code: bytes, arch: str | None) -> None:
    launch = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0")
    image = tmp_path / "a.sif"
    image.write_bytes(launch + b"SIF_MAGIC\0" + b"01\0" + code + b"\0" + bytes(80))
    assert container.image_arch(image) == arch


def test_other_files_have_no_architecture(tmp_path: Path) -> None:
    other = tmp_path / "a.img"
    other.write_bytes(b"\x7fELF" + bytes(100))
    assert container.image_arch(other) is None
