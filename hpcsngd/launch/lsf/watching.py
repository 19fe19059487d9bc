"""Jobs of LSF as submitit sees them: cancel, and states that are never taken for more than they say."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from submitit.core import core, logger

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.lsf import control, jobs, request
from hpcsngd.launch.queued import ENDED, PENDING, RUNNING, AlreadyEndedError

COMMAND_S = 60.0
"""Patience with one command of LSF."""
SETTLE_S = 8.0
"""An end without a result counts once it has stood for so long: a requeued job looks finished for seconds."""
REQUEUE_S = 60.0
"""The same where the job has asked for its requeue."""
LOST_ROUNDS = 3
"""A job that neither bjobs nor bhist knows is lost after so many complete answers."""


class LsfWatcher(core.InfoWatcher):
    """submitit's watcher, which believes neither a silence nor an end too soon.

    A host that cannot be reached, a bjobs that gives no answer, and the moment in which a requeued job looks
    finished are no ends. A job that LSF has forgotten is lost, so that waiting for it ends.
    """

    def __init__(self, delay_s: int = 60) -> None:
        super().__init__(delay_s)
        self._folders: dict[str, Path] = {}
        self._missed: dict[str, int] = {}
        self._over_since: dict[str, float] = {}

    def register_folder(self, job_id: str, folder: Path) -> None:
        """Takes note of where a job's files are."""
        self._folders[job_id] = folder

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """Returns the state in submitit's words; see `core.InfoWatcher.get_info` for the mode."""
        return self.get_info(job_id, mode=mode).get("State") or "UNKNOWN"

    def update_if_long_enough(self, mode: str) -> None:
        """Asks sooner while an end waits to be believed."""
        is_settling = any(job_id not in self._finished for job_id in self._over_since)
        is_due = time.time() - self._last_status_check > 1.0
        super().update_if_long_enough("force" if mode == "standard" and is_settling and is_due else mode)

    def clear(self) -> None:
        """Forgets all states."""
        super().clear()
        self._missed.clear()
        self._over_since.clear()

    def update(self) -> None:
        """Asks LSF about all jobs that have not finished."""
        asked = sorted(self._registered - self._finished)
        if not asked:
            return
        self._num_calls += 1
        answer = jobs.ask(asked, timeout_s=COMMAND_S)
        for complaint in answer.complaints:
            logger.get_logger().warning(f"Call #{self.num_calls} - {complaint}, status may be inaccurate.")
        for job_id in asked:
            found = answer.jobs.get(job_id)
            if isinstance(found, jobs.Job):
                self._missed.pop(job_id, None)
                self._take_note(job_id, found)
            elif answer.is_complete:
                self._miss(job_id)
        self._last_status_check = time.time()
        self._finished |= {job_id for job_id in asked if self.is_done(job_id, mode="cache")}

    def _take_note(self, job_id: str, found: jobs.Job) -> None:
        info = {"JobID": job_id, "State": state(found), "LSF": found.state, "Detail": found.detail}
        if found.phase == PENDING:
            info["Detail"] = found.waiting()
        if found.phase != ENDED:
            self._over_since.pop(job_id, None)
        elif not self._is_settled(job_id):
            info["State"] = "REQUEUED" if self._is_requeued(job_id) else "COMPLETING"
        self._info_dict[job_id] = info

    def _is_settled(self, job_id: str) -> bool:
        since = self._over_since.setdefault(job_id, time.monotonic())
        return time.monotonic() - since >= (REQUEUE_S if self._is_requeued(job_id) else SETTLE_S)

    def _is_requeued(self, job_id: str) -> bool:
        folder = self._folders.get(job_id)
        return folder is not None and control.requeued_mark(control.job_folder(folder, job_id)).exists()

    def _miss(self, job_id: str) -> None:
        """Counts a complete answer without the job; bsub's word may be ahead of bjobs'."""
        self._missed[job_id] = self._missed.get(job_id, 0) + 1
        self._over_since.setdefault(job_id, time.monotonic())  # ask again soon
        if self._missed[job_id] >= LOST_ROUNDS:
            detail = "neither bjobs nor bhist knows the job"
            self._info_dict[job_id] = {"JobID": job_id, "State": "LOST", "Detail": detail}


def state(job: jobs.Job) -> str:
    """Returns submitit's word for LSF's; a held job is PENDING, for SUSPENDED reads as finished there."""
    if job.phase != ENDED:
        return {PENDING: "PENDING", RUNNING: "RUNNING"}.get(job.phase, "UNKNOWN")
    if job.is_success:
        return "COMPLETED"
    return {"timeout": "TIMEOUT", "cancelled": "CANCELLED"}.get(job.ending()[0], "FAILED")


class LsfJob(core.Job[core.R]):
    """A job of LSF."""

    _cancel_command = "bkill"
    _results_timeout_s = 30  # parallel file systems show new files late
    watcher = LsfWatcher(delay_s=60)

    def _register_in_watcher(self) -> None:
        super()._register_in_watcher()
        self.watcher.register_folder(self.job_id, self.paths.folder)

    def cancel(self, check: bool = True) -> None:
        """Kills the job; one that has ended is no error.

        Raises:
            SchedulerError: with ``check``, if bkill refuses.
        """
        try:
            jobs.cancel([self.job_id], timeout_s=COMMAND_S)
        except AlreadyEndedError:
            return
        except SchedulerError:
            if check:
                raise

    def _interrupt(self, timeout: bool = False) -> None:
        """Sends the signal of the run limit; submitit's own tests of checkpoints call this."""
        subprocess.check_call(["bkill", "-s", "USR2", request.lsf_id(self.job_id)])
