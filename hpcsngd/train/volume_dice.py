"""The Dice coefficient of a volume, as the published U-Net results count it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def dice(predicted: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    """Returns ``2 |P and T| / (|P| + |T|)`` for the prediction's largest component P; 1 if both are empty.

    Source: Buda et al., Computers in Biology and Medicine 109 (2019), section 3.3. Their code divides zero by
    zero where both are empty.

    Args:
        predicted: ``(slices, height, width)``.
        true: the same shape.
    """
    kept = largest_component(predicted)
    total = int(kept.sum()) + int(true.sum())
    return 2 * int((kept & true).sum()) / total if total else 1.0


def largest_component(volume: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Returns the largest set of marked voxels that touch by faces; of equals the one that comes first."""
    from scipy import ndimage

    labels, count = ndimage.label(volume)
    if count == 0:
        return volume
    sizes = np.bincount(labels.reshape(-1))[1:]
    result: npt.NDArray[np.bool_] = labels == 1 + int(sizes.argmax())
    return result
