"""Figures as SVG inside a page, and text that can't steer one; with nothing from any network."""

from __future__ import annotations

import io
import logging
import re
import unicodedata
import warnings
from typing import Any

from markupsafe import Markup, escape

BEFORE, AFTER = "#b35806", "#2166ac"  # orange and blue: told apart by every kind of colour vision
INK, QUIET, GRID = "#1b1b1b", "#767676", "#d9d9d9"
# A page that gives these variables draws its pictures in its own colours, by day and by night; one that does not, in
# these.
_VARIABLES = {BEFORE: "before", AFTER: "after", INK: "ink", QUIET: "quiet", GRID: "grid"}
_LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "likely",
    "font.family": "sans-serif",
    # Data is no formula, whatever dollar signs it has.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.color": BEFORE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def draw_svg(draw: Any, content: Any, *, name: str = "", label: str = "", height: float = 3.4) -> Markup:
    """An inline SVG of a matplotlib figure, in the reader's fonts; the same bytes for the same content.

    Args:
        draw: ``draw(figure, content)``.
        name: of the picture, so that ids are unique in a page with several.
        label: what is read aloud in its place.
        height: inches beside a width of 7.2.
    """
    # Where it can't keep its list of fonts is no matter of the user's.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import style  # noqa: PLC0415  (a second of start-up that only a report needs)
    from matplotlib.figure import Figure  # noqa: PLC0415

    with warnings.catch_warnings(), style.context(["default", _LOOK]):  # whatever the user's own matplotlibrc says
        # Text stays text: the reader's fonts draw it, and matplotlib's only measure it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(7.2, height), layout="constrained")
        draw(figure, content)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), transparent=True
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var(--{variable}, {colour})")
    if name:
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    if label:
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(svg)  # noqa: S704  (drawn here; matplotlib escapes text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def visible(text: str) -> str:
    """White space and other characters that a reader could not see, written out."""
    shown = "".join(c if c.isprintable() else _written_out(c) for c in text)
    return f"'{shown}'" if text != text.strip() or not text else shown


def readable(text: str, limit: int = 2000) -> str:
    """Text for a page: its first ``limit`` characters, and how many more there are. White space stays, and what joins
    letters; other characters that can't be seen (controls, marks of direction, halves of pairs) are written out, so
    that none can hide or turn what stands beside it."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs" else _written_out(c)
        for c in text[:limit]
    )
    return shown if len(text) <= limit else f"{shown} … ({len(text) - limit:,} more characters)"


def token_text(text: str, limit: int = 40) -> str:
    """One token as it stands in running text: a line break is shown and made, a tab is shown."""
    return readable(text, limit).replace("\n", "⏎\n").replace("\t", "⇥")
