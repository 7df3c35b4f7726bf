"""The smaller pictures of a report: where the change is, the ends of answers, one prediction, calibration, lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from likely.insight.chart import Chart
from likely.insight.lengths import draw_lengths
from likely.insight.pictures import AFTER, BEFORE, GRID, QUIET, draw_svg, readable, visible
from likely.insight.report import Report

MAX_SLICES = 24


def draw(report: Report) -> list[Chart]:
    """Those that the report has data for, in the order of the page."""
    made = [
        _change(report) if report.delta else None,
        _ends(report) if report.ends else None,
        _lens(report) if report.lens else None,
        _calibration(report) if report.held_out else None,
        _lengths(report) if report.lengths else None,
    ]
    return [chart for chart in made if chart]


# --- where the change is ---


def _change(report: Report) -> Chart | None:
    columns = ("slice", "name", "examples", "weight", "nll_before", "nll_after", "change", "low", "high")
    slices = (report.held_out or {}).get("slices", {})
    rows: list[tuple[Any, ...]] = []
    for kind in ("position", "turn", "length", "source"):
        for entry in slices.get(kind, []):
            own = (entry["num_examples"], entry["num_tokens"], entry["base_nll"], entry["nll"], entry["change"])
            rows.append((kind, entry["name"], *own, *(entry["change_ci95"] or (None, None))))
    if not rows:
        return None
    delta, base, tuned = report.delta, report.base, report.tuned
    assert delta  # noqa: S101
    assert base  # noqa: S101
    assert tuned  # noqa: S101
    own = (tuned.num_examples, tuned.num_tokens, base.nll, tuned.nll, delta.nll)
    rows.insert(0, ("all", "all answers", *own, *(delta.ci95 or (None, None))))
    apart = _told_apart(rows)
    shown = [rows[0], *apart[: MAX_SLICES - 1]]
    label = "Change of the held-out loss: " + ", ".join(f"{_name(row)} {row[6]:+.3f}" for row in shown[:8])
    left_out = f"{len(shown) - 1} of {len(apart)} slices are drawn." if len(shown) <= len(apart) else ""
    svg = draw_svg(_draw_change, shown, name="change", label=label, height=0.8 + 0.24 * len(shown))
    return Chart("change", svg, label, left_out, columns, rows)


def _told_apart(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The slices that part the examples: one that holds all of them tells nothing new."""
    kinds = [row[0] for row in rows]
    return [row for row in rows[1:] if kinds.count(row[0]) > 1]


def _name(row: tuple[Any, ...]) -> str:
    kind, name = row[:2]
    if kind == "position":
        return f"{name} token" + ("s" if name == "middle" else "")
    return {"turn": f"answer {name}", "length": f"answers of {name}"}.get(kind, readable(visible(str(name)), 40))


def _draw_change(figure: Any, rows: Any) -> None:
    axes = figure.add_subplot()
    axes.axvline(0, color=QUIET, linewidth=1)
    for y, row in enumerate(rows):
        change, low, high = row[6:]
        low, high = (change, change) if low is None else (low, high)
        sure = row[7] is not None and (high < 0 or low > 0)
        colour, marker = (AFTER if change < 0 else BEFORE, "o" if change < 0 else "x") if sure else (QUIET, "|")
        axes.plot([low, high], [y, y], color=colour, linewidth=2 if row[0] == "all" else 1.2)
        axes.plot([change], [y], color=colour, marker=marker, markersize=7 if row[0] == "all" else 5, gid=f"slice-{y}")
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, linewidth=0.5)
    axes.set_xlabel("change of NLL, nats per token: left of zero is better")


# --- where answers begin and end ---

ENDS = {"first": "the first token of an answer", "stop": "the token that ends it"}


def _ends(report: Report) -> Chart:
    rows = [
        (name, low, high, before, after)
        for name, end in report.ends.items()
        for low, high, before, after in zip(end["edges"], end["edges"][1:], end["before"], end["after"], strict=False)
    ]
    label = "; ".join(
        f"median probability of {ENDS[name]}: {end['median_before']:.1%} before, {end['median_after']:.1%} after"
        for name, end in report.ends.items()
    )
    svg = draw_svg(_draw_ends, report.ends, name="ends", label=label, height=3.0)
    return Chart("ends", svg, label, "", ("token", "from", "to", "answers_before", "answers_after"), rows)


