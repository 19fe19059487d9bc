"""submitit's executors, taught our sites' rules.

Slurm: the directives come from the plan, any of them can be left out, and ``sbatch`` is called once, in a
clean environment, with a time limit and its own words in the error. LSF: our own executor, told by the plan.
Local: the job gets a session of its own,
so that Ctrl-C and a closed terminal do not end it.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from hpcsngd.launch import environment
from hpcsngd.launch.lsf.plugin import LsfExecutor
from hpcsngd.launch.plan import Directive, Plan
from hpcsngd.launch.programs import command_output

STRAGGLER_WAIT_S = 60
"""After the first agent has ended, srun gives the others this long."""
_DIRECTIVE = re.compile(r"#SBATCH --(?P<name>[A-Za-z0-9-]+)(=|$)")


class SlurmSiteExecutor(SlurmExecutor):
    """submitit's Slurm executor for one plan."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(folder, python=None)
        self._plan = plan
        self.update_parameters(**_parameters(plan))

    @classmethod
    def affinity(cls) -> int:
        """Returns that this executor can be made anywhere: a dry run needs no Slurm."""
        return 2

    @property
    def script(self) -> str:
        """The text that is submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text: str = super()._make_submission_file_text(command, uid)
        return "\n".join(line for line in text.split("\n") if not self._is_skipped(line))

    def _is_skipped(self, line: str) -> bool:
        match = _DIRECTIVE.match(line)
        return match is not None and match["name"] in self._plan.skip_options

    def _submit_command(self, command: str) -> SlurmJob[Any]:
        name = uuid.uuid4().hex
        file = JobPaths.get_first_id_independent_folder(self.folder) / f".submission_file_{name}.sh"
        file.write_text(self._make_submission_file_text(command, name), encoding="utf-8")
        words = self._make_submission_command(file)
        clean = environment.clean(os.environ)
        output = command_output(words, timeout_s=self._plan.command_timeout_s, env=clean)
        job_id = self._get_job_id_from_submission_command(output)
        job: SlurmJob[Any] = self.job_class(
            folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks()))
        )
        job.paths.move_temporary_file(file, "submission_file", keep_as_symlink=True)
        return job


class LsfSiteExecutor(LsfExecutor):
    """Our LSF executor for one plan."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(folder)
        self._plan = plan
        self.update_parameters(
            job_name=plan.job_name,
            nodes=plan.nodes,
            tasks_per_node=plan.agents_per_node,
            time=plan.walltime_min,
            flavor=plan.flavor,
            launcher=plan.launcher,
            launcher_args=plan.launch_args,
            resource_sets=plan.jsrun_sets,
            batch_host=plan.batch_host,
            options=plan.directives,
            straggler_s=STRAGGLER_WAIT_S,
            **({"signal_delay_s": math.ceil(plan.stop_margin_s)} if plan.stop_margin_s else {}),
        )

    @classmethod
    def affinity(cls) -> int:
        """Returns that this executor can be made anywhere: a dry run needs no LSF."""
        return 2

    @property
    def script(self) -> str:
        """The text that LSF runs on the job's first host."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def directives(self) -> dict[str, Directive]:
        """Returns what the plan asks for; nothing is added to it."""
        return dict(self._plan.directives)

    def _command_timeout_s(self) -> float:
        return self._plan.command_timeout_s


class LocalSiteExecutor(LocalExecutor):
    """submitit's local executor for one plan; the job outlives the process and the terminal it came from."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        super().__init__(folder)
        self._plan = plan
        self.update_parameters(tasks_per_node=plan.agents_per_node, timeout_min=plan.walltime_min)

    def _submit_command(self, command: str) -> LocalJob[Any]:
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "submitit.local._local", str(self.folder)],
                env=environment.clean(os.environ) | _controller_environment(command, self._plan),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # the thread reaps the controller if we are still here when it ends; otherwise init does
        threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()
        return LocalJob(
            folder=self.folder, job_id=str(process.pid), tasks=list(range(self._plan.agents_per_node))
        )


def _controller_environment(command: str, plan: Plan) -> dict[str, str]:
    """Returns what ``submitit.local._local`` reads; submitit's own starter has no seam for a new session."""
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_COMMAND": command,
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_NTASKS": str(plan.agents_per_node),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * plan.walltime_min),
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
    }


def _parameters(plan: Plan) -> dict[str, Any]:
    """Returns the plan's directives as submitit takes them: by its own names, else as additional ones."""
    known = SlurmExecutor._valid_parameters()  # noqa: SLF001 - the only place where submitit tells
    parameters: dict[str, Any] = {"wckey": None, "additional_parameters": {}}
    for name, value in plan.directives.items():
        key = name.replace("-", "_")
        if key in known:
            parameters[key] = value
        else:
            # submitit spells its own open-mode and signal like this; equal keys replace them
            parameters["additional_parameters"][name] = value
    if plan.launcher == "none":
        parameters["use_srun"] = False
    else:
        parameters["srun_args"] = srun_args(plan)
    return parameters


def srun_args(plan: Plan) -> list[str]:
    """Returns the words for srun: end the job when one agent fails, and the cores, which it forgets.

    Slurm 22.05 to 23.02 does not hand ``--cpus-per-task`` from sbatch to srun. 22.05 also loses the kill on a
    node that has not launched its task yet; ``--wait`` then ends the step.
    """
    cores = plan.cpus_per_agent
    is_skipped = "cpus-per-task" in plan.skip_options
    restated = [f"--cpus-per-task={cores}"] if cores and not is_skipped else []
    return ["--kill-on-bad-exit=1", f"--wait={STRAGGLER_WAIT_S}", *restated, *plan.launch_args]
