"""Downloads of small data sets through torchvision, by one process at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpcsngd.train import vision
from hpcsngd.train.data import locks
from hpcsngd.train.faults import MissingDataError

LOCK = ".hpcsngd-download.lock"


def fetch(root: Path, name: str, torchvision_class: str, is_there: Callable[[], bool]) -> None:
    """Lets rank 0 fetch missing files into torchvision's place, behind a lock that other runs wait for.

    Args:
        root: the data root.
        name: of the data set, for messages.
        torchvision_class: its class in ``torchvision.datasets``.
        is_there: whether the files exist; asked again behind the lock.

    Raises:
        MissingDataError: that failed; on every rank.
    """

    def work() -> None:
        if is_there():
            return
        try:
            with locks.exclusive(root / LOCK):
                if not is_there():
                    getattr(vision.load().datasets, torchvision_class)(str(root), download=True)
        except (OSError, RuntimeError, ImportError) as error:
            raise MissingDataError(f"cannot download {name} into {root}: {error}") from error

    locks.on_first_rank(work)
