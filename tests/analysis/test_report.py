"""The page and its JSON: right numbers, no network, inert text. tests/browser looks at it in a browser."""

from __future__ import annotations

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from hpcsngd.errors import HpcsngdError, RunDirError
from hpcsngd.rundir import Status
from hpcsngd_analysis.figures import style
from hpcsngd_analysis.report import to_json, write_report
from hpcsngd_analysis.sections.context import Options
from tests.analysis.runs import EXAMPLES, make_run

VOID = {"meta", "br", "img", "link", "input", "hr", "base", "embed", "source"}
BLOCKS = {"td", "th", "dt", "dd", "div", "p", "li", "button", "summary"}


class Page(HTMLParser):
    """The elements and texts of a page; refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " " if tag in BLOCKS else ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag
        self.text += " " if tag in BLOCKS else ""

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append((self.elements[-1][1], data))
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def drawings(self) -> dict[str, Any]:
        return {
            str(each["data-plot"]): json.loads(text) for each, text in self.scripts if "data-plot" in each
        }

    @property
    def code(self) -> list[str]:
        return [text for each, text in self.scripts if "data-plot" not in each]


def page_of(tmp_path: Path, *paths: Path) -> Page:
    out = write_report(paths, tmp_path / "out" / "report.html")
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), EXAMPLES)


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    return to_json([EXAMPLES])


def decoded(values: Any) -> list[float]:
    """Returns the numbers of a plotly array, which is a list or base64 with a type."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float).tolist()
    return [math.nan if value is None else value for value in values]


def test_json_is_strict_and_has_every_part(numbers: dict[str, Any]) -> None:
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert set(numbers) == {
        "schema",
        "summary",
        "runs",
        "sweeps",
        "sections",
        "absent",
        "config_differences",
        "provenance",
        "details",
    }


def figures_of(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for section in numbers["sections"] for each in section["figures"]}


def test_summary_numbers(numbers: dict[str, Any]) -> None:
    summary = numbers["summary"]
    assert summary["runs"] == 4
    assert summary["states"] == {"completed": 2, "failed": 1, "no status yet": 1}
    assert (summary["best_final"]["run"], summary["best_final"]["accuracy"]) == ("resumed", 0.975)
    assert (summary["best"]["run"], summary["best"]["best_epoch"]) == ("resumed", 3.0)
    assert len(summary["revisions"]) == 2
    assert {"run": "resumed", "note": "ran from a working tree with uncommitted changes"} in summary["notes"]


def test_run_numbers(numbers: dict[str, Any]) -> None:
    complete, failed, resumed, running = numbers["runs"]
    assert (complete["final_accuracy"], complete["best_accuracy"], complete["wall_s"]) == (0.825, 0.85, 7.75)
    assert (failed["final_accuracy"], failed["evaluations"], failed["epochs"]) == (None, 0, 1.0)
    assert (resumed["dropped_rows"], resumed["attempts"], resumed["world_size"]) == (3, 2, 2)
    assert (running["world_size"], running["state"], running["seed"]) == (None, "no status yet", 3)
    assert isinstance(resumed["world_size"], int)


def test_settings_and_details(numbers: dict[str, Any]) -> None:
    (lr,) = [row for row in numbers["config_differences"] if row["key"] == "experiment.optimizer.lr"]
    assert lr["failed"] == "50.0"
    complete, failed, _, running = numbers["details"]
    assert complete["provenance"]["argv"] == "submit --site local --exp digits-sgd"
    assert complete["path"] == str(EXAMPLES / "complete")
    assert failed["evidence"] == ["step 4: loss nan <learning rate 50.0>"]
    assert running["provenance"] == {}


