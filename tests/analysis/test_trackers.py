"""Export to TensorBoard and Weights & Biases with the real libraries, without a network."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpcsngd.errors import ConfigError
from hpcsngd.rundir import CsvWriter, RunDir, Status
from hpcsngd.tables import TABLES
from hpcsngd_analysis.load import load
from hpcsngd_analysis.records import Run
from hpcsngd_analysis.trackers import weights_biases
from hpcsngd_analysis.trackers.event_files import SUFFIX, TensorBoard, read_scalars
from hpcsngd_analysis.trackers.follow import Tracker, export
from hpcsngd_analysis.trackers.history import CURVES, history
from hpcsngd_analysis.trackers.weights_biases import STATE, WeightsAndBiases, default_mode
from tests.analysis.runs import at, make_run, row

COMPLETED = Status("completed", "", 2)


def training(attempt: int, step: int, loss: float) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "loss": loss, "epoch": step / 10, "utc": at(step)}


def two_attempts(root: Path, status: Status | None = COMPLETED) -> RunDir:
    """The second attempt did step 20 again, with another loss."""
    return make_run(
        root,
        status=status,
        tables={
            "train": [training(1, 10, 0.9), training(1, 20, 0.7), training(2, 20, 0.6), training(2, 30, 0.5)],
            "eval": [{"attempt": 2, "step": 30, "split": "test", "accuracy": 0.75, "utc": at(30)}],
            "grad_norm": [{"attempt": 2, "step": 25, "layer": "conv1", "norm": 2.5}],
        },
    )


def append(run: RunDir, table: str, *rows: dict[str, Any]) -> None:
    writer = CsvWriter(run.metrics(table, 0), TABLES[table])
    for cells in rows:
        writer.write(**row(table, **cells))
    writer.close()


def in_files(folder: Path) -> dict[tuple[str, int], float]:
    """Returns what TensorBoard reads; no number is in the files twice."""
    found = list(read_scalars(folder))
    assert len(dict(found)) == len(found)
    return dict(found)


def losses(found: dict[tuple[str, int], float]) -> dict[int, float]:
    return {step: round(value, 6) for (tag, step), value in found.items() if tag == "train/loss"}


# --- numbers by tag and step


def test_numbers_are_those_of_the_loader_by_tag_and_step(tmp_path: Path) -> None:
    run = two_attempts(tmp_path)
    runs = load([run.path], CURVES)
    numbers = history(runs, "run")
    found = {(tag, step): value for step, tag, value in numbers[["step", "tag", "value"]].to_numpy().tolist()}
    assert [found["train/loss", step] for step in (10, 20, 30)] == [0.9, 0.6, 0.5]
    assert found["eval/test/accuracy", 30] == 0.75
    assert found["grad_norm/conv1/norm", 25] == 2.5
    assert len(found) == len(numbers)
    assert numbers["step"].is_monotonic_increasing
    assert {tag.split("/")[-1] for tag in numbers["tag"]}.isdisjoint({"attempt", "step", "utc", "rank"})


def test_rows_without_a_clock_stand_between_those_that_have_one(tmp_path: Path) -> None:
    numbers = history(load([two_attempts(tmp_path).path], CURVES), "run")
    times = dict(zip(numbers["tag"] + numbers["step"].astype(str), numbers["time"], strict=True))
    start = pd.Timestamp(at(0)).timestamp()
    assert times["train/loss20"] == start + 20 * 60
    assert times["grad_norm/conv1/norm25"] == start + 25 * 60


def test_of_tables_of_every_rank_the_first_speaks(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"profiling": [{"rank": 0, "step": 1, "phase": "data", "seconds": 3.0}]})
    writer = CsvWriter(run.metrics("profiling", 1), TABLES["profiling"])
    writer.write(**row("profiling", rank=1, step=1, phase="data", seconds=9.0))
    writer.close()
    numbers = history(load([run.path], CURVES), "run")
    assert numbers.loc[numbers["tag"] == "profiling/data/seconds", "value"].to_list() == [3.0]
    assert numbers["time"].to_list() == [0.0] * len(numbers)


def test_a_run_without_rows_has_no_numbers(tmp_path: Path) -> None:
    numbers = history(load([make_run(tmp_path).path], CURVES), "run")
    assert len(numbers) == 0
    assert numbers.dtypes["step"] == np.int64


# --- TensorBoard


def to_files(run: RunDir, out: Path) -> int:
    (done,) = export([run.path], lambda run: TensorBoard(out / run.name))
    return done.written


def test_event_files_hold_the_last_attempts_numbers_with_their_times(tmp_path: Path) -> None:
    run = two_attempts(tmp_path)
    written = to_files(run, tmp_path / "out")
    found = in_files(tmp_path / "out" / "run")
    assert written == len(found)
    assert losses(found) == {10: 0.9, 20: 0.6, 30: 0.5}
    assert found["eval/test/accuracy", 30] == 0.75
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "out" / "run")).Reload()
    scalars = board.Scalars("train/loss")
    assert [event.step for event in scalars] == [10, 20, 30]
    assert scalars[0].wall_time == pd.Timestamp(at(10)).timestamp()


def test_a_second_export_adds_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    run = two_attempts(tmp_path)
    to_files(run, tmp_path / "out")
    before = sorted((tmp_path / "out" / "run").iterdir())
    assert to_files(run, tmp_path / "out") == 0
    assert sorted((tmp_path / "out" / "run").iterdir()) == before
    append(run, "train", training(2, 40, 0.4))
    assert to_files(run, tmp_path / "out") == len(TABLES["train"].columns) - 3  # attempt, step, utc
    assert losses(in_files(tmp_path / "out" / "run")) == {10: 0.9, 20: 0.6, 30: 0.5, 40: 0.4}
    assert before[0] in (tmp_path / "out" / "run").iterdir()


def test_numbers_that_a_later_attempt_changed_are_written_anew(tmp_path: Path) -> None:
    run = two_attempts(tmp_path)
    to_files(run, tmp_path / "out")
    folder = tmp_path / "out" / "run"
    (folder / "events.out.tfevents.1.theirs").write_bytes(b"")
    append(run, "train", training(3, 30, 0.45), training(3, 40, float("nan")))
    to_files(run, tmp_path / "out")
    found = losses(in_files(folder))
    assert [found[step] for step in (10, 20, 30)] == [0.9, 0.6, 0.45]
    assert np.isnan(found[40])
    assert len(list(folder.glob(f"*{SUFFIX}"))) == 1
    assert (folder / "events.out.tfevents.1.theirs").exists()
    assert to_files(run, tmp_path / "out") == 0  # nan is what was written, no change


def test_a_file_cut_off_in_a_record_is_mended(tmp_path: Path) -> None:
    run = two_attempts(tmp_path)
    whole = to_files(run, tmp_path / "out")
    (file,) = (tmp_path / "out" / "run").glob(f"*{SUFFIX}")
    file.write_bytes(file.read_bytes()[:-5])
    assert to_files(run, tmp_path / "out") == 1
    assert len(in_files(tmp_path / "out" / "run")) == whole


# --- live


class Recorded:
    """A tracker that remembers what it was given."""

    folder = Path("nowhere")

    def __init__(self) -> None:
        self.given: list[dict[int, float]] = []
        self.is_closed = False

    def sync(self, run: Run, numbers: pd.DataFrame) -> int:
        rows = numbers[numbers["tag"] == "train/loss"]
        self.given.append(dict(zip(rows["step"], rows["value"], strict=True)))
        return len(numbers)

    def close(self) -> None:
        self.is_closed = True


def test_live_holds_the_newest_step_back_until_the_run_has_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [training(1, 10, 0.9)]})
    tracker, rounds = Recorded(), iter([[20, 30], [], [40]])
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        steps = next(rounds)
        append(run, "train", *(training(1, step, 1 / step) for step in steps))
        if steps == [40]:
            run.write_status(COMPLETED)

    (done,) = export([run.path], lambda _: tracker, every_s=7.0, sleep=sleep)
    assert [sorted(given) for given in tracker.given] == [[], [], [10, 20], [10, 20], [10, 20, 30, 40]]
    assert waited == [7.0] * 3
    assert (done.state, done.step, tracker.is_closed) == ("completed", 40, True)


def test_an_interrupted_export_closes_its_trackers(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [training(1, 10, 0.9)]})
    tracker = Recorded()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export([run.path], lambda _: tracker, every_s=1.0, sleep=interrupt)
    assert tracker.is_closed


def test_live_follows_a_run_into_files(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [training(1, 10, 0.9), training(1, 20, 0.8)]})
    shown: list[dict[int, float]] = []
    folder = tmp_path / "out" / "run"

    def sleep(_: float) -> None:
        shown.append(losses(in_files(folder)))
        if len(shown) == 3:
            append(run, "train", training(2, 20, 0.7), training(2, 30, 0.6))
            run.write_status(COMPLETED)

    def build(run: Run) -> Tracker:
        return TensorBoard(tmp_path / "out" / run.name)

    export([run.path], build, every_s=1.0, sleep=sleep)
    assert shown == [{}, {10: 0.9}, {10: 0.9}]
    assert losses(in_files(folder)) == {10: 0.9, 20: 0.7, 30: 0.6}


# --- Weights & Biases


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own: neither a login nor files of wandb."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def records(file: Path) -> Iterator[bytes]:
    """Yields the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32_768 - position % 32_768 < 7:  # the rest of a block is padding
            position += 32_768 - position % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline_runs(out: Path) -> list[tuple[str, dict[str, Any], dict[int, dict[str, Any]]]]:
    """Returns id, configuration and history by step of each offline run in a folder."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service writes the last records a moment after `finish`; this waits for its end
    found = []
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        name, config, steps = "", {}, {}
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                name = record.run.run_id
                config = {each.key: json.loads(each.value_json) for each in record.run.config.update}
            if record.HasField("history"):
                values = {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json)
                    for each in record.history.item
                }
                steps[int(values["_step"])] = values
        found.append((name, config, steps))
    return found


def to_wandb(run: RunDir, out: Path) -> int:
    (done,) = export([run.path], lambda run: WeightsAndBiases(out / run.name, project="p", mode="offline"))
    return done.written


@pytest.mark.usefixtures("no_login")
def test_an_offline_run_has_the_history_and_grows_and_changes_with_it(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run, out = two_attempts(tmp_path), tmp_path / "out"
    written = to_wandb(run, out)
    ((name, config, steps),) = offline_runs(out / "run")
    assert name == "run"
    assert config["experiment"] == "digits-sgd"
    assert config["seed"] == 1
    assert {step: values.get("train/loss") for step, values in steps.items()} == {
        10: 0.9,
        20: 0.6,
        25: None,
        30: 0.5,
    }
    assert steps[30]["eval/test/accuracy"] == 0.75
    assert steps[25]["grad_norm/conv1/norm"] == 2.5
    assert steps[10]["_timestamp"] == pd.Timestamp(at(10)).timestamp()
    assert (
        sum(len([key for key in values if not key.startswith("_")]) for values in steps.values()) == written
    )

    assert to_wandb(run, out) == 0
    append(run, "train", training(2, 40, 0.4))
    to_wandb(run, out)
    ((name, _, steps),) = offline_runs(out / "run")
    assert (name, sorted(steps)) == ("run", [10, 20, 25, 30, 40])

    (folder,) = (out / "run" / "wandb").glob("offline-run-*")
    (folder / "run-run.wandb.synced").touch()
    append(run, "train", training(3, 40, 0.35))
    to_wandb(run, out)
    ((name, _, steps),) = offline_runs(out / "run")
    assert name == "run-2"  # what was sent cannot be taken back
    assert steps[40]["train/loss"] == 0.35


@pytest.mark.usefixtures("no_login")
def test_live_logs_into_one_run_and_begins_anew_when_steps_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run = make_run(tmp_path, tables={"train": [training(1, 10, 0.9), training(1, 20, 0.8)]})
    rounds = iter([[], [training(1, 30, 0.7)], [], [training(2, 20, 0.65), training(2, 30, 0.6)]])
    folders: list[int] = []

    def sleep(_: float) -> None:
        rows = next(rounds)
        folders.append(len(list((tmp_path / "out/run/wandb").glob("offline-run-*"))))
        append(run, "train", *rows)
        if rows and rows[0]["attempt"] == 2:
            run.write_status(COMPLETED)

    def build(run: Run) -> Tracker:
        return WeightsAndBiases(tmp_path / "out" / run.name, project="p", mode="offline")

    export([run.path], build, every_s=1.0, sleep=sleep)
    assert folders == [0, 1, 1, 1]
    ((_, _, steps),) = offline_runs(tmp_path / "out" / "run")
    assert {step: values["train/loss"] for step, values in steps.items()} == {10: 0.9, 20: 0.65, 30: 0.6}


class FakeServer:
    """Stands for wandb where a login would be needed: keeps what is logged, by run id."""

    def __init__(self) -> None:
        self.runs: dict[str, list[int]] = {}
        self.resume: list[Any] = []

    def Settings(self, **_: Any) -> None:
        return None

    def init(self, **settings: Any) -> Any:
        steps = self.runs.setdefault(settings["id"], [])
        self.resume.append(settings["resume"])

        class Opened:
            def log(self, values: dict[str, float], *, step: int) -> None:
                steps.append(step)

            def finish(self) -> None:
                return None

        return Opened()


def test_online_only_new_steps_are_sent_and_changed_ones_as_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", server)
    run = two_attempts(tmp_path)

    def send() -> None:
        out = tmp_path / "out"
        export([run.path], lambda run: WeightsAndBiases(out / run.name, project="p", mode="online"))

    for rows in ([], [], [training(2, 40, 0.4)], [training(3, 40, 0.3)]):
        append(run, "train", *rows)
        send()
    assert server.runs == {"run": [10, 20, 25, 30, 40], "run-2": [10, 20, 25, 30, 40]}
    assert server.resume == ["allow"] * 3
    state = json.loads((tmp_path / "out" / "run" / STATE).read_text())
    assert (state["mode"], state["last_step"], state["generation"]) == ("online", 40, 2)


@pytest.mark.usefixtures("no_login")
def test_without_a_login_it_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert default_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert default_mode() == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine api.wandb.ai login user password " + "a" * 40 + "\n")
    netrc.chmod(0o600)
    assert default_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert default_mode() == "offline"
    netrc.write_text("no netrc at all")
    assert default_mode() == "offline"


@pytest.mark.parametrize(
    ("module", "extra"), [("tensorboard.summary.writer", "tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    builders: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(tmp_path),
        "wandb": lambda: WeightsAndBiases(tmp_path, project="p", mode="offline"),
    }
    with pytest.raises(ConfigError, match=rf"{extra} is missing: pip install 'hpcsngd\[{extra}\]'"):
        builders[extra]()


def test_digests_change_with_what_was_logged() -> None:
    one = pd.DataFrame({"step": [1, 2], "tag": ["a", "a"], "value": [0.5, float("nan")], "time": [0.0, 0.0]})
    assert weights_biases.digest(one) == weights_biases.digest(one.assign(time=1.0))
    changes: list[dict[str, Any]] = [{"step": [1, 3]}, {"tag": ["a", "b"]}, {"value": [0.5, 0.6]}]
    others = [weights_biases.digest(one.assign(**change)) for change in changes]
    assert len({weights_biases.digest(one), *others}) == 4
    assert weights_biases.digest(one[:0]) == ""
