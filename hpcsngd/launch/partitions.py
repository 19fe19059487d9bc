"""What Slurm's own tables say against a request: partitions, accounts, qualities of service.

Parsing and judging are pure; `problems` asks at most three programs. A table that cannot be had, or that the
cluster does not enforce, says nothing: sbatch decides then.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpcsngd.config.fields import walltime_text
from hpcsngd.errors import SchedulerError, did_you_mean
from hpcsngd.launch.programs import command_output

SHOW_PARTITIONS = ("scontrol", "show", "partition", "--oneliner")
SHOW_CONFIG = ("scontrol", "show", "config")
SHOW_ASSOCIATIONS = (
    "sacctmgr",
    "--noheader",
    "--parsable2",
    "show",
    "associations",
    "format=Account,Partition,QOS",
)
_PATIENCE_S = 15.0
"""A controller that is slower than this is not asked for its tables."""


@dataclass(frozen=True)
class Request:
    """What a job asks of Slurm; ``origin`` maps partition, account and qos to where they were written."""

    nodes: int
    walltime_min: int
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    origin: Mapping[str, str] | None = None

    def rule(self, key: str) -> str:
        """Returns how a message names one of the keys."""
        where = (self.origin or {}).get(key, "default")
        return f"scheduler.{key}" if where == "default" else f"scheduler.{key} ({where})"


@dataclass(frozen=True)
class Partition:
    """One partition, as ``scontrol show partition`` describes it; None stands for no limit or all."""

    name: str
    is_default: bool
    is_up: bool
    total_nodes: int | None
    max_nodes: int | None
    max_minutes: int | None
    allowed: Mapping[str, frozenset[str] | None]
    denied: Mapping[str, frozenset[str]]


def problems(request: Request, *, timeout_s: float) -> list[str]:
    """Returns what Slurm's tables say against a request, one sentence each."""
    patience_s = min(timeout_s, _PATIENCE_S)
    known = parse_partitions(_told(SHOW_PARTITIONS, patience_s))
    found = [*partition_problems(request, known)]
    if request.account or request.qos:
        enforced = parse_enforced(_told(SHOW_CONFIG, patience_s))
        if enforced & {"associations", "limits", "qos"}:
            words = (*SHOW_ASSOCIATIONS, f"user={getpass.getuser()}")
            found += association_problems(request, _told(words, patience_s), enforced)
    return found


def _told(words: Sequence[str], timeout_s: float) -> str:
    try:
        return command_output(words, timeout_s=timeout_s)
    except SchedulerError:
        return ""


def parse_partitions(text: str) -> dict[str, Partition]:
    """Returns name -> partition for the lines of ``scontrol show partition --oneliner``."""
    found = {}
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in facts:
            continue
        name = facts["PartitionName"]
        found[name] = Partition(
            name=name,
            is_default=facts.get("Default") == "YES",
            is_up=facts.get("State", "UP") == "UP",
            total_nodes=_number(facts.get("TotalNodes", "")),
            max_nodes=_number(facts.get("MaxNodes", "")),
            max_minutes=minutes(facts.get("MaxTime", "")),
            allowed={key: _names(facts.get(f"Allow{key}", "ALL")) for key in ("Accounts", "Qos")},
            denied={key: _names(facts.get(f"Deny{key}", "")) or frozenset() for key in ("Accounts", "Qos")},
        )
    return found


def parse_enforced(config: str) -> set[str]:
    """Returns what ``AccountingStorageEnforce`` of ``scontrol show config`` names."""
    found = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", config, re.MULTILINE)
    return set(found[1].split(",")) if found else set()


def minutes(text: str) -> int | None:
    """Returns Slurm's ``[[days-]hours:]minutes:seconds`` in minutes, rounded down; None for ``UNLIMITED``."""
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, mins = (int(part or 0) for part in found.groups()[:3])
    return (days * 24 + hours) * 60 + mins


def partition_problems(request: Request, known: Mapping[str, Partition]) -> Iterator[str]:
    """Yields what speaks against the partition asked for, or the default one."""
    if not known:
        return
    name = request.partition or next((each.name for each in known.values() if each.is_default), None)
    if name is None:
        yield f"{request.rule('partition')}: this cluster has no default partition; allowed: {_list(known)}"
        return
    # a job may name several partitions; one that fits is enough
    verdicts = [list(_against(request, one, known)) for one in name.split(",")]
    if all(verdicts):
        yield from (text for texts in verdicts for text in texts)


def _against(request: Request, name: str, known: Mapping[str, Partition]) -> Iterator[str]:
    rule = request.rule("partition")
    if name not in known:
        yield f"{rule}: no partition {name!r}{did_you_mean(name, known)}; this cluster has {_list(known)}"
        return
    partition = known[name]
    if not partition.is_up:
        yield f"{rule}: partition {name} is down"
    most = min((n for n in (partition.max_nodes, partition.total_nodes) if n is not None), default=None)
    if most is not None and request.nodes > most:
        yield f"{rule}: partition {name} gives a job at most {most} node(s), asked: {request.nodes}"
    if partition.max_minutes is not None and request.walltime_min > partition.max_minutes:
        allowed, asked = walltime_text(partition.max_minutes), walltime_text(request.walltime_min)
        yield f"{rule}: partition {name} gives a job at most {allowed}, asked: {asked}"
    for key, table, value in (("account", "Accounts", request.account), ("qos", "Qos", request.qos)):
        allowed_names = partition.allowed[table]
        if value and allowed_names is not None and value not in allowed_names:
            yield f"{request.rule(key)}: partition {name} takes {_list(allowed_names)}, not {value}"
        if value and value in partition.denied[table]:
            yield f"{request.rule(key)}: partition {name} refuses {value}"


def association_problems(request: Request, table: str, enforced: set[str]) -> Iterator[str]:
    """Yields what speaks against account and quality of service; an empty table says nothing.

    Args:
        request: the request.
        table: lines ``account|partition|qos,qos`` of the user's associations.
        enforced: what the cluster enforces, see `parse_enforced`.
    """
    rows = [line.split("|") for line in table.splitlines() if line.count("|") == 2]
    if not rows:
        return
    accounts = {row[0] for row in rows}
    if request.account and request.account.lower() not in accounts:
        hint = f"{request.account!r}{did_you_mean(request.account, accounts)}"
        yield f"{request.rule('account')}: you have no account {hint}; yours: {_list(accounts)}"
        return
    mine = [row for row in rows if request.account in (None, row[0])]
    allowed = {name for row in mine for name in row[2].split(",") if name}
    if request.qos and "qos" in enforced and allowed and request.qos not in allowed:
        hint = f"{request.qos!r}{did_you_mean(request.qos, allowed)}"
        yield f"{request.rule('qos')}: you have no quality of service {hint}; yours: {_list(allowed)}"


def _names(text: str) -> frozenset[str] | None:
    return None if text in ("ALL", "") else frozenset(text.split(","))


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _list(names: Mapping[str, object] | set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names))
