"""Specs of reports: read strictly, and the ones we ship name what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.errors import HpcsngdError
from hpcsngd_analysis import report, sections, spec
from tests.analysis.runs import make_run, rich_runs

SPECS = sorted((Path(__file__).parents[2] / "analysis" / "reports").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


def test_what_a_spec_says(tmp_path: Path) -> None:
    text = "title: T\nreference: a paper\nsections: [phases, bytes]\ntarget: 0.9\ngroup_by: [exp_name]\n"
    options = spec.options(written(tmp_path, text))
    assert (options.title, options.sections, options.target) == ("T", ("phases", "bytes"), 0.9)
    assert (options.group_by, options.description) == (("exp_name",), "After a paper.")


def test_what_is_given_by_hand_goes_first(tmp_path: Path) -> None:
    path = written(tmp_path, "title: T\ntarget: 0.9\nbaseline: a\n")
    options = spec.options(path, target=0.8, baseline="b")
    assert (options.target, options.baseline) == (0.8, "b")
    assert spec.options(path).baseline == "a"
    assert spec.options(None).sections == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sections: [phases]\n", "title is missing"),
        ("title: T\nsection: [phases]\n", "unknown key 'section'; did you mean 'sections'"),
        ("title: T\nsections: [phase]\n", "unknown section 'phase'; did you mean 'phases'"),
        ("title: T\nsections: phases\n", "sections should be a list of names, is 'phases'"),
        ("title: T\ntarget: 92\n", "target should be a share above 0 and up to 1"),
        ("title: 3\n", "title should be text, is 3"),
        ("- title\n", "expected a mapping"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(HpcsngdError, match=r"spec\.yaml") as caught:
        spec.read(path)
    assert words in str(caught.value)


def test_a_target_by_hand_is_a_share() -> None:
    with pytest.raises(HpcsngdError, match="--target should be a share"):
        spec.options(None, target=92.0)


def test_every_section_belongs_to_a_spec_that_we_ship() -> None:
    named = {name for path in SPECS for name in spec.read(path).sections}
    assert named == {builder.id for builder in sections.BUILDERS}


def test_runs_that_have_everything_fill_every_spec_that_we_ship(tmp_path: Path) -> None:
    runs = rich_runs(tmp_path / "runs")
    for path in SPECS:
        options = spec.options(path, target=0.7, baseline="net-sgd")
        made = report.make([runs], options)
        assert [section.id for section in made.content.sections] == list(options.sections), path.name
        assert made.content.absent == []


def test_runs_without_what_a_spec_shows_are_refused(tmp_path: Path) -> None:
    options = spec.options(written(tmp_path, "title: T\nsections: [phases, low-rank]\n"))
    with pytest.raises(
        HpcsngdError, match=r"nothing that the spec shows: Phases of a step \(--profiling\); Matrix"
    ):
        report.make([make_run(tmp_path).path], options)


def test_a_spec_shows_on_the_page(tmp_path: Path) -> None:
    make_run(tmp_path, tables={"eval": [{"step": 1, "split": "test"}]})
    path = written(tmp_path, "title: A <b>title</b>\ndescription: What it shows.\nsections: [curves]\n")
    page = report.render(report.make([tmp_path / "run"], spec.options(path)))
    assert "<h1>A &lt;b&gt;title&lt;/b&gt;</h1>" in page
    assert "<p>What it shows.</p>" in page
    assert "Not on this page" not in page
