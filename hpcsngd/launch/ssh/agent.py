"""The agent's process on a host: ``python -m hpcsngd.launch.ssh.agent RUN_DIR ATTEMPT``.

It begins when the submission is complete, which ``submitted.yaml`` with its job id shows: a submission that
fails at another host, or is cut off, leaves nothing running.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.launch.agent import NodeAgent
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.ssh import remote
from hpcsngd.rundir import Attempt

log = logging.getLogger(__name__)

POLL_S = 0.2


def is_submitted(attempt: Attempt, job_id: str, timeout_s: float) -> bool:
    """Waits for the end of a submission; returns whether it succeeded.

    Args:
        attempt: the attempt.
        job_id: the job that this agent belongs to.
        timeout_s: how long the submitter may take for all its hosts, in seconds.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if attempt.path.is_dir():
            list(attempt.path.iterdir())  # NFS: reading the folder makes a new file visible
        if attempt.submitted_yaml.exists():
            facts = rundir.read_yaml(attempt.submitted_yaml)
            if str(facts["job_id"]) == job_id:
                return True
        time.sleep(POLL_S)
    return False


def main() -> None:
    """Runs the agent that the command line and the environment describe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path, number = sys.argv[1:]
    run = rundir.open_run(Path(path))
    plan = Plan.from_record(run.plan_record(int(number)))
    job_id = str(json.loads(os.environ[remote.PLACE])["job_id"])
    # every host is asked at once: so long may the slowest take, and its server
    if not is_submitted(run.attempt(int(number)), job_id, 2 * plan.command_timeout_s):
        log.warning("the submission of job %s did not succeed: nothing to do", job_id)
        return
    NodeAgent(path, int(number))()


if __name__ == "__main__":
    main()
