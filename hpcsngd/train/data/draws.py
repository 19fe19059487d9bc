"""Random numbers that follow from a key: no stream, no state, the same on every machine.

Each number is a hash of (seed, epoch, sample, use), by the finalizer of SplitMix64 (Steele et al., OOPSLA
2014, figure 16). So one sample's numbers do not depend on which others are in its batch, nor one use's on
which other uses there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hpcsngd.train import seeds

Words: TypeAlias = "npt.NDArray[np.uint64]"
Numbers: TypeAlias = "npt.NDArray[np.float64]"

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

#: Place of the first number of each use, and how many there are.
USES = {"crop": (0, 2), "flip": (2, 1), "cutout": (3, 2), "scale": (5, 1), "rotate": (6, 1), "area": (7, 22)}


class Draws:
    """The random numbers of some samples in one epoch.

    Args:
        seed: of the run.
        epoch: from 0.
        indices: the samples.
    """

    def __init__(self, seed: int, epoch: int, indices: Sequence[int]) -> None:
        key = np.full(1, seeds.derive(seed, "augment", epoch), dtype=np.uint64)
        self._keys = _mixed(key + _mixed(np.asarray(indices, dtype=np.uint64)))
        self.epoch = epoch

    def uniform(self, use: str) -> Numbers:
        """Returns numbers in [0, 1), ``(samples, count)``, for one of `USES`."""
        first, count = USES[use]
        places = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
        # the upper 53 bits, what a float64 can hold
        numbers: Numbers = (_mixed(self._keys[:, None] + places) >> np.uint64(11)) * 2.0**-53
        return numbers


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed
