"""What a rank imports late and a test can import early."""

from __future__ import annotations

import sklearn.datasets
import torchinfo

from tests.train import runs

__all__ = ["runs", "sklearn", "torchinfo"]
