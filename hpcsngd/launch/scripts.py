"""What would be submitted and run, as text: the dry run.

The script comes from the executor that submits it and the commands from the functions that the agent calls,
so this text is the deed, with ``RUN_DIR`` where the run directory's name will stand. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcsngd.config.resolve import Resolved
from hpcsngd.launch import causes, commands, environment, plan, refusals, secrets
from hpcsngd.launch.executors import LsfSiteExecutor, SlurmSiteExecutor
from hpcsngd.launch.lsf import launchers
from hpcsngd.launch.plan import Directive, Host, Plan
from hpcsngd.launch.ssh import jobs as ssh_jobs
from hpcsngd.launch.ssh.words import Ssh
from hpcsngd.rundir import RunDir

_SHOWN = 30
"""Longer values of options are not repeated where their causes are listed."""
SCRIPT = "SCRIPT.sh"
"""Stands for the name of the script, which is made at submission."""
RUN_DIR = "RUN_DIR"
"""Stands for the run directory's name, which is made at submission."""

_FIRST_HOST = {
    "slurm": "the first host that Slurm gives",
    "ssh": "the first of the site's hosts, by its address",
    "lsf": "the first compute host that LSF gives; a batch host has no rank and is not the master",
}

_COMMAND_KEYS = (
    "site.launch.mode",
    "site.launch.python",
    "site.launch.rendezvous_timeout_s",
    "site.master_port",
    "site.preload",
    "site.container.image",
    "site.container.binds",
    "site.container.gpu_flag",
    "site.container.args",
    "site.container.code",
    "site.container.binds_if_present",
    "site.container.tmp",
    "site.container.pass_env",
)


def script(made: Plan, run_dir: Path) -> str:
    """Returns the text that is submitted for a run directory; on a local site, the command."""
    submit_dir = RunDir(run_dir).submit_dir
    if made.scheduler == "slurm":
        return SlurmSiteExecutor(submit_dir, made).script
    if made.ssh:
        return _ssh_commands(made.ssh, made.agent_python)
    return (
        LsfSiteExecutor(submit_dir, made).script if made.scheduler == "lsf" else _local_command(made, run_dir)
    )


def dry_run(
    resolved: Resolved, *, host: Host | None = None, directives: Mapping[str, Directive] | None = None
) -> str:
    """Returns what a submission would send and run, and why; writes nothing.

    Args:
        resolved: the checked configuration.
        host: the machine that submits; default: this one.
        directives: more directives for this submission, as for `hpcsngd.launch.submit.submit`.

    Raises:
        ConfigError: the configuration holds what looks like a secret.
        PreflightError: what the site's rules refuse; a submission also asks the scheduler.
    """
    secrets.refuse(resolved)
    host = host or Host.here()
    made = plan.make(resolved, host=host, is_dry=True)
    made = dataclasses.replace(made, directives=made.directives | dict(directives or {}))
    run_dir = Path(resolved.site.run_root).expanduser().absolute() / RUN_DIR
    head = "\n".join([_headline(made), *_objections(resolved, host)])
    return "\n\n".join([head, *details(resolved, made, run_dir, script(made, run_dir))]) + "\n"


def _objections(resolved: Resolved, host: Host) -> list[str]:
    found = refusals.of_this_machine(resolved, host)
    return [f"# a submission from here would be refused: {words}" for words in found]


def details(resolved: Resolved, made: Plan, run_dir: Path, sent: str, bsub: Sequence[str] = ()) -> list[str]:
    """Returns the blocks of a dry run: what is sent, what each node runs, and where all of it comes from.

    Args:
        resolved: the checked configuration.
        made: its plan.
        run_dir: the run directory.
        sent: the batch script, or the command that is started on this machine.
        bsub: bsub's command line; default: that of a single run.
    """
    if made.scheduler == "slurm":
        blocks = [
            f"# --- script for sbatch\n{sent.rstrip()}",
            "# --- where it comes from\n" + explain(sent, resolved),
        ]
    elif made.scheduler == "lsf":
        blocks = _lsf(resolved, made, run_dir, sent, bsub)
    elif made.ssh and sent == script(made, run_dir):
        blocks = [f"# --- agents are started with, on standard input the run directory\n{sent}"]
    else:
        blocks = [f"# --- started on this machine, in a session of its own\n{sent}"]
    return [
        *blocks,
        _workers(made, run_dir),
        "# --- where it comes from\n" + _origins(_COMMAND_KEYS, resolved),
        "# --- environment of the workers\n" + _environment(made, resolved),
    ]


def explain(text: str, resolved: Resolved) -> str:
    """Returns one line per directive of a script: the directive, its cause, and the file and line of it."""
    rows = []
    for name in re.findall(r"^#SBATCH --([A-Za-z0-9-]+)", text, flags=re.MULTILINE):
        cause, where = causes.cause(name, resolved, causes.SLURM)
        rows.append(f"--{name:<18} {cause:<40} {where}".rstrip())
    return "\n".join(rows)


