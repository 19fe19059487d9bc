"""The command line as a user meets it: read verbs, messages, exit codes, completion, imports."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.cli.submit import _print_outcome
from hpcsngd.config import resolve
from hpcsngd.launch import plan
from hpcsngd.sweepdir import SweepDir

ROOT = Path(__file__).parents[1]


def hpcsngd(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "analysis")])
    return subprocess.run(
        [sys.executable, "-m", "hpcsngd", *args],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": path, **env},
        timeout=120,
        check=False,
    )


def modules_of(*args: str) -> set[str]:
    """Returns the modules that a command imports, checked while it really runs."""
    code = (
        "import sys\n"
        "from hpcsngd.cli import cli\n"
        "try:\n    cli.main(sys.argv[1:], standalone_mode=False)\n"
        "finally:\n"
        "    print('MODULES', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, check=True
    )
    line = next(line for line in done.stderr.splitlines() if line.startswith("MODULES"))
    return set(line.split()[1:])


def test_help_lists_the_verbs_and_exit_codes() -> None:
    done = hpcsngd("--help")
    assert done.returncode == 0
    for word in ("submit", "show", "sites", "experiments", "status", "report", "Exit codes", "completion"):
        assert word in done.stdout


def test_help_imports_click_alone() -> None:
    found = modules_of("--help")
    assert "click" in found
    assert not found & {"torch", "pandas", "numpy", "submitit", "pydantic", "yaml", "rich", "plotly"}


@pytest.mark.parametrize(
    "args",
    [
        ("sites",),
        ("experiments", "--json"),
        ("show", "--site", "local", "--exp", "digits-hylo"),
        ("submit", "--site", "local", "--exp", "digits-hylo", "--dry-run"),
        ("submit", "--site", "slurm", "--exp", "digits-hylo", "--matrix", "seed=1,2", "--dry-run"),
        ("status", "--json"),
    ],
    ids=lambda args: args[0],
)
def test_no_login_verb_imports_torch(args: tuple[str, ...]) -> None:
    assert not modules_of(*args) & {"torch", "pandas", "torchvision"}


def test_a_matrix_is_checked_cell_by_cell_before_anything_is_written(tmp_path: Path) -> None:
    words = ("submit", "--site", "slurm", "--exp", "digits-hylo", "--run-root", str(tmp_path / "runs"))
    done = hpcsngd(*words, "--matrix", "seed=1,2", "--matrix", "optimizer.lr=0.1,-1", "--parallel", "2")
    assert done.returncode == 2
    assert "--matrix optimizer.lr: optimizer.lr: input should be greater than 0; found -1" in done.stderr
    assert "in 2 cells: seed=1, optimizer.lr=-1; seed=2, optimizer.lr=-1" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sweeps_status_is_its_own_table(tmp_path: Path) -> None:
    rundir.write_yaml(tmp_path / "sweep.yaml", {"schema": 1, "cells": []})
    assert f"{tmp_path.name}: 0 cells: none" in hpcsngd("status", str(tmp_path)).stdout
    assert json.loads(hpcsngd("status", str(tmp_path), "--json", "--failed").stdout)["cells"] == []
    two = hpcsngd("status", str(tmp_path), str(tmp_path), "--json")
    assert two.returncode == 2
    assert "name one sweep" in two.stderr


def test_a_sweep_is_one_line_among_runs(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = recorded_run(root)
    run.write_status(rundir.Status("completed", "", 1))
    sweep = SweepDir(root / "s-sweep-0")
    cells = [recorded_run(sweep.path) for _ in range(2)]
    cells[0].write_status(rundir.Status("completed", "", 1))
    gone = {"id": "g", "axes": {}, "run": "0002-gone"}
    sweep.write_record({"cells": [*({"id": "c", "axes": {}, "run": cell.name} for cell in cells), gone]})
    lines = [f"completed  {run.name}", "sweep      s-sweep-0  3 cells: 1 completed, 2 lost"]
    assert hpcsngd("status", cwd=tmp_path).stdout.splitlines() == lines
    assert hpcsngd("status", "--watch", cwd=tmp_path).stdout.splitlines() == lines
    assert hpcsngd("status", str(sweep.path), str(run.path)).stdout.splitlines() == lines
    one, other = json.loads(hpcsngd("status", "--json", cwd=tmp_path).stdout)
    assert (one["state"], other["counts"]) == ("completed", {"completed": 1, "lost": 2})


def test_a_cell_that_was_never_written_spoils_no_table(tmp_path: Path) -> None:
    SweepDir(tmp_path).write_record({"cells": [{"id": "g", "axes": {}, "run": "0000-gone"}]})
    text = hpcsngd("status", str(tmp_path)).stdout
    assert "1 cells: 1 lost" in text
    assert "submission was interrupted" in text
    assert hpcsngd("cancel", str(tmp_path)).returncode == 0


def test_sites_and_experiments() -> None:
    rows = json.loads(hpcsngd("sites", "--json").stdout)
    assert {row["name"] for row in rows} >= {"local", "mist", "slurm"}
    assert all(row["error"] is None for row in rows)
    assert "digits-hylo" in hpcsngd("experiments").stdout


def test_a_broken_file_is_listed_as_broken(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("description: x\nnodse: 3\n")
    done = hpcsngd("sites", HPCSNGD_SITES=str(tmp_path))
    assert done.returncode == 0
    assert "nodse: unknown key" in done.stdout


def test_show_with_origins() -> None:
    done = hpcsngd("show", "--site", "mist", "--exp", "digits-hylo", "--set", "epochs=3", "--origins")
    assert done.returncode == 0
    assert "experiment.epochs: 3" in done.stdout
    assert "# --set epochs" in done.stdout
    assert "${MIST_ACCOUNT}" in done.stdout
    tree = json.loads(hpcsngd("show", "--exp", "digits-sgd", "--json").stdout)
    assert tree["experiment"]["preconditioner"] is None


def test_show_schema_is_json() -> None:
    assert "master_port" in json.loads(hpcsngd("show", "--schema", "site").stdout)["properties"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ("submit", "--site", "lcal", "--exp", "digits-hylo"),
            2,
            "unknown site 'lcal'; did you mean 'local'",
        ),
        (("submit", "--site", "local", "--exp", "digits-hyl"), 2, "did you mean 'digits-hylo'"),
        (("submit", "--site", "local"), 2, "Missing option '--exp'"),
        (("submit", "--sit", "local"), 2, "No such option '--sit'"),
        (("sbmit",), 2, "sbmit"),
        (("show",), 2, "give --site, --exp or both"),
        (("show", "--exp", "digits-hylo", "--set", "epocs=1"), 2, "did you mean 'epochs'"),
        (("show", "--exp", "digits-hylo", "--set", "epochs=x"), 2, "epochs: input should be a valid integer"),
        (("status", "/nonexistent/run"), 2, "does not exist"),
        (("report", "/nonexistent/run"), 2, "does not exist"),
        (("logs", "/nonexistent/run"), 2, "does not exist"),
        (("logs", ".", "--rank", "0", "--node", "0"), 2, "give --rank or --node, not both"),
        (("cancel", "."), 2, "has no run.yaml: it is not a run directory"),
        (("resume", "/nonexistent/run"), 2, "does not exist"),
        (("rerun", "/nonexistent/run"), 2, "does not exist"),
        (("diff", "/nonexistent/run", "."), 2, "does not exist"),
        (("submit", "--site", "local", "--exp", "digits-sgd", "--hold"), 3, "need a scheduler with a queue"),
        (
            (
                "submit",
                "--site",
                "local",
                "--exp",
                "digits-sgd",
                "--set",
                "site.env.MY_TOKEN=abcdefgh1",
                "--dry-run",
            ),
            2,
            "site.env.MY_TOKEN (--set site.env.MY_TOKEN): it looks like a secret",
        ),
        (
            ("submit", "--site", "local", "--exp", "digits-sgd", "--nodes", "0", "--dry-run"),
            2,
            "--nodes: resources.nodes: input should be greater than or equal to 1; found 0",
        ),
        (("show", "--site", "/nonexistent.yaml"), 2, "no site file at /nonexistent.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_end_with_a_message_and_no_traceback(args: tuple[str, ...], code: int, words: str) -> None:
    done = hpcsngd(*args)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_site_with_gpus_can_be_asked_for_none(tmp_path: Path) -> None:
    site = tmp_path / "s.yaml"
    site.write_text("description: d\nscheduler: {kind: slurm}\ngpus_per_node: 4\n")
    words = ("submit", "--site", str(site), "--exp", "digits-sgd", "--gpus-per-node", "0", "--dry-run")
    assert "no GPUs" in hpcsngd(*words).stdout.splitlines()[0]


def test_completion_offers_names() -> None:
    env = {"_HPCSNGD_COMPLETE": "bash_complete", "COMP_WORDS": "hpcsngd submit --site mi", "COMP_CWORD": "3"}
    assert "mist" in hpcsngd(**env).stdout
    env = {"_HPCSNGD_COMPLETE": "bash_complete", "COMP_WORDS": "hpcsngd show --exp digits", "COMP_CWORD": "3"}
    assert "digits-sgd" in hpcsngd(**env).stdout


RUNS = ROOT / "tests" / "data" / "runs"


def recorded_run(folder: Path) -> rundir.RunDir:
    """Returns a run as submit makes one, without a job."""
    resolved = resolve.resolve("local", "digits-sgd")
    record = {"config": resolved.to_record(), "plan": plan.make(resolved).to_record()}
    return rundir.create(folder, "x", record)


def test_status_tells_the_verdict_of_a_single_run(tmp_path: Path) -> None:
    run = recorded_run(tmp_path)
    fault = rundir.Fault("nan", "loss is nan", "node1", rank=1, evidence=["step 7: nan"])
    run.write_status(rundir.Status("failed", fault.line(), 1, fault=dataclasses.asdict(fault)))
    done = hpcsngd("status", run.name, cwd=tmp_path)
    assert done.returncode == 0
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"failed     {run.name}  nan: loss is nan (rank 1 on node1, ")
    assert others == ["  evidence:", "    step 7: nan", f"  logs: hpcsngd logs {run.name}"]


def test_diff_of_two_runs() -> None:
    words = ("diff", str(RUNS / "complete"), str(RUNS / "failed"))
    found = json.loads(hpcsngd(*words, "--json").stdout)
    assert found["outcome"]["state"] == ["completed", "failed"]
    assert list(found) == ["runs", "config", "code", "environment", "hardware", "outcome"]
    text = hpcsngd(*words).stdout
    assert "    < completed\n    > failed\n" in text


def test_logs_of_a_run_without_logs(tmp_path: Path) -> None:
    done = hpcsngd("logs", str(recorded_run(tmp_path).path))
    assert (done.returncode, done.stdout) == (0, "")
    assert "no logs yet in" in done.stderr


def test_status_of_an_empty_root(tmp_path: Path) -> None:
    done = hpcsngd("status", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "no runs in runs\n")


def test_a_verb_that_does_not_exist_is_answered_with_the_closest() -> None:
    done = hpcsngd("docter")
    assert done.returncode == 2
    assert "did you mean 'doctor'" in done.stderr


def test_doctor_looks_at_this_machine_and_a_site(tmp_path: Path) -> None:
    done = hpcsngd("doctor", "--site", "local", "--json", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert done.returncode == (1 if record["is_broken"] else 0)
    verdicts = {row["name"]: row["verdict"] for row in record["findings"]}
    assert verdicts["torch"] == "ok"
    assert verdicts["scheduler"] == "ok"
    assert "python" in hpcsngd("doctor").stdout


def test_doctor_ends_with_1_where_something_is_broken(tmp_path: Path) -> None:
    site = tmp_path / "gone.yaml"
    site.write_text("description: d\nscheduler: {kind: local}\nlaunch: {python: /nowhere/python}\n")
    done = hpcsngd("doctor", "--site", str(site))
    assert done.returncode == 1
    assert "broken   torch" in done.stdout


def test_the_end_of_a_run_tells_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {"validation_accuracy": 0.25, "validation_loss": 4.5, "best_validation_accuracy": 0.3}
    times = {"epochs": 2, "steps": 8, "train_s": 1.0, "wall_s": 2.0}
    scores = {"validation_perplexity": 90.017, "validation_bleu": 31.25}
    status = rundir.Status("completed", "", 1, result=accuracy | scores | times)
    _print_outcome(rundir.RunDir(tmp_path), status, None)
    assert capsys.readouterr().out.splitlines()[:3] == [
        "validation accuracy: 0.2500 after 2 epochs",
        "validation perplexity: 90.02",
        "validation bleu: 31.25",
    ]
