"""The verbs ``container check``, ``def`` and ``build``, as a person calls them."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from hpcsngd import cli, fingerprint

from .launch.images import sifs

CODES = {"x86_64": b"02", "aarch64": b"04", "ppc64le": b"06"}
SITE = """\
description: test
arch: ppc64le
scheduler: {kind: slurm}
container:
  image: ${IMAGES}/a.sif
  code: bind
  build: {base: debian, mirror: http://deb.example.org/debian, how: fakeroot, pins: {TORCH: 2.9.9}}
"""


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hpcsngd", "container", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGES", str(tmp_path / "my images"))
    file = tmp_path / "power.yaml"
    file.write_text(SITE)
    return file


def image_here(path: Path, **options: object) -> Path:
    labels = {"org.hpcsngd.code": fingerprint.identity()}
    return sifs.write(path, **({"arch": CODES[platform.machine()], "labels": labels} | options))  # type: ignore[arg-type]


def test_check_of_an_image_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", image_here(tmp_path / "a.sif")) == 0
    out = capsys.readouterr().out
    assert f"architecture  {platform.machine()}" in out
    assert "2023-11-14 22:13:20 UTC" in out
    assert f"org.hpcsngd.code = {fingerprint.identity()}" in out
    assert "fits this machine" in out


def test_check_against_a_site(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_here(tmp_path / "a.sif", arch=b"04")
    assert call(monkeypatch, "check", image, "--site", site) == 3
    assert "built for aarch64, the nodes are ppc64le" in capsys.readouterr().err


def test_check_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", image_here(tmp_path / "a.sif", labels=None), "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["arch"] == platform.machine()
    assert record["labels"] is None
    assert record["problems"] == []


def test_labels_that_only_a_runtime_can_read_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", image_here(tmp_path / "a.sif", labels=None)) == 0
    assert "apptainer inspect reads them" in capsys.readouterr().out


def test_check_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", tmp_path) == 2
    assert call(monkeypatch, "check", tmp_path / "none.sif") == 2
    err = capsys.readouterr().err
    assert "a folder" in err
    assert "not there" in err


def test_def_of_a_site(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "def", "--site", site) == 0
    text = capsys.readouterr().out
    assert "'python3-torch=2.9.9*'" in text
    assert "org.hpcsngd.arch ppc64le" in text
    assert "%files" not in text  # the site binds the code


def test_def_writes_the_wheel_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my defs" / "a.def"
    out.parent.mkdir()
    assert call(monkeypatch, "def", "--base", "rocm", "--arch", "amd64", "--out", out) == 0
    assert "Bootstrap: docker" in out.read_text()
    (wheel,) = out.parent.glob("*.whl")
    assert f"    {wheel.name} /opt/hpcsngd/code.whl" in out.read_text()
    assert f"cd '{out.parent}' && apptainer build --force IMAGE.sif a.def" in capsys.readouterr().out


def test_def_for_another_machine_says_where_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arch in ("x86_64", "aarch64"):
        assert call(monkeypatch, "def", "--base", "cuda", "--arch", arch, "--out", tmp_path / "a.def") == 0
        told = f"build it on a {arch} machine" in capsys.readouterr().out
        assert told == (arch != platform.machine())


def test_def_of_every_shipped_site_that_says_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = ("--mirror", "http://deb.example.org/debian")
    for name in ("mist", "summit"):
        assert call(monkeypatch, "def", "--site", name, *mirror) == 0
        assert "base cuda-ppc64le, ppc64le" in capsys.readouterr().out
    assert call(monkeypatch, "def", "--site", "frontier", *mirror) == 2
    assert "--base cuda or --base rocm" in capsys.readouterr().err
    assert call(monkeypatch, "def", "--site", "slurm", *mirror) == 0


def test_build_dry_run(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "build", "--site", site, "--dry-run", "--build-arg", "--notest") == 0
    text = capsys.readouterr().out
    assert f"apptainer build --force --fakeroot --notest '{tmp_path}/my images/a.sif' IMAGE.def" in text
    assert not (tmp_path / "my images").exists()


def test_the_sites_build_options_may_name_variables(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "mirror: '${MIRROR}', tmp: '${SCRATCH}/tmp', binds: ['${CERTS:-/etc/ssl}'], pins: {TORCH: '${NEW}'}"
    )
    site.write_text(SITE.replace("build: {base: debian, ", f"build: {{base: debian, {options}}}\n#"))
    monkeypatch.setenv("MIRROR", "http://deb.example.org/debian")
    monkeypatch.setenv("NEW", "2.9.9")
    assert call(monkeypatch, "def", "--site", site) == 0  # needs no scratch folder
    assert call(monkeypatch, "build", "--site", site, "--dry-run") == 2
    assert "container.build.tmp: the environment variable SCRATCH is not set" in capsys.readouterr().err
    monkeypatch.setenv("SCRATCH", "/big disk")
    assert call(monkeypatch, "build", "--site", site, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "env 'APPTAINER_TMPDIR=/big disk/tmp' apptainer build --force --bind /etc/ssl " in text
    assert "'python3-torch=2.9.9*'" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["def"], "give --site, or --base"),
        (["def", "--base", "debian", "--pin", "TORCH"], "expected NAME=VERSION"),
        (["build", "--base", "debian", "--mirror", "http://x/debian"], "where to?"),
        (["def", "--base", "debain"], "did you mean 'debian'"),
        (["def", "--base", "debian", "--arch", "vax"], "unknown architecture 'vax'"),
        (["def", "--base", "cuda", "--arch", "arm64", "--out", "/no/such/a.def"], "no folder /no/such that"),
    ],
)
def test_wrong_usage(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
