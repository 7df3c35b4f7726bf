"""The pictures of a report: the course of training and each example here, smaller ones in
:mod:`likely.insight.panels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np

from likely.insight import panels
from likely.insight.chart import Cell, Chart
from likely.insight.movement import TokenMove
from likely.insight.pictures import AFTER, BEFORE, QUIET, draw_svg
from likely.insight.report import Report
from likely.types import FloatArray, IntArray

MAX_STEPS = 1000  # points of the training curve; more are averaged in stretches of equal length
MAX_POINTS = 1200  # examples of the scatter; of more, an even share is drawn, with those that moved farthest


def draw_charts(report: Report) -> dict[str, Chart]:
    """Every picture that the report has data for, by name, in the order of the page."""
    made = [
        _curve(report),
        _examples(report) if len(report.nll_before) > 1 else None,
        *panels.draw(report),
    ]
    return {chart.name: chart for chart in made if chart}


def moved_table(report: Report) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """The tokens of the heat map, for a CSV."""
    columns = ("source", "token", *(f.name for f in fields(TokenMove)))
    return columns, [
        (row.source, row.first + i, *astuple(token)) for row in report.moved for i, token in enumerate(row.tokens)
    ]


# --- the likelihood while training ---


def _curve(report: Report) -> Chart:
    held_out = {point["step"]: point for point in report.evaluations}
    trained = {m.step: m for m in report.steps}
    rows: list[tuple[Cell, ...]] = []
    for step in sorted({*held_out, *trained}):
        own, scored = trained.get(step), held_out.get(step)
        training: tuple[Cell, ...] = (None,) * 4
        if own:
            training = (own.nll, own.supervised_tokens, own.learning_rate, own.grad_norm)
        low, high = (scored and scored["ci95"]) or (None, None)
        rows.append((step, *training, scored["nll"] if scored else None, low, high))
    columns = ("step", "training_nll", "supervised_tokens", "learning_rate", "grad_norm")
    step_M, nll_M, each = _thinned(report)
    left_out = f"Each point of the training line is the mean of {each} steps." if each > 1 else ""
    label = f"Training loss over {len(report.steps):,} steps"
    if len(nll_M):
        label += f", from {nll_M[0]:.3f} to {nll_M[-1]:.3f} nats per token"
    if report.base and report.tuned:
        label += f"; held-out loss {report.base.nll:.3f} before and {report.tuned.nll:.3f} after"
    return Chart(
        "curve",
        draw_svg(_draw_curve, (report, step_M, nll_M, each), name="curve", label=label),
        label,
        left_out,
        (*columns, "held_out_nll", "held_out_low", "held_out_high"),
        rows,
    )


def _thinned(report: Report) -> tuple[FloatArray, FloatArray, int]:
    """The training curve in at most MAX_STEPS points: mean step, and NLL of all supervised tokens of a stretch."""
    each = max(1, -(-len(report.steps) // MAX_STEPS))
    table = np.array([(m.step, m.nll, m.supervised_tokens) for m in report.steps], np.float64).reshape(-1, 3)
    starts = np.arange(0, len(table), each)
    if not len(starts):
        return np.empty(0), np.empty(0), each
    if each == 1:
        return table[:, 0], table[:, 1], 1
    weight_M = np.add.reduceat(table[:, 2], starts)
    nll_M = np.add.reduceat(table[:, 1] * table[:, 2], starts) / np.maximum(weight_M, 1e-300)
    return np.add.reduceat(table[:, 0], starts) / np.diff(starts, append=len(table)), nll_M, each


def _draw_curve(figure: Any, content: Any) -> None:
    report, step_M, nll_M, each = content
    axes = figure.add_subplot()
    few = len(step_M) == 1  # one point makes no line
    axes.plot(step_M, nll_M, color=QUIET, linewidth=1, marker="." if few else None, gid="training")
    told = f"each point {each} steps" if each > 1 else "each step before its update"
    axes.plot([], [], color=QUIET, linewidth=1, label=f"training, {told}")
    points = report.evaluations
    last = max([*(point["step"] for point in points), *step_M[-1:], 1])
    if points:
        _draw_held_out(axes, points, last)
    if report.entropy_floor is not None:
        axes.axhline(report.entropy_floor, color=QUIET, linestyle=":", linewidth=1, label="entropy floor of the data")
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("NLL, nats per token")
    axes.legend()


def _draw_held_out(axes: Any, points: Sequence[Any], last: float) -> None:
    """The base's score with its band all along, so that any later point is seen beside it."""
    base, after = points[0], points[1:]
    if base["ci95"]:
        axes.fill_between([0, last], *([end, end] for end in base["ci95"]), color=BEFORE, alpha=0.15, linewidth=0)
    axes.axhline(base["nll"], color=BEFORE, linestyle="--", linewidth=1, label=f"held-out, base {base['nll']:.3f}")
    axes.plot([base["step"]], [base["nll"]], marker="s", linestyle="", color=BEFORE, gid="held-out-base")
    if not after:
        return
    steps, nll = [p["step"] for p in after], np.array([p["nll"] for p in after])
    low, high = np.array([p["ci95"] or (p["nll"], p["nll"]) for p in after]).T
    axes.errorbar(
        steps,
        nll,
        yerr=[nll - low, high - nll],
        fmt="o-",
        capsize=4,
        linewidth=1.5,
        color=AFTER,
        label=f"held-out, tuned {nll[-1]:.3f}, with 95% interval",
    )