def _lsf(resolved: Resolved, made: Plan, run_dir: Path, sent: str, bsub: Sequence[str]) -> list[str]:
    """Returns bsub's command line, the script, and what starts the agents, each with its causes."""
    submit_dir = RunDir(run_dir).submit_dir
    words = bsub or LsfSiteExecutor(submit_dir, made).bsub_words(submit_dir / SCRIPT)
    hosts = [f"HOST{number}" for number in range(made.nodes)]
    started = launchers.commands(
        made.launcher,
        hosts,
        [made.agent_python, *launchers.STARTER],
        sets=made.jsrun_sets,
        args=made.launch_args,
    )
    where = "on the batch host" if made.jsrun_sets else "on the job's first host"
    why = causes.jsrun(made, started[0], resolved) if made.jsrun_sets else []
    blocks = [
        f"# --- submitted with\n{shlex.join(words)}",
        "# --- where it comes from\n" + explain_bsub(words, resolved),
        f"# --- script that LSF runs {where}\n{sent.rstrip()}",
        "# --- where it comes from\n" + "\n".join(causes.head(sent, resolved)),
        "# --- it starts agents on the compute nodes with\n" + "\n".join(map(shlex.join, started)),
    ]
    return [*blocks, "# --- where it comes from\n" + "\n".join(why)] if why else blocks


def explain_bsub(words: Sequence[str], resolved: Resolved) -> str:
    """Returns one line per option of bsub: the option, its cause, and the file and line of it."""
    rows = []
    for position, word in enumerate(words[1:-1], start=1):
        if not word.startswith("-"):
            continue
        following = words[position + 1]
        is_bare = following.startswith("-") or position + 1 == len(words) - 1
        value = "" if is_bare else f" {following}"
        shown = word + (value if len(value) <= _SHOWN else " ...")
        cause, where = causes.cause(word[1:], resolved, causes.LSF)
        rows.append(f"{shown:<36} {cause:<50} {where}".rstrip())
    return "\n".join(rows)


def _origins(keys: Sequence[str], resolved: Resolved) -> str:
    return "\n".join(f"{key:<61} {resolved.origins[key]}" for key in keys if key in resolved.origins)


def _headline(made: Plan) -> str:
    gpus = f", {made.gpus_per_node} GPU(s) per node" if made.gpus_per_node else ", no GPUs"
    return (
        f"# {made.exp_name} on {made.site_name}: {made.nodes} node(s) x {made.ranks_per_node} rank(s){gpus}, "
        f"{made.walltime_min} min, {made.mode}, {made.backend}\n"
        f"# {RUN_DIR} stands for the directory that a submission makes. Nothing was written."
    )


def _local_command(made: Plan, run_dir: Path) -> str:
    words = [made.agent_python, "-u", "-m", "submitit.core._submit", str(RunDir(run_dir).submit_dir)]
    return f"# agents: {made.agents_per_node}\n{shlex.join(words)}"


def _ssh_commands(ssh: Ssh, python: str) -> str:
    return "\n".join(shlex.join(ssh_jobs.command(ssh, python, host)) for host in ssh.hosts)


def _workers(made: Plan, run_dir: Path) -> str:
    first, last = made.ports
    port = f"# PORT: leased on node 0 at the start, {first if first == last else f'{first}-{last}'}"
    address, legend = ("127.0.0.1", [port])
    if made.scheduler != "local":
        address, legend = "HOST0", [f"# HOST0: {_FIRST_HOST[made.scheduler]}", port]
    if text := causes.devices(made):
        legend.append(f"# {text}")
    if made.starts_ranks:
        title = "# --- each rank runs, with RANK and LOCAL_RANK of its own and"
        legend.append(f"# WORLD_SIZE={made.world_size} MASTER_ADDR={address} MASTER_PORT=PORT")
        words = commands.rank_command(made, str(run_dir), 1)
    else:
        nodes = f"0 to {made.nodes - 1}" if made.nodes > 1 else "0"
        title = f"# --- each node runs, with NODE its number ({nodes}),"
        words = commands.node_command(made, str(run_dir), 1, node="NODE", address=address, port="PORT")
    return "\n".join([title, *legend, _readable(words)])


def _readable(words: Sequence[str]) -> str:
    """Returns ``bash -c TEXT ...`` as shell text that does the same, with TEXT on lines of its own."""
    bash, option, text, *rest = words
    return f"shell=$(cat <<'END'\n{text}\nEND\n)\n{bash} {option} \"$shell\" {shlex.join(rest)}"


def _environment(made: Plan, resolved: Resolved) -> str:
    set_for_all = environment.worker_environment({}, made)
    passed = ", ".join(["PYTHONPATH", *made.ssh.pass_env]) if made.ssh else ""
    whose = f"a login's on the host, with the submitter's {passed}" if passed else "the submitter's"
    rows = [f"# {whose}, without scheduler and launcher variables, and:"]
    for name, value in sorted(set_for_all.items()):
        where = resolved.origins.get(f"site.env.{name}", "hpcsngd")
        rows.append(f"{f'{name}={shlex.quote(value)}':<60} {where}")
    return "\n".join(rows)
