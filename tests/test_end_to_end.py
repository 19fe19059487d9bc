"""The main job through the command line on this machine: submit, wait, status, report, Ctrl-C, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.config import matrix
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.resolve import load_experiment
from hpcsngd.resources import named_files
from hpcsngd.tables import TABLES

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "analysis")])
QUICK = ("--site", "local", "--exp", "digits-hylo", "--set", "data.train_limit=256", "--set", "epochs=2")

# As a terminal starts it: tests in the background of a shell inherit an ignored SIGINT.
FOREGROUND = """
import signal
from hpcsngd.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PYTHONPATH, **more}


def hpcsngd(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcsngd", *args]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment(**more), timeout=240, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished quick run with all diagnostics, and what submit printed."""
    folder = tmp_path_factory.mktemp("main job")  # with a space
    flags = ("--profiling", "--rank-analysis", "--grad-norm", "--grad-error")
    kis = ("--set", "preconditioner.method=kis", "--set", "preconditioner.ratio=0.5")
    return folder, hpcsngd("submit", *QUICK, *kis, *flags, "--wait", "--run-root", "my runs", cwd=folder)


def only_run(folder: Path, root: str = "my runs") -> rundir.RunDir:
    (path,) = (folder / root).iterdir()
    return rundir.open_run(path)


def test_submit_and_wait_end_with_accuracy_time_run_and_report(finished) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    run = only_run(folder)
    lines = done.stdout.splitlines()
    assert any(line.startswith("test accuracy: 0.") for line in lines)
    assert any(line.startswith("time: ") for line in lines)
    assert f"run directory: {run.path}" in lines
    assert f"report: {run.report_html}" in lines
    assert run.report_html.stat().st_size > 1_000_000  # plotly is inside
    assert "running: epoch" in done.stderr  # lines where there is no terminal


def test_the_run_directory_holds_what_the_contract_says(finished) -> None:
    run = only_run(finished[0])
    status = run.status()
    assert status is not None
    assert status.state == "completed"
    assert run.record()["provenance"]["argv"][0] == "submit"
    assert "digits-cnn" in run.run_yaml.read_text()
    assert "Total params" in run.summary_txt.read_text()
    evaluations = list(rundir.read_rows(run.metrics("eval"), TABLES["eval"]))
    assert [row["epoch"] for row in evaluations] == [1.0, 2.0]
    assert {row["count"] for row in evaluations} == {359}  # each test digit once, though two ranks share them
    assert list(rundir.read_rows(run.metrics("train"), TABLES["train"]))[-1]["samples"] == 512
    assert (run.checkpoints_dir / "latest").exists()


@pytest.mark.parametrize("table", ["communication", "memory", "rank_analysis", "grad_norm", "grad_error"])
def test_each_diagnostics_flag_writes_its_table(finished, table: str) -> None:
    rows = list(rundir.read_rows(only_run(finished[0]).metrics(table), TABLES[table]))
    assert rows


def test_profiling_has_a_file_per_rank(finished) -> None:
    run = only_run(finished[0])
    for rank in (0, 1):
        rows = list(rundir.read_rows(run.metrics("profiling", rank), TABLES["profiling"]))
        assert {row["rank"] for row in rows} == {rank}
        assert {"forward", "backward", "gather", "precondition"} <= {row["phase"] for row in rows}


def test_status_and_report_read_it_back(finished) -> None:
    folder, _ = finished
    run = only_run(folder)
    (state,) = json.loads(hpcsngd("status", str(run.path), "--json", cwd=folder).stdout)
    assert (state["state"], state["epoch"], state["epochs"]) == ("completed", 2.0, 2)
    assert "completed" in hpcsngd("status", "--run-root", "my runs", cwd=folder).stdout
    numbers = json.loads(hpcsngd("report", "my runs", "--json", cwd=folder).stdout)
    assert numbers["summary"]["runs"] == 1
    done = hpcsngd("report", "my runs", "--out", "both.html", cwd=folder)
    assert done.stdout == "report: both.html\n"
    assert (folder / "both.html").exists()


def test_interrupted_wait_leaves_the_run_alone(tmp_path: Path) -> None:
    waiting = subprocess.Popen(
        # long enough that it cannot end between its first row and the signal
        [sys.executable, "-c", FOREGROUND, "submit", *QUICK, "--set", "epochs=60", "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,  # a terminal sends Ctrl-C to the whole group
    )
    wait_until(lambda: list(tmp_path.glob("runs/*/metrics/train.csv")) != [])
    os.killpg(waiting.pid, signal.SIGINT)
    _, stderr = waiting.communicate(timeout=30)
    run = only_run(tmp_path, "runs")
    assert waiting.returncode == 130
    assert f"the run goes on. Come back with: hpcsngd status runs/{run.name}" in stderr
    assert "Traceback" not in stderr
    wait_until(lambda: run.status() is not None)
    assert run.status().state == "completed"


def test_a_failing_run_names_its_cause_in_one_line_and_exits_1(tmp_path: Path) -> None:
    broken = (
        "--set",
        "optimizer.lr=1e30",
        "--set",
        "preconditioner=null",
        "--set",
        "schedule.warmup_epochs=0",
    )
    done = hpcsngd("submit", *QUICK, *broken, "--wait", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: nan: ")
    assert "rank " in line
    assert "Traceback" not in done.stderr
    assert only_run(tmp_path, "runs").status().fault["kind"] == "nan"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--nodes", "2"), 3, "max_nodes"),
        (("--walltime", "30d"), 3, "max_walltime"),
        (("--run-root", "/proc/nothing"), 3, "cannot write the run root /proc/nothing"),
        (("--gpus-per-node", "64", "--ranks-per-node", "65"), 3, "ranks"),
        (("--set", "scheduler.kind=ssh"), 3, "ssh"),
        (("--set", "scheduler.kind=lsf"), 4, "bsub"),
        (("--set", "scheduler.kind=slurm", "--set", "preload=[]"), 4, "sbatch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals_write_nothing(tmp_path: Path, args: tuple[str, ...], code: int, words: str) -> None:
    path = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if not Path(part, "sbatch").exists()
    )
    done = hpcsngd("submit", "--site", "local", "--exp", "digits-sgd", *args, cwd=tmp_path, PATH=path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def on_real_data() -> list[str]:
    """Returns the experiments whose data a package brings and whose network two cores can train.

    Files with a matrix are left to tests/test_jobs_smoke.py: what they link cannot be set from outside.
    """
    single = [name for name in named_files("jobs") if not matrix.resolve("local", name, environment={})]
    found = {name: load_experiment(name) for name in single}
    is_small = {
        name: each.data.name == "digits" or "width" in each.model.args for name, each in found.items()
    }
    return [
        name
        for name, each in found.items()
        if is_small[name] and each.data.name in ("digits", "fashion-mnist")
    ]


@pytest.mark.parametrize("name", on_real_data())
def test_small_experiments_train_on_their_real_data(tmp_path: Path, name: str) -> None:
    facts = DATASETS[load_experiment(name).data.name]
    if facts.needs_root and not any(Path(path).exists() for path in facts.system_paths):
        assert os.environ.get("CI") != "true", f"continuous integration must have the data: {facts.get}"
        pytest.skip(f"no data for {name}: {facts.get}")
    small = ("data.train_limit=128", "data.test_limit=64", "epochs=1", "batch_size=32", "ranks_per_node=2")
    sets = [word for text in small for word in ("--set", text)]
    done = hpcsngd("submit", "--site", "local", "--exp", name, *sets, "--wait", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["status"]["result"]
    # 128 samples: two steps of both ranks, four of one worker beside the server, or one step on all of them
    steps = {"parameter_server": 4, "full_batch": 1}.get(load_experiment(name).strategy, 2)
    assert (result["epochs"], result["steps"]) == (1, steps)
    assert result["test_loss"] < 3  # ten classes: chance is 2.3


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = hpcsngd("submit", *QUICK, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def wait_until(condition, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def test_smoke_is_one_command_and_leaves_no_half_data(tmp_path: Path) -> None:
    done = hpcsngd("submit", "--exp", "resnet32-kfac", "--smoke", "--wait", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["run"].startswith("resnet32-kfac-smoke-")
    assert told["status"]["result"]["epochs"] == 2
    assert Path(told["report"]).stat().st_size > 100_000
    (version,) = (tmp_path / "runs" / "smoke-data").iterdir()
    assert [folder.name for folder in version.iterdir()] == ["cifar10"]
    # what was set stays, of a matrix the first cell is taken, and the data are there already
    words = ("--exp", "study-profiling", "--smoke", "--set", "epochs=7", "--dry-run")
    again = hpcsngd("submit", *words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "the first of 2 cells: preconditioner.method=kid" in again.stderr
    assert "torch.distributed.run" in again.stdout
    assert hpcsngd("status", cwd=tmp_path).stdout.count("resnet32-kfac-smoke") == 1
