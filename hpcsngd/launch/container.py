"""How a command is wrapped to run inside an image.

The environment is cleaned (``--cleanenv``) and an allow-list goes in, read in the task itself after the
preload lines: what the scheduler sets per task, such as a task's own GPUs, and what a preload line exports.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcsngd import fingerprint
from hpcsngd.config.site import Container
from hpcsngd.handover import CODE
from hpcsngd.launch.images import check, sif

if TYPE_CHECKING:
    from hpcsngd.launch.plan import Plan

RUNTIMES = ("apptainer", "singularity")
CODE_IN_IMAGE = "/opt/hpcsngd/lib"
"""Folder on the path of Python in our images; hpcsngd is in it, or bound into it."""

PASSED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "NVIDIA_VISIBLE_DEVICES"),
    *("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "HSA_*", "MIOPEN_*"),
    *(
        "NCCL_*",
        "RCCL_*",
        "GLOO_*",
        "UCX_*",
        "FI_*",
        "TORCH_*",
        "TORCHELASTIC_*",
        "PYTORCH_*",
        "CUBLAS_WORKSPACE_CONFIG",
    ),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "KMP_*", "HPCSNGD_*", "TZ"),
)
"""Variables that workers get, besides the site's own; ``*`` stands for any ending. No paths of the host."""

_PREFIXES = ("APPTAINERENV_", "SINGULARITYENV_")
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
_PACKAGE = Path(fingerprint.__file__).parent


def exec_words(container: Container, installed: str | None) -> tuple[str, ...]:
    """Returns the words that run a command inside an image, up to the binds.

    Args:
        container: the site's container section.
        installed: the runtime found on this machine; used where the site says ``auto``.
    """
    runtime = container.runtime if container.runtime != "auto" else installed or RUNTIMES[0]
    flag = () if container.gpu_flag == "none" else (container.gpu_flag,)
    return (runtime, "exec", "--cleanenv", *flag, *container.args)


def binds(container: Container, always: Iterable[str]) -> tuple[str, ...]:
    """Returns the bind mounts that every node must have, in the runtime's words and without repetitions.

    Args:
        container: the site's container section.
        always: folders that are bound under their own names.
    """
    ours = [escaped(folder) for folder in always]
    if container.code == "bind":
        ours.append(f"{escaped(str(_PACKAGE))}:{CODE_IN_IMAGE}/hpcsngd:ro")
    if container.tmp:
        ours.append(f"{escaped(container.tmp)}:/tmp")
    return tuple(dict.fromkeys([*ours, *map(_at_home, container.binds)]))


def optional_binds(container: Container) -> tuple[str, ...]:
    """Returns the bind mounts that nodes may lack."""
    return tuple(map(_at_home, container.binds_if_present))


def passed_names(container: Container, env: Iterable[str]) -> tuple[str, ...]:
    """Returns which variables reach the workers: ours, those of the site's ``env``, and what it asks to pass.

    Raises:
        ValueError: something that is neither a name nor the beginning of one and ``*``.
    """
    for word in container.pass_env:
        if not _PATTERN.fullmatch(word):
            raise ValueError(f"{word!r} is not a variable's name; allowed: a name, or its beginning and *")
    return tuple(dict.fromkeys([*PASSED, *env, *container.pass_env]))


def inner_environment(plan: Plan) -> dict[str, str]:
    """Returns what is set inside the image for every worker, under the runtimes' own names.

    Values are taken as they are: without the last two, the runtime would have a shell expand them.
    """
    inside = {"TMPDIR": "/tmp", "PYTHONNOUSERSITE": "1", CODE: fingerprint.identity()}  # noqa: S108
    if any(bind.endswith(f":{CODE_IN_IMAGE}/hpcsngd:ro") for bind in plan.binds):
        inside["PYTHONPATH"] = CODE_IN_IMAGE
    named = {prefix + name: value for name, value in inside.items() for prefix in _PREFIXES}
    return named | {"APPTAINER_NO_EVAL": "1", "SINGULARITY_NO_EVAL": "1"}


def export_lines(names: Sequence[str]) -> list[str]:
    """Returns lines of bash that hand the named variables, if set, to the runtime under both prefixes."""
    exports = " ".join(f'"{prefix}$name=${{!name}}"' for prefix in _PREFIXES)
    return [
        "for name in $(compgen -e); do",
        f"  case $name in {'|'.join(names)}) export {exports} ;; esac",
        "done",
    ]


def run_words(plan: Plan, run_dir: str) -> list[str]:
    """Returns the words in front of a worker's command: runtime, binds, working directory, image."""
    mounts = dict.fromkeys([*plan.binds, *plan.binds_if_present, escaped(run_dir)])
    return [
        *plan.container,
        *(word for bind in mounts for word in ("--bind", bind)),
        *("--pwd", run_dir, str(plan.image)),
    ]


def settle(plan: Plan, *, exists: Callable[[str], bool] = os.path.exists) -> Plan:
    """Returns the plan as this node can carry it out: without the optional binds that it lacks.

    Raises:
        ValueError: the image or the source of a bind is not on this node.
    """
    if plan.image is None:
        return plan
    if not exists(plan.image):
        raise ValueError(f"no image at {plan.image} on this node; is it on a file system that all nodes see?")
    for bind in plan.binds:
        if not exists(source(bind)):
            raise ValueError(
                f"site {plan.site_name}, container.binds: {source(bind)} does not exist on this node; "
                "container.binds_if_present is for paths that nodes may lack"
            )
    present = tuple(bind for bind in plan.binds_if_present if exists(source(bind)))
    return dataclasses.replace(plan, binds_if_present=present)


def escaped(path: str) -> str:
    """Returns a path as ``--bind`` reads it: there, comma and colon separate.

    Apptainer 1.4 fails on a path that has both, if options follow; either alone works.
    """
    return re.sub(r"([,:])", r"\\\1", path)


def source(bind: str) -> str:
    """Returns the host's path of a bind ``host[:inside[:options]]``."""
    return re.sub(r"\\([,:])", r"\1", re.split(r"(?<!\\):", bind, maxsplit=1)[0])


def image_arch(image: Path) -> str | None:
    """Returns the architecture that a SIF file is for; None for anything that is not one."""
    try:
        return sif.read(image).arch
    except (sif.SifError, OSError):
        return None


def image_problem(image: Path, code: str) -> str | None:
    """Returns why a file that exists cannot be the image, or None; the architecture is judged elsewhere.

    Args:
        image: the image; a folder is a sandbox, of which nothing is known here.
        code: the site's ``container.code``.
    """
    if not image.is_file():
        return None
    try:
        found = sif.read(image)
    except (sif.SifError, OSError) as error:
        return str(error)
    return check.code_problem(found.labels or {}, code=code)


def _at_home(bind: str) -> str:
    """Returns a bind with ``~`` at its beginning replaced."""
    return str(Path(bind).expanduser()) if bind.startswith("~") else bind
