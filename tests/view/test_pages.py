"""The viewer's pages in a real browser: what each is for, by mouse and by keyboard, with text that means harm."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import HOSTILE, Viewer

import likely
from browser import Browser, Visit

STATIC = Path(likely.__file__).parent / "web" / "static"
SOURCES = sorted(path for path in STATIC.rglob("*") if path.is_file() and "vendor" not in path.parts)
WHOLE = "[data-drawn]"
PIECE = "[role=option]"
LONG = 16_000
WAIT = 60_000  # milliseconds; a model may have to be loaded first

Open = Callable[..., Visit]


def _opener(browser: Browser, viewer: Viewer) -> Open:
    def visit(address: str, **context: Any) -> Visit:
        name, _, value = viewer.cookie.partition("=")
        cookie = {"name": name, "value": value, "domain": "127.0.0.1", "path": "/", "sameSite": "Strict", "expires": -1}
        state = {"cookies": [{**cookie, "httpOnly": True, "secure": False}], "origins": []}
        visited = browser.visit(f"{viewer.origin}/#{address}", storage_state=state, **context)
        visited.page.set_default_timeout(WAIT)
        visited.page.wait_for_selector(WHOLE)
        return visited

    return visit


@pytest.fixture
def visit(browser: Browser, viewer: Viewer) -> Open:
    """Open an address of the viewer, such as ``/run/ID``, in a fresh profile that is signed in."""
    return _opener(browser, viewer)


def metrics_line(step: int) -> str:
    line = {"step": step, "nll": 2 / step, "tokens": 100, "distinct_tokens": 90, "supervised_tokens": 40}
    return json.dumps({**line, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": 0.1}) + "\n"


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a name that means harm, which is being written."""
    run = tmp_path_factory.mktemp("growing") / "<b>run\u202e\u0007"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run_id": "1", "num_steps": 50, "device": HOSTILE}), encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(map(metrics_line, range(1, 6))), encoding="utf-8")
    return run


