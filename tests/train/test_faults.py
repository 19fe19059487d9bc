from __future__ import annotations

import errno

import pytest
import torch

from hpcsngd import rundir
from hpcsngd.errors import ConfigError
from hpcsngd.train import faults


def caused_by(cause: BaseException) -> Exception:
    try:
        raise RuntimeError("while loading") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModuleNotFoundError("No module named 'torch'"), "import_error"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "import_error"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. ... out of shared memory"
            ),
            "out_of_memory",
        ),
        (RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "quota"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EACCES, "Permission denied"), "unknown"),
        (torch.distributed.DistNetworkError("The server socket has failed to listen"), "rendezvous"),
        (faults.NotFiniteError("loss is nan"), "nan"),
        (faults.MissingDataError("no data"), "missing_data"),
        (faults.SettingError("fp16 needs a GPU"), "configuration"),
        (ConfigError("unknown key"), "configuration"),
        (faults.CheckpointError("all damaged"), "unknown"),
        (caused_by(OSError(errno.ENOSPC, "No space left on device")), "quota"),
        (ValueError("something else"), "unknown"),
    ],
)
def test_every_cause_has_its_kind(error: BaseException, kind: str) -> None:
    assert faults.kind_of(error) == kind
    assert kind in rundir.FAULT_KINDS


def test_the_message_is_one_line_with_the_class_unless_it_was_written_for_users() -> None:
    assert faults.message_of(ValueError("two\n  lines")) == "ValueError: two lines"
    assert faults.message_of(faults.SettingError("fp16 needs a GPU")) == "fp16 needs a GPU"


def test_the_evidence_ends_with_the_error() -> None:
    evidence = faults.evidence_of(caused_by(KeyError("x")))
    assert evidence[-1] == "RuntimeError: while loading"
    assert len(evidence) <= faults.EVIDENCE_LINES
