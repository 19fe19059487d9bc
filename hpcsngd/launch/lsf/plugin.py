"""submitit's plugin: ``submitit.AutoExecutor(folder, cluster="lsf")`` for everyone who installs hpcsngd.

The entry points are loaded in every process that asks submitit where it runs, so this module imports little.
Tasks get their place from the starters (`hpcsngd.launch.lsf.node`), not from LSF, which knows one process.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from submitit.core import core, job_environment, logger, utils

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import environment, programs
from hpcsngd.launch.lsf import control, flavors, node, parse, render, request
from hpcsngd.launch.lsf.flavors import Flavor
from hpcsngd.launch.lsf.hosts import BatchHost
from hpcsngd.launch.lsf.launchers import ResourceSets, Visibility
from hpcsngd.launch.lsf.request import Directive
from hpcsngd.launch.lsf.watching import COMMAND_S, LsfJob


@dataclass(frozen=True)
class Parameters:
    """What ``update_parameters`` takes, with the prefix ``lsf_`` where submitit has no name of its own.

    Attributes:
        job_name: name of the job; made acceptable.
        time: run limit in minutes.
        nodes: compute hosts.
        tasks_per_node: tasks on each.
        cpus_per_task: cores of a task.
        gpus_per_node: GPUs of each host.
        mem_gb: memory of each host in GB.
        queue: queue.
        project: project that is charged.
        exclusive: whole hosts.
        alloc_flags: CSM's flags, such as ``smt4 nvme``.
        options: more options of bsub, name without dash -> value; ``True`` for a bare one.
        skip_options: options that the site refuses; they are left out.
        setup: shell lines that run first, on the job's first host.
        signal_delay_s: seconds before the run limit at which tasks get USR2.
        array_parallelism: elements of an array that may run at once.
        stderr_to_stdout: one log for both.
        flavor: ``auto``, or one of `flavors.FLAVORS`.
        launcher: ``auto``, jsrun, blaunch, lsrun or none.
        launcher_args: more words for the launcher.
        resource_sets: jsrun's; default: the usual ones.
        gpu_visibility: whether a task sees ``all`` GPUs of its host or only its ``one`` (jsrun).
        batch_host: whether the first host only runs the script; auto: by CSM's and jsrun's signs.
        straggler_s: seconds that other tasks have after one has failed; None: as long as they want.
    """

    job_name: str = "submitit"
    time: int = 5
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    queue: str | None = None
    project: str | None = None
    exclusive: bool = False
    alloc_flags: str | None = None
    options: dict[str, Directive] | None = None
    skip_options: Sequence[str] = ()
    setup: Sequence[str] = ()
    signal_delay_s: int = 90
    array_parallelism: int = 256
    stderr_to_stdout: bool = False
    flavor: str = "auto"
    launcher: str = "auto"
    launcher_args: Sequence[str] = ()
    resource_sets: ResourceSets | None = None
    gpu_visibility: Visibility = "all"
    batch_host: BatchHost = "auto"
    straggler_s: float | None = None

    @property
    def cores_per_node(self) -> int | None:
        """Returns the cores of a host's tasks; None if they are not counted."""
        return self.cpus_per_task * self.tasks_per_node if self.cpus_per_task else None


class LsfJobEnvironment(job_environment.JobEnvironment):
    """Where a task stands in its LSF job."""

    _env = {  # noqa: RUF012 - submitit's own form
        "job_id": "LSB_JOBID",
        "num_tasks": node.TASKS,
        "num_nodes": node.NODES,
        "node": node.NODE,
        "global_rank": node.GLOBAL_RANK,
        "local_rank": node.LOCAL_RANK,
    }

    @property
    def array_job_id(self) -> str | None:
        """Returns the array's id; None outside an array, where LSF sets the index to 0."""
        return os.environ["LSB_JOBID"] if self.array_task_id else None

    @property
    def array_task_id(self) -> str | None:
        """Returns the index in the array, from 1; None outside an array."""
        index = os.environ.get("LSB_JOBINDEX", "0")
        return None if index in ("", "0") else index

    @property
    def hostnames(self) -> Sequence[str]:
        """Returns the compute hosts, in the job's order."""
        listed = os.environ.get(node.HOSTS, "")
        return listed.split(",") if listed else [self.hostname]

    def _requeue(self, countdown: int) -> None:
        """Puts the job back in the queue; LSF ends it seconds later."""
        control.own().request_requeue(self.job_id, timeout_s=COMMAND_S)
        logger.get_logger().info(f"Requeued job {self.job_id} ({countdown} remaining timeouts)")


