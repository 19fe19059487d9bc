"""Causes of failures, from logs (tests/data/logs; its README says how they came about) and single lines."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcsngd.launch import verdict

LOGS = Path(__file__).parents[1] / "data" / "logs"


@pytest.mark.parametrize(
    ("log", "status", "kind", "words"),
    [
        ("import", 1, "import_error", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nomodule", 1, "import_error", "No module named 'no'"),
        ("kill", 1, "killed", "a worker was ended by SIGKILL (signal 9)"),
        ("taken", 1, "rendezvous", "port: 29533, useIpv6: false, code: -98, name: EADDRINUSE"),
        ("absent", 1, "rendezvous", "while trying to connect to (127.0.0.1, 29534)"),
        ("nohost", 1, "rendezvous", "while trying to connect to (nosuchhost, 29534)"),
        ("arch", 126, "architecture", "cannot execute binary file: Exec format error"),
        ("notfound", 127, "configuration", "exec: nopython: not found"),
        ("boom", 1, "unknown", "exit status 1; last exception: RuntimeError: the sky fell"),
        ("library", 1, "import_error", "OSError: libcudart.so.12: cannot open shared object file"),
        ("quota", 1, "quota", "OSError: [Errno 28] No space left on device"),
        ("memory", 1, "out_of_memory", "DefaultCPUAllocator: can't allocate memory"),
        ("anomaly", 1, "nan", "Function 'SqrtBackward0' returned nan values in its 0th output"),
        ("torchvision", 1, "import_error", "operator torchvision::nms does not exist"),
        ("waited", 1, "hang", "Timed out waiting 4000ms for recv operation to complete"),
        ("cuda-oom", 1, "out_of_memory", "CUDA out of memory. Tried to allocate 784.00 MiB. GPU 1 has"),
        (
            "nccl-timeout",
            1,
            "hang",
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580",
        ),
        ("nccl-remote", 1, "rendezvous", "Connection closed by remote peer node18.cluster"),
        ("glibc", 1, "architecture", "libm.so.6: version `GLIBC_2.38' not found (required by /opt/venv"),
        ("slurm-walltime", 1, "walltime", "JOB 12838068 ON hpcsngd-1 CANCELLED AT"),
        ("slurm-lostnode", 1, "node_failure", "Node failure on hpcsngd-2"),
        ("slurm-noexec", 2, "configuration", "execve(): /opt/nowhere/bin/python: No such file or directory"),
    ],
)
def test_recorded_logs(log: str, status: int, kind: str, words: str) -> None:
    found = verdict.classify((LOGS / f"{log}.log").read_text().splitlines(), status)
    assert found.kind == kind
    assert words in found.message
    assert "\n" not in found.message
    assert found.evidence or log == "kill"  # a killed worker says nothing


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "out_of_memory"),
        ("[rank3]: torch.cuda.OutOfMemoryError: HIP out of memory. Tried to allocate", "out_of_memory"),
        ("MemoryError", "out_of_memory"),
        ("numpy.core._exceptions.MemoryError: Unable to allocate 8.00 EiB", "out_of_memory"),
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
            "out_of_memory",
        ),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.0.", "out_of_memory"),
        (
            (
                "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. "
                "It is possible that dataloader's workers are out of shared memory."
            ),
            "out_of_memory",
        ),
        ("RuntimeError: unable to write to file </torch_7_1>: No space left on device (28)", "out_of_memory"),
        (
            "NCCL WARN Error while creating shared memory segment /dev/shm/nccl-Ab1 (size 9637888)",
            "out_of_memory",
        ),
        ("OSError: [Errno 28] No space left on device", "quota"),
        ("OSError: [Errno 122] Disk quota exceeded: '/home/x'", "quota"),
        ("bash: line 3: 4711 Killed                  python train.py", "killed"),
        ("FATAL: the image's architecture (amd64) could not run on the host's (ppc64le)", "architecture"),
        ("hpcsngd: preload line 2 failed: module load cuda/99", "configuration"),
        ("ImportError: libcudart.so.12: cannot open shared object file", "import_error"),
        (
            "RuntimeError: Gloo connectFullMesh failed with [/x/gloo/transport/tcp/pair.cc:144] no error",
            "rendezvous",
        ),
        ("socket.gaierror: [Errno -2] Name or service not known", "rendezvous"),
        (
            "slurmstepd: error: *** STEP 1.0 ON node1 CANCELLED AT 2026-11-21T10:00:00 DUE TO TIME LIMIT ***",
            "walltime",
        ),
        (
            "slurmstepd: error: *** JOB 1 ON node1 CANCELLED AT 2026-11-21T10:00:00 DUE TO NODE FAILURE, SEE",
            "node_failure",
        ),
        ("srun: error: Node failure on node2", "node_failure"),
        ("[rank2]: RuntimeError: CUDA error: uncorrectable ECC error encountered", "node_failure"),
        (
            "FATAL:   could not open image /images/a.sif: failed to retrieve path for /images/a.sif",
            "architecture",
        ),
        ('FATAL:   "python3": executable file not found in $PATH', "configuration"),
        ("python: /lib64/libm.so.6: version `GLIBC_2.29' not found (required by python)", "architecture"),
        (
            "RuntimeError: CUDA error: no kernel image is available for execution on the device",
            "architecture",
        ),
        (
            "[E ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(",
            "hang",
        ),
        ("hpcsngd.train.faults.NotFiniteError: the loss is nan in step 7", "nan"),
        ("hpcsngd.train.faults.MissingDataError: no such file below data", "missing_data"),
        ("RuntimeError: Dataset not found. You can use download=True to download it", "missing_data"),
    ],
)
def test_single_lines(line: str, kind: str) -> None:
    found = verdict.classify(["before", line, "after"], 1)
    assert found.kind == kind
    assert any(line.endswith(text) for text in found.evidence)


@pytest.mark.parametrize(
    "line",
    [
        "optional package missing, caught ImportError: no cupy",
        "will retry on address in use by somebody",
        "Killedeer is a bird",
        "the loss is not a number",
        "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-11-21T10:00:00 ***",
        "[W1121 11:19:00.344903457 socket.cpp:764] [c10d] (gai error: -2 - Name or service not known).",
    ],
)
def test_other_words_name_no_cause(line: str) -> None:
    found = verdict.classify([line], 3)
    assert (found.kind, found.message) == ("unknown", "the workers ended with exit status 3")
    assert found.evidence == [line]


def test_a_real_cause_goes_before_its_echo_in_other_ranks() -> None:
    echo = "torch.distributed.DistNetworkError: Connection reset by peer"
    found = verdict.classify([echo, "[rank1]: MemoryError"], 1)
    assert (found.kind, found.message) == ("out_of_memory", "MemoryError")


@pytest.mark.parametrize(("log", "status"), [("exit75", 75), ("kill", -9), ("boom", 1), ("taken", 1)])
def test_the_first_workers_exit_status_comes_from_torchruns_report(log: str, status: int) -> None:
    assert verdict.worker_exit((LOGS / f"{log}.log").read_text().splitlines(), 1) == status


def test_only_torchs_word_about_this_port_means_that_it_was_taken() -> None:
    lines = (LOGS / "taken.log").read_text().splitlines()
    assert verdict.is_port_taken(lines, 29533)
    assert not verdict.is_port_taken(lines, 29534)
    older = "The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use)."
    assert verdict.is_port_taken([older], 29500)


@pytest.mark.parametrize(
    ("log", "kind", "host", "utc"),
    [
        ("slurm-preempted", "preempted", "hpcsngd-1", "2026-11-21T14:44:56+00:00"),
        ("slurm-cancelled", "killed", "hpcsngd-1", "2026-11-21T14:44:11+00:00"),
        ("slurm-walltime", "walltime", "hpcsngd-1", "2026-11-21T17:58:19+00:00"),
        ("slurm-lostnode", "node_failure", "hpcsngd-2", ""),  # srun names the node, and no time
    ],
)
def test_slurms_own_words_have_host_and_time(
    log: str, kind: str, host: str, utc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    found = verdict.recognize((LOGS / f"{log}.log").read_text().splitlines())
    assert found is not None
    assert (found.kind, found.host, found.utc) == (kind, host, utc)


def test_a_step_that_ends_with_its_first_failure_was_not_killed_by_a_person() -> None:
    assert verdict.recognize((LOGS / "slurm-badtask.log").read_text().splitlines()) is None


@pytest.mark.parametrize("log", ["boom", "exit75", "kill"])
def test_logs_that_name_no_cause_are_not_guessed_at(log: str) -> None:
    assert verdict.recognize((LOGS / f"{log}.log").read_text().splitlines()) is None
