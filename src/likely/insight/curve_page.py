"""A learning curve for people: text, a table as CSV, a picture as SVG, and a page that holds all of it."""

from __future__ import annotations

import csv
import io
from typing import Any

import jinja2
import numpy as np

from likely.insight.pictures import AFTER, BEFORE, draw_svg
from likely.types import FloatArray

MARKERS = "os^Dv<>pP*X"  # one a seed, so that colour is not needed


def to_text(result: dict[str, Any]) -> str:
    """The sizes, the law and the answer."""
    lines = [f"{'rows':>10} {'share':>7} {'NLL':>8}  95% interval       by seed"]
    base = result["base"]
    lines.append(f"{'base':>10} {'':>7} {base['nll']:8.4f}  {_interval(base['ci95'])}")
    for size in result["sizes"]:
        seeds = " ".join(f"{nll:.4f}" for nll in size["nll_of_seeds"])
        lines.append(
            f"{size['rows']:10,.0f} {size['share']:>7} {size['nll']:8.4f}  {_interval(size['ci95'])}   {seeds}"
        )
    return "\n".join([*lines, "", *_words(result), "", result["verdict"]])


def _interval(ci95: Any) -> str:
    return "[  -   ,   -   ]" if ci95 is None else f"[{ci95[0]:.4f}, {ci95[1]:.4f}]"


def _words(result: dict[str, Any]) -> list[str]:
    law, line, spread = result["power_law"], result["log_linear"], result["spread"]
    fit = f"power law: NLL = {law['a']:.4f} {law['b']:+.4f} (n / N)^-{law['c']:.3g}, N all rows"
    if not law["determined"]:
        fit += "; these points leave its exponent open, so don't read its limit as one"
    words = [
        fit,
        f"straight line through the last sizes: {line['per_doubling']:.4f} nats a doubling {_interval(line['ci95'])}",
    ]
    if spread:
        seeds, examples = spread["seeds"], spread["examples"]
        words.append(f"chance in that: ± {seeds:.4f} from the seeds, ± {examples:.4f} from the held-out examples")
    room = result["room"]
    words.append(
        f"rows that were trained on: NLL {result['sizes'][-1]['seen_nll']:.4f} with all rows, so a doubling can bring"
        f" about {max(room['nats'], 0):.4f} nats at most ({room['most']:.4f} with chance)"
    )
    return [*words, f"held fixed: {result['held_fixed']}"]


def to_csv(result: dict[str, Any]) -> str:
    """One line a training, the base first."""
    columns = ["share", "rows", "examples", "tokens", "seed", "steps", "judged_after", "nll", "seen_nll", "folder"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerow({"rows": 0, "nll": result["base"]["nll"], "folder": "points/base"})
    writer.writerows(result["points"])
    return text.getvalue()


def to_svg(result: dict[str, Any]) -> str:
    return str(draw_svg(_draw, result))


def to_html(result: dict[str, Any]) -> str:
    """The page; it needs nothing from any network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("likely.insight", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("curve.html.j2").render(
        result=result, picture=draw_svg(_draw, result), words=_words(result), interval=_interval, after=AFTER
    )


def _draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    sizes = result["sizes"]
    rows_K = np.array([size["rows"] for size in sizes])
    nll_K = np.array([size["nll"] for size in sizes])
    if result["kind"] != "none" and not result["room"]["refutes"]:
        _draw_law(axes, result, rows_K)
    bars = np.array([[nll - size["ci95"][0], size["ci95"][1] - nll] for nll, size in zip(nll_K, sizes, strict=True)]).T
    axes.errorbar(
        rows_K, nll_K, yerr=np.maximum(bars, 0), fmt="_", markersize=14, capsize=4, color="black",
        label="mean, 95% interval",
    )  # fmt: skip
    for i, seed in enumerate(dict.fromkeys(point["seed"] for point in result["points"])):
        own = [point for point in result["points"] if point["seed"] == seed]
        axes.plot(
            [p["rows"] for p in own], [p["nll"] for p in own], MARKERS[i % len(MARKERS)], color=AFTER, markersize=5,
            markerfacecolor="none", label=f"seed {seed}",
        )  # fmt: skip
    low, high = axes.get_ylim()
    base = f"base {result['base']['nll']:.4f}"
    if low <= result["base"]["nll"] <= high + (high - low) / 2:
        axes.axhline(result["base"]["nll"], color=BEFORE, linestyle=":", label=base)
    else:  # it would press the points into a line
        axes.plot([], [], " ", label=f"{base}, outside")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows_K, [f"{rows:,.0f}" for rows in rows_K], minor=False)
    axes.set_xlabel("training rows (each step to the right is a doubling)")
    axes.set_ylabel("held-out NLL, nats per token")
    axes.legend(frameon=False, fontsize=8)


def _draw_law(axes: Any, result: dict[str, Any], rows_K: FloatArray) -> None:
    """The law through the points, and what it expects of twice the data."""
    law, doubling = result["power_law"], result["doubling"]
    for first, last, style, name in ((rows_K[0] / rows_K[-1], 1.0, "-", "power law"), (1.0, 2.0, "--", None)):
        relative = np.geomspace(first, last, 60)
        axes.plot(relative * rows_K[-1], law["a"] + law["b"] * relative ** -law["c"], style, color=AFTER, label=name)
    low, high = doubling["ci95"]
    now = law["a"] + law["b"]
    bar = [[max(high - doubling["nats"], 0)], [max(doubling["nats"] - low, 0)]]
    axes.errorbar(
        [2 * rows_K[-1]],
        [now - doubling["nats"]],
        yerr=bar,
        fmt="D",
        capsize=4,
        color=AFTER,
        markerfacecolor="white",
        label=f"twice the data, expected {now - doubling['nats']:.4f}",
    )
