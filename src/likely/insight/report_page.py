"""The report of a run as one self-contained HTML page: no script, no font, nothing from any network."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from likely.insight.chart import Cell, Chart, table_as_csv
from likely.insight.charts import moved_table
from likely.insight.movement import NUM_ROWS, RowMove, TokenMove
from likely.insight.panels import ENDS
from likely.insight.pictures import AFTER, BEFORE, readable, token_text, visible
from likely.insight.report import LIMITS, Report

MAX_BYTES = 1_900_000  # of the page
NAVIGATION = "<!-- sections -->"
LEVELS = (0.1, 0.5, 1.0, 2.0)  # nats from which a token is marked, and marked more
# measure of :mod:`likely.insight.measures` -> plain words, its entry among the words of the page, the term
MEASURES = {
    "nll": ("loss on the answers, nats per token", "nll", "negative log-likelihood (NLL)"),
    "perplexity": ("choices per token", "perplexity", "perplexity, exp(NLL)"),
    "bits_per_byte": ("bits for a byte of the answers", "bits", "bits per byte: NLL over UTF-8 bytes of the answers"),
    "token_accuracy": ("gold tokens that come first", "accuracy", "token accuracy under teacher forcing"),
    "calibration_error": ("how far sureness is from being right", "ece", "expected calibration error, 15 bins"),
    "joint_nll": ("loss on prompt and answer together", "joint", "joint NLL, -log P(x, y) per token"),
    "prompt_nll": ("loss on the prompts alone", "joint", "NLL of the unsupervised tokens"),
}
SECTIONS = {
    "training": "Training",
    "measures": "Before and after",
    "examples": "Each example",
    "ends": "Beginning and end",
    "moved": "Moved most",
    "lens": "One prediction",
    "calibration": "Calibration",
    "answers": "Answers",
    "harm": "Harm",
    "data": "Denominators",
    "run": "Settings",
    "limits": "Limits",
    "words": "Words",
}


@dataclass(frozen=True)
class Budget:
    """How much of long things the page shows: ``rows`` of a table, ``characters`` of a text, ``csv`` bytes of a table
    that can be downloaded from it, ``token`` characters of a token and ``moved`` examples of the heat map, either
    way."""

    rows: int = 60
    characters: int = 1000
    csv: int = 90_000
    token: int = 40
    moved: int = NUM_ROWS

    @property
    def half(self) -> Budget:
        return Budget(*(value // 2 for value in astuple(self)))


def render_html(report: Report, charts: Mapping[str, Chart]) -> str:
    """The page, in at most MAX_BYTES bytes of UTF-8: where data would make more of it, less of long texts and tables is
    shown, and it says how much."""
    budget = Budget()
    page = _render(report, charts, budget)
    while len(page.encode()) > MAX_BYTES and budget.rows:
        budget = budget.half
        page = _render(report, charts, budget)
    return page


def _render(report: Report, charts: Mapping[str, Chart], budget: Budget) -> str:
    def finalize(value: Any) -> Any:
        # Whatever is put into the page goes through here, so that no text of the data can be forgotten.
        return readable(value, budget.characters) if type(value) is str else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("likely.insight", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    heat = _heat(report.moved, budget)
    tables = {chart.name: _download(chart.name, chart.columns, chart.rows, budget) for chart in charts.values()}
    tables["moved"] = _download("moved", *moved_table(report), budget)
    page = template.render(
        report=report,
        charts={name: charts.get(name) for name in (*SECTIONS, "curve", "change", "lengths")},
        tables=tables,
        heat=heat,
        num_heat=sum(len(rows) for _, rows in heat),
        measures=_measures(report),
        answers=report.answers[: budget.rows],
        notes=report.notes[: budget.rows],
        guard=_guard(report.guard, budget.rows),
        generation=_generation(report.generation),
        exact_match=report.exact_match,
        before=BEFORE,
        after=AFTER,
        end_names=ENDS,
        navigation=Markup(NAVIGATION),  # noqa: S704  (no data)
        limits=LIMITS,
        percent=_percent,
        number=_number,
        shown=visible,
        tail=lambda text: _tail(text, budget.characters),
    )
    found = [(id_, name) for id_, name in SECTIONS.items() if f'<h2 id="{id_}">' in page]
    links = Markup("").join(Markup('<li><a href="#{}">{}</a></li>\n').format(*section) for section in found)
    return page.replace(NAVIGATION, str(links), 1)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.9995 or value == 1 else f"{value:.3%}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _tail(text: str, limit: int) -> str:
    """The end of a context, which is what the prediction follows."""
    cut = len(text) - limit + 40
    return f"({cut:,} characters before) … {text[cut:]}" if cut > 40 else text


def _download(name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], budget: Budget) -> dict[str, Any]:
    """A table as the content of a link, cut after whole rows."""
    num = min(len(rows), budget.csv // 8)
    while len(text := table_as_csv(columns, rows[:num]).encode()) > budget.csv and num:
        num = num * 3 // 4
    return {
        "file": f"{name}.csv",
        "base64": Markup(base64.b64encode(text).decode()),  # noqa: S704  (letters and digits)
        "rows": num,
        "of": len(rows),
    }


# --- tables ---


def _measures(report: Report) -> list[dict[str, str]]:
    found = (report.held_out or {}).get("measures", {})
    rows = []
    for key, (words, id_, title) in MEASURES.items():
        entry = found.get(key)
        if entry is None or entry["value"] is None:
            continue
        low_high = entry["change_ci95"]
        rows.append(
            {
                "words": words,
                "id": id_,
                "title": title,
                "base": _number(entry["base"]),
                "value": _number(entry["value"]),
                "change": _number(entry["change"], "+"),
                "interval": "[{:+.4f}, {:+.4f}]".format(*low_high) if low_high else "-",
            }
        )
    return rows


def _generation(generation: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    if not generation or not generation.get("tuned"):
        return []
    was, now = generation.get("base") or {}, generation["tuned"]
    return [
        (name.replace("_", " "), _number(was.get(name)), _number(value))
        for name, value in now.items()
        if name != "num" and value is not None
    ]


def _guard(guard: Mapping[str, Any] | None, rows: int) -> list[Any]:
    """The rows that gained most, or are likeliest where there is no base."""
    if not guard:
        return []
    return sorted(guard["rows"], key=lambda r: -(r["gain"] if r["gain"] is not None else r["unwanted"]))[:rows]


# --- the heat map ---


def _heat(moved: Sequence[RowMove], budget: Budget) -> list[tuple[str, list[dict[str, Any]]]]:
    parts = {
        "Gained most": [row for row in moved if row.gain > 0][: budget.moved],
        "Lost most": [row for row in moved if row.gain < 0][: budget.moved],
    }
    return [(title, [_heat_row(row, budget.token) for row in rows]) for title, rows in parts.items()] if moved else []


def _heat_row(row: RowMove, limit: int) -> dict[str, Any]:
    judged = [token for token in row.tokens if token.weight and token.logprob_after is not None]
    most = max(judged, key=lambda token: abs(_gain(token)), default=None)
    last = row.first + len(row.tokens)
    left_out = row.first or last < row.num_tokens
    return {
        "source": row.source,
        "gain": row.gain,
        "weight": row.weight,
        "nll_before": row.nll_before,
        "nll_after": row.nll_after,
        "left_out": f"Tokens {row.first + 1:,} to {last:,} of {row.num_tokens:,} are shown." if left_out else "",
        "label": f"The tokens of {readable(row.source, 200)} by their change; the table below has them"
        + (f", most moved {_name(most.text, limit)} by {_gain(most):+.2f} nats" if most else ""),
        "table_caption": f"Judged tokens of {readable(row.source, 200)}",
        "tokens": [_heat_token(token, limit) for token in row.tokens],
        "table": [
            (
                _name(token.text, limit),
                _percent(math.exp(token.logprob_before or 0.0)),
                _percent(math.exp(token.logprob_after or 0.0)),
                f"{_gain(token):+.3f}",
                f"{token.rank_before:,} → {token.rank_after:,}",
                _name(token.choice_after, limit),
            )
            for token in judged
        ],
    }


def _name(text: str | None, limit: int) -> str:
    return visible(readable(text or "", limit))


def _gain(token: TokenMove) -> float:
    assert token.logprob_after is not None  # noqa: S101
    assert token.logprob_before is not None  # noqa: S101
    return token.logprob_after - token.logprob_before


def _heat_token(token: TokenMove, limit: int) -> dict[str, str]:
    text = token_text(token.text, limit)
    if not token.weight or token.logprob_after is None or token.logprob_before is None:
        return {"text": text, "class": "c", "title": ""}
    gain = _gain(token)
    level = sum(abs(gain) >= bound for bound in LEVELS)
    was, now = _percent(math.exp(token.logprob_before)), _percent(math.exp(token.logprob_after))
    title = f"{_name(token.text, limit)}: {was} → {now}, {gain:+.2f} nats"
    title += f", choice {token.rank_before:,} → {token.rank_after:,}"
    if token.rank_after != 1:
        title += f"; first choice now {_name(token.choice_after, limit)}"
    return {"text": text, "class": f"{'g' if gain > 0 else 'w'}{level}" if level else "z", "title": title}
