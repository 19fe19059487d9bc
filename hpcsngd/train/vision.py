"""Imports torchvision also where its build and torch's do not match.

torchvision's wheels carry compiled operators that a torch of another build cannot load (PyPI's torchvision
beside a CPU-only torch). The import then stops at the first operator it wants to describe, although models
and data sets need none of them. Declaring the operators' schemas lets it pass; calling one still fails.
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

# The two operators that torchvision describes by name at import; their signature is in its csrc/ops.
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")

# torch forgets a declaration when the object that made it goes away
_declared: list[torch.library.Library] = []


def load() -> ModuleType:
    """Returns the module ``torchvision``.

    Raises:
        ImportError: it is not installed. Anything else that its import raises is passed on as it is.
    """
    undeclared = set(_OPERATORS)
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] not in undeclared:
                raise
        undeclared.remove(missing[1])
        _forget_half_imported()
        _declare(missing[1])


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
    _declared.append(library)
