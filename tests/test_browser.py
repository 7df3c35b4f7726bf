"""The browser of the tests: what a page says or asks for is heard."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Browser


def test_a_quiet_page_passes(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><html lang="en"><title>t</title><main><h1>Hello</h1></main>', encoding="utf-8")
    visit = browser.visit(page)
    visit.assert_quiet()
    visit.assert_accessible()
    assert visit.page.inner_text("h1") == "Hello"


@pytest.mark.parametrize(
    ("body", "heard"),
    [
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>nothing.here()</script>", "nothing is not defined"),
        ("<img src='http://example.org/a.png'>", "ERR_NAME_NOT_RESOLVED"),
    ],
)
def test_what_a_page_says_and_asks_is_heard(browser: Browser, tmp_path: Path, body: str, heard: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>t</title>{body}", encoding="utf-8")
    visit = browser.visit(page)
    assert any(heard in line for line in visit.said)
    assert visit.asked == (["http://example.org/a.png"] if "img" in body else [])
    with pytest.raises(AssertionError):
        visit.assert_quiet()
    if "img" in body:
        with pytest.raises(AssertionError, match="image-alt"):
            visit.assert_accessible()
