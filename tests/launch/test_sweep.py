"""Submission of sweeps with stand-in commands: one array, what is skipped, what is refused, its status."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcsngd import rundir, sweepdir
from hpcsngd.config import matrix, resolve
from hpcsngd.config.matrix import Matrix
from hpcsngd.errors import PreflightError, RunDirError, SchedulerError
from hpcsngd.launch import arrays, cancel, cell, plan, slurm, sweep, sweep_scripts, sweep_status
from hpcsngd.launch.plan import Host
from hpcsngd.rundir import Fault, Status
from hpcsngd.sweepdir import SweepDir

from .conftest import EXPERIMENT

SITE: dict[str, Any] = {
    "description": "cluster",
    "scheduler": {"kind": "slurm", "command_timeout_s": 20, "poll_s": 0.05},
    "limits": [{"max_nodes": 4, "max_walltime": "2h"}],
}
AXES = ("seed=1,2,3", "optimizer.lr=0.1,0.2")
# one job id more each time; script and number of calls are kept
ACCEPT = """
n=$(cat "$0.n" 2>/dev/null || echo 4710); echo $((n+1)) > "$0.n"
cp "$1" "$0.script.$((n+1))"
echo "Submitted batch job $((n+1))"
"""


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a folder for stand-in programs first in PATH; Slurm's own are not behind it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    program(folder, "sbatch", ACCEPT)
    for name in ("squeue", "sacct", "scontrol"):
        program(folder, name, 'echo "$@" >> "$0.calls"; echo stand-in not set up >&2; exit 1')
    return folder


def cells(
    tmp_path: Path, axes: tuple[str, ...] = AXES, *sets: str, site: dict[str, Any] | None = None
) -> Matrix:
    site_file, exp_file = tmp_path / "testsite.yaml", tmp_path / "standin.yaml"
    site_file.write_text(yaml.safe_dump({"run_root": str(tmp_path / "runs"), **(site or SITE)}))
    exp_file.write_text(yaml.safe_dump(EXPERIMENT))
    found = matrix.resolve(
        str(site_file),
        str(exp_file),
        [resolve.parse_set(text) for text in sets],
        [matrix.parse(text) for text in axes],
        environment={},
    )
    assert found is not None
    return found


def scripts_sent(path: Path) -> list[str]:
    return [file.read_text() for file in sorted(path.glob("sbatch.script.*"))]


def answer(path: Path, states: dict[str, str]) -> None:
    """Lets squeue list jobs."""
    lines = "\n".join(f"{job_id}|{state}|None" for job_id, state in states.items())
    program(path, "squeue", f'echo "$@" >> "$0.calls"; echo "{lines}"')


class TestOneArray:
    def test_all_cells_are_one_call(self, tmp_path: Path, path: Path) -> None:
        submitted = sweep.submit(cells(tmp_path, AXES, "site.scheduler.parallel_cells=2"), argv=["submit"])
        (script,) = scripts_sent(path)
        assert "#SBATCH --array=0-5%2" in script
        assert re.search(rf"-m hpcsngd\.launch\.cell {submitted.sweep.path} 1$", script, re.MULTILINE)
        assert (submitted.job_ids, submitted.submitted, submitted.skipped) == (("4711",), 6, {})

    def test_every_cell_is_an_ordinary_run_directory(self, tmp_path: Path, path: Path) -> None:
        found = cells(tmp_path)
        place = sweep.submit(found, argv=["submit", "x"]).sweep
        assert place.path.parent == tmp_path / "runs"
        for index, (known, asked) in enumerate(
            zip(sweepdir.open_sweep(place.path).cells(), found.cells, strict=True)
        ):
            run = rundir.open_run(known.run.path)
            record = run.record()
            assert (known.id, known.axes) == (asked.id, asked.axes)
            assert resolve.from_record(record["config"]) == asked.resolved
            assert plan.Plan.from_record(record["plan"]) == plan.make(asked.resolved)
            assert record["sweep"] == {"cell": asked.id, "axes": asked.axes}
            assert record["provenance"]["argv"] == ["submit", "x"]
            assert not (record["provenance"]["git"] or {}).get("diff")
            facts = rundir.read_yaml(run.attempt(1).submitted_yaml)
            assert (facts["scheduler"], facts["job_id"]) == ("slurm", f"4711_{index}")
            assert place.array(1)[index] == sweepdir.Member(run.name, 1)

    def test_without_a_limit_all_may_run(self, tmp_path: Path, path: Path) -> None:
        sweep.submit(cells(tmp_path), argv=[])
        assert "#SBATCH --array=0-5%6" in scripts_sent(path)[0]

    def test_cells_that_ask_for_other_resources_have_arrays_of_their_own(
        self, tmp_path: Path, path: Path
    ) -> None:
        found = cells(tmp_path, ("seed=1,2", "nodes=1,2"), "site.scheduler.parallel_cells=1")
        submitted = sweep.submit(found, argv=[])
        first, second = scripts_sent(path)
        assert ("#SBATCH --nodes=1\n" in first, "#SBATCH --nodes=2\n" in second) == (True, True)
        # the limit holds for both together
        assert "dependency" not in first
        assert "#SBATCH --dependency=afterany:4711" in second
        assert submitted.job_ids == ("4711", "4712")
        assert [member.run for number in (1, 2) for member in submitted.sweep.array(number)] == [
            submitted.sweep.cells()[index].run.name for index in (0, 2, 1, 3)
        ]

    def test_a_large_sweep_is_split_where_the_cluster_asks_for_it(
        self, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(arrays, "DEFAULT_SIZE", 5)
        program(path, "scontrol", 'printf "MaxArrayCount = 9\\nMaxArraySize            = 4\\n"')
        submitted = sweep.submit(cells(tmp_path), argv=[])
        assert [re.findall(r"--array=(\S+)", script) for script in scripts_sent(path)] == [
            ["0-2%3"],
            ["0-2%3"],
        ]
        ids = [rundir.read_yaml(run.attempt(1).submitted_yaml)["job_id"] for run in submitted.sweep.runs()]
        assert ids == ["4711_0", "4711_1", "4711_2", "4712_0", "4712_1", "4712_2"]

    def test_a_thousand_cells_are_one_call(self, tmp_path: Path, path: Path) -> None:
        seeds = ",".join(map(str, range(500)))
        submitted = sweep.submit(cells(tmp_path, (f"seed={seeds}", "optimizer.lr=0.1,0.2")), argv=[])
        assert submitted.submitted == 1000
        (script,) = scripts_sent(path)
        assert "#SBATCH --array=0-999%1000" in script
        assert not (path / "squeue.calls").exists()


class TestAgain:
    def test_finished_and_active_cells_are_left_alone(self, tmp_path: Path, path: Path) -> None:
        """Of six cells two have completed, two are on their way, one has failed and one is lost."""
        place = sweep.submit(cells(tmp_path), argv=["first"]).sweep
        runs = place.runs()
        for run in runs[:2]:
            run.write_status(Status("completed", "", 1, result={"test_accuracy": 1.0}))
        runs[2].write_status(Status("failed", "nan", 1))
        answer(path, {"4711_3": "RUNNING", "4711_4": "PENDING"})
        program(path, "sacct", "exit 0")
        again = sweep.submit(cells(tmp_path), argv=["second"])
        assert again.sweep == place
        assert (again.submitted, again.skipped) == (2, {"completed": 2, "running": 1, "pending": 1})
        assert "#SBATCH --array=0-1%2" in scripts_sent(path)[1]
        assert place.array(2) == [sweepdir.Member(runs[2].name, 2), sweepdir.Member(runs[5].name, 2)]
        assert rundir.read_yaml(runs[2].attempt(2).submitted_yaml)["job_id"] == "4712_0"
        assert [item["argv"] for item in place.record()["submissions"]] == [["first"], ["second"]]
        assert runs[2].record()["provenance"]["argv"] == ["first"]

    def test_nothing_is_submitted_when_all_have_completed(self, tmp_path: Path, path: Path) -> None:
        for run in sweep.submit(cells(tmp_path), argv=[]).sweep.runs():
            run.write_status(Status("completed", "", 1))
        before = sweep.directory(cells(tmp_path)).record()
        again = sweep.submit(cells(tmp_path), argv=[])
        assert (again.submitted, again.job_ids, again.skipped) == (0, (), {"completed": 6})
        assert len(scripts_sent(path)) == 1
        assert again.sweep.record() == before

    def test_more_values_extend_the_sweep(self, tmp_path: Path, path: Path) -> None:
        first = sweep.submit(cells(tmp_path), argv=[]).sweep
        for run in first.runs():
            run.write_status(Status("completed", "", 1))
        larger = sweep.submit(cells(tmp_path, ("seed=1,2,3,4", "optimizer.lr=0.1,0.2")), argv=[])
        assert (larger.sweep, larger.submitted) == (first, 2)
        names = [known.run.name for known in first.cells()]
        assert [name[:4] for name in names] == [f"{index:04}" for index in range(8)]
        assert [known.axes["seed"] for known in first.cells()][-2:] == [4, 4]

    def test_a_refusal_leaves_cells_that_are_submitted_next_time(self, tmp_path: Path, path: Path) -> None:
        program(path, "sbatch", 'echo "sbatch: error: no such account" >&2; exit 1')
        with pytest.raises(SchedulerError, match=r"no such account .*the same command submits"):
            sweep.submit(cells(tmp_path), argv=[])
        place = sweep.directory(cells(tmp_path))
        assert sweep_status.look(place).counts == {"lost": 6}
        program(path, "sbatch", ACCEPT)
        again = sweep.submit(cells(tmp_path), argv=[])
        assert again.submitted == 6
        assert {member.attempt for member in place.array(2)} == {1}

    def test_a_resubmitted_cell_asks_for_what_the_site_now_says(self, tmp_path: Path, path: Path) -> None:
        place = sweep.submit(cells(tmp_path), argv=[]).sweep
        for run in place.runs():
            run.write_status(Status("timeout", "wall time", 1))
        again = sweep.submit(cells(tmp_path, AXES, "walltime=90m"), argv=[])
        assert (again.sweep, again.submitted) == (place, 6)
        assert {run.record()["plan"]["walltime_min"] for run in place.runs()} == {90}


class TestRefusals:
    def test_every_reason_is_told_once_with_its_cells(self, tmp_path: Path, path: Path) -> None:
        with pytest.raises(PreflightError) as caught:
            sweep.submit(cells(tmp_path, ("seed=1,2", "nodes=1,8")), argv=[])
        first, second = str(caught.value).splitlines()
        assert "8 node(s) for 00:30:00 fits no row" in first
        assert second == "    in 2 cells: seed=1, nodes=8; seed=2, nodes=8"
        assert not (tmp_path / "runs").exists()
        assert scripts_sent(path) == []

    def test_a_missing_sbatch_leaves_nothing_behind(
        self, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SchedulerError, match="sbatch is not in PATH"):
            sweep.submit(cells(tmp_path), argv=[])
        assert not (tmp_path / "runs").exists()

    def test_a_run_root_that_cannot_be_written(self, tmp_path: Path, path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(PreflightError, match="choose another with --run-root"):
            sweep.submit(cells(tmp_path), argv=[], run_root=tmp_path / "file" / "runs")


class TestElement:
    def test_it_becomes_the_agent_of_its_cell(
        self, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = sweep.submit(cells(tmp_path), argv=[]).sweep
        run = place.runs()[3]
        run.attempt(1).submitted_yaml.unlink()  # as if the submitter had ended before it wrote this
        environment = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "4715", "SLURM_ARRAY_JOB_ID": "4711"}
        for name, value in (environment | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}).items():
            monkeypatch.setenv(name, value)
        started: list[cell.NodeAgent] = []

        class Agent(cell.NodeAgent):
            def __call__(self) -> None:
                started.append(self)

        monkeypatch.setattr(cell, "NodeAgent", Agent)
        monkeypatch.setattr(cell.sys, "argv", ["cell", str(place.path), "1"])
        cell.main()
        assert started == [Agent(str(run.path), 1)]
        assert rundir.read_yaml(run.attempt(1).submitted_yaml)["job_id"] == "4711_3"

    def test_a_list_that_is_damaged_or_absent_is_named(self, tmp_path: Path, path: Path) -> None:
        place = sweep.submit(cells(tmp_path), argv=[]).sweep
        rundir.write_yaml(place.array_yaml(1), {"members": [{"run": "x"}]})
        with pytest.raises(RunDirError, match=r"1\.yaml is damaged"):
            place.array(1)
        with pytest.raises(RunDirError, match=r"cannot read .*7\.yaml"):
            place.array(7)


def test_a_sweep_is_cancelled_by_one_command(tmp_path: Path, path: Path) -> None:
    place = sweep.submit(cells(tmp_path), argv=[]).sweep
    place.runs()[0].write_status(Status("completed", "", 1))
    answer(path, {f"4711_{index}": "PENDING" for index in range(6)})
    program(path, "scancel", 'echo "$@" >> "$0.calls"')
    done = cancel.cancel(sweepdir.runs_at(place.path))
    assert [each.was_sent for each in done] == [False] + [True] * 5
    assert (path / "scancel.calls").read_text().split() == [f"4711_{index}" for index in range(1, 6)]
    assert sweep_status.look(place).counts == {"completed": 1, "cancelled": 5}


def test_what_else_a_submission_asks_for_is_in_the_script(tmp_path: Path, path: Path) -> None:
    wanted = {"hold": True, "dependency": "afterok:7"}
    found = cells(tmp_path, ("seed=1", "nodes=1,2"), "site.scheduler.parallel_cells=1")
    assert "#SBATCH --hold" in sweep_scripts.dry_run(found, directives=wanted)
    sweep.submit(found, argv=[], directives=wanted)
    first, second = scripts_sent(path)
    assert "#SBATCH --hold\n" in first
    assert "#SBATCH --dependency=afterok:7\n" in first
    assert "#SBATCH --dependency=afterok:7,afterany:4711\n" in second


class TestStatus:
    def test_one_question_and_a_row_for_each_cell(self, tmp_path: Path, path: Path) -> None:
        place = sweep.submit(cells(tmp_path), argv=[]).sweep
        runs = place.runs()
        runs[0].write_status(Status("completed", "", 1, result={}))
        fault = Fault("nan", "loss is nan", "node1", rank=0)
        runs[1].write_status(Status("failed", fault.line(), 1, fault=vars(fault)))
        answer(path, {"4711_2": "RUNNING", "4711_[3-4,5%2]": "PENDING"})
        state = sweep_status.look(place)
        assert state.counts == {"completed": 1, "running": 1, "pending": 3, "failed": 1}
        assert not state.has_ended
        (question,) = (path / "squeue.calls").read_text().splitlines()
        assert question.endswith("--jobs 4711")
        head, columns, *rows = state.text().splitlines()
        assert head == f"{place.name}: 6 cells: 1 completed, 1 running, 3 pending, 1 failed"
        assert columns.split() == ["cell", "seed", "optimizer.lr", "state", "epoch", "accuracy", "reason"]
        assert rows[1].split()[:4] == [runs[1].name, "1", "0.2", "failed"]
        assert "loss is nan" in rows[1]
        plain = state.failed.to_json()
        assert [(row["axes"], row["fault_kind"]) for row in plain["cells"]] == [
            ({"seed": 1, "optimizer.lr": 0.2}, "nan")
        ]
        assert plain["counts"] == {"failed": 1}

    def test_waiting_ends_when_every_cell_has(self, tmp_path: Path, path: Path) -> None:
        place = sweep.submit(cells(tmp_path, ("seed=1,2",)), argv=[]).sweep
        answer(path, {"4711_0": "RUNNING", "4711_1": "CANCELLED by 0"})
        seen: list[dict[str, int]] = []

        def look(state: sweep_status.SweepState) -> None:
            seen.append(state.counts)
            place.runs()[0].write_status(Status("completed", "", 1, result={}))

        ended = sweep_status.wait(place, poll_s=0.01, on_change=look)
        assert seen == [{"running": 1, "cancelled": 1}, {"completed": 1, "cancelled": 1}]
        assert ended.counts == seen[-1]

    def test_a_directory_that_is_no_sweep(self, tmp_path: Path) -> None:
        assert not sweepdir.is_sweep(tmp_path)
        with pytest.raises(RunDirError, match=r"has no sweep\.yaml"):
            sweepdir.open_sweep(tmp_path)
        rundir.write_yaml(tmp_path / "sweep.yaml", {"schema": 99})
        with pytest.raises(RunDirError, match="schema 99; this version knows 1"):
            sweepdir.open_sweep(tmp_path)
        SweepDir(tmp_path).write_record({"cells": [{"id": "x"}]})
        with pytest.raises(RunDirError, match=r"sweep\.yaml is damaged"):
            sweepdir.open_sweep(tmp_path).cells()


class TestDryRun:
    def test_script_first_command_and_cells(self, tmp_path: Path, path: Path, host: Host) -> None:
        found = cells(tmp_path, AXES, "site.scheduler.parallel_cells=2")
        text = sweep_scripts.dry_run(found, host=host)
        place = sweep.directory(found)
        assert "6 cells, 6 to submit, 2 at once" in text
        assert "#SBATCH --array=0-5%2" in text
        assert f"hpcsngd.launch.cell {place.path} 1" in text
        assert re.search(r"--array +the matrix and site.scheduler.parallel_cells", text)
        for index, each in enumerate(found.cells):
            assert f"{index:04}-{each.id}  new        {each}" in text
        assert f"hpcsngd.train.worker {place.path}/0000-{found.cells[0].id} --attempt 1" in text
        assert not (tmp_path / "runs").exists()
        assert scripts_sent(path) == []

    def test_it_shows_the_script_that_is_sent(self, tmp_path: Path, path: Path) -> None:
        text = sweep_scripts.dry_run(cells(tmp_path))
        sweep.submit(cells(tmp_path), argv=[])
        assert scripts_sent(path)[0].rstrip() in text

    def test_finished_cells_are_shown_as_such(self, tmp_path: Path, path: Path, host: Host) -> None:
        for run in sweep.submit(cells(tmp_path), argv=[]).sweep.runs():
            run.write_status(Status("completed", "", 1))
        text = sweep_scripts.dry_run(cells(tmp_path), host=host)
        assert "6 cells, 0 to submit" in text
        assert text.count("  completed  ") == 6
        assert "#SBATCH" not in text


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[0-2,7%2]", ["12_0", "12_1", "12_2", "12_7"]),
        ("12_[5]", ["12_5"]),
        ("12_[0-1,4-5%4]", ["12_0", "12_1", "12_4", "12_5"]),
        ("12_[strange]", ["12_[strange]"]),
    ],
)
def test_ids_of_array_members(written: str, ids: list[str]) -> None:
    assert slurm.members(written) == ids


def test_parts_of_an_array_are_even() -> None:
    assert arrays.parts(10, 4) == [range(3), range(3, 6), range(6, 10)]
    assert arrays.parts(4, 4) == [range(4)]
