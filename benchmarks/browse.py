"""How a report's page behaves in a real Chromium: time to load, to draw, to filter; what the console says.

Run: ``python -m benchmarks.browse PAGE [--filter TEXT] [--pictures FOLDER]``, with any page of
``hpcsngd report``; ``python -m benchmarks.report --page PAGE`` keeps that of a thousand runs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser.view import LAPTOP, PHONE, PROGRAMS, View, open_view


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def use(view: View, text: str) -> Iterator[tuple[str, float]]:
    """Yields what is done with a page and the seconds that it takes.

    Args:
        view: the page, just loaded.
        text: for the filter; must leave some of the runs.
    """
    yield "draw all figures, scrolling", timed(view.draw_all)
    rows = view.page.locator("#table-runs tbody tr")
    count = rows.count()

    def filtered(words: str) -> None:
        view.page.fill("#filter", words)
        view.until(f"(document.getElementById('filtered').textContent === '') === {str(not words).lower()}")

    yield f"filter {text!r}", timed(lambda: filtered(text))
    left = rows.locator("visible=true").count()
    if not 0 < left < count:
        raise SystemExit(f"the filter {text!r} leaves {left} of {count} rows")
    yield f"no filter again ({left} of {count} rows were left)", timed(lambda: filtered(""))
    name = view.page.locator(".key button[data-run], .key button[data-group]").first
    yield "hide a name of the key", timed(name.click)
    yield "show it again", timed(name.click)
    yield "sort the table by a column", timed(view.page.locator("#table-runs th button").nth(1).click)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.browse", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--filter", default="hylo completed", help="text for the filter")
    parser.add_argument("--pictures", type=Path, help="folder for pictures at two widths")
    options = parser.parse_args()
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, size in (("laptop", LAPTOP), ("phone", PHONE)):
            begin = time.perf_counter()
            view, context = open_view(browser, options.page.absolute(), size)
            print(f"{name}: load {time.perf_counter() - begin:.1f} s", flush=True)
            for what, seconds in use(view, options.filter):
                print(f"{name}: {what} {seconds:.1f} s", flush=True)
            print(f"{name}: console {view.console or 'silent'}, {len(view.requests)} request", flush=True)
            if options.pictures is not None:
                view.page.screenshot(path=options.pictures / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