def _draw_ends(figure: Any, ends: Any) -> None:
    all_axes = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
    for axes, (name, end) in zip(all_axes, ends.items(), strict=True):
        edges = np.array(end["edges"])
        width = float(edges[1] - edges[0])
        middle = (edges[1:] + edges[:-1]) / 2
        looks = {
            "before": ("base", {"facecolor": "none", "edgecolor": BEFORE, "hatch": "/////"}),
            "after": ("tuned", {"color": AFTER}),
        }
        for (state, (words, look)), shift in zip(looks.items(), (-width / 4, width / 4), strict=True):
            share = np.array(end[state]) / end["num"]
            label = f"{words}, median {end[f'median_{state}']:.1%}"
            for i, bar in enumerate(axes.bar(middle + shift, share, width / 2.2, label=label, **look)):
                bar.set_gid(f"{name}-{state}-{i}")
        axes.set_title(ENDS[name], fontsize=9)
        axes.set_xlabel("probability of the gold token")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.set_ylim(0, 1)
        axes.legend(loc="upper center")
    all_axes[0].set_ylabel("share of answers")
    all_axes[0].set_yticks([0, 0.5, 1], ["0", "50%", "100%"])


# --- one prediction ---


def _lens(report: Report) -> Chart:
    lens = report.lens
    assert lens is not None  # noqa: S101
    rows = [(visible(r.text), int(r.gold), r.before, r.after, r.gradient_before, r.gradient_after) for r in lens.rows]
    gold = lens.rows[0]
    label = f"The wanted token had probability {gold.before:.1%} and has {gold.after:.1%} now"
    columns = ("token", "gold", "before", "after", "gradient_before", "gradient_after")
    return Chart("lens", draw_svg(_draw_lens, lens.rows, name="lens", label=label), label, "", columns, rows)


def _draw_lens(figure: Any, rows: Any) -> None:
    axes = figure.add_subplot()
    y = np.arange(len(rows))
    for offset, name, values, look in (
        (-0.2, "base", [r.before for r in rows], {"facecolor": "none", "edgecolor": BEFORE, "hatch": "/////"}),
        (0.2, "tuned", [r.after for r in rows], {"color": AFTER}),
    ):
        bars = axes.barh(y + offset, values, height=0.36, label=name, **look)
        axes.bar_label(bars, [f"{v:.1%}" for v in values], padding=3, fontsize=8)
    axes.set_yticks(y, [readable(visible(r.text), 30) + ("  (gold)" if r.gold else "") for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("probability of the next token")
    axes.legend(loc="lower right")


# --- calibration ---


def _calibration(report: Report) -> Chart | None:
    held_out = report.held_out or {}
    states = [(state, held_out.get("calibration", {}).get(state) or []) for state in ("base", "tuned")]
    if not any(bins for _, bins in states):
        return None
    columns = ("low", "high", "weight", "probability", "right")
    rows = [(state, *(entry[column] for column in columns)) for state, bins in states for entry in bins]
    errors = held_out["measures"]["calibration_error"]
    label = f"Expected calibration error of the tuned model {errors['value']:.3f}"
    if errors["base"] is not None:
        label += f", of the base {errors['base']:.3f}"
    svg = draw_svg(_draw_calibration, states, name="calibration", label=label)
    return Chart("calibration", svg, label, "", ("state", *columns), rows)


def _draw_calibration(figure: Any, states: Any) -> None:
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":", label="as sure as right")
    for (state, bins), colour, marker, line in zip(states, (BEFORE, AFTER), "so", ("--", "-"), strict=True):
        if bins:
            x, y = [b["probability"] for b in bins], [b["right"] for b in bins]
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, linewidth=1.5, label=state, gid=state)
    axes.set_xlabel("mean probability of the model's first choice")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.03)
    axes.grid(color=GRID, linewidth=0.5)
    axes.legend()


# --- lengths ---


def _lengths(report: Report) -> Chart:
    lengths = report.lengths
    assert lengths is not None  # noqa: S101
    edges, counts = lengths["edges"], lengths["counts"]
    rows = [(low, high, count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    label = f"{sum(counts):,} training examples by length; at most {lengths['limit']:,} tokens are allowed"
    svg = draw_svg(draw_lengths, lengths, name="lengths", label=label, height=2.6)
    return Chart("lengths", svg, label, "", ("from", "to", "examples"), rows)
