"""Critical periods of training: epochs in which the gradient norm changes quickly.

The criterion is Accordion's (Agarwal et al., "Adaptive gradient communication via critical learning regime
identification", MLSys 2021), which the hybrid method also switches by: the relative change from one epoch to
the next is at least eta. The method itself compares norms of summed gradients; files hold the norms of single
steps, so here their root mean square over an epoch stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

ETA = 0.5


def critical_epochs(grad_norm: pd.DataFrame, eta: float = ETA) -> pd.DataFrame:
    """Returns the gradient norm of each epoch and whether the epoch is critical.

    Args:
        grad_norm: the table ``grad_norm``; rows without an epoch are left out.
        eta: relative change that counts as critical.

    Returns:
        Columns ``run``, ``epoch`` (from 0: the epoch in which the steps were), ``norm`` (all layers
        together), ``change`` (relative, from the epoch before; NaN in the first) and ``is_critical``. The
        first epoch is critical, as there is nothing to compare with.
    """
    rows = grad_norm[grad_norm["epoch"].notna()]
    # the row at epoch 3.0 is of the last step of the epoch that began at 2.0
    epoch = np.ceil(rows["epoch"].to_numpy()).astype("int64") - 1
    squares = rows.assign(epoch=epoch, square=rows["norm"] ** 2)
    steps = squares.groupby(["run", "epoch", "step"], sort=False)["square"].sum()
    found = np.sqrt(steps.groupby(["run", "epoch"], sort=False).mean()).rename("norm").reset_index()
    before = found.groupby("run", sort=False)["norm"].shift(1)
    found["change"] = (found["norm"] - before).abs() / before
    found["is_critical"] = before.isna() | (found["change"] >= eta)
    return found


def periods(epochs: Sequence[int]) -> list[tuple[int, int]]:
    """Returns rising epochs as intervals ``(first, end)``, end excluded: [0, 1, 4] is [(0, 2), (4, 5)]."""
    found: list[tuple[int, int]] = []
    for epoch in epochs:
        if found and found[-1][1] == epoch:
            found[-1] = (found[-1][0], epoch + 1)
        else:
            found.append((epoch, epoch + 1))
    return found
