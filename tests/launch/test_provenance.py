"""What is recorded of a run's origin and hardware, and what is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hpcsngd.launch import hardware, provenance, slurm
from hpcsngd.launch.secrets import REDACTED

RECORDED = Path(__file__).parents[1] / "data" / "slurm"
TOKEN = "ghp_" + "a1B2c3D4e5" * 3


def test_versions_image_and_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "a.sif"
    image.write_bytes(b"x" * 3_000_000)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_PRIVATE_THING", "nobody's business")
    found = provenance.collect(["submit", f"--set=site.env.A={TOKEN}"], tmp_path, image=str(image))
    assert found["versions"]["submitit"]
    assert found["git"] is None
    assert found["image"] == {
        "path": str(image),
        "size_bytes": 3_000_000,
        "sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest(),
    }
    assert found["environment"]["NCCL_DEBUG"] == "INFO"
    assert "MY_PRIVATE_THING" not in found["environment"]
    assert TOKEN not in str(found)
    assert found["argv"] == ["submit", f"--set=site.env.A={REDACTED}"]


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    assert provenance.image_facts(tmp_path / "none.sif") is None


def test_variables_are_chosen_by_name_and_never_secret() -> None:
    given = {"OMP_NUM_THREADS": "4", "HOME": "/h", "NCCL_TOKEN": "abcdefgh", "UCX_X": TOKEN}
    assert provenance.variables(given) == {"OMP_NUM_THREADS": "4"}


def test_hardware_of_this_machine() -> None:
    found = hardware.facts()
    assert found["cpus"] >= 1
    assert found["mem_gb"] > 0
    assert isinstance(found["gpus"], list)


def test_hardware_as_programs_print_it() -> None:
    assert hardware.cpu_model("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n") == (
        "POWER9, altivec supported"
    )
    assert hardware.cpu_model("processor\t: 0\nmodel name\t: EPYC 7A53\ncpu MHz\t: 1\n") == "EPYC 7A53"
    assert hardware.memory_gb("MemTotal:       2097152 kB\nMemFree: 1 kB\n") == 2.0
    listing = "Tesla V100-SXM2-32GB, 32768, 535.104.12\nTesla V100-SXM2-32GB, 32768, 535.104.12\n"
    assert (
        hardware.gpus(listing)
        == [{"name": "Tesla V100-SXM2-32GB", "mem_mib": "32768", "driver": "535.104.12"}] * 2
    )
    assert hardware.gpus("No devices were found\n") == []


def test_amds_gpus_as_the_kernel_shows_them(tmp_path: Path) -> None:
    """Frontier-like cards, a card without a stored name, and what is no GPU of AMD's."""
    files = {
        "card1": {"vendor": "0x1002", "device": "0x7408", "mem_info_vram_total": str(64 * 2**30)}
        | {"product_name": "AMD INSTINCT MI250X"},
        "card10": {"vendor": "0x1002", "device": "0x73bf", "mem_info_vram_total": str(16 * 2**30)},
        "card0": {"vendor": "0x1a03", "device": "0x2000"},
        "card1-DP-1": {"vendor": "0x1002", "mem_info_vram_total": "1"},
    }
    for card, facts in files.items():
        folder = tmp_path / "class" / "drm" / card / "device"
        folder.mkdir(parents=True)
        for name, text in facts.items():
            (folder / name).write_text(f"{text}\n")
    version = tmp_path / "module" / "amdgpu" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("6.7.0\n")
    assert hardware.amd_gpus(tmp_path) == [
        {"name": "AMD INSTINCT MI250X", "mem_mib": "65536", "driver": "6.7.0"},
        {"name": "AMD GPU 0x73bf", "mem_mib": "16384", "driver": "6.7.0"},
    ]
    version.unlink()
    assert hardware.amd_gpus(tmp_path)[0]["driver"].startswith("Linux ")
    assert hardware.amd_gpus(tmp_path / "none") == []


def test_slurms_record_of_a_job_holds_no_paths() -> None:
    found = slurm.parse_record((RECORDED / "job.txt").read_text())
    assert (found["JobId"], found["Partition"], found["NumNodes"]) == ("12722361", "debug", "2")
    assert found["NodeList"] == "hpcsngd-[1-2]"
    assert found["TRES"] == "cpu=2,node=2,billing=2"
    assert not {"Command", "WorkDir", "UserId", "Features"} & set(found)
