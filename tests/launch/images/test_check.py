"""An image against the site: every refusal names the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd import fingerprint
from hpcsngd.launch import container
from hpcsngd.launch.images import check, sif

from . import sifs

OURS = {"org.hpcsngd.code": fingerprint.identity()}


def problems(image: Path, *, arch: str = "x86_64", code: str = "image") -> list[str]:
    return check.problems(sif.read(image), arch=arch, code=code, site="mist")


def test_an_image_of_ours_fits(tmp_path: Path) -> None:
    image = sifs.write(tmp_path / "a.sif", labels=OURS)
    assert problems(image) == problems(image, arch="any") == []
    assert container.image_problem(image, "image") is None


def test_another_architecture(tmp_path: Path) -> None:
    (text,) = problems(sifs.write(tmp_path / "a.sif", labels=OURS), arch="ppc64le")
    assert "built for x86_64, the nodes are ppc64le" in text
    assert "hpcsngd container build --site mist --force" in text


def test_a_header_that_contradicts_the_content(tmp_path: Path) -> None:
    (text,) = problems(sifs.write(tmp_path / "a.sif", arch=b"06", header_arch=b"02"), arch="ppc64le")
    assert "header says x86_64, but its system is ppc64le" in text


@pytest.mark.parametrize(
    ("label", "code", "words"),
    [
        ("0.0.1+000000000000", "image", "the image has hpcsngd 0.0.1+000000000000, this is"),
        ("0.0.1+000000000000", "bind", None),
        ("bind", "image", "set container.code: bind"),
        ("bind", "bind", None),
    ],
)
def test_the_code_inside(tmp_path: Path, label: str, code: str, words: str | None) -> None:
    image = sifs.write(tmp_path / "a.sif", labels={"org.hpcsngd.code": label})
    found = "; ".join(problems(image, code=code))
    assert (words in found) if words else found == ""
    assert bool(container.image_problem(image, code)) is bool(words)


def test_an_image_without_our_labels_is_let_through(tmp_path: Path) -> None:
    assert problems(sifs.write(tmp_path / "a.sif", labels={"maintainer": "me"})) == []


def test_encrypted_and_oci(tmp_path: Path) -> None:
    assert "encrypted" in problems(sifs.write(tmp_path / "a.sif", filesystem=5))[0]
    assert "OCI-SIF" in problems(sifs.write(tmp_path / "b.sif", more=(0x400A,)))[0]


def test_the_record_is_plain_data(tmp_path: Path) -> None:
    record = check.to_record(sif.read(sifs.write(tmp_path / "a.sif", labels=OURS)))
    assert record["created"] == "2023-11-14T22:13:20+00:00"
    assert record["has_definition"] is True
    assert "definition" not in record
