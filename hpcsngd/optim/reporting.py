"""How any preconditioner turns what was timed, counted and went wrong into records."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from hpcsngd import dist
from hpcsngd.optim.records import Communication, Fallback, LayerCheck, PhaseTime


def phase_times(step: int, seconds: Mapping[str, float]) -> tuple[PhaseTime, ...]:
    """Returns the records of seconds by phase."""
    return tuple(PhaseTime(step, *item) for item in seconds.items())


def traffic(step: int, sent: Mapping[tuple[str, str], tuple[int, int]]) -> tuple[Communication, ...]:
    """Returns the records of what was handed to collectives, as a communicator counts it."""
    return tuple(Communication(step, *what, *amount) for what, amount in sent.items())


def fall_back(logger: logging.Logger, step: int, layer: str, reason: str, instead: str) -> Fallback:
    """Returns the record of a layer's failure, and logs it on rank 0.

    Args:
        logger: of the method.
        step: at which it happened, 1 for the first.
        layer: whose update failed.
        reason: why, with the ranks.
        instead: what the layer goes on with.
    """
    if dist.rank() == 0:
        logger.warning("step %d, layer %s: %s; using its %s", step, layer, reason, instead)
    return Fallback(step, layer, reason)


def tell_checks(title: str, checks: Sequence[LayerCheck]) -> None:
    """Prints what `Preconditioner.verify` found, on rank 0."""
    if dist.rank() == 0:
        # The one print outside the command line: verify is called by hand, to be read.
        print(title, *checks, sep="\n")  # noqa: T201
