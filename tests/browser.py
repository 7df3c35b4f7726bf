"""The system's Chromium without a head, for tests of pages: it hears every request and every word on the console.

A test takes the fixture ``browser`` and calls ``browser.visit(file or URL)``; it is skipped where there is no Chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No name is ever looked up, so that a page that asks the network fails instead of passing where there is one.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


@dataclass
class Visit:
    """A page that was opened. ``said`` are the errors and warnings of its console and the exceptions of its scripts;
    ``asked`` the URLs that it asked for, but for those that it may."""

    page: Any
    may_ask: tuple[str, ...]
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def listen(self) -> None:
        def hear(message: Any) -> None:
            if message.type in {"error", "warning"}:
                self.said.append(message.text)

        def note(request: Any) -> None:
            if not request.url.startswith(self.may_ask):
                self.asked.append(request.url)

        self.page.on("console", hear)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", note)

    def assert_quiet(self) -> None:
        """No word on the console, no request to anybody."""
        assert not self.said, self.said
        assert not self.asked, self.asked

    def assert_accessible(self) -> None:
        """No rule of axe-core is broken."""
        from axe_playwright_python.sync_playwright import Axe

        broken = Axe().run(self.page).response["violations"]
        assert not broken, [(rule["id"], [node["html"][:200] for node in rule["nodes"][:3]]) for rule in broken]


@dataclass
class Browser:
    """A running Chromium with no profile."""

    chromium: Any
    _contexts: list[Any] = field(default_factory=list)

    def visit(self, target: Path | str, *, may_ask: tuple[str, ...] = (), width: int = 1100, **context: Any) -> Visit:
        """Open a file, or a URL and what it loads from that host.

        Args:
            may_ask: what else the page may ask for, as beginnings of URLs.
            context: of Playwright's ``new_context``, such as ``color_scheme="dark"`` or ``java_script_enabled=False``.
        """
        url = target.absolute().as_uri() if isinstance(target, Path) else target
        own = (url,) if isinstance(target, Path) else ("/".join(url.split("/")[:3]) + "/",)
        made = self.chromium.new_context(viewport={"width": width, "height": 900}, **context)
        self._contexts.append(made)
        visit = Visit(made.new_page(), (*own, "data:", "blob:", "about:", *may_ask))
        visit.listen()
        visit.page.goto(url, wait_until="load")
        return visit

    def close_pages(self) -> None:
        while self._contexts:
            self._contexts.pop().close()


@contextmanager
def running() -> Iterator[Browser]:
    """A browser for some tests. It holds an event loop in this thread while it runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
