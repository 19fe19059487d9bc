"""Scikit-learn's handwritten digits, which need no files."""

from __future__ import annotations

from pathlib import Path

import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train.data.samples import Images, Splits

# Mean and standard deviation of the training pixels, in units of the full scale.
_SCALE, _MEAN, _STD = 16.0, 0.3052, 0.3758


def digits(root: Path | None, config: schema.Data) -> Splits:
    """Returns scikit-learn's handwritten digits, 1,438 to train and 359 to test.

    The test set is every fifth sample of each class in scikit-learn's order, from the third on. That order
    goes through the writers one after the other, so both sets have all of them. No seed is involved.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(loaded.target).to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero().flatten()[2::5]] = True

    def part(chosen: torch.Tensor) -> Images:
        return Images(pixels[chosen], labels[chosen], scale=_SCALE, mean=_MEAN, std=_STD)

    return Splits(part(~is_test), part(is_test), 10)