def test_the_page_draws_the_numbers_of_the_json(page: Page, numbers: dict[str, Any]) -> None:
    drawn = figures_of(numbers)
    assert set(drawn) == set(page.drawings)
    assert {"accuracy-epoch", "accuracy-samples", "loss-train_s", "clocks"} <= set(drawn)
    assert len(drawn["accuracy-epoch"]["series"]) == 6
    for name, each in drawn.items():
        traces = page.drawings[name]["data"]
        assert [trace.get("name") for trace in traces] == [series["name"] for series in each["series"]]
        for trace, series in zip(traces, each["series"], strict=True):
            for axis in {"x", "y"} & set(series):
                if any(isinstance(value, str) and value not in ("nan", "inf") for value in series[axis]):
                    assert trace[axis] == series[axis]
                    continue
                expected = [math.nan if value is None else float(value) for value in series[axis]]
                assert decoded(trace[axis]) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_each_drawing_has_its_place(page: Page) -> None:
    places = [each["data-figure"] for each in page.all("div") if each.get("class") == "plot"]
    assert len(places) == len(set(places))
    assert set(places) == set(page.drawings)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_was_measured_as_nan_is_not_missing(tmp_path: Path) -> None:
    rows = [{"step": 1, "split": "test", "accuracy": 0.5, "loss": 1.0}]
    rows += [{"step": 2, "split": "test", "accuracy": math.nan, "loss": math.inf}]
    make_run(tmp_path, status=Status("completed", "", 1), tables={"eval": rows})
    found = to_json([tmp_path])
    (run,) = found["runs"]
    assert (run["final_accuracy"], run["final_loss"], run["best_accuracy"]) == ("nan", "inf", 0.5)
    assert figures_of(found)["loss-epoch"]["series"][0]["y"] == [1.0, "inf"]
    assert found["summary"]["best_final"] is None
    words = page_of(tmp_path, tmp_path / "run").words
    assert "nan 50.00" in words
    assert "Best test accuracy at any evaluation: 50.00" in words


def test_a_run_that_did_not_complete_is_never_the_best_final(tmp_path: Path) -> None:
    for name, state, accuracy in (("a", "completed", 0.7), ("b", "timeout", 0.9)):
        rows = [{"step": 1, "split": "test", "accuracy": accuracy}]
        make_run(tmp_path, name, status=Status(state, "", 1), tables={"eval": rows})
    summary = to_json([tmp_path])["summary"]
    assert summary["best_final"]["run"] == "a"
    assert (summary["best"]["run"], summary["best"]["state"]) == ("b", "timeout")
    words = page_of(tmp_path, tmp_path / "a", tmp_path / "b").words
    assert re.search(r"at any evaluation: 90\.00.%, digits-sgd \(● b, timeout\)", words)


def test_the_summary_in_words(page: Page) -> None:
    assert "4 runs: 2 completed, 1 failed, 1 no status yet." in page.words
    assert "Best final test accuracy of a completed run: 97.50\u00a0%, digits-hylo" in page.text
    assert "The runs come from 2 revisions of the code." in page.words
    assert "● resumed: train: 2 rows written again by a later attempt; the last counts" in page.words
    assert "running: train.csv: the last line is unfinished and was left out" in page.words


def test_the_runs_table_shows_failed_runs_with_their_reason(page: Page) -> None:
    assert "● failed digits-sgd local failed nan: loss is nan at step 4 (rank 0 on node1" in page.words
    assert "● complete digits-sgd local completed 3 3 82.50 % 85.00 % 0.6 6.0 s 7.8 s 2 1 1 0" in page.words
    assert "● running digits-sgd local no status yet 0.5 3 – – – 1.0 s 1.5 s – 3 1 0" in page.words


def test_settings_provenance_and_evidence_are_on_the_page(page: Page) -> None:
    assert "experiment.optimizer.lr 0.05 50.0 0.02 0.05" in page.words
    assert "git.sha 9c1185a5c5e9fc54612808977ee8f548b2258d31" in page.words
    assert "git.diff 2 lines - damping = 0.1 + damping = 0.3" in page.words
    assert "step 4: loss nan <learning rate 50.0>" in page.words
    assert "run.yaml records no provenance." in page.words