def _token(i: int) -> dict[str, Any]:
    known = None if i == 0 else -float(i % 7)
    token = {"id": i, "text": "\n" if i % 80 == 79 else f" w{i % 50}", "role": "assistant" if i > 20 else "user"}
    return token | {"weight": float(i > 20), "logprob": known, "rank": 1, "entropy": 0.5, "base_logprob": known}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of no run: a row of 16,000 tokens and 120 of three."""
    path = tmp_path_factory.mktemp("scored") / "rows.jsonl"
    rows = []
    for row, length in enumerate([LONG, *[3] * 120]):
        tokens = [_token(i + 19 if length == 3 else i) for i in range(length)]
        tokens[1]["text"] += "W" * 300 * (row == 119)
        facts = {"source": f"{HOSTILE}:{row + 1}", "nll_nats": float(row), "num_tokens": 1.0, "base_nll_nats": 60.0}
        rows.append(json.dumps(facts | {"tokens": tokens}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def other(growing: Path, scored: Path) -> Iterator[Viewer]:
    """A viewer of the run that grows and of the scores of no run."""
    running = Viewer(growing, "--scores", scored)
    yield running
    running.close()


@pytest.fixture
def visit_other(browser: Browser, other: Viewer) -> Open:
    return _opener(browser, other)


def loose_scores(other: Viewer) -> str:
    (found,) = other.json("/api/scores")["sets"]
    return str(other.ready(found["id"])["id"])


def pages_of(run: str, scores: str) -> dict[str, str]:
    return {
        "runs": "/",
        "run": f"/run/{run}",
        "examples": f"/run/{run}/examples",
        "example": f"/scores/{scores}/1?run={run}&token=3",
        "try": f"/run/{run}/try",
        "data": f"/run/{run}/data?line=2",
    }


# --- the sources ---


def test_nothing_in_the_sources_can_become_markup_or_come_from_elsewhere() -> None:
    parses = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|srcdoc|DOMParser")
    inline = re.compile(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=\"|javascript:")
    hosts = re.compile(r"https?://(?!www\.w3\.org/)")
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for pattern in (parses, hosts) + ((inline,) if path.suffix == ".html" else ()):
            assert not pattern.search(text), f"{path.name}: {pattern.search(text)}"


def test_the_front_end_stays_small() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert sum(lines.values()) < 3000
    assert max(lines.values()) < 400


# --- every page ---


@pytest.mark.parametrize(
    ("colours", "width", "pages"),
    [
        ("light", 1100, ("run", "examples", "example", "try", "data", "runs")),
        ("dark", 390, ("run", "examples", "example", "try")),  # data: below
    ],
)
def test_every_page_is_quiet_and_accessible(
    visit: Open, run_id: str, scores_id: str, colours: str, width: int, pages: tuple[str, ...]
) -> None:
    visited = visit("/nothing", color_scheme=colours, width=width)
    page = visited.page
    for name in pages:
        page.evaluate(f"document.querySelector('{WHOLE}').remove()")
        page.evaluate("address => (location.hash = address)", pages_of(run_id, scores_id)[name])
        page.wait_for_selector(WHOLE)
        page.wait_for_function("() => !document.querySelector('[aria-busy], .page progress')")
        visited.assert_accessible()
        visited.assert_quiet()
        across = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert across <= 0, f"{name} scrolls sideways"


def test_the_frame_by_keyboard_the_skip_link_the_pages_and_the_explanations(visit: Open, run_id: str) -> None:
    page = visit(f"/run/{run_id}").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("link", name="Data").press("Enter")
    page.wait_for_selector("h1:text('Data')")
    assert page.title() == "Data · likely"
    assert page.evaluate("document.activeElement.id") == "main"
    page.go_back()
    term = page.get_by_role("button", name="answers it was not trained on")
    term.focus()
    assert "held-out data" in page.locator("#tip").inner_text()
    assert "held-out data" in page.evaluate(
        "id => document.getElementById(id).textContent", term.get_attribute("aria-describedby")
    )
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_chosen_theme_stays(visit: Open, run_id: str) -> None:
    page = visit(f"/run/{run_id}", color_scheme="light").page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(paper)
    page.reload()
    page.wait_for_selector(WHOLE)
    assert light != dark == page.evaluate(paper)


def test_a_server_that_is_gone_and_a_page_that_is_not_there_are_told(visit: Open, run_id: str) -> None:
    page = visit("/run/0000").page
    assert "there is no such run" in page.get_by_role("alert").inner_text()
    page.route("**/api/runs/*", lambda route: route.abort())
    page.evaluate(f"location.hash = '#/run/{run_id}'")
    page.wait_for_selector("text=does not answer")


@pytest.mark.parametrize("what", ["an answer", "a module"])
def test_a_page_that_breaks_says_so_and_shows_a_way_out(visit: Open, run_id: str, what: str) -> None:
    visited = visit(f"/run/{run_id}/try")
    page = visited.page
    if what == "an answer":
        page.route(f"**/api/runs/{run_id}/metrics", lambda route: route.fulfill(json=[]))
        page.evaluate(f"location.hash = '#/run/{run_id}'")
        page.wait_for_selector("h1:text('shown')")
    else:
        page.route("**/js/scatter.js", lambda route: route.abort())
        page.reload()
    page.wait_for_selector("#broken:not([hidden])")
    assert page.inner_text("#broken").startswith("This page broke.")
    assert "Error" in page.inner_text("#broken") or "main.js" in page.inner_text("#broken")
    if what == "an answer":
        visited.assert_accessible()
    page.unroute_all()
    page.locator("#broken a").click()
    page.wait_for_selector(WHOLE)
    assert page.locator("#broken").is_hidden()


# --- the run ---


def test_an_interval_that_no_run_wrote_is_a_dash_and_not_a_blank_page(visit: Open, run_id: str) -> None:
    visited = visit("/")

    def garble(route: Any) -> None:
        value = route.fetch().json()
        for figures in (value["report"]["base"], value["report"]["delta"]):
            figures["ci95"] = {"low": 1}
        route.fulfill(json=value)

    visited.page.route(f"**/api/runs/{run_id}", garble)
    visited.page.reload()
    visited.page.wait_for_selector(f"{WHOLE} :text('95% interval')")
    visited.assert_quiet()


def test_two_runs_beside_each_other_are_accessible_on_a_phone(browser: Browser, run_folder: Path) -> None:
    """Where tables scroll, which makes each of them a place with a name of its own."""
    viewer = Viewer(run_folder, shutil.copytree(run_folder, run_folder.parent / "copies" / "beside"))
    try:
        one, two = (run["id"] for run in viewer.json("/api/runs")["runs"])
        for width in (360, 1600):
            visited = _opener(browser, viewer)(f"/run/{one}?with={two}", width=width)
            visited.page.wait_for_timeout(200)
            visited.assert_accessible()
            visited.assert_quiet()
            cells = visited.page.locator("tbody th").evaluate_all("cells => cells.map((cell) => cell.clientWidth)")
            assert min(cells) >= 7 * 14
            assert visited.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        assert viewer.close() == 0


def test_the_run_page_tells_the_verdict_and_saves_its_picture(visit: Open, viewer: Viewer, run_id: str) -> None:
    told = viewer.json(f"/api/runs/{run_id}")
    page = visit(f"/run/{run_id}").page
    assert told["report"]["verdict"] in page.inner_text("main")
    assert "finished" in page.inner_text(".badge")
    with page.expect_download() as download:
        page.get_by_role("button", name="as CSV").click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert rows[0].startswith("run,step,nll,held_out_nll")
    steps = [row.split(",") for row in rows if row.split(",")[2]]
    assert [row[1] for row in steps[1:]] == ["1", "2", "3", "4"]
    with page.expect_download() as download:
        page.get_by_role("button", name="as PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_the_curve_is_read_by_arrow_keys(visit: Open, run_id: str) -> None:
    page = visit(f"/run/{run_id}").page
    chart = page.get_by_role("slider", name="Step of the chart")
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert chart.get_attribute("aria-valuenow") == "1"
    assert chart.get_attribute("aria-valuetext") == page.locator(".readout").inner_text()
    assert re.match(r"Step 1: this step \d\.\d{4}", page.locator(".readout").inner_text())


def test_a_run_that_grows_is_followed_to_its_end(visit_other: Open, growing: Path) -> None:
    visited = visit_other("/")  # one run: its page
    page = visited.page
    # The list of runs comes last: what the stream tells at once must wait for the page.
    page.route("**/api/runs", lambda route: (time.sleep(1), route.continue_()))
    page.reload()
    page.wait_for_selector(".badge")
    assert "running" in page.inner_text(".badge")
    assert page.inner_text("h1") == "<b>run[U+202E]␇"
    assert "step 5 of 50" in page.inner_text(".page")
    with (growing / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(map(metrics_line, range(6, 13))))
    page.wait_for_selector("text=step 12 of 50")
    page.wait_for_selector(".plot-slider[aria-valuemax='12']")  # what the curve holds
    (growing / "metrics.jsonl").write_text("".join(map(metrics_line, range(1, 9))), encoding="utf-8")  # resumed
    page.wait_for_selector("text=step 8 of 50")
    page.wait_for_selector(".plot-slider[aria-valuemax='8']")
    (growing / "report.json").write_text(json.dumps({"verdict": f"Well. {HOSTILE}"}), encoding="utf-8")
    page.wait_for_selector(".badge.finished")
    assert "Well. <img src=x" in page.inner_text(".verdict")
    assert not page.locator("main img, main b").count()
    visited.assert_accessible()
    visited.assert_quiet()
    (growing / "report.json").unlink()


# --- the examples ---


def test_rows_are_sorted_filtered_and_found_again_by_their_address(visit_other: Open, other: Viewer) -> None:
    visited = visit_other(f"/scores/{loose_scores(other)}")
    page = visited.page
    page.wait_for_selector("tr[data-id]")
    assert page.locator("th[aria-sort]").inner_text().startswith("Change")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert "WWWW" in page.inner_text(".rows")  # a word without an end pushes no number out of sight
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.list .scroll'))") <= 0
    page.locator("[data-sort=nll_tuned]").press("Enter")
    page.wait_for_selector("th[aria-sort=descending] [data-sort=nll_tuned]")
    assert page.evaluate("document.activeElement.dataset.sort") == "nll_tuned"
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort=ascending] [data-sort=nll_tuned]")
    page.get_by_role("button", name="Next").click()
    page.wait_for_selector("tr[data-id='50']")
    page.reload()
    page.wait_for_selector("tr[data-id='50']")
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("After")
    page.get_by_label("Got worse").check()
    page.wait_for_selector("text=60 of 121 rows")
    assert "worse=1" in page.url
    page.go_back()
    page.wait_for_selector("text=All 121 rows")
    page.get_by_label("Text contains").fill("no such text")
    page.wait_for_selector("text=No row is like that.")
    visited.assert_quiet()


def test_a_row_is_opened_from_the_table_and_from_the_picture(visit: Open, run_id: str, scores_id: str) -> None:
    page = visit(f"/run/{run_id}/examples").page
    page.wait_for_selector("tr[data-id]")
    assert "<img src=x onerror=alert(1)>" in page.inner_text(".list")
    assert page.locator("tr[data-id='0'] .preview").inner_text().startswith("What is 7 and 7? … It is 14.")
    assert "\u202e" not in page.inner_text("main")
    page.locator("tr[data-id='1'] a").press("Enter")
    page.wait_for_selector("[role=listbox]")
    assert f"/scores/{scores_id}/1" in page.url
    page.go_back()
    page.wait_for_selector(".scatter [data-id='2']")
    page.locator(".scatter [data-id='2']").click(force=True)
    page.wait_for_selector("[role=listbox]")
    assert f"/scores/{scores_id}/2" in page.url


# --- one example ---


def test_tokens_are_read_and_opened_by_keyboard(visit: Open, viewer: Viewer, run_id: str, scores_id: str) -> None:
    row = viewer.json(f"/api/scores/{scores_id}/rows/0")
    visited = visit(f"/scores/{scores_id}/0?run={run_id}")
    page = visited.page
    assert page.locator(PIECE).count() == len(row["token_text"])
    page.locator("[role=option][tabindex='0']").focus()
    page.keyboard.press("n")
    chosen = page.locator("[role=option][aria-selected=true]")
    first = row["token_weight"].index(1.0)
    assert page.evaluate("[...document.querySelectorAll('[role=option]')].indexOf(document.activeElement)") == first
    assert page.locator("[role=option][tabindex]").count() == 1
    assert "trained, chance" in (chosen.get_attribute("aria-label") or "")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card .name:text('everything else')")
    page.wait_for_selector(".card .picture .name >> nth=6")
    shown = page.locator(".card .picture").get_attribute("aria-label")
    assert (shown or "").startswith("Chance of the next token: wanted token")
    with page.expect_download() as download:
        page.locator(".card").get_by_role("button", name="as CSV").click()
    with Path(download.value.path()).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert sum(float(cells[-3]) for cells in rows) == pytest.approx(1, abs=1e-6)  # chances after
    assert sum(float(cells[-1]) for cells in rows) == pytest.approx(0, abs=1e-6)  # p - onehot after
    with page.expect_download() as download:
        page.locator(".card").get_by_role("button", name="as SVG").click()
    assert "<script" not in Path(download.value.path()).read_text(encoding="utf-8")
    visited.assert_accessible()
    visited.assert_quiet()


def test_the_change_is_a_sign_and_a_number_too(visit: Open, viewer: Viewer, run_id: str, scores_id: str) -> None:
    row = viewer.json(f"/api/scores/{scores_id}/rows/0")
    page = visit(f"/scores/{scores_id}/0?run={run_id}&numbers=1").page
    values = page.evaluate("[...document.querySelectorAll('[role=option]')].map(each => each.dataset.value ?? null)")
    for weight, now, before, value in zip(
        row["token_weight"], row["logprob"], row["base_logprob"], values, strict=True
    ):
        change = None if not weight or now is None else f"{now - before:+.2f}".replace("-", "−")
        assert value == change or value in {"0.00", "+0.00"}
    page.get_by_role("radio", name="After").check(force=True)
    assert page.locator("[data-value$='%']").count() == sum(weight > 0 for weight in row["token_weight"])
    assert "show=after" in page.url


def test_checkpoints_between_are_scored_when_asked_for(visit: Open, run_id: str, scores_id: str) -> None:
    page = visit(f"/scores/{scores_id}/0?run={run_id}&show=after&numbers=1").page
    tuned = page.evaluate("[...document.querySelectorAll('[data-value]')].map(each => each.dataset.value)")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "step 2"
    drawn = (
        "before => JSON.stringify([...document.querySelectorAll('[data-value]')].map(e => e.dataset.value)) !== before"
    )
    page.wait_for_function(drawn, arg=json.dumps(tuned, ensure_ascii=False, separators=(",", ":")))
    assert "state=step-" in page.url
    page.locator(f"{PIECE}[data-value]").first.click()
    assert "at the tuned model" in page.inner_text(".card")  # the rivals would be those of other weights
    assert not page.locator(".card .name >> nth=2").count()
    page.reload()
    page.wait_for_selector(WHOLE)
    assert page.get_by_role("slider").get_attribute("aria-valuetext") == "step 2"


def test_white_space_and_what_steers_text_is_seen(visit: Open, viewer: Viewer, run_id: str, scores_id: str) -> None:
    page = visit(f"/scores/{scores_id}/1?run={run_id}").page
    shown = page.inner_text("[role=listbox]")
    assert "[U+202E]" in shown or "�" in shown  # a byte of it may be a token of its own
    assert "↵" in shown
    assert "\u202e" not in shown
    assert not page.locator("main img, main script").count()


def test_sixteen_thousand_tokens_are_drawn(visit_other: Open, other: Viewer) -> None:
    scores = loose_scores(other)
    page = visit_other(f"/scores/{scores}/1").page
    seconds = page.evaluate(
        """async address => {
            const started = performance.now();
            location.hash = address;
            const frame = () => new Promise(requestAnimationFrame);
            while (document.querySelectorAll('[role=option]').length < 16000) await frame();
            document.querySelector('[role=listbox]').getBoundingClientRect();
            await frame();
            await frame();
            return (performance.now() - started) / 1000;
        }""",
        f"#/scores/{scores}/0",
    )
    assert page.locator(PIECE).count() == LONG
    assert seconds < 3  # 0.5 to 1.6 s were seen on two cores with a load of 14; the rest is room for slower machines
    page.locator("[role=option]").first.focus()
    page.keyboard.press("Control+End")
    assert page.locator("[role=option]").last.get_attribute("aria-selected") == "true"


# --- a prompt of one's own ---


def test_try_it_asks_both_models_and_takes_a_step(visit: Open, run_id: str) -> None:
    visited = visit(f"/run/{run_id}/try")
    page = visited.page
    page.get_by_label("Prompt").fill(f"What is 3 and 3? {HOSTILE}")
    page.get_by_label("Wanted answer").fill("It is 6.")
    page.get_by_label("Longest answer").fill("8")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("text=What they say themselves")
    before, after = page.get_by_role("listbox", name="Wanted answer").all()
    assert before.locator(PIECE).count() == after.locator(PIECE).count() > 3
    after.locator(PIECE).first.click()
    assert page.locator(".card .picture").count() == 1
    visited.assert_accessible()
    page.get_by_role("button", name="One step").click()
    page.wait_for_selector("h2:text('One step on this')")
    page.get_by_text("In numbers").click()
    cells = page.locator("details table tbody tr").first.locator("td").all_inner_texts()
    assert all(re.fullmatch(r"[+−]?\d+\.\d+", cell) for cell in cells)
    page.reload()  # the address says it all
    page.wait_for_selector("h2:text('One step on this')")
    assert page.get_by_label("Wanted answer").input_value() == "It is 6."
    visited.assert_accessible()
    visited.assert_quiet()


def test_a_wait_tells_its_place_and_can_be_cancelled(visit: Open, run_id: str) -> None:
    page = visit(f"/run/{run_id}/try?prompt=a&answer=b").page
    asked = []
    job = {
        "id": "j",
        "kind": "lens",
        "state": "waiting",
        "ahead": 2,
        "title": "",
        "done": 0,
        "total": None,
        "seconds": 0,
    }

    def answer(route: Any) -> None:
        asked.append(route.request.method)
        route.fulfill(status=202 if route.request.method == "POST" else 200, json={**job, "job": "j"})

    page.route("**/api/jobs**", answer)
    page.route("**/api/jobs/**", answer)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("text=waiting, 2 before it")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("text=Cancelled.")
    page.wait_for_timeout(300)
    assert asked[0] == "POST"
    assert "DELETE" in asked


@pytest.mark.parametrize(("place", "start"), [("examples", "Score the held-out rows"), ("data", "Check the data")])
def test_long_work_goes_on_without_its_page_and_can_be_cancelled(
    visit: Open, run_id: str, place: str, start: str
) -> None:
    """The server's words are the test's, so that nothing is timed."""
    page = visit(f"/run/{run_id}/try").page
    asked: list[str] = []
    state = "running"

    def answer(route: Any) -> None:
        nonlocal state
        asked.append(route.request.method)
        state = "cancelled" if asked[-1] == "DELETE" else "running" if asked[-1] == "POST" else state
        kind = "score" if place == "examples" else "check"
        job = {"id": "j", "kind": kind, "run": run_id, "state": state, "title": "rows", "done": 1, "total": 9}
        listed = [job] if "POST" in asked else []
        route.fulfill(status=200, json={**job, "job": "j", "jobs": listed, "ahead": 0, "seconds": 3})

    def without_scores(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), "scores": []})

    page.route("**/api/jobs**", answer)
    page.route("**/api/jobs/**", answer)
    page.route(f"**/api/runs/{run_id}", without_scores)
    page.evaluate(f"location.hash = '#/run/{run_id}/{place}'")
    page.get_by_role("button", name=start).click()
    page.wait_for_selector("text=rows, 1 of 9")
    page.evaluate(f"location.hash = '#/run/{run_id}/try'")
    page.wait_for_selector("h1:text('Try it')")
    page.evaluate(f"location.hash = '#/run/{run_id}/{place}'")
    page.wait_for_selector("text=rows, 1 of 9")
    assert "DELETE" not in asked
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name=start).wait_for()
    assert asked.count("POST") == 1
    assert asked.count("DELETE") == 1


# --- the data ---


def test_the_data_page_shows_the_mask_of_any_row(visit: Open, run_id: str) -> None:
    visited = visit(f"/run/{run_id}/data", color_scheme="dark", width=390)
    page = visited.page
    offer = page.get_by_role("button", name="Check the data")
    offer.or_(page.locator("h2:text('Lengths')")).wait_for()  # a check that was made before is found again
    if offer.count():
        offer.click()
    page.wait_for_selector("h2:text('Lengths')")
    assert "can be trained on exactly as shown" in page.inner_text(".verdict-words")
    page.get_by_label("Row at line").fill("3")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector(".mask figcaption:has-text('train.jsonl:3')")
    assert "It is 4." in page.inner_text(".mask mark")
    assert "line=3" in page.url
    with page.expect_download() as download:
        page.get_by_role("button", name="the numbers of Lengths as CSV").click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()[1:]
    assert sum(int(row.split(",")[2]) for row in rows) == 6
    page.get_by_label("Row at line").fill("99")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("[role=alert]:has-text('line 99')")
    visited.assert_accessible()
