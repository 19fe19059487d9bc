"""The flavors of LSF, and what each understands. Pure.

Unknown options must be refused here: LSF-compatible programs read them letter by letter, accept the rest and
take what follows as the job's command (``-alloc_flags smt4`` is ``-a lloc_flags`` and a job that runs
``smt4``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

Flavor = Literal["ibm", "compatible", "csm"]
"""IBM Spectrum LSF; a scheduler with LSF's commands but without IBM's options (OpenLava, volclava); IBM's LSF
with Cluster System Management and jsrun, as on Summit."""
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)

# bsub of volclava 2.2; IBM LSF 10.1 knows them too
_COMMON = "J n R W o e i q P m w x H r K I Ip Is L M t b E Ep a Jd sp u N B Zs is k c C D F S T v p"
# bsub(1) of IBM Spectrum LSF 10.1
_IBM = (
    "ar app clusters cwd data datachk datagrp env eo eptl ext f freq G g gpu hl IS ISp ISs IX jobprio Lp Ne "
    "network notify oo outdir pack ptl Q rn rnc s sla stage tty ti U ul We wa wt XF"
)
# the same, and OLCF's Summit user guide: "easy" and "expert" mode
_CSM = "alloc_flags cn_cu cn_mem core_isolation csm jsm ln_mem ln_slots nnodes smt step_cgroup"
_KNOWN: dict[Flavor, frozenset[str]] = {
    "compatible": frozenset(_COMMON.split()),
    "ibm": frozenset(f"{_COMMON} {_IBM}".split()),
    "csm": frozenset(f"{_COMMON} {_IBM} {_CSM}".split()),
}

_EXPERT_ONLY = ("R",)
_EASY_ONLY = ("nnodes", "cn_cu", "ln_slots", "ln_mem")


def detect(lsid: str, is_installed: Callable[[str], bool]) -> Flavor:
    """Returns the flavor by the first line of ``lsid`` and the launchers in PATH.

    Args:
        lsid: what the program printed.
        is_installed: whether a program is in PATH.
    """
    first = lsid.strip().partition("\n")[0].lower()
    is_ibm = "spectrum lsf" in first or "platform lsf" in first
    if is_ibm:
        return "csm" if is_installed("jsrun") else "ibm"
    return "compatible"


def checked(name: str) -> Flavor:
    """Returns a flavor by its name.

    Raises:
        ValueError: there is none of that name.
    """
    for flavor in FLAVORS:
        if flavor == name:
            return flavor
    raise ValueError(f"LSF flavor {name!r}; allowed: auto, {', '.join(FLAVORS)}")


def known(flavor: Flavor) -> frozenset[str]:
    """Returns the options of a flavor's bsub, without the dash."""
    return _KNOWN[flavor]


def default_launcher(flavor: Flavor, nodes: int) -> str:
    """Returns what starts processes on all nodes of a job; on Summit even one node is not the job's first."""
    if flavor == "csm":
        return "jsrun"
    if nodes == 1:
        return "none"
    return "blaunch" if flavor == "ibm" else "lsrun"


def problems(flavor: Flavor, options: Mapping[str, object]) -> Iterator[str]:
    """Yields why bsub of a flavor would refuse, or worse misread, these options (names without the dash)."""
    for name in options:
        if name not in _KNOWN[flavor]:
            close = difflib.get_close_matches(name, _KNOWN[flavor], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"bsub of flavor {flavor} has no option -{name}{hint}"
    if flavor == "csm":
        yield from _csm_problems(options)


def _csm_problems(options: Mapping[str, object]) -> Iterator[str]:
    """Yields what the submission filter of a Summit-style system refuses (OLCF, Summit user guide)."""
    is_expert = str(options.get("csm", "")).lower() in ("y", "yes")
    if "n" in options:
        yield "-n is refused where jobs ask for whole nodes with -nnodes"
    if not options.get("P") and not options.get("G"):
        # -P is OLCF's; others charge a user group, -G
        yield "-P is required: a project (site.scheduler.account), or -G in site.scheduler.options"
    needed = {"W": "a wall time"} if is_expert else {"W": "a wall time", "nnodes": "a number of nodes"}
    for name, words in needed.items():
        if not options.get(name):
            yield f"-{name} is required: {words}"
    for name in _EASY_ONLY if is_expert else _EXPERT_ONLY:
        if name in options:
            mode = "does not go with -csm y" if is_expert else "needs the expert mode, -csm y"
            yield f"-{name} {mode}"
