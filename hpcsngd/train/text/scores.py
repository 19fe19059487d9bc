"""Scores of predictions, each by the library that is known for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def accuracy(predicted: Array, true: Array) -> float:
    """Returns the share of right classes."""
    return float((predicted == true).mean())


def f1(predicted: Array, true: Array) -> float:
    """Returns the F1 score of class 1, by scikit-learn; 0 where nothing is or should be of it."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, zero_division=0))


def matthews(predicted: Array, true: Array) -> float:
    """Returns Matthews' correlation coefficient, by scikit-learn; 0 where one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(true, predicted))


def pearson(predicted: Array, true: Array) -> float:
    """Returns Pearson's correlation, by SciPy; nan where one side is constant."""
    from scipy import stats

    return math.nan if _is_constant(predicted, true) else float(stats.pearsonr(predicted, true).statistic)


def spearman(predicted: Array, true: Array) -> float:
    """Returns Spearman's rank correlation, by SciPy; nan where one side is constant."""
    from scipy import stats

    return math.nan if _is_constant(predicted, true) else float(stats.spearmanr(predicted, true).statistic)


def _is_constant(*sides: Array) -> bool:
    return any((side == side[0]).all() for side in sides)


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
