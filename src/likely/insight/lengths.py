"""How long examples are, beside the longest that is allowed: figures and picture, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from likely.insight.pictures import AFTER, BEFORE
from likely.types import IntArray

FAR = 3  # times the longest example: a cut line beyond would leave no room for the bars


def histogram(length_N: IntArray, max_length: int, num_bins: int = 40) -> dict[str, Any]:
    """Examples by length in tokens: ``counts[i]`` of them from ``edges[i]`` to below ``edges[i + 1]``."""
    top = int(length_N.max(initial=1)) + 1
    width = max(1, -(-top // num_bins))
    counts, edges = np.histogram(length_N, bins=np.arange(0, top + width, width))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "limit": max_length}


def draw_lengths(figure: Any, lengths: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    axes.stairs(lengths["counts"], lengths["edges"], fill=True, color=AFTER, label="examples")
    told = f"cut line, {lengths['limit']:,} tokens"
    if lengths["limit"] <= FAR * lengths["edges"][-1]:
        axes.axvline(lengths["limit"], color=BEFORE, linestyle="--", label=told)
    else:
        axes.plot([], [], color=BEFORE, linestyle="--", label=f"{told}: far to the right")
    axes.set_xlabel("tokens of an example")
    axes.set_ylabel("examples")
    axes.legend()
