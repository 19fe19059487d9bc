"""Numbers about runs: pure functions from the tables of `hpcsngd_analysis.load` to frames indexed by run.

A run without rows has no entry, so that "nothing measured" never looks like a measured value that is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; ``low`` and ``high`` are NaN where the spread cannot be known."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, folds: int | None = None) -> Interval:
    """Returns the mean of replicates with Student's t interval.

    Folds of one cross-validation share most of their training data, so their results vary less together than
    independent ones would, and the plain interval is too narrow. With ``folds`` the variance of the mean is
    (1/n + 1/(folds - 1)) s^2 instead of s^2/n (Nadeau and Bengio, "Inference for the generalization error",
    2003, equation 9, with a test share of 1/folds).

    Args:
        values: one per replicate, such as the seeds of a study. (A bootstrap of three values is no more than
            their range, which misses the true mean in every fourth study.)
        confidence: that the interval covers the mean, between 0 and 1.
        folds: number of folds, where the replicates come from cross-validation.

    Raises:
        ValueError: no value.
    """
    if len(values) == 0:
        raise ValueError("no value to take the mean of")
    numbers = np.asarray(values, dtype=np.float64)
    # fsum, so that the order of equal results makes no difference and no winner
    n, mean = len(numbers), math.fsum(values) / len(numbers)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    share = 1 / n + (1 / (folds - 1) if folds else 0.0)
    half = student_quantile(confidence, n - 1) * math.sqrt(share) * float(numbers.std(ddof=1))
    return Interval(mean, mean - half, mean + half, n)


@functools.cache
def student_quantile(confidence: float, freedom: int) -> float:
    """Returns t such that Student's t distribution lies between -t and t with this probability.

    With x = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1), which is smooth on a
    finite interval: its integral is taken by the trapezoidal rule, with a relative error below 1e-7.

    Args:
        confidence: between 0 and 1.
        freedom: degrees of freedom, at least 1.
    """
    angles = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(confidence * mass[-1], mass, angles)
    return float(np.sqrt(freedom) * np.tan(angle))


def elapsed(*tables: pd.DataFrame) -> pd.DataFrame:
    """Returns how far each run came, from tables that have the columns ``epoch`` and ``train_s``.

    Returns:
        Index ``run``; ``epochs`` (passes completed) and ``train_s`` (s), the maximum over the tables.
    """
    furthest = [table.groupby("run", sort=False)[["epoch", "train_s"]].max() for table in tables]
    return pd.concat(furthest).groupby(level="run", sort=False).max().rename(columns={"epoch": "epochs"})


def split_results(evaluation: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """Returns the last and the best evaluation of each run on one split.

    The best is the largest accuracy of all evaluations. On test data it is chosen with the test labels, so it
    flatters; compare methods by the final value.

    Args:
        evaluation: the table ``eval``, ordered by step within a run.
        split: which data: ``test`` or ``validation``.

    Returns:
        Index ``run``; ``evaluations`` (count), ``final_accuracy``, ``final_loss``, ``best_accuracy`` and
        ``best_epoch`` (the first that reached it). Accuracies are shares. A run whose every accuracy is NaN
        has NaN for its best.
    """
    rows = evaluation[evaluation["split"] == split]
    grouped = rows.groupby("run", sort=False)
    last = rows.drop_duplicates("run", keep="last").set_index("run")
    # NaN compares below every accuracy; dropping it first leaves runs without any number out of `best`.
    valid = rows.dropna(subset="accuracy")
    best = valid.loc[valid.groupby("run", sort=False)["accuracy"].idxmax()].set_index("run")
    return pd.DataFrame(
        {
            "evaluations": grouped.size(),
            "final_accuracy": last["accuracy"],
            "final_loss": last["loss"],
            "best_accuracy": best["accuracy"].reindex(last.index),
            "best_epoch": best["epoch"].reindex(last.index),
        }
    )


def not_finite(table: pd.DataFrame, column: str = "loss") -> pd.DataFrame:
    """Returns where a column stops being a finite number.

    Returns:
        Index ``run``, only runs that have such rows; ``rows`` (count) and ``first_step``.
    """
    bad = table[~np.isfinite(table[column])]
    grouped = bad.groupby("run", sort=False)["step"]
    return pd.DataFrame({"rows": grouped.size(), "first_step": grouped.min()})


def time_to_target(evaluation: pd.DataFrame, target: float, split: str = "test") -> pd.DataFrame:
    """Returns when each run first reached an accuracy, with runs that never did as censored.

    Between the last evaluation below the target and the first at or above it, accuracy is taken to rise
    linearly, so that the answer is not a whole number of evaluations. A first evaluation that is already at
    the target counts as the time.

    Args:
        evaluation: the table ``eval``, ordered by step within a run.
        target: accuracy, a share.
        split: which data: ``test`` or ``validation``.

    Returns:
        Index ``run``; ``reached`` (bool); ``epochs`` and ``train_s`` (s) until the target. Where it was not
        reached these are the last evaluation's: the true values are larger.
    """
    rows = evaluation[evaluation["split"] == split]
    found = {run: _crossing(frame, target) for run, frame in rows.groupby("run", sort=False)}
    columns = ["reached", "epochs", "train_s"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("run")


def _crossing(rows: pd.DataFrame, target: float) -> tuple[bool, float, float]:
    """Returns whether one run reached the target, and epochs and training seconds until then."""
    accuracy, epoch, train_s = (rows[name].to_numpy(float) for name in ("accuracy", "epoch", "train_s"))
    above = np.flatnonzero(accuracy >= target)
    if not above.size:
        return False, epoch[-1], train_s[-1]
    at = above[0]
    if at == 0 or np.isnan(accuracy[at - 1]):
        return True, epoch[at], train_s[at]
    share = (target - accuracy[at - 1]) / (accuracy[at] - accuracy[at - 1])
    between = [float(values[at - 1] + share * (values[at] - values[at - 1])) for values in (epoch, train_s)]
    return True, between[0], between[1]
