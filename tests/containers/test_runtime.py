"""The words that hpcsngd writes, run by a real Apptainer: binds, variables, refusals, builds, definitions."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from hpcsngd import fingerprint
from hpcsngd.config.site import Container, ImageBuild
from hpcsngd.errors import RunFailedError
from hpcsngd.launch import commands, container, environment, plan, verdict
from hpcsngd.launch.images import bases, build, code, definition, machines, sif
from hpcsngd.launch.plan import Plan
from tests.launch.conftest import LOCAL_SITE, Configure
from tests.launch.images.test_definition import EVERY, request_for

pytestmark = pytest.mark.apptainer

# spaces, both quotes, a dollar, backquotes, a backslash, and what --bind itself would take for a separator
NASTY = 'it\'s a "dir" $HOME `id` \\ c,d'
ENDING = r"unused build args: __lint__"


@pytest.fixture
def made(configure: Configure, busybox_image: Path, tmp_path: Path) -> Plan:
    """A plan with a real image at a path with a space, and a bind of a folder with a terrible name."""
    image = tmp_path / "my images" / "bb.sif"
    image.parent.mkdir()
    shutil.copy(busybox_image, image)
    shared = tmp_path / NASTY
    shared.mkdir()
    (shared / "hello").write_text("from the host\n")
    section = {
        "image": str(image),
        "code": "bind",
        "binds": [f"{container.escaped(str(shared))}:/opt/shared:ro"],
    }
    return plan.make(configure(LOCAL_SITE | {"container": section, "env": {"STANDIN": NASTY}}))


def run(made: Plan, run_dir: Path, script: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of the image's shell as a worker would run."""
    words = commands.wrap(container.settle(made), str(run_dir), ["sh", "-c", script])
    env = environment.worker_environment({"PATH": os.environ["PATH"], "HOME": str(run_dir), **given}, made)
    return subprocess.run(words, env=env, cwd="/", capture_output=True, text=True, check=False, timeout=60)


def test_any_path_and_any_value_arrive_as_they_are(made: Plan, tmp_path: Path) -> None:
    run_dir = tmp_path / f"run {NASTY}"
    run_dir.mkdir()
    script = 'printf "%s\\n" "$PWD" "$STANDIN"; cat /opt/shared/hello; touch "$PWD/written"; touch /tmp/x'
    done = run(made, run_dir, script)
    assert done.stdout == f"{run_dir}\n{NASTY}\nfrom the host\n", done.stderr
    assert (run_dir / "written").exists()


def test_the_environment_is_clean_but_for_the_list(made: Plan, tmp_path: Path) -> None:
    task = {
        "CUDA_VISIBLE_DEVICES": "2",
        "RANK": "5",
        "LD_LIBRARY_PATH": "/x",
        "SECRET": "1",
        "SLURM_JOB_ID": "7",
    }
    done = run(made, tmp_path, "env", **task)
    lines = set(done.stdout.splitlines())
    assert {"CUDA_VISIBLE_DEVICES=2", "HPCSNGD_BACKEND=gloo", "TMPDIR=/tmp", "PYTHONNOUSERSITE=1"} <= lines
    assert "PYTHONPATH=/opt/hpcsngd/lib" in lines
    names = {line.partition("=")[0] for line in lines}
    assert not {"SECRET", "SLURM_JOB_ID"} & names
    assert "LD_LIBRARY_PATH=/x" not in lines
    assert "RANK" not in names  # a launcher's word about another process


def test_the_submitters_code_is_in_the_image_and_cannot_be_changed(made: Plan, tmp_path: Path) -> None:
    done = run(
        made, tmp_path, "ls /opt/hpcsngd/lib/hpcsngd/train/worker.py; touch /opt/hpcsngd/lib/hpcsngd/x"
    )
    assert done.stdout == "/opt/hpcsngd/lib/hpcsngd/train/worker.py\n"
    assert "Read-only file system" in done.stderr


def test_optional_binds_are_bound_where_they_are(made: Plan, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "x").write_text("")
    both = dataclasses.replace(
        made, binds_if_present=(f"{there}:/opt/there", f"{tmp_path}/lacking:/opt/lacking")
    )
    done = run(both, tmp_path, "ls /opt/there; ls /opt/lacking")
    assert done.stdout == "x\n", done.stderr


def test_a_folder_of_the_node_can_be_tmp(made: Plan, tmp_path: Path) -> None:
    scratch = tmp_path / "node scratch"
    scratch.mkdir()
    with_tmp = Container.model_validate({"image": "x", "tmp": str(scratch)})
    changed = dataclasses.replace(made, binds=container.binds(with_tmp, []))
    done = run(changed, tmp_path, "touch /tmp/here")
    assert (scratch / "here").exists(), done.stderr


def test_workers_have_the_nodes_shared_memory(made: Plan, tmp_path: Path) -> None:
    host = subprocess.run(
        ["df", "-k", "--output=size", "/dev/shm"], capture_output=True, text=True, check=True
    )
    inside = run(made, tmp_path, "busybox df -k /dev/shm")
    assert inside.stdout.split()[-5] == host.stdout.split()[-1]