# --- each example ---


def _examples(report: Report) -> Chart:
    before_N, after_N = np.array(report.nll_before), np.array(report.nll_after)
    drawn = _drawn(before_N - after_N)
    better = int((after_N < before_N).sum())
    label = (
        f"{better:,} of {len(before_N):,} held-out examples lie below the diagonal: their answers are more likely now"
    )
    left_out = f"{len(drawn):,} of {len(before_N):,} examples are drawn." if len(drawn) < len(before_N) else ""
    sources = report.sources or [""] * len(before_N)
    weights: Sequence[Cell] = report.weights or [None] * len(before_N)
    rows = list(zip(sources, weights, report.nll_before, report.nll_after, strict=True))
    svg = draw_svg(_draw_examples, (before_N, after_N, drawn), name="examples", label=label, height=4.2)
    return Chart("examples", svg, label, left_out, ("source", "weight", "nll_before", "nll_after"), rows)


def _drawn(gain_N: FloatArray) -> IntArray:
    """Which examples are drawn: all, or an even share in their order with the extremes of both ends."""
    num = len(gain_N)
    if num <= MAX_POINTS:
        return np.arange(num)
    order = np.argsort(gain_N, kind="stable")
    even = np.linspace(0, num - 1, MAX_POINTS - 40).astype(np.int64)
    return np.unique(np.concatenate([even, order[:20], order[-20:]]))


def _draw_examples(figure: Any, content: Any) -> None:
    before_N, after_N, drawn = content
    axes = figure.add_subplot()
    axes.set_aspect("equal", adjustable="box")
    top = float(max(before_N.max(), after_N.max())) * 1.05 or 1.0
    axes.plot([0, top], [0, top], color=QUIET, linewidth=1, linestyle=":", label="no change")
    shown = np.zeros(len(before_N), bool)
    shown[drawn] = True
    better = after_N < before_N
    for chosen, colour, marker, name in (
        (better, AFTER, "o", "more likely now"),
        (~better, BEFORE, "x", "not more likely"),
    ):
        if chosen.any():
            x, y = before_N[chosen & shown], after_N[chosen & shown]
            fill = "none" if marker == "o" else colour
            axes.plot(
                x,
                y,
                linestyle="",
                marker=marker,
                markersize=5,
                markerfacecolor=fill,
                color=colour,
                alpha=0.8,
                label=f"{name} ({int(chosen.sum()):,})",
                gid="better" if marker == "o" else "worse",
            )
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("NLL per token, base (nats)")
    axes.set_ylabel("NLL per token, tuned (nats)")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
