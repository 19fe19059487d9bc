"""The worker as the launcher starts it: a process, an exit status, a fault in the run's directory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import handover, rundir
from hpcsngd.rundir import Fault, RunDir
from hpcsngd.train import checkpoint, devices, session, worker
from hpcsngd.train.data import idx
from hpcsngd.train.faults import RendezvousError, SettingError
from tests.train.runs import make_run

ROOT = Path(__file__).parents[2]


def start(run: RunDir, attempt: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one worker without a group, in a clean environment."""
    ranks = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ranks}
    return subprocess.run(
        [sys.executable, "-m", "hpcsngd.train.worker", str(run.path), "--attempt", str(attempt)],
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def only_fault(run: RunDir) -> Fault:
    (fault,) = run.attempt(1).faults()
    return fault


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(*_: Any, **__: Any) -> bool:
        raise error

    monkeypatch.setattr(session, "train", train)


def test_a_worker_trains_to_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    done = start(run)
    assert done.returncode == 0, done.stderr
    assert rundir.read_yaml(run.attempt(1).finished_yaml)["steps"] == 26
    assert run.attempt(1).faults() == []
    assert "[rank0] INFO hpcsngd.train.loop: epoch 2/2: " in done.stderr
    assert "Warning" not in done.stderr


def test_a_stop_request_has_its_own_exit_status(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).stop_request.touch()
    done = start(run)
    assert done.returncode == handover.EXIT_STOPPED == 75
    assert run.attempt(1).faults() == []


def test_a_torch_that_cannot_be_imported_is_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so: wrong ELF class')\n")
    done = start(run, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    fault = only_fault(run)
    assert (fault.kind, fault.rank) == ("import_error", 0)
    assert fault.message == "ImportError: libtorch.so: wrong ELF class"
    assert "[rank0]: ImportError: libtorch.so: wrong ELF class" in done.stderr
    assert fault.host


def test_a_loss_that_is_not_finite_is_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"optimizer.lr": "1e30"})
    assert worker.main([str(run.path), "--attempt", "1"]) == 1
    fault = only_fault(run)
    assert fault.kind == "nan"
    assert fault.message.startswith("loss is nan at step ")


def test_missing_data_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "_find", lambda name, root: None)
    run = make_run(tmp_path, **{"data.name": "fashion-mnist", "data.root": str(tmp_path / "nowhere")})
    assert worker.main([str(run.path), "--attempt", "1"]) == 1
    fault = only_fault(run)
    assert fault.kind == "missing_data"
    assert str(tmp_path / "nowhere") in fault.message


def test_a_full_disk_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run(tmp_path, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            session.train(run, 1, torch.device("cpu"), started=0.0)
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert worker.main([str(run.path), "--attempt", "1"]) == 1
    assert only_fault(run).kind == "quota"


def test_a_fault_that_cannot_be_written_is_still_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ValueError("the cause"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir.Attempt, "write_fault", full)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(devices, "join_ranks", lambda device: None)
    assert worker.main([str(make_run(tmp_path).path), "--attempt", "1"]) == 1
    assert "[rank3]: ValueError: the cause" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main([str(tmp_path), "--attempt", "1"]) == 1
    assert "has no run.yaml: it is not a run directory" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(handover.DEVICE, "cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingError, match=r"cuda:2 was asked for, but torch .* sees 0 GPUs here"):
        devices.choose_device()


def test_the_device_is_the_cpu_unless_the_launcher_says_otherwise() -> None:
    assert devices.choose_device() == torch.device("cpu")


def test_ranks_that_cannot_meet_are_a_rendezvous_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> bool:
        raise torch.distributed.DistStoreError("timed out")

    monkeypatch.setattr(devices.dist, "init", init)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RendezvousError, match="cannot meet the other ranks at node0:29500: timed out"):
        devices.join_ranks(torch.device("cpu"))
