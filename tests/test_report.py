"""The report of a run: its numbers against independent code, its tables against its pictures, and its bounds."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from likely.insight.chart import table_as_csv
from likely.insight.charts import MAX_POINTS, MAX_STEPS, draw_charts
from likely.insight.movement import CONTEXT, WINDOW, ends_of_answers, moved_rows
from likely.insight.pictures import readable
from likely.insight.report import Answer
from likely.insight.report_page import render_html
from likely.types import Example, ExampleScore, Source
from reported import HELD_OUT, TRAIN, Finished, made

CLOSE = 1e-4  # float32 in training against float64 here; the project's own bound for reported likelihoods


def test_each_example_is_the_truth(finished: Finished) -> None:
    table = finished.table("examples")
    assert [row["source"].rpartition(":")[2] for row in table] == ["1", "2", "3", "4", "5"]
    for (ids, weights), was, now, row in zip(
        finished.rows, finished.before.logprob, finished.after.logprob, table, strict=True
    ):
        num = sum(weights)
        assert float(row["weight"]) == num
        assert len(ids) == len(weights)
        for column, logprob in (("nll_before", was), ("nll_after", now)):
            nll = -sum(w * p for w, p in zip(weights, logprob, strict=True) if w) / num
            assert float(row[column]) == pytest.approx(nll, abs=CLOSE)
    weight = np.array([float(row["weight"]) for row in table])
    for column, state in (("nll_before", "base"), ("nll_after", "tuned")):
        nll = np.array([float(row[column]) for row in table])
        assert (nll * weight).sum() / weight.sum() == pytest.approx(finished.report[state]["nll"], abs=1e-9)
    assert finished.report["tuned"]["nll"] == pytest.approx(finished.after.nll / weight.sum(), abs=CLOSE)


def test_the_tokens_that_moved_are_the_truth(finished: Finished) -> None:
    table = finished.table("moved")
    assert len({row["source"] for row in table}) == len(HELD_OUT)
    place = 0
    for row in finished.report["moved"]:
        i = int(row["source"].rpartition(":")[2]) - 1
        ids, weights = finished.rows[i]
        was, now = finished.before, finished.after
        gain = sum(w * (b - a) for w, a, b in zip(weights, was.logprob[i], now.logprob[i], strict=True) if w)
        assert row["gain"] == pytest.approx(gain, abs=len(ids) * CLOSE)
        assert row["gain"] == pytest.approx(row["nll_before"] - row["nll_after"], abs=1e-9)
        for offset, token in enumerate(row["tokens"]):
            t = row["first"] + offset
            line = table[place]
            place += 1
            assert (line["source"], int(line["token"])) == (readable(row["source"]), t)
            assert token["weight"] == weights[t] == float(line["weight"])
            if t == 0:
                assert token["logprob_before"] is token["rank_after"] is None
                continue
            assert token["logprob_before"] == pytest.approx(was.logprob[i][t], abs=CLOSE)
            assert token["logprob_after"] == pytest.approx(now.logprob[i][t], abs=CLOSE)
            assert float(line["logprob_after"]) == token["logprob_after"]
            assert token["rank_after"] == now.rank[i][t] == int(line["rank_after"])
            if token["rank_after"] == 1:
                assert token["choice_after"] == token["text"]
    assert place == len(table)
    gains = [row["gain"] for row in finished.report["moved"]]
    up = [gain for gain in gains if gain > 0]
    assert gains[: len(up)] == sorted(up, reverse=True)
    assert gains[len(up) :] == sorted(gains[len(up) :])


def test_the_ends_of_answers_are_the_truth(finished: Finished) -> None:
    for name, at in (("first", lambda weights: weights.index(1.0)), ("stop", lambda weights: len(weights) - 2)):
        told = finished.report["ends"][name]
        for state, truth in (("before", finished.before), ("after", finished.after)):
            logprob = [truth.logprob[i][at(weights)] for i, (_, weights) in enumerate(finished.rows)]
            assert told[f"median_{state}"] == pytest.approx(float(np.median(np.exp(logprob))), abs=CLOSE)
            assert told[f"nll_{state}"] == pytest.approx(-float(np.mean(logprob)), abs=CLOSE)
            counts, _ = np.histogram(np.exp(logprob), bins=10, range=(0, 1))
            assert told[state] == counts.tolist()
            column = [int(row[f"answers_{state}"]) for row in finished.table("ends") if row["token"] == name]
            assert column == counts.tolist()
        entry = next(row for row in finished.table("change") if (row["slice"], row["name"]) == ("position", name))
        assert float(entry["nll_after"]) == pytest.approx(told["nll_after"], abs=1e-9)
    [everything] = [row for row in finished.table("change") if row["slice"] == "all"]
    assert float(everything["change"]) == finished.report["delta"]["nll"]


def test_the_course_is_that_of_the_metrics(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {line["step"]: line for line in lines if "nll" in line}
    scored = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    table = {int(row["step"]): row for row in finished.table("curve")}
    assert sorted(table) == [0, 1, 2, 3, 4, 5, 6]
    for step, line in trained.items():
        assert float(table[step]["training_nll"]) == line["nll"]
        assert float(table[step]["grad_norm"]) == line["grad_norm"]
    assert sorted(scored) == [0, 2, 4, 6]
    for step, summary in scored.items():
        assert float(table[step]["held_out_nll"]) == pytest.approx(summary["nll"], abs=1e-6)
        assert [float(table[step][key]) for key in ("held_out_low", "held_out_high")] == pytest.approx(summary["ci95"])
    assert table[1]["held_out_nll"] == ""
    assert [point["step"] for point in finished.report["evaluations"]] == [0, 2, 4, 6]
    assert finished.report["evaluations"][-1]["nll"] == finished.report["tuned"]["nll"]


def test_denominators_and_hashes(finished: Finished) -> None:
    counted = finished.report["counted"]
    own = counted["held out data"]
    assert own["rows"] == own["examples"] == len(HELD_OUT)
    assert own["tokens"] == sum(len(ids) for ids, _ in finished.rows)
    assert own["supervised_tokens"] == own["weight"] == sum(sum(weights) for _, weights in finished.rows)
    assert counted["training data"]["rows"] == len(TRAIN)
    assert finished.report["tuned"]["num_tokens"] == own["weight"]
    origins = json.loads((finished.folder / "run.json").read_text(encoding="utf-8"))
    assert finished.report["hashes"]["training data"] == origins["data"]["sha256"]
    for value in finished.report["hashes"].values():
        assert value in finished.page
    assert f'<td class="n">{own["tokens"]}</td>' in finished.page
    lengths = finished.report["lengths"]
    assert sum(lengths["counts"]) == len(TRAIN)
    assert lengths["limit"] == 512


def test_report_json_is_what_was_returned_and_names_the_tables(finished: Finished) -> None:
    written = json.loads((finished.folder / "report.json").read_text(encoding="utf-8"))
    assert sorted(written["tables"]) == sorted(path.stem for path in (finished.folder / "report").iterdir())
    assert {"curve", "examples", "change", "ends", "lens", "calibration", "lengths", "moved"} == set(written["tables"])
    del written["tables"]
    assert written == json.loads(json.dumps(finished.report))


# --- a picture shows the numbers of its table ---


def positions(svg: str, group: str) -> np.ndarray:
    """(N, 2) pixels of the markers of a line that has this id."""
    root = ElementTree.fromstring(svg)  # noqa: S314
    [found] = [element for element in root.iter() if element.get("id") == group]
    uses = [e for e in found.iter() if e.tag.endswith("}use")]
    return np.array([(float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in uses])


def assert_drawn(pixels: np.ndarray, values: np.ndarray) -> None:
    """The pixels are one linear map of the values, in each direction."""
    assert len(pixels) == len(values) > 1
    for p, v in zip(pixels.T, values.T, strict=True):
        slope, offset = np.polyfit(v, p, 1)
        assert abs(slope) > 1
        assert p == pytest.approx(slope * v + offset, abs=0.01)


def test_the_scatter_shows_its_table() -> None:
    chart = draw_charts(made())["examples"]
    before, after = (np.array([row[i] for row in chart.rows]) for i in (2, 3))
    for group, chosen in (("examples-better", after < before), ("examples-worse", after >= before)):
        assert_drawn(positions(chart.svg, group), np.stack([before[chosen], after[chosen]], axis=1))
    better = int((after < before).sum())
    assert f"({better})" in chart.svg
    assert chart.label.startswith(f"{better} of 30 ")


def test_the_reliability_diagram_shows_its_table() -> None:
    bins = [
        {"low": i / 4, "high": (i + 1) / 4, "weight": 5.0, "probability": i / 4 + 0.1, "right": i / 5} for i in range(4)
    ]
    held_out = {
        "calibration": {"base": None, "tuned": bins},
        "measures": {"calibration_error": {"value": 0.1, "base": None, "change_ci95": None, "change": None}},
        "slices": {},
        "gap_closed": None,
    }
    chart = draw_charts(made(held_out=held_out))["calibration"]
    assert_drawn(positions(chart.svg, "calibration-tuned"), np.array([(b["probability"], b["right"]) for b in bins]))
    assert [row[0] for row in chart.rows] == ["tuned"] * 4


def test_the_bars_of_the_ends_show_their_table() -> None:
    ends = {
        "first": {
            "num": 8, "edges": np.linspace(0, 1, 11).tolist(), "before": [8] + [0] * 9, "after": [0] * 8 + [2, 6],
            "median_before": 0.01, "median_after": 0.95, "nll_before": 4.0, "nll_after": 0.1,
        }
    }  # fmt: skip
    chart = draw_charts(made(ends=ends))["ends"]
    root = ElementTree.fromstring(chart.svg)  # noqa: S314

    def height(group: str) -> float:
        [found] = [e for e in root.iter() if e.get("id") == group]
        [path] = [e for e in found.iter() if e.tag.endswith("}path")][:1]
        y = [float(v) for v in re.findall(r"[ML] [\d.]+ ([\d.]+)", path.get("d", ""))]
        return max(y) - min(y)

    tall = height("ends-first-before-0")
    assert height("ends-first-after-9") == pytest.approx(tall * 6 / 8, abs=0.01)
    assert height("ends-first-after-8") == pytest.approx(tall * 2 / 8, abs=0.01)
    assert [row[3] for row in chart.rows] == ends["first"]["before"]


def test_a_long_training_is_drawn_by_means_that_keep_its_mean() -> None:
    report = made(num_steps=2500)
    chart = draw_charts(report)["curve"]
    assert len(chart.rows) == 2501  # and step 0
    root = ElementTree.fromstring(chart.svg)  # noqa: S314
    [line] = [e for e in root.iter() if e.get("id") == "curve-training"]
    path = next(e for e in line.iter() if e.tag.endswith("}path")).get("d", "")
    assert 10 < len(re.findall("[ML]", path)) <= MAX_STEPS
    assert "mean of 3 steps" in chart.left_out
    assert render_html(report, {"curve": chart}).count("mean of 3 steps") == 1


# --- closed forms ---


def score(logprob: list[float], rank: list[int] | None = None) -> ExampleScore:
    values = np.array([math.nan, *logprob])
    ranks = np.array([math.nan, *(rank or [1] * len(logprob))])
    return ExampleScore(values, ranks, values, np.zeros(len(values)), values)


def example(weights: list[float], ids: list[int] | None = None, line: int = 1) -> Example:
    num = len(weights)
    return Example(np.array(ids or [5] * num), np.array(weights), np.zeros(num, np.int8), Source("d", line))


class Numbers:
    """A tokenizer whose texts are the ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def test_ends_by_hand() -> None:
    """Two answers of two tokens each in one example, the second token of each ends it (id 9)."""
    own = example([0, 1, 1, 0, 1, 1], [1, 5, 9, 2, 6, 9])
    before = score([math.log(p) for p in (0.05, 0.5, 0.9, 0.25, 0.95)])
    after = score([math.log(p) for p in (0.55, 1.0, 0.9, 0.25, 0.15)])
    found = ends_of_answers([own], [before], [after], {9})
    assert found["first"]["num"] == found["stop"]["num"] == 2
    assert found["first"]["before"] == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert found["first"]["after"] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert found["stop"]["after"] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found["first"]["median_before"] == pytest.approx(0.15)
    assert found["first"]["nll_before"] == pytest.approx(-(math.log(0.05) + math.log(0.25)) / 2)
    assert ends_of_answers([example([0, 1, 1])], [score([-1, -1])], [score([-1, -1])], set()).keys() == {"first"}
    assert ends_of_answers([], [], [], {9}) == {}


