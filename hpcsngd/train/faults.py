"""What a worker's failure is called. Goes by names of classes: torch may be what cannot be imported."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator

from hpcsngd.errors import HpcsngdError

EVIDENCE_LINES = 12

_BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (HpcsngdError, "configuration"),
    (ImportError, "import_error"),
    (MemoryError, "out_of_memory"),
)
_BY_NAME = {
    "OutOfMemoryError": "out_of_memory",
    "DistNetworkError": "rendezvous",
    "DistStoreError": "rendezvous",
}
_BY_ERRNO = {errno.ENOSPC: "quota", errno.EDQUOT: "quota", errno.ENOMEM: "out_of_memory"}
# RuntimeErrors of torch that have no class of their own
_BY_WORDS = (
    # a full /dev/shm, in the words of data loaders, torch and NCCL; it is not a quota, though torch says so
    ("out of shared memory", "out_of_memory"),
    ("unable to write to file </torch_", "out_of_memory"),
    ("unable to allocate shared memory", "out_of_memory"),
    ("Error while creating shared memory segment", "out_of_memory"),
    ("DefaultCPUAllocator: ", "out_of_memory"),
    ("CUBLAS_STATUS_ALLOC_FAILED", "out_of_memory"),
    ("CUDA out of memory", "out_of_memory"),
    ("HIP out of memory", "out_of_memory"),
    ("No space left on device", "quota"),
    ("Disk quota exceeded", "quota"),
)
# what a collective says when the process at the other end is gone: gloo, then NCCL
_TORN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class TrainError(HpcsngdError):
    """A failure that the training code explains itself.

    Attributes:
        kind: one of ``rundir.FAULT_KINDS``.
        is_echo: whether it only repeats what has happened to another process, which knows better.
    """

    kind = "unknown"
    is_echo = False


class NotFiniteError(TrainError):
    """The loss is infinite or not a number."""

    kind = "nan"


class MissingDataError(TrainError):
    """The data set is not where it should be."""

    kind = "missing_data"


class RendezvousError(TrainError):
    """The ranks could not meet."""

    kind = "rendezvous"


class CheckpointError(TrainError):
    """No checkpoint can be used although there are some."""


class DismissedError(TrainError):
    """The others go on without this process, which is no failure of the run."""


class SettingError(TrainError):
    """The configuration cannot be carried out here; checked before the first step."""

    kind = "configuration"


def kind_of(error: BaseException) -> str:
    """Returns the fault kind of an exception: its own, or that of what caused it, or ``unknown``."""
    return next((kind for each in _chain(error) if (kind := _own_kind(each)) != "unknown"), "unknown")


def is_echo(error: BaseException) -> bool:
    """Returns whether an exception only says that another process has gone."""
    if isinstance(error, TrainError):
        return error.is_echo
    return kind_of(error) == "unknown" and any(
        words in str(each) for each in _chain(error) for words in _TORN
    )


def message_of(error: BaseException) -> str:
    """Returns an exception as one line, with its class unless the message was written for users."""
    text = " ".join(str(error).split())
    if isinstance(error, HpcsngdError):
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500]


def evidence_of(error: BaseException) -> list[str]:
    """Returns the last lines of the traceback."""
    return "".join(traceback.format_exception(error)).splitlines()[-EVIDENCE_LINES:]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def _own_kind(error: BaseException) -> str:
    if isinstance(error, TrainError):
        return error.kind
    for classes, kind in _BY_CLASS:
        if isinstance(error, classes):
            return kind
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return _BY_ERRNO[error.errno]
    names = [base.__name__ for base in type(error).__mro__]
    text = str(error)
    found = [_BY_NAME[name] for name in names if name in _BY_NAME]
    found += [kind for words, kind in _BY_WORDS if words in text]
    return found[0] if found else "unknown"
