"""What a node is made of: processor, memory, GPUs and their driver. For the record; nothing decides by it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_NVIDIA = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_TIMEOUT_S = 20.0
# x86 and Arm, POWER
_MODEL = re.compile(r"^(?:model name|cpu)\s*:\s*(.+)$", re.MULTILINE)


_AMD = "0x1002"  # PCI vendor
_AMD_FILES = ("vendor", "device", "product_name", "mem_info_vram_total")
_CARD = re.compile(r"card\d+$")


def facts() -> dict[str, Any]:
    """Returns what this machine is made of, as plain data; no driver means no ``gpus``."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(_text("/proc/cpuinfo")),
        "cpus": os.cpu_count(),
        "mem_gb": memory_gb(_text("/proc/meminfo")),
        "kernel": platform.release(),
        "gpus": [*gpus(_nvidia()), *amd_gpus(Path("/sys"))],
    }


def cpu_model(cpuinfo: str) -> str:
    """Returns the processor's name in /proc/cpuinfo; empty where it has none."""
    found = _MODEL.search(cpuinfo)
    return found[1].strip() if found else ""


def memory_gb(meminfo: str) -> float | None:
    """Returns the memory in /proc/meminfo in GiB."""
    found = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return round(int(found[1]) / 2**20, 1) if found else None


def gpus(listing: str) -> list[dict[str, str]]:
    """Returns name, memory in MiB and driver of each GPU that nvidia-smi lists."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
    return [{"name": row[0], "mem_mib": row[1], "driver": row[2]} for row in rows if len(row) == 3]


def amd_gpus(sys: Path) -> list[dict[str, str]]:
    """Returns name, memory in MiB and driver of each GPU of AMD's kernel driver.

    rocm-smi prints other columns with every release and is missing in many images; the kernel's files
    (Documentation/gpu/amdgpu, "product_name", "mem_info_vram_total") are the same everywhere.

    Args:
        sys: where sysfs is mounted.
    """
    driver = _text(str(sys / "module/amdgpu/version")).strip() or f"Linux {platform.release()}"
    cards = (card for card in (sys / "class/drm").glob("card*") if _CARD.match(card.name))
    found = []
    for card in sorted(cards, key=lambda card: int(card.name.removeprefix("card"))):
        fact = {name: _text(str(card / "device" / name)).strip() for name in _AMD_FILES}
        if fact["vendor"] == _AMD and fact["mem_info_vram_total"].isdigit():
            name = fact["product_name"] or f"AMD GPU {fact['device']}"
            mem_mib = str(int(fact["mem_info_vram_total"]) // 2**20)
            found.append({"name": name, "mem_mib": mem_mib, "driver": driver})
    return found


def _nvidia() -> str:
    try:
        done = subprocess.run(
            _NVIDIA, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
