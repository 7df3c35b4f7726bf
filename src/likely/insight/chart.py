"""A picture with the data behind it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from likely.insight.pictures import readable

Cell = str | float | int | None


@dataclass(frozen=True)
class Chart:
    """A picture, what is read aloud in its place, what is left out of it, and all the data behind it as a table."""

    name: str
    svg: Markup
    label: str
    left_out: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]


def table_as_csv(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """RFC 4180 with plain line feeds; numbers in full, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([readable(cell, len(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()
