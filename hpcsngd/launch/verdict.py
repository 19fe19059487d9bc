"""What a failed job's last lines and exit status say about the cause. Pure; tested on recorded logs.

Only words that leave no doubt name a cause; everything else is ``unknown`` with the last lines as evidence.
A worker that could write its own fault knows better: the agent asks here only when none did.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd.launch.commands import PRELOAD_FAILED
from hpcsngd.launch.slurm import utc

EVIDENCE_LINES = 12

# what torchrun, torch's excepthook and srun --label put in front of a line
_PREFIX = re.compile(r"^(?:\[(?:rank|default)\d+\]:\s?|\d+:\s)+")
# torchrun's own words about a worker that failed; everything before them is the workers'
_TORCHRUN = re.compile(r"torch[./]distributed[./]elastic[./]multiprocessing[./]api")
_LAST_WORDS = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b(?::|$)")
# glog's warnings: c10d warns of names that it cannot look up and then connects all the same
_WARNING = re.compile(r"^\[?W\d{4} ")
_WORKER_EXIT = re.compile(r"exitcode\s*:\s*(-?\d+)")
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)

# several slurmd on one machine add the node's name
_SLURMSTEPD = r"^slurmstepd(?:-\S+)?: error: "
_EXCEPTION = r"^(?:[\w.]+\.)?"
_CAUSES: tuple[tuple[str, str], ...] = (
    ("configuration", r"^hpcsngd: preload line \d+ failed: "),
    ("import_error", _EXCEPTION + r"(?:ModuleNotFoundError|ImportError): "),
    ("import_error", r": No module named '?[\w.]+'?$|Error while finding module specification for "),
    ("architecture", r"Exec format error|cannot execute binary file"),
    ("architecture", r"image's architecture \(\w+\) could not run on the host's"),
    ("out_of_memory", r"(?:CUDA|HIP) out of memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc"),
    ("out_of_memory", _EXCEPTION + r"(?:OutOfMemoryError|MemoryError)\b"),
    ("out_of_memory", r"DefaultCPUAllocator: .*(?:can't|not enough) |oom[-_]kill event|Out Of Memory"),
    # a full /dev/shm, in the words of data loaders, torch and NCCL; it is not a quota, though torch says so
    ("out_of_memory", r"out of shared memory|unable to (?:write to file </torch_|allocate shared memory)"),
    ("out_of_memory", r"Error while creating shared memory segment"),
    ("quota", r"No space left on device|Disk quota exceeded"),
    (
        "configuration",
        _SLURMSTEPD + r"execve\(\): .+: (?:No such file or directory|Permission denied)$",
    ),
    ("configuration", r"^FATAL: +\S+: executable file not found in \$PATH"),
    ("import_error", r"\blib[\w.+-]+: cannot open shared object file: No such file or directory"),
    # torchvision and torch of different builds
    ("import_error", r"^RuntimeError: operator torchvision::\w+ does not exist"),
    ("architecture", r"^FATAL: .*(?:could not open image|[Ii]mage format not recognized)"),
    ("architecture", r"version [`']GLIBC(?:XX)?_[\d.]+' not found"),
    ("architecture", r"no kernel image is available for execution on the device"),
    ("architecture", r"CUDA driver version is insufficient for CUDA runtime version"),
    ("nan", _EXCEPTION + r"NotFiniteError: "),
    ("nan", r"^RuntimeError: Function '\w+' returned nan values in its \d+th output"),
    ("missing_data", _EXCEPTION + r"MissingDataError: "),
    ("missing_data", r"^RuntimeError: Dataset not found"),
    ("walltime", _SLURMSTEPD + r"\*\*\* .+ DUE TO TIME LIMIT"),
    ("preempted", _SLURMSTEPD + r"\*\*\* .+ DUE TO PREEMPTION"),
    ("node_failure", _SLURMSTEPD + r"\*\*\* .+ DUE TO NODE FAILURE"),
    ("node_failure", r"^srun: error: Node failure on "),
    ("node_failure", r"uncorrectable ECC error encountered|GPU is lost\.? "),
    ("hang", r"Watchdog caught collective operation timeout: "),
)
# these are often the echo of another rank's failure, so they count only if nothing above is found
_ECHOES: tuple[tuple[str, str], ...] = (
    ("rendezvous", r"EADDRINUSE|[Aa]ddress already in use"),
    ("rendezvous", r"\bDist(?:Network|Store)Error\b|Rendezvous(?:Connection|Timeout)Error"),
    ("rendezvous", r"client socket has (?:timed out|failed)|Gloo connectFullMesh failed"),
    # the end of a rank elsewhere, or no way to it
    ("rendezvous", r"NCCL WARN .*(?:Connection (?:refused|closed|reset)|no socket interface found)"),
    ("rendezvous", r"\bnccl(?:Remote|System)Error: "),
    ("rendezvous", r"Unable to find address for|No route to host"),
    ("rendezvous", r"Name or service not known|Temporary failure in name resolution"),
    ("hang", r"Timed out waiting \d+ms for (?:recv|send) operation to complete"),
    ("killed", r"^(?:.*: line \d+: +\d+ )?Killed\b"),
    # of the whole job: a step is also cancelled when one of its tasks fails
    ("killed", _SLURMSTEPD + r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ \*\*\*$"),
)
# how slurmstepd dates and places what it did
_EVENT = re.compile(r" ON (?P<host>\S+) CANCELLED AT (?P<time>[\dT:-]+)")
_LOST = re.compile(r"Node failure on (?P<host>\S+)")


@dataclass(frozen=True)
class Verdict:
    """A cause: a fault kind, one line, the lines that show it, and host and time where the line has them."""

    kind: str
    message: str
    evidence: list[str]
    host: str = ""
    utc: str = ""


def classify(lines: Sequence[str], exit_status: int) -> Verdict:
    """Returns the cause of a failure.

    Args:
        lines: the last lines that the child wrote.
        exit_status: its exit status; negative for a signal.
    """
    plain = _plain(lines)
    return _recognize(plain) or _from_exit(plain, exit_status)


def recognize(lines: Sequence[str]) -> Verdict | None:
    """Returns the cause that some lines of a log name; None if they name none."""
    return _recognize(_plain(lines))


def _plain(lines: Sequence[str]) -> list[str]:
    return [_PREFIX.sub("", line).rstrip() for line in lines]


def _recognize(plain: Sequence[str]) -> Verdict | None:
    for causes in (_CAUSES, _ECHOES):
        if (found := _first(plain, causes)) is not None:
            kind, index = found
            event, lost = _EVENT.search(plain[index]), _LOST.search(plain[index])
            return Verdict(
                kind,
                _message(plain[index]),
                list(plain[max(0, index - 2) : index + 3]),
                host=event["host"] if event else lost["host"] if lost else "",
                utc=utc(event["time"]) if event else "",
            )
    return None


def is_port_taken(lines: Sequence[str], port: int) -> bool:
    """Returns whether torch said that it could not listen on this port."""
    return any(_PORT_TAKEN.search(line) and re.search(rf"\b{port}\b", line) for line in lines)


def worker_exit(lines: Sequence[str], exit_status: int) -> int:
    """Returns the exit status of the worker that failed first.

    torchrun ends with 1 whatever its workers did, but says in its report how the first one ended.
    """
    found = [match[1] for line in lines if (match := _WORKER_EXIT.search(line))]
    # its report lists the root cause last
    return int(found[-1]) if found else exit_status


def _first(lines: Sequence[str], causes: Sequence[tuple[str, str]]) -> tuple[str, int] | None:
    """Returns the kind and index of the earliest line that one of the patterns describes."""
    patterns = [(kind, re.compile(pattern)) for kind, pattern in causes]
    for index, line in enumerate(lines):
        if _WARNING.match(line):
            continue
        for kind, pattern in patterns:
            if pattern.search(line):
                return kind, index
    return None


def _message(line: str) -> str:
    return line.strip().removeprefix("hpcsngd: ")[:300]


def _from_exit(lines: Sequence[str], exit_status: int) -> Verdict:
    own = list(itertools.takewhile(lambda line: not _TORCHRUN.search(line), lines))
    evidence = [line for line in own if line.strip()][-EVIDENCE_LINES:]
    status = worker_exit(lines, exit_status)
    if status < 0:
        return Verdict("killed", f"a worker was ended by {signal_name(-status)}", evidence)
    if status in (126, 127):
        # the shell's words for a command that cannot be run or found
        return Verdict("configuration", evidence[-1] if evidence else "the command was not found", evidence)
    if status == PRELOAD_FAILED:
        return Verdict("configuration", "a preload line failed", evidence)
    words = next((line for line in reversed(evidence) if _LAST_WORDS.match(line)), "")
    quoted = f"; last exception: {_message(words)}" if words else ""
    return Verdict("unknown", f"the workers ended with exit status {status}{quoted}", evidence)


def signal_name(number: int) -> str:
    """Returns a signal's name and number, for people."""
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
