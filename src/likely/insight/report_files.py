"""What a finished run leaves for people and programs: the card, the tables, the page, and the facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from likely import storage
from likely.insight.card import model_card
from likely.insight.chart import table_as_csv
from likely.insight.charts import draw_charts, moved_table
from likely.insight.report import Report
from likely.insight.report_page import render_html

TABLES = "report"  # the folder of the CSV files


def write_report(report: Report, published: Mapping[str, Any], folder: Path) -> None:
    """``README.md``, ``report/NAME.csv`` of each picture, ``report.html``, which needs nothing from any network; then
    ``report.json``, which marks a run as finished.

    Args:
        published: what the card may say of the run's origin; see :func:`likely.insight.card.model_card`.
    """
    charts = draw_charts(report)
    tables = {chart.name: (chart.columns, chart.rows) for chart in charts.values()}
    if report.moved:
        tables["moved"] = moved_table(report)
    storage.replace_file(folder / "README.md", model_card(report, published).encode())
    storage.make_folder(folder / TABLES)
    for name, (columns, rows) in tables.items():
        storage.replace_file(folder / TABLES / f"{name}.csv", table_as_csv(columns, rows).encode())
    storage.replace_file(folder / "report.html", render_html(report, charts).encode())
    content = report.to_dict() | {"tables": {name: f"{TABLES}/{name}.csv" for name in tables}}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # A file name that is no UTF-8 is written as its escape, which JSON knows too.
    storage.replace_file(folder / "report.json", (text + "\n").encode(errors="backslashreplace"))
