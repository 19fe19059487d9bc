"""Seeds that follow from the run's seed and the purpose; and the states of all random streams of a rank."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def derive(seed: int, *words: str | int) -> int:
    """Returns a 63-bit seed for one purpose: the same words give the same seed on every machine."""
    text = ":".join(str(part) for part in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *words: str | int) -> torch.Generator:
    """Returns a generator of its own for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *words))


def seed_streams(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global streams (all devices) of this process."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def stream_states() -> dict[str, Any]:
    """Returns the states of all global streams as tensors, numbers and strings."""
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
        "numpy": None,
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = [name, keys.tolist(), position, has_gauss, cached]
    return states


def restore_streams(states: Mapping[str, Any]) -> None:
    """Sets all global streams to the states that `stream_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if states["numpy"] is not None and (numpy := sys.modules.get("numpy")) is not None:
        name, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((name, keys, position, has_gauss, cached))