def test_a_run_has_the_color_of_its_curves_in_the_key(page: Page) -> None:
    colors = [attributes["style"] for attributes in page.all("span") if attributes.get("class") == "glyph"]
    assert {f"--run: {style(position).color}" for position in range(4)} == set(colors)
    of_runs = [
        trace for each in page.drawings.values() for trace in each["data"] if "run" in trace.get("meta", {})
    ]
    assert len(of_runs) > 20
    for trace in of_runs:
        assert trace["line"]["color"] == style(trace["meta"]["run"]).color


def test_nothing_refers_to_the_network(page: Page) -> None:
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "ping", "formaction"}
    used = {
        (tag, str(attributes[name])[:1])
        for tag, attributes in page.elements
        for name in loading & set(attributes)
    }
    assert used == {("a", "#")}  # places on the page itself
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import|https?:", "".join(page.styles))
    assert "http" not in json.dumps(page.drawings)
    assert "http" not in page.code[-1]
    # plotly.js 4 would add an upload button by default.
    assert '[["toImage", "zoom2d", "pan2d", "resetScale2d"]]' in page.code[-1]


def test_the_browser_is_told_to_load_nothing_and_to_run_our_scripts_only(page: Page) -> None:
    (policy,) = [each["content"] for each in page.all("meta") if "http-equiv" in each]
    assert policy is not None
    rules = {words.split()[0]: words.split()[1:] for words in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:", "blob:"]
    (nonce,) = rules["script-src"]
    assert {f"'nonce-{each['nonce']}'" for each in page.all("script")} == {nonce}


def test_plotly_is_inside_once(page: Page) -> None:
    assert len(page.scripts) == len(page.all("script")) == len(page.drawings) + 2
    assert page.code[0] == get_plotlyjs()


def test_it_fits_a_phone(page: Page) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_text_of_users_is_inert(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    fault = {"evidence": [evil]}
    for number in range(2):
        make_run(
            tmp_path,
            f"run{number} <script>alert(3)<script>",
            experiment=evil,
            settings={"description": f"{evil}{number}", f"<b>{number}": "'\"><svg onload=alert(4)>"},
            provenance={"argv": [evil], "<i>key": "{{ 7 * 7 }}", "git": {"diff": f"{evil}\n{evil}"}},
            status=Status("failed", evil, 1, fault=fault),
            tables={"train": [{"step": 1}], "eval": [{"step": 1, "split": f"<u>{evil}"}]},
        )
    page = page_of(tmp_path, *(path for path in tmp_path.iterdir() if path.name.startswith("run")))
    assert len(page.all("script")) == len(page.drawings) + 2
    tags = {tag for tag, _ in page.elements}
    assert not {"img", "svg", "b", "i", "u"} & tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for each, text in page.scripts:  # so that no text in the data can end its script element
        assert "data-plot" not in each or "<" not in text
    assert "{{ 7 * 7 }}" in page.text
    assert page.text.count(evil) >= 2 * 6  # experiment, reason, note, setting, command line, evidence
    assert "<" not in json.dumps(
        [trace.get("name") for drawing in page.drawings.values() for trace in drawing["data"]]
    )


def test_one_run_without_rows(tmp_path: Path) -> None:
    make_run(tmp_path)
    page = page_of(tmp_path, tmp_path / "run")
    assert "1 run: 1 no status yet." in page.words
    assert "No test accuracy has been measured yet." in page.words
    assert not page.drawings
    assert "Not on this page No run has what these sections show." in page.words
    assert "Phases of a step (--profiling)" in page.words
    assert "There is one run only." in page.words
    assert {each["class"] for each in page.all("button")} == {"sort"}


def test_one_run_needs_no_name_in_its_summary(tmp_path: Path) -> None:
    words = page_of(tmp_path, EXAMPLES / "complete").words
    assert re.search(r"1 run: 1 completed\. Final test accuracy: 82\.50.%, after 3 epochs\.", words)
    assert re.search(r"Best test accuracy at any evaluation: 85\.00.%, at epoch 2\.", words)


def test_fifty_runs(tmp_path: Path) -> None:
    for number in range(50):
        tables = {"train": [{"step": 1}], "eval": [{"step": 1, "split": "test", "accuracy": number / 50}]}
        status = Status("completed", "", 1)
        make_run(
            tmp_path / "runs", f"run{number:02}", settings={"seed": number}, status=status, tables=tables
        )
    page = page_of(tmp_path, tmp_path / "runs")
    assert "50 runs: 50 completed." in page.words
    assert not [each for each in page.all("button") if "data-run" in each]
    assert [each["data-group"] for each in page.all("button") if "data-group" in each] == ["0"]
    assert "loss-epoch" not in page.drawings
    *_, mean = page.drawings["mean-accuracy-epoch"]["data"]
    assert decoded(mean["y"]) == pytest.approx([0.49])
    assert "With so many runs, groups are drawn instead of runs." in page.words


def test_training_curves_of_many_runs_start_hidden(tmp_path: Path) -> None:
    for number in range(9):
        tables = {"train": [{"step": 1}], "eval": [{"step": 1, "split": "test"}]}
        make_run(tmp_path / "runs", f"run{number}", settings={"seed": number}, tables=tables)
    page = page_of(tmp_path, tmp_path / "runs")
    assert len([each for each in page.all("button") if "data-run" in each]) == 9
    pressed = {
        each["data-split"]: each["aria-pressed"] for each in page.all("button") if "data-split" in each
    }
    assert pressed == {"train": "false", "test": "true"}
    assert "With so many runs the training curves start hidden." in page.words


def test_runs_with_equal_settings_say_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path, name)
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "Site and experiment have the same settings in all runs." in page.words


def test_the_differences_table_grows_downwards(tmp_path: Path) -> None:
    for number in range(2):
        make_run(tmp_path, f"run{number}", settings={f"key{n}": number for n in range(3)})
    tall = page_of(tmp_path, tmp_path / "run0", tmp_path / "run1")
    assert "key run0 run1 experiment.key0 0 1 experiment.key1 0 1" in tall.words
    for number in range(2, 5):
        make_run(tmp_path, f"run{number}", settings={f"key{n}": number for n in range(3)})
    wide = page_of(tmp_path, *(tmp_path / f"run{number}" for number in range(5)))
    expected = "run experiment.key0 experiment.key1 experiment.key2 ● run0 0 0 0 ● run1 1 1 1"
    assert expected in wide.words


def test_the_report_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "report.html"
    assert write_report([EXAMPLES / "complete"], out) == out
    first = out.read_text()
    write_report([EXAMPLES / "resumed"], out)
    assert "digits-hylo on slurm" in out.read_text()
    assert "digits-sgd on local" in first
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HpcsngdError, match=r"cannot write .*/file/report.html: "):
        write_report([EXAMPLES / "complete"], tmp_path / "file" / "report.html")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(HpcsngdError, match=r"cannot write .*/taken: Is a directory"):
        write_report([EXAMPLES / "complete"], taken)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}


def test_a_damaged_run_is_named_instead_of_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [{"step": 1}]})
    with run.metrics("train").open("a") as file:
        file.write("damaged\n")
    with pytest.raises(RunDirError, match=r"train.csv:3: "):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_page_without_figures_of_runs_has_no_key(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [{"step": 1}], "profiling": [{"step": 1, "phase": "forward"}]})
    options = Options(sections=("phases",))
    out = write_report([run.path], tmp_path / "report.html", options)
    page = Page(out.read_text(encoding="utf-8"))
    assert set(page.drawings) == {"phases-refresh", "phases-kinds"}
    assert not [each for each in page.all("button") if "data-run" in each or "data-split" in each]
