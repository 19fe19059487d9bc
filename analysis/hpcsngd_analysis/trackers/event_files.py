"""TensorBoard event files from a run's numbers. Needs the package tensorboard; neither torch nor TensorFlow.

What a folder holds already is read from its event files, so that nothing has to be remembered between two
exports: numbers that are missing are added in one more file, and where a number has changed, because a later
attempt did its step again, all files of ours are written anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcsngd.errors import ConfigError
from hpcsngd_analysis.records import Run

SUFFIX = ".hpcsngd"
"""What our event files end with; files of others in the folder are left alone."""


class TensorBoard:
    """The event files of one run.

    Args:
        folder: theirs, made when there is something to write.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise ConfigError(
                f"tensorboard is missing: pip install 'hpcsngd[tensorboard]' ({error})"
            ) from error
        self.folder = folder
        self._events, self._summaries, self._writers = event_pb2, summary_pb2, event_file_writer
        self._writer: Any = None
        self._written: dict[tuple[str, int], float] = dict(read_scalars(folder))

    def sync(self, run: Run, numbers: pd.DataFrame) -> int:
        """Makes the files agree with the numbers so far.

        Args:
            run: the run.
            numbers: from `hpcsngd_analysis.trackers.history.history`.

        Returns:
            How many numbers were written.
        """
        keys = list(zip(numbers["tag"], numbers["step"], strict=True))
        # the format of the files is single precision
        values = numbers["value"].to_numpy(np.float32).tolist()
        times = numbers["time"].to_list()
        if any(
            not _same(self._written.get(key, value), value) for key, value in zip(keys, values, strict=True)
        ):
            self._clear()
        missing = [each for each in zip(keys, values, times, strict=True) if each[0] not in self._written]
        for (tag, step), value, time in missing:
            summary = self._summaries.Summary(
                value=[self._summaries.Summary.Value(tag=tag, simple_value=value)]
            )
            event = self._events.Event(wall_time=time, step=step, summary=summary)
            self._opened().add_event(event)
            self._written[tag, step] = value
        if missing:
            self._writer.flush()
        return len(missing)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self) -> Any:
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._writers.EventFileWriter(str(self.folder), filename_suffix=SUFFIX)
        return self._writer

    def _clear(self) -> None:
        self.close()
        for file in _files(self.folder):
            file.unlink()
        self._written = {}


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"events.out.tfevents.*{SUFFIX}"))


def read_scalars(folder: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """Yields (tag, step) and value of every number in our event files, in the order written."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in _files(folder):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield (value.tag, event.step), value.simple_value
