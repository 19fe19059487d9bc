"""SIF files are read without a runtime: architecture, id, times, labels, and what is wrong with them."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone
from pathlib import Path

import pytest

from hpcsngd.launch import container
from hpcsngd.launch.images import sif

from . import sifs


@pytest.mark.parametrize(
    ("code", "arch"), [(b"02", "x86_64"), (b"04", "aarch64"), (b"06", "ppc64le"), (b"99", "unknown (99)")]
)
def test_architecture(tmp_path: Path, code: bytes, arch: str) -> None:
    image = sifs.write(tmp_path / "a.sif", arch=code)
    assert sif.read(image).arch == arch
    assert container.image_arch(image) == arch


def test_facts(tmp_path: Path) -> None:
    image = sifs.write(tmp_path / "a.sif", labels={"org.hpcsngd.base": "debian"}, more=(sifs.SIGNATURE,))
    found = sif.read(image)
    assert found.id == str(uuid.UUID(bytes=sifs.ID))
    assert found.created == datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)
    assert (found.modified - found.created).total_seconds() == 60
    assert found.labels == {"org.hpcsngd.base": "debian"}
    assert found.definition == "Bootstrap: scratch\n"
    assert found.signatures == 1
    assert found.size_bytes == image.stat().st_size
    assert not found.is_encrypted
    assert not found.is_oci


def test_the_partition_is_believed_before_the_header(tmp_path: Path) -> None:
    found = sif.read(sifs.write(tmp_path / "a.sif", arch=b"06", header_arch=b"02"))
    assert (found.arch, found.header_arch) == ("ppc64le", "x86_64")


def test_labels_inside_the_file_system_are_not_guessed(tmp_path: Path) -> None:
    assert sif.read(sifs.write(tmp_path / "a.sif")).labels is None


def test_encrypted_and_oci_images_are_told(tmp_path: Path) -> None:
    assert sif.read(sifs.write(tmp_path / "a.sif", filesystem=5)).is_encrypted
    assert sif.read(sifs.write(tmp_path / "b.sif", more=(0x400A, 0x400B))).is_oci


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a SIF image"),
        (b"hsqs" + bytes(200), "bare squashfs"),
        (b"\x1f\x8b" + bytes(200), "docker-archive"),
        (b"\x7fELF" + bytes(200), "not a SIF image"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    other = tmp_path / "a.img"
    other.write_bytes(content)
    with pytest.raises(sif.SifError, match=words):
        sif.read(other)
    assert container.image_arch(other) is None
    assert words in str(container.image_problem(other, "image"))


@pytest.mark.parametrize("kept_bytes", [sifs.TABLE + 100, -1])
def test_a_file_that_was_cut_short(tmp_path: Path, kept_bytes: int) -> None:
    image = sifs.write(tmp_path / "a.sif")
    image.write_bytes(image.read_bytes()[:kept_bytes])
    with pytest.raises(sif.SifError, match="cut short"):
        sif.read(image)


def test_a_missing_file_has_no_architecture(tmp_path: Path) -> None:
    assert container.image_arch(tmp_path / "nothing.sif") is None