def test_the_rows_that_moved_most_by_hand() -> None:
    """The gain is the objective's: weights count, and context doesn't."""
    examples = [example([0, 0, w, w], line=i) for i, w in enumerate([1, 2, 1, 1, 0.5, 1, 1, 1, 1, 1], start=1)]
    before = [score([0, -3, -3]) for _ in examples]
    changes = [1.0, 1.0, -1.0, 0.0, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    after = [score([-50, -3 + change, -3]) for change in changes]
    found = moved_rows(examples, before, after, Numbers())
    assert [row.source for row in found] == ["d:2", "d:1", "d:5", "d:10", "d:9", "d:3"]
    assert [row.gain for row in found] == pytest.approx([2.0, 1.0, 0.5, 0.5, 0.4, -1.0])
    assert found[0].nll_before == pytest.approx(12)
    assert moved_rows([], [], [], Numbers()) == []


def test_of_a_long_example_the_stretch_that_moved_is_shown() -> None:
    num = 1000
    long = example([0.0] * 100 + [1.0] * 900, list(range(num)))
    logprob = [-1.0] * (num - 1)
    moved = list(logprob)
    moved[699] += 0.9  # token 700
    [row] = moved_rows([long], [score(logprob)], [score(moved)], Numbers())
    assert len(row.tokens) == WINDOW
    assert row.first <= 700 < row.first + WINDOW
    assert row.num_tokens == num
    assert row.tokens[700 - row.first].text == "700"
    short = example([0.0] * 100 + [1.0] * 20, list(range(120)))
    [row] = moved_rows([short], [score([-1.0] * 119)], [score([-0.5] * 119)], Numbers())
    assert (row.first, len(row.tokens)) == (100 - CONTEXT, CONTEXT + 20)


# --- the page ---


def test_the_same_report_gives_the_same_bytes() -> None:
    pages = [render_html(report, draw_charts(report)) for report in (made(), made())]
    assert pages[0] == pages[1]
    ids = re.findall(r'\bid="([^"]*)"', pages[0])
    assert len(ids) == len(set(ids))


def test_the_user_s_own_style_of_plots_does_not_matter() -> None:
    import matplotlib as mpl

    plain = draw_charts(made())["examples"].svg
    with mpl.rc_context({"figure.dpi": 50, "lines.linewidth": 9, "svg.fonttype": "path", "text.usetex": False}):
        assert draw_charts(made())["examples"].svg == plain


@pytest.mark.filterwarnings("error")
def test_a_huge_run_makes_no_huge_page() -> None:
    wide = "\U0001fae8\u202e<&\x00\ud800" * 200_000  # a megabyte of what takes most room in a page
    guard = [
        {"source": f"g:{i}", "prompt": wide[:5000], "unwanted": -1.0, "base_unwanted": -2.0, "odds": 0.0,
         "base_odds": 1.0, "gain": float(i), "broken": False}
        for i in range(3000)
    ]  # fmt: skip
    guarded = {"path": wide, "sha256": "", "num_rows": 3000, "max_gain": None, "largest_gain": 1.0, "passed": None}
    report = made(
        num=30_000,
        num_steps=20_000,
        title=wide,
        facts={wide[:9000]: wide},
        notes=[wide] * 30,
        answers=[Answer(wide, wide, wide[:-1], wide)] * 500,
        guard=guarded | {"mean_gain": 0.0, "rows": guard},
    )
    charts = draw_charts(report)
    page = render_html(report, charts)
    assert len(page.encode()) < 2_000_000
    assert len(charts["examples"].rows) == 30_000
    assert charts["examples"].svg.count("<use") < 2 * MAX_POINTS + 200
    assert f"{MAX_POINTS - 5:,}"[:2] in charts["examples"].left_out
    assert "of 30,000 rows; all are in" in page
    assert "are shown; report.json has all" in page
    assert "more characters)" in page
    assert "\x00" not in page
    assert "\u202e" not in page
    assert "\\u202e&lt;&amp;\\x00\\ud800" in page


def test_tables_are_read_back_as_they_were() -> None:
    rows = [("a,b", 0.1 + 0.2, None), ('"\nnew', 1e-300, 3), ("\ud800\x00", -0.0, 1)]
    text = table_as_csv(("x", "y", "z"), rows)
    text.encode()
    back = list(csv.reader(text.splitlines(keepends=True)))
    assert back[0] == ["x", "y", "z"]
    assert [float(row[1]) for row in back[1:]] == [row[1] for row in rows]
    assert [row[0] for row in back[1:]] == ["a,b", '"\nnew', "\\ud800\\x00"]


def test_readable_keeps_writing_and_nothing_else() -> None:
    assert readable("Où est\u00a0la gare\u202f?\n\tनमस्ते क्\u200dष 👩\u200d🚀 שלום") == (
        "Où est\u00a0la gare\u202f?\n\tनमस्ते क्\u200dष 👩\u200d🚀 שלום"
    )
    assert readable("a\u202eb\x00\x1b[31m\ud83d") == "a\\u202eb\\x00\\x1b[31m\\ud83d"
    assert readable("x" * 50, 10) == "x" * 10 + " … (40 more characters)"