def test_an_image_of_another_architecture_is_told_apart(made: Plan, tmp_path: Path) -> None:
    image = tmp_path / "other.sif"
    other = b"04" if platform.machine() != "aarch64" else b"02"
    content = bytearray(Path(str(made.image)).read_bytes())
    own = next(m.sif for m in machines.MACHINES if m.kernel == platform.machine()).encode()
    content[45:47] = other
    table = content.index(own + b"\0", 128)  # of the partition
    content[table : table + 2] = other
    image.write_bytes(bytes(content))
    assert container.image_arch(image) != platform.machine()
    done = run(dataclasses.replace(made, image=str(image)), tmp_path, "true")
    assert done.returncode != 0
    assert verdict.classify(done.stderr.splitlines(), done.returncode).kind == "architecture"


# What is in an image


def test_a_real_image_is_read_without_the_runtime(busybox_image: Path, apptainer: Path) -> None:
    found = sif.read(busybox_image)
    words = [str(apptainer), "inspect", "--labels", str(busybox_image)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.labels == told
    assert found.labels["org.hpcsngd.base"] == "busybox"
    assert found.arch == found.header_arch == platform.machine()
    assert found.definition is not None
    assert found.definition.startswith("Bootstrap: scratch")


def test_a_signature_is_seen(busybox_image: Path, tmp_path: Path) -> None:
    """A signature is an object like any other; keys and their making are the runtime's business."""
    image = Path(shutil.copy(busybox_image, tmp_path / "a.sif"))
    words = ["apptainer", "sif", "add", "--datatype", "5", "--groupid", "1", "--signhash", "1"]
    words += ["--signentity", "0" * 40, str(image), "/etc/hostname"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sif.read(image).signatures == 1


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the first test may build the image
def test_an_image_passes_its_own_test_with_our_code_in_it(torch_image: Path, tmp_path: Path) -> None:
    """The kept image has no code, so that it outlives commits; here it gets the wheel's, as in a build."""
    folder = tmp_path / "lib"
    with zipfile.ZipFile(code.write_wheel(tmp_path)) as wheel:
        wheel.extractall(folder)
    words = ["apptainer", "test", "--cleanenv", "--bind", f"{folder}:/opt/hpcsngd/lib", str(torch_image)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 of 2: all-reduce ok" in done.stdout
    assert f"hpcsngd {fingerprint.identity()}" in done.stdout
    assert re.search(r"^ok +torch +\d", done.stdout, re.MULTILINE)  # doctor
    assert "broken" not in done.stdout


# Definitions


@pytest.mark.parametrize(("base", "arch"), EVERY)
def test_the_runtimes_parser_takes_every_definition(
    base: str, arch: str, apptainer: Path, tmp_path: Path
) -> None:
    """Apptainer checks the grammar, then stops at an argument that the definition does not use."""
    file = tmp_path / "x.def"
    file.write_text(definition.render(request_for(base, arch)))
    assert ENDING in parse(apptainer, file)


def test_the_parser_finds_mistakes(apptainer: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.def"
    file.write_text(definition.render(request_for("debian", "amd64")).replace("%labels", "%lables"))
    assert "invalid section" in parse(apptainer, file)


@pytest.mark.parametrize(("base", "arch"), EVERY)
def test_the_shell_takes_every_script(base: str, arch: str, tmp_path: Path) -> None:
    text = definition.render(request_for(base, arch))
    scripts = [part.partition("\n")[2] for part in text.split("\n%") if part.startswith(("post", "test"))]
    assert len(scripts) >= 2
    for script in scripts:
        done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def parse(apptainer: Path, file: Path) -> str:
    words = [str(apptainer), "build", "--build-arg", "__lint__=1", str(file.with_suffix(".sif")), str(file)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stderr


# Builds


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, busybox_image: Path, tmp_path: Path) -> Any:
    """Makes the base ``local`` stand on busybox: its template alone, without what needs torch."""
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "local.def").write_text("Bootstrap: localimage\nFrom: @PARENT@\n")
    (folder / "every-image.def").write_text("\n%post\n    @POST@\n\n%labels\n@LABELS@\n")
    monkeypatch.setattr(definition, "resource_dir", lambda kind: folder)
    real = definition._values

    def job(target: Path, post: str = "true", *, is_forced: bool = False, **options: Any) -> build.Job:
        monkeypatch.setattr(definition, "_values", lambda request: {**real(request), "POST": post})
        machine = machines.find(platform.machine())
        request = definition.Request("local", machine, code="bind", parent=str(busybox_image))
        settings = ImageBuild.model_validate(options)
        return build.Job(request, target, build.find_runtime("apptainer"), settings, is_forced)

    return job


def test_a_build_by_the_real_runtime(toy: Any, tmp_path: Path) -> None:
    target = tmp_path / "my images" / "a.sif"
    target.parent.mkdir()
    lines: list[str] = []
    build.build(toy(target, compression="zstd"), machine=platform.machine(), on_line=lines.append)
    found = sif.read(target)
    assert found.labels is not None
    assert found.labels["org.hpcsngd.base"] == "local"
    assert bases.BASES["local"].arches.count(found.arch) == 1
    assert "Build complete" in target.with_name("a.sif.log").read_text()
    assert any(line.startswith("INFO:") for line in lines)
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.sif", "a.sif.log"]


def test_a_failing_build_of_the_real_runtime_leaves_the_old_image(toy: Any, tmp_path: Path) -> None:
    target = tmp_path / "a.sif"
    target.write_text("old")
    broken = toy(target, "echo what went wrong; exit 3", is_forced=True)
    with pytest.raises(RunFailedError, match="what went wrong"):
        build.build(broken, machine=platform.machine(), on_line=lambda line: None)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.glob(".*")] == []
