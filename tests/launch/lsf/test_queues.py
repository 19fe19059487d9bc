"""Queues before a submission, and what the doctor says about an LSF."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.errors import PreflightError
from hpcsngd.launch import preflight
from hpcsngd.launch.doctor import lsf
from hpcsngd.launch.doctor.finding import Finding
from hpcsngd.launch.doctor.machine import Output
from hpcsngd.launch.lsf import queues
from tests.launch.conftest import Configure
from tests.launch.test_doctor import SLURM, Standin, findings

from .conftest import Play
from .test_parse import text
from .test_runs import SITE

LSF = SLURM | {"scheduler": {"kind": "lsf", "queue": "batch"}}
LSID = "IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022\nCopyright\n"


def answers(**changed: Output) -> dict[str, Output]:
    right = {name: Output(0, "") for name in (*lsf.PROGRAMS, "blaunch")}
    right |= {"lsid": Output(0, LSID), "bqueues": Output(0, text("bqueues"))}
    return right | changed


def found(site: Mapping[str, Any] = LSF, **changed: Output) -> dict[str, Finding]:
    return findings(Standin(answers(**changed)), site)


def test_queues_and_their_status() -> None:
    assert queues.parse(text("bqueues")) == {
        "batch": "Open:Active",
        "debug": "Open:Inact",
        "killable": "Closed:Active",
    }
    assert queues.parse("no queues") == {}


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        (None, []),
        ("batch", []),
        ("debug", []),  # it takes jobs and starts them later
        ("killable", ["queue killable (s.yaml:3) takes no jobs: Closed:Active"]),
        ("bach", ["queue bach (s.yaml:3) is not among LSF's: batch, debug, killable"]),
    ],
)
def test_a_queue_that_cannot_take_the_job(queue: str | None, said: list[str]) -> None:
    assert list(queues.problems(queue, queues.parse(text("bqueues")), "s.yaml:3")) == said
    assert list(queues.problems(queue, {})) == []


def test_a_queue_that_is_not_there_is_refused_before_submission(
    play: Play, configure: Configure, tmp_path: Path
) -> None:
    play("ibm", queues=("batch", "debug"))
    site = SITE | {"scheduler": SITE["scheduler"] | {"queue": "bach"}}
    with pytest.raises(PreflightError, match=r"queue bach \(.*\) is not among LSF's: batch, debug"):
        preflight.check(configure(site), run_root=tmp_path)


def test_an_lsf_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("executor", "job_environment")
    points = [EntryPoint(name, "hpcsngd.launch.lsf.plugin:X", "submitit") for name in names]
    monkeypatch.setattr(lsf, "entry_points", lambda group: points)
    told = found()
    assert {name: told[name].verdict for name in ("scheduler", "plugin", "flavor", "queue")} == {
        "scheduler": "ok",
        "plugin": "ok",
        "flavor": "ok",
        "queue": "ok",
    }
    assert "launcher" not in told
    assert told["scheduler"].text == LSID.partition("\n")[0]
    assert told["flavor"].text == "ibm"


def test_without_the_plugin_no_job_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsf, "entry_points", lambda group: [])
    assert found()["plugin"].verdict == "broken"


def test_what_is_missing_or_contradicts_the_site() -> None:
    down = found(lsid=Output(255, "LSF is down. Please wait"))["scheduler"]
    assert down.text == "LSF does not answer: LSF is down. Please wait"
    nothing = findings(Standin({"bsub": Output(0, "")}), LSF)["scheduler"]
    assert nothing.text == "no bjobs, bkill, bhist, brequeue, bqueues, lsid in PATH"
    summit = LSF | {"scheduler": {"kind": "lsf", "queue": "bach", "flavor": "csm"}}
    told = found(summit)
    assert told["flavor"].text == "the site file says csm, lsid and jsrun say ibm"
    assert told["launcher"].text == "jsrun is not in PATH here"
    assert told["queue"].verdict == "broken"
    assert found(bqueues=Output(255, "LSF is down"))["queue"].verdict == "warning"
    assert found(jsrun=Output(0, ""))["flavor"].text == "csm"


def test_without_a_site_the_scheduler_is_named() -> None:
    assert findings(Standin(answers()), None)["scheduler"].text == LSID.partition("\n")[0]
