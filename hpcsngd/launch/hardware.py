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


def facts() -> dict[str, Any]:
    """Returns what this machine is made of, as plain data; ``gpus`` is empty without an NVIDIA driver."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(_text("/proc/cpuinfo")),
        "cpus": os.cpu_count(),
        "mem_gb": memory_gb(_text("/proc/meminfo")),
        "kernel": platform.release(),
        "gpus": gpus(_nvidia()),
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