class LsfExecutor(core.PicklingExecutor):
    """Submits functions as LSF jobs.

    Args:
        folder: for pickles, scripts and logs; shared by all hosts.
        max_num_timeout: how often a checkpointable function is requeued after a timeout.
        max_pickle_size_gb: largest pickle.
        python: shell text that runs Python on the hosts; default: this interpreter.
    """

    job_class = LsfJob

    def __init__(
        self,
        folder: str | Path,
        max_num_timeout: int = 3,
        max_pickle_size_gb: float = 1.0,
        python: str | None = None,
    ) -> None:
        super().__init__(folder, max_num_timeout=max_num_timeout, max_pickle_size_gb=max_pickle_size_gb)
        self.python = shlex.quote(sys.executable) if python is None else python
        if self.affinity() < 0:
            raise RuntimeError("bsub is not in PATH; is this a login node of an LSF cluster?")

    @classmethod
    def affinity(cls) -> int:
        """Returns 2 where bsub is found, -1 elsewhere."""
        return -1 if shutil.which("bsub") is None else 2

    @classmethod
    def _equivalence_dict(cls) -> core.EquivalenceDict:
        return {
            "name": "job_name",
            "timeout_min": "time",
            "mem_gb": "mem_gb",
            "nodes": "nodes",
            "cpus_per_task": "cpus_per_task",
            "gpus_per_node": "gpus_per_node",
            "tasks_per_node": "tasks_per_node",
        }

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return {each.name for each in fields(Parameters)}

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - self._valid_parameters())
        if unknown:
            allowed = ", ".join(sorted(self._valid_parameters()))
            raise ValueError(f"unknown parameter(s) {', '.join(unknown)}; allowed: {allowed}")
        super()._internal_update_parameters(**kwargs)
        asked = self._asked()
        if asked.flavor != "auto":
            flavors.checked(asked.flavor)
        request.walltime(asked.time)

    def _asked(self) -> Parameters:
        return Parameters(**self.parameters)

    def _num_tasks(self) -> int:
        asked = self._asked()
        return asked.nodes * asked.tasks_per_node

    def flavor(self) -> Flavor:
        """Returns the flavor of LSF: the parameter's, or as ``lsid`` says."""
        asked = self._asked().flavor
        return detected_flavor() if asked == "auto" else flavors.checked(asked)

    def directives(self) -> dict[str, Directive]:
        """Returns bsub's options, name without dash -> value."""
        asked = self._asked()
        found = request.directives(
            flavor=self.flavor(),
            name=asked.job_name,
            nodes=asked.nodes,
            tasks_per_node=asked.tasks_per_node,
            walltime_min=asked.time,
            cores_per_node=asked.cores_per_node,
            gpus_per_node=asked.gpus_per_node or 0,
            mem_gb=asked.mem_gb,
            account=asked.project,
            queue=asked.queue,
            exclusive=asked.exclusive,
            alloc_flags=asked.alloc_flags,
        )
        found |= asked.options or {}
        return {name: value for name, value in found.items() if name not in asked.skip_options}

    def head(self) -> render.Head:
        """Returns the settings of the job's head."""
        asked, flavor = self._asked(), self.flavor()
        launcher = asked.launcher
        if launcher == "auto":
            launcher = flavors.default_launcher(flavor, asked.nodes)
        return render.Head(
            python=self.python,
            folder=str(self.folder),
            log_folder=str(self._fixed_folder()),
            nodes=asked.nodes,
            tasks_per_node=asked.tasks_per_node,
            walltime_min=asked.time,
            warning_s=asked.signal_delay_s,
            launcher=launcher,
            launcher_args=tuple(asked.launcher_args),
            sets=self._sets(asked) if launcher == "jsrun" else None,
            batch_host=asked.batch_host,
            straggler_s=asked.straggler_s,
            is_joined=asked.stderr_to_stdout,
        )

    @staticmethod
    def _sets(asked: Parameters) -> ResourceSets:
        if asked.resource_sets is not None:
            return asked.resource_sets
        cores = asked.cores_per_node or asked.tasks_per_node
        return ResourceSets.usual(asked.tasks_per_node, asked.gpus_per_node or 0, cores, asked.gpu_visibility)

    def bsub_words(self, script: Path, *, array: int | None = None) -> list[str]:
        """Returns bsub's command line.

        Args:
            script: the script's path.
            array: elements of an array; None: no array.

        Raises:
            SchedulerError: an option that this flavor does not take.
        """
        options = self.directives()
        log = "%J_lsf.out"
        if array is not None:
            name, at_once = str(options.get("J", "job")), self._asked().array_parallelism
            options["J"] = request.array_name(name, array, at_once, limit=array_limit())
            log = "%J_%I_lsf.out"
        # without -o LSF mails its report, which some sites refuse
        options.setdefault("o", str(self._fixed_folder() / log))
        return request.bsub_words(self.flavor(), options, str(script))

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return render.script(self.head(), command, setup=self._asked().setup)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return self.bsub_words(submission_file_path)

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        return parse.submitted_id(string if isinstance(string, str) else string.decode())

    def _fixed_folder(self) -> Path:
        return utils.JobPaths.get_first_id_independent_folder(self.folder)

    def _submit_command(self, command: str) -> core.Job[Any]:
        number = self._send(command)
        tasks = list(range(self._num_tasks()))
        return self.job_class(folder=self.folder, job_id=number, tasks=tasks)

    def _send(self, command: str, *, array: int | None = None) -> str:
        """Writes the script, calls bsub and returns the number of the job.

        The script keeps its name, for LSF runs it later, and again after a requeue; the name that submitit
        expects is a link.
        """
        script = self._fixed_folder() / f"submission_{uuid.uuid4().hex}.sh"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(self._make_submission_file_text(command, ""), encoding="utf-8")
        script.chmod(0o755)
        said = programs.run(
            self.bsub_words(script, array=array),
            timeout_s=self._command_timeout_s(),
            env=environment.clean(os.environ),
        )
        if said.status:
            raise utils.FailedSubmissionError(f"bsub refused: {said.words() or 'no reason given'}")
        try:
            number = parse.submitted_id(said.out + said.err)
        except SchedulerError as error:
            raise utils.FailedSubmissionError(str(error)) from error
        job_id = f"{number}_1" if array else number
        link = utils.JobPaths(self.folder, job_id=job_id).submission_file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(script)
        return number

    def _command_timeout_s(self) -> float:
        return COMMAND_S

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[core.Job[Any]]:
        if len(delayed_submissions) == 1:
            return super()._internal_process_submissions(delayed_submissions)
        made: list[core.Job[Any]] = []
        limit = array_limit()
        for first in range(0, len(delayed_submissions), limit):
            made += self._submit_array(delayed_submissions[first : first + limit])
        return made

    def _submit_array(self, submissions: Sequence[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        """Submits one array; its elements and our ids count from 1, as LSF's do."""
        folder = self._fixed_folder()
        folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for each in submissions:
            pickles.append(folder / f"{uuid.uuid4().hex}.pkl")
            each.set_timeout(self._asked().time, self.max_num_timeout)
            each.dump(pickles[-1])
        self._throttle()
        number = self._send(self._submitit_command_str, array=len(submissions))
        self._last_job_submitted = time.time()
        tasks = list(range(self._num_tasks()))
        made = []
        for index, file in enumerate(pickles, start=1):
            job: core.Job[Any] = self.job_class(self.folder, f"{number}_{index}", tasks)
            job.paths.move_temporary_file(file, "submitted_pickle")
            made.append(job)
        return made


def detected_flavor() -> Flavor:
    """Returns the flavor of the LSF that is installed here.

    Raises:
        SchedulerError: lsid is missing or does not answer.
    """
    said = programs.run(["lsid"], timeout_s=COMMAND_S)
    return flavors.detect(said.out, lambda name: shutil.which(name) is not None)


@functools.lru_cache(maxsize=1)
def array_limit() -> int:
    """Returns the largest index of an array here; LSF's default where it does not tell."""
    try:
        said = programs.run(["bparams", "-l"], timeout_s=COMMAND_S)
    except SchedulerError:
        return request.MAX_ARRAY
    return parse.array_limit(said.out) or request.MAX_ARRAY
