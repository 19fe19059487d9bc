"""A page in a real Chromium, as tests and `benchmarks.browse` look at it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LAPTOP = {"width": 1366, "height": 768}
PHONE = {"width": 390, "height": 844}
PATIENCE_S = 120.0
# Of drawing in software: advice on speed from the browser to plotly.js, no fault of a page.
HINTS = ("Canvas2D: Multiple readback operations", "GL Driver Message", "GPU stall due to ReadPixels")


@dataclass
class View:
    """A page in the browser, and what the browser said and asked for."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def until(self, expression: str) -> None:
        """Waits for an expression to be true. (playwright's own wait needs eval, which the page forbids.)"""
        deadline = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def draw_all(self) -> None:
        """Scrolls through the page, so that all figures are drawn."""
        self.page.evaluate(
            """async () => {
                for (const plot of document.querySelectorAll(".plot")) {
                    plot.scrollIntoView();
                    while (!plot.calcdata) await new Promise(requestAnimationFrame);
                }
                scrollTo(0, 0);
            }"""
        )


def open_view(browser: Browser, path: Path, size: dict[str, int]) -> tuple[View, BrowserContext]:
    """Opens a file in a new window of a size; returns it and what is to be closed in the end."""
    context = browser.new_context(viewport={"width": size["width"], "height": size["height"]})
    context.set_default_timeout(1000 * PATIENCE_S)
    view = View(context.new_page())

    def heard(message: ConsoleMessage) -> None:
        if not any(hint in message.text for hint in HINTS):
            view.console.append(f"{message.type}: {message.text}")

    def asked(request: Request) -> None:
        view.requests.append(request.url)

    view.page.on("console", heard)
    view.page.on("pageerror", lambda error: view.console.append(f"error: {error}"))
    view.page.on("request", asked)
    view.page.goto(path.as_uri())
    return view, context
