"""Second-order preconditioners that stand beside any torch optimizer. They know no files."""

from __future__ import annotations

from hpcsngd.optim.base import Preconditioner as Preconditioner
from hpcsngd.optim.base import Schedule as Schedule
from hpcsngd.optim.hylo import HyLo as HyLo
from hpcsngd.optim.records import StepRecord as StepRecord

#: Every preconditioner by the name that experiments use.
PRECONDITIONERS: dict[str, type[Preconditioner]] = {"hylo": HyLo}


def get(name: str) -> type[Preconditioner]:
    """Returns the preconditioner class called ``name``.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    if name not in PRECONDITIONERS:
        raise ValueError(f"unknown preconditioner {name!r}; known: {', '.join(PRECONDITIONERS)}")
    return PRECONDITIONERS[name]
