"""pytest fixture ``slurm_cluster``: a real Slurm, started when the first test asks for it.

Tests that use it carry the marker ``slurm``; collection fails otherwise, so that ``-m "not slurm"`` never
starts a cluster. Where Slurm cannot be had the tests are skipped with the reason, except in continuous
integration (``CI=true``): there a missing install is a failure.

The cluster is taken down by the last session that uses it, unless ``HPCSNGD_TESTBED_KEEP=1`` is set or
somebody else had started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from .needs import refuse_unmarked, require
from .slurmbed import claims
from .slurmbed.cluster import read_facts
from .slurmbed.errors import EXIT_OK
from .slurmbed.layout import Layout

SCRIPT = Path(__file__).parent / "slurm"


def run_script(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``tests/testbed/slurm WORDS``; the exit code is the caller's to judge."""
    argv = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster.

    Args:
        nodes: The nodes' names in order; they are host names too if ``network`` is ``netns``.
        conf: The value for ``SLURM_CONF``; set in this process while the cluster is in use.
        network: ``netns``, or ``loopback`` where the nodes share the machine's address and host name.
    """

    nodes: tuple[str, ...]
    conf: Path
    network: str

    def call(self, *argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a client program such as ``srun``; the exit code is the caller's to judge.

        Raises:
            AssertionError: If it takes too long; the message has its output, and what Slurm is doing.
        """
        try:
            return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as late:
            # In text mode, too, Python gives the output so far as bytes.
            parts: list[str | bytes] = [part for part in (late.stdout, late.stderr) if part]
            output = "".join(
                part.decode(errors="replace") if isinstance(part, bytes) else part for part in parts
            )
            message = f"{' '.join(argv)}: still running after {timeout_s:.0f} s\n{output}{self._situation()}"
            raise AssertionError(message) from late

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """Runs a client program; returns what it prints.

        Raises:
            AssertionError: If it fails or takes too long; the message has its output.
        """
        done = self.call(*argv, timeout_s=timeout_s)
        words = " ".join(argv)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *options: str, command: str) -> str:
        """Submits a shell command through ``sbatch``; returns the job id. Output goes nowhere by default."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}").strip()

    def state(self, job_id: str) -> str:
        """Returns a job's state in Slurm's words, such as ``RUNNING``; empty if nobody knows the job.

        The controller answers at once, until 5 minutes after a job's end; from then on sacct does.
        """
        done = subprocess.run(
            ("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"),
            capture_output=True,
            text=True,
            check=False,
        )
        rows = done.stdout.split() if done.returncode == 0 else []
        rows = rows or self.accounted_states(job_id)
        if len(rows) > 1:
            raise ValueError(f"job {job_id} has {len(rows)} states; ask for one element, such as {job_id}_0")
        return rows[0] if rows else ""

    def accounted_states(self, job_id: str) -> list[str]:
        """Returns the states that sacct gives for a job, an array's one by one; they lag by up to 5 s."""
        rows = self.run("sacct", "-n", "-X", "-P", "-o", "State", "-j", job_id).splitlines()
        return [row.split()[0] for row in rows if row.strip()]  # "CANCELLED by 0" has the user in it

    def wait_state(self, job_id: str, states: Collection[str], timeout_s: float = 60) -> str:
        """Waits until a job is in one of ``states``; returns the state.

        Raises:
            TimeoutError: If it is not within ``timeout_s`` seconds; the message has the queue.
        """
        end = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in states:
            if time.monotonic() > end:
                wanted = " or ".join(sorted(states))
                message = f"job {job_id} is {state or 'unknown'}, not {wanted}, after {timeout_s:.0f} s"
                raise TimeoutError(f"{message}\n{self._situation()}")
            time.sleep(0.2)
        return state

    def _situation(self) -> str:
        commands = (("squeue", "-t", "all"), ("squeue", "-s"), ("sinfo", "-N", "-p", "debug"))
        return "\n".join(
            subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout
            for argv in commands
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses tests that would start a cluster without saying so."""
    refuse_unmarked(items, {"slurm_cluster"}, "slurm")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A running cluster, with ``SLURM_CONF`` set in this process."""
    layout = Layout.from_env()
    with claims.usage() as usage, pytest.MonkeyPatch.context() as patch:
        if run_script("status").returncode != EXIT_OK:
            require(run_script("up"), "tests/testbed/slurm up", os.environ)
            layout.by_tests.touch()
        facts = read_facts(layout)
        assert facts is not None
        patch.setenv("SLURM_CONF", str(layout.slurm_conf))
        yield SlurmCluster(facts.shape.node_names, layout.slurm_conf, facts.network)
        if os.environ.get("HPCSNGD_TESTBED_KEEP") == "1":
            layout.by_tests.unlink(missing_ok=True)  # from now on it is the user's
        if layout.by_tests.exists() and usage.is_last():
            down = run_script("down", "--force")  # the claim that it would respect is ours
            assert down.returncode == EXIT_OK, down.stderr
