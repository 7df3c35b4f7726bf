"""The page of a run in a browser: it draws, it is read aloud, it asks nobody, and no row of data does anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from likely.insight.charts import draw_charts
from likely.insight.report_page import render_html
from reported import Finished, made

HOSTILE = "window.pwned = 1"


@pytest.mark.parametrize(
    ("scheme", "width", "medium"),
    [("light", 1100, "screen"), ("dark", 1100, "screen"), ("light", 360, "screen"), ("dark", 800, "print")],
)
def test_the_page_is_drawn_quietly(browser: Browser, finished: Finished, scheme: str, width: int, medium: str) -> None:
    visit = browser.visit(finished.folder / "report.html", color_scheme=scheme, width=width)
    page = visit.page
    page.emulate_media(media=medium, color_scheme=scheme)
    visit.assert_quiet()
    visit.assert_accessible()
    boxes = [svg.bounding_box() for svg in page.query_selector_all("svg")]
    assert len(boxes) == 7
    assert all(box["width"] > 250 and box["height"] > 60 for box in boxes)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        ".map(e => e.outerHTML.slice(0, 90))"
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 24, 27)" if (scheme, medium) == ("dark", "screen") else "rgb(255, 255, 255)")
    ink = page.evaluate("getComputedStyle(document.querySelector('#curve-text_1 text')).fill")
    assert ink == ("rgb(232, 232, 232)" if (scheme, medium) == ("dark", "screen") else "rgb(27, 27, 27)")


def test_rows_of_data_do_nothing(browser: Browser, finished: Finished) -> None:
    visit = browser.visit(finished.folder / "report.html")
    assert visit.page.evaluate("window.pwned") is None
    for tag in ("script", "img", "iframe", "object", "form", "base"):
        assert visit.page.locator(tag).count() == 0, tag
    text = visit.page.inner_text("body")
    assert HOSTILE in text  # it was shown
    assert "\\u202e" in text
    assert not set("\u202e\x07\x00") & set(text)
    assert "onerror='window.pwned=1'" in text


def test_everything_is_reached_by_keyboard(browser: Browser, finished: Finished) -> None:
    page = browser.visit(finished.folder / "report.html").page
    wanted = page.evaluate("document.querySelectorAll('a[href], summary, [tabindex=\"0\"]').length")
    seen = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
    assert "skip" in seen[0]
    assert sum("<summary" in item for item in seen) == len(finished.report["moved"])
    assert sum("download=" in item for item in seen) == 8
    assert page.evaluate("document.activeElement.tagName") != "BODY"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BODY"  # nothing was left out
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None


def test_what_is_said_on_hover_and_by_links(browser: Browser, finished: Finished) -> None:
    page = browser.visit(finished.folder / "report.html").page
    links = page.eval_on_selector_all("a[href^='#']", "links => links.map(a => a.getAttribute('href').slice(1))")
    assert len(links) > 15
    for target in links:
        assert page.locator(f"[id='{target}']").count() == 1, target
    assert page.locator("a.term").first.get_attribute("title").startswith("negative log-likelihood")
    assert page.eval_on_selector_all("nav a", "links => links.length") >= 10
    for svg in page.locator("svg").all():
        assert len(svg.get_attribute("aria-label")) > 20


def test_the_tables_in_the_page_are_the_files(browser: Browser, finished: Finished) -> None:
    page = browser.visit(finished.folder / "report.html", accept_downloads=True, java_script_enabled=False).page
    links = page.locator("a.csv").all()
    assert len(links) == 8
    for link in links:
        with page.expect_download() as waiting:
            link.click()
        name = waiting.value.suggested_filename
        assert Path(waiting.value.path()).read_bytes() == (finished.folder / "report" / name).read_bytes()


def test_no_colour_alone(finished: Finished) -> None:
    """What is better and worse is told by line and shape as well."""
    page = finished.page
    better, worse = (re.search(rf"\.{level}1, [^{{]*{{ text-decoration: underline (\w+)", page) for level in "gw")
    assert better
    assert worse
    assert better[1] != worse[1]
    assert "hatch" in page or "<pattern" in page


def test_without_held_out_rows_the_page_says_so(browser: Browser, tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("base", "tuned", "delta"))
    report = made(**nothing, nll_before=(), nll_after=(), sources=(), weights=(), evaluations=())
    (tmp_path / "report.html").write_text(render_html(report, draw_charts(report)), encoding="utf-8")
    visit = browser.visit(tmp_path / "report.html")
    visit.assert_quiet()
    visit.assert_accessible()
    assert "nothing can be said about new examples" in visit.page.inner_text(".verdict")
    assert visit.page.locator("svg").count() == 1
