"""The page as a reader has it: it draws, filters, sorts, prints, loads nothing, and needs no mouse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from hpcsngd.rundir import Status
from hpcsngd_analysis import report, sections
from hpcsngd_analysis.export import export
from tests.analysis.runs import make_run, rich_runs
from tests.browser.conftest import Look
from tests.browser.view import LAPTOP, View

pytestmark = pytest.mark.browser


@pytest.fixture(params=["laptop", "phone"])
def view(request: pytest.FixtureRequest) -> View:
    found: View = request.getfixturevalue(request.param)
    return found


def test_every_figure_is_drawn_in_silence_and_without_the_network(view: View, report_html: Path) -> None:
    assert view.page.locator(".plot").count() > 40
    bare = view.page.evaluate(
        """[...document.querySelectorAll(".plot")].filter(plot => !plot.querySelector(
            ".trace, .bars .point, .boxlayer .box, .contourlayer path, .heatmaplayer image, canvas"
        )).map(plot => plot.id)"""
    )
    assert bare == []
    assert view.console == []
    assert view.requests == [report_html.as_uri()]


def test_all_sections_are_there(laptop: View) -> None:
    missing = [each.id for each in sections.BUILDERS if laptop.page.locator(f"h2#{each.id}").count() == 0]
    assert missing == []
    assert laptop.page.locator("h2#absent").count() == 0


def test_nothing_is_wider_than_the_window(view: View) -> None:
    wide, window = view.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window
    cut = view.page.evaluate(
        """[...document.querySelectorAll(".plot")].filter(plot =>
            plot.querySelector(".svg-container").getBoundingClientRect().width > plot.clientWidth + 1
        ).map(plot => plot.id)"""
    )
    assert cut == []


def test_it_looks_like_something(view: View, tmp_path: Path) -> None:
    """Takes the picture that people look at; a blank page would compress to almost nothing."""
    picture = view.page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(picture) > 300_000


def test_accessibility(view: View) -> None:
    # Inside a drawing there is nothing to judge; its name, its numbers and its buttons are outside.
    found = Axe().run(view.page, context={"exclude": [[".main-svg"]]})
    assert [(each["id"], each["nodes"][0]["html"][:120]) for each in found.response["violations"]] == []


def shown(view: View, figure: str, run: int) -> tuple[int, int]:
    """Returns how many curves of a run a figure shows, and how many it has."""
    found: list[object] = view.page.evaluate(
        """([figure, run]) => document.getElementById(`plot-${figure}`).data
            .filter(trace => trace.meta?.run === run).map(trace => trace.visible ?? true)""",
        [figure, run],
    )
    return sum(state is True for state in found), len(found)


def test_the_filter_hides_rows_and_curves(laptop: View) -> None:
    rows = laptop.page.locator("#table-runs tbody tr")
    before = [shown(laptop, "accuracy-epoch", run) for run in range(9)]
    laptop.page.fill("#filter", "net-hylo completed")
    laptop.page.wait_for_selector("#filtered:has-text('5 of 9 runs')")
    assert rows.locator("visible=true").count() == 5
    names = laptop.page.locator("#table-runs tbody th").all_text_contents()
    hylo, sgd = (
        next(place for place, name in enumerate(names) if text in name) for text in ("hylo-1", "sgd-1")
    )
    assert before[hylo][0] > 0
    assert before[sgd][0] > 0
    assert shown(laptop, "accuracy-epoch", hylo) == before[hylo]
    assert shown(laptop, "accuracy-epoch", sgd) == (0, before[sgd][1])
    assert laptop.page.locator(f".key button[data-run='{sgd}']").is_hidden()
    laptop.page.fill("#filter", "")
    laptop.until("document.getElementById('filtered').textContent === ''")
    assert rows.locator("visible=true").count() == 9
    assert [shown(laptop, "accuracy-epoch", run) for run in range(9)] == before


def test_a_name_of_the_key_hides_its_curves_in_all_figures(laptop: View) -> None:
    button = laptop.page.locator(".key button[data-run='1']")
    figures = ("accuracy-epoch", "loss-charged_s", "gradient-norm", "damping")
    before = {figure: shown(laptop, figure, 1) for figure in figures}
    assert all(count > 0 for count, _ in before.values())
    button.focus()
    laptop.page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert {figure: shown(laptop, figure, 1) for figure in figures} == {
        figure: (0, count) for figure, (_, count) in before.items()
    }
    laptop.page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true"
    assert {figure: shown(laptop, figure, 1) for figure in figures} == before


def test_the_legend_of_a_figure_hides_a_part(laptop: View) -> None:
    first = "document.getElementById('plot-phases-refresh').data[0].visible"
    entry = laptop.page.locator("#plot-phases-refresh .legendtoggle").first
    entry.click()
    laptop.until(f"{first} === 'legendonly'")
    entry.click()
    laptop.until(f"{first} === true")


def test_stacked_bars_stand_on_each_other(laptop: View) -> None:
    ends, sums = laptop.page.evaluate(
        """() => {
            const bars = document.getElementById("plot-phases-refresh").calcdata.flat();
            const ends = {}, sums = {};
            for (const bar of bars.filter(each => each.s > 0)) {
                ends[bar.p] = Math.max(ends[bar.p] ?? 0, bar.s1);
                sums[bar.p] = (sums[bar.p] ?? 0) + bar.s;
            }
            return [ends, sums];
        }"""
    )
    assert len(ends) > 2
    assert ends == pytest.approx(sums)


def test_a_heading_sorts_the_table_by_number(laptop: View) -> None:
    heading = laptop.page.locator("#table-runs th", has_text="final test accuracy")
    heading.locator("button").click()
    cells = laptop.page.locator("#table-runs tbody tr td:nth-child(7)").all_text_contents()
    assert cells.pop() == "–"  # the run without a number stays last
    numbers = [float(cell.split()[0]) for cell in cells]
    assert numbers == sorted(numbers)
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    cells = laptop.page.locator("#table-runs tbody tr td:nth-child(7)").all_text_contents()
    assert cells.pop() == "–"
    assert [float(cell.split()[0]) for cell in cells] == numbers[::-1]
    laptop.page.locator("#table-runs th button").first.click()


def test_numbers_of_a_figure_can_be_read(laptop: View) -> None:
    details = laptop.page.locator(".numbers[data-plot='accuracy-epoch']")
    details.locator("summary").click()
    rows = details.locator("tr")
    rows.first.wait_for()
    assert rows.count() == 8 * 4  # what is shown: test; with so many runs training starts hidden
    assert re.match(r"\w+-\d.*, test\s+1\s+0\.\d+", rows.first.inner_text())
    details.locator("summary").click()


def test_paper_gets_every_figure(look: Look, report_html: Path) -> None:
    view = look(report_html, LAPTOP)  # not scrolled: printing draws what the window has not shown
    view.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    view.until("[...document.querySelectorAll('.plot')].every(plot => plot.calcdata)")
    view.page.emulate_media(media="print")
    assert view.page.locator(".key, nav, .filter, .numbers").locator("visible=true").count() == 0
    assert view.page.locator("details.run:not([open])").count() == 0
    assert len(view.page.pdf(format="A4")) > 200_000
    assert view.console == []


def test_many_runs_are_drawn_as_groups(look: Look, crowded_html: Path) -> None:
    view = look(crowded_html, LAPTOP)
    view.draw_all()
    assert view.page.locator(".key button[data-run]").count() == 0
    view.page.locator(".key button[data-group='0']").click()
    figure = "document.getElementById('plot-mean-accuracy-epoch')"
    shown = view.page.evaluate(f"{figure}.data.map(trace => [trace.meta.group, trace.visible])")
    assert {tuple(each) for each in shown} == {(0, False), (1, True)}
    view.page.fill("#filter", "run07")
    view.page.wait_for_selector("#filtered:has-text('1 of 60 runs')")
    assert view.console == []


def test_names_and_settings_of_users_do_nothing(look: Look, tmp_path: Path) -> None:
    evil = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
    for number in range(2):
        make_run(
            tmp_path / "runs",
            f"run{number}<img src=x onerror=alert(1)>",
            experiment=evil,
            settings={"description": f"{evil}{number}", f"<b>{number}": "'\"><svg onload='window.hit = 3'>"},
            status=Status("failed", evil, 1, fault={"evidence": [evil]}),
            tables={
                "train": [{"step": 1}],
                "eval": [{"step": 1, "split": f"<u>{evil}"}],
                "grad_norm": [{"step": 1, "layer": evil}],
                "profiling": [{"step": 1, "phase": evil, "seconds": 1.0}],
            },
        )
    page = report.write_report([tmp_path / "runs"], tmp_path / "report.html")
    view = look(page, LAPTOP)
    view.draw_all()
    view.page.hover("#plot-accuracy-epoch")
    for summary in view.page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    assert view.page.evaluate("window.hit") is None
    assert view.page.locator("img[src='x'], b, u").count() == 0
    assert view.requests == [page.as_uri()]
    assert [line for line in view.console if "Content Security" in line or line.startswith("error")] == []


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_figures_become_files(chromium: str, tmp_path: Path, form: Any, magic: bytes) -> None:
    made = report.make([rich_runs(tmp_path / "runs")])
    chosen = [panel for panel in made.panels if panel.id in ("phases-refresh", "landscape-contour-0")]
    files = export(chosen, tmp_path / "figures", form)
    assert [file.name for file in files] == [f"phases-refresh.{form}", f"landscape-contour-0.{form}"]
    for file in files:
        assert file.read_bytes().startswith(magic)
        assert file.stat().st_size > 5_000
