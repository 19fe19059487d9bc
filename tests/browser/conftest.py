"""A real Chromium, and pages made once for all tests that look at them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from hpcsngd_analysis import report
from hpcsngd_analysis.sections.context import Options
from tests.analysis.runs import make_run, rich_runs
from tests.browser.view import LAPTOP, PHONE, PROGRAMS, View, open_view


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the machine's own Chromium; missing, it is a failure in continuous integration."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        words = f"no {' or '.join(PROGRAMS)} in PATH; make system installs one"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(words)
        pytest.skip(words)
    return found


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Browser]:
    """The browser, started once. Without its sandbox, which root may not use."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that has every section."""
    folder = tmp_path_factory.mktemp("rich")
    options = Options(target=0.7, baseline="net-sgd")
    return report.write_report([rich_runs(folder / "runs")], folder / "report.html", options)


@pytest.fixture(scope="session")
def crowded_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page on more runs than are drawn one by one."""
    folder = tmp_path_factory.mktemp("crowd")
    for number in range(60):
        rows = [
            {
                "step": step,
                "epoch": float(step),
                "split": "test",
                "accuracy": 0.5 + step / 100 + number / 1000,
            }
            for step in range(1, 11)
        ]
        make_run(
            folder / "runs",
            f"run{number:02}",
            experiment=("one", "other")[number % 2],
            settings={"seed": number},
            tables={"eval": rows},
        )
    return report.write_report([folder / "runs"], folder / "report.html")


Look = Callable[[Path, dict[str, int]], View]


@pytest.fixture(scope="session")
def look(browser: Browser) -> Iterator[Look]:
    """Opens a file in a new window of a size."""
    contexts = []

    def opened(path: Path, size: dict[str, int]) -> View:
        view, context = open_view(browser, path, size)
        contexts.append(context)
        return view

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def laptop(look: Look, report_html: Path) -> View:
    """The page in a laptop's window with all figures drawn. Tests leave it as they found it."""
    view = look(report_html, LAPTOP)
    view.draw_all()
    return view


@pytest.fixture(scope="session")
def phone(look: Look, report_html: Path) -> View:
    """The same in a phone's window."""
    view = look(report_html, PHONE)
    view.draw_all()
    return view
