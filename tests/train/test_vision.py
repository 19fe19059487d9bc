"""Both ways to torchvision, each in a fresh interpreter: an import cannot be undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A package that behaves as torchvision does beside a torch of another build: it describes operators by name.
MISMATCHED = """\
import torch
for name in {names!r}:
    torch.library.register_fake("torchvision::" + name)(lambda boxes, scores, threshold: scores)
from torchvision import models
"""


def run(folder: Path, package: str, program: str) -> str:
    """Returns what a program prints when `package` is the torchvision it finds."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(package)
    (folder / "torchvision" / "models.py").write_text("LOADED = True\n")
    search = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", search + program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """\
from hpcsngd.train import vision
module = vision.load()
print(module.models.LOADED, module is sys.modules["torchvision"], module is vision.load())
print(len(vision._declared))
"""

FAIL = """\
from hpcsngd.train import vision
try:
    vision.load()
except Exception as error:
    print(type(error).__name__, error, len(vision._declared))
"""


def test_a_matching_torchvision_is_imported_as_it_is(tmp_path: Path) -> None:
    assert run(tmp_path, "from torchvision import models\n", LOAD) == "True True True\n0"


def test_missing_operators_are_declared(tmp_path: Path) -> None:
    package = MISMATCHED.format(names=["nms", "qnms"])
    assert run(tmp_path, package, LOAD) == "True True True\n2"


def test_only_what_is_missing_is_declared(tmp_path: Path) -> None:
    declared = "import torch\nlib = torch.library.Library('torchvision', 'FRAGMENT')\n"
    declared += "lib.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    script = declared + LOAD
    assert run(tmp_path, MISMATCHED.format(names=["nms", "qnms"]), script) == "True True True\n1"


def test_an_operator_that_we_do_not_know_stays_an_error(tmp_path: Path) -> None:
    printed = run(tmp_path, MISMATCHED.format(names=["roi_align"]), FAIL)
    assert printed == "RuntimeError operator torchvision::roi_align does not exist 0"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    assert run(tmp_path, "raise ImportError('broken wheel')\n", FAIL) == "ImportError broken wheel 0"


def test_the_installed_torchvision_can_be_used() -> None:
    from hpcsngd.train import vision

    assert "resnet50" in vision.load().models.list_models()
