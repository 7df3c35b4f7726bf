"""What the points of a learning curve say, in numbers and one sentence; and whether they can say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from likely.insight.power_law import (
    EXPONENTS,
    Law,
    Scores,
    fit_power_law,
    interval,
    replicate,
    slope_per_doubling,
    spread,
)
from likely.types import FloatArray

FEW_EXAMPLES = 20  # below, a bootstrap of examples covers clearly less than it says
SURE = 0.99  # of what speaks against a curve: four sizes are looked at, so 95% would see ghosts
BELIEVABLE = 0.1  # of the laws that the points allow; where fewer fit into the room there is, the law is wrong
SMALL = 0.1  # of what training gained: a doubling that brings less, at best, is not worth the rows


def judge(scores: Scores, base: float, against: Sequence[str] = (), room_B: FloatArray | None = None) -> dict[str, Any]:
    """The answer of a learning curve.

    Args:
        base: held-out NLL of the base model, nats per token.
        against: what else forbids an answer.
        room_B: what twice the data can bring at most (:func:`likely.insight.room.room_for_more`), if that is known.

    Returns:
        ``{"kind", "verdict", "reasons", "doubling", "room", "power_law", "log_linear", "spread", "size_ci95"}``.
        ``kind`` is ``falls`` where a doubling helps beyond chance, ``saturated`` where it brings little at best, and
        ``none`` where the points can't support an answer, for the ``reasons``. ``doubling["nats"]`` is by how many nats
        per token twice the data lower the NLL, with ``ci95`` and its ``half_width``.
    """
    mean_K = scores.mean_K
    law = fit_power_law(scores.size_K, mean_K[None], refine=True)
    has_seeds = scores.nll_KSN.shape[1] > 1
    other_BK = replicate(scores, seeds=has_seeds)
    laws = fit_power_law(scores.size_K, other_BK)
    room = _room(law, laws, room_B)
    low, high = interval(laws.doubling)
    nats, high = float(law.doubling[0]), min(high, room["most"]) if room else high
    if room and room["refutes"]:
        nats, low = min(nats, max(room["nats"], 0.0)), min(low, 0.0)
    half = (high - low) / 2
    doubling = {"nats": nats, "ci95": (low, high), "half_width": half}
    slope = float(slope_per_doubling(scores.size_K, mean_K[None])[0])
    slope_ci95 = interval(slope_per_doubling(scores.size_K, other_BK))
    parts = spread(scores, lambda nll_BK: fit_power_law(scores.size_K, nll_BK).doubling) if has_seeds else None
    gained = base - float(mean_K[-1])
    reasons = [*against, *_too_few(scores), *_rises(scores, other_BK)]
    if not (room and room["refutes"]):
        reasons += _misfit(scores, law, other_BK, laws)
    kind = "none"
    if reasons:
        pass
    elif room and room["refutes"]:
        kind = "saturated" if high <= SMALL * gained else "none"
        reasons = [] if kind == "saturated" else [_refuted(float(law.doubling[0]), room)]
    elif low > 0 and (nats > half or slope <= high):  # a lopsided interval must hold what the last doublings brought
        kind = "falls"
    elif slope_ci95[0] > 0:
        reasons = [_disagreeing(nats, half, slope)]
    elif high <= SMALL * gained:
        kind = "saturated"
    else:
        reasons = [_too_wide(low, high, parts)]
    return {
        "kind": kind,
        "verdict": _verdict(kind, reasons, doubling, room, float(mean_K[-1]), gained),
        "reasons": reasons,
        "doubling": doubling,
        "room": room,
        "power_law": _law(law, laws),
        "log_linear": {"per_doubling": slope, "ci95": slope_ci95},
        "spread": parts,
        "size_ci95": [interval(column) for column in other_BK.T],
    }


def _room(law: Law, laws: Law, room_B: FloatArray | None) -> dict[str, Any] | None:
    """What a doubling can bring at most, and whether what the law expects of it goes beyond, even with its chance."""
    if room_B is None:
        return None
    # Each law beside each room, as the two were drawn apart.
    fits = np.searchsorted(np.sort(laws.doubling), room_B, side="right") / len(laws.doubling)
    most = float(np.quantile(room_B, SURE))
    refutes = float(law.doubling[0]) > most and fits.mean() < BELIEVABLE
    return {"nats": float(np.median(room_B)), "most": most, "refutes": bool(refutes)}


def _law(law: Law, laws: Law) -> dict[str, Any]:
    found: dict[str, Any] = {name: float(getattr(law, name)[0]) for name in ("a", "b", "c")}
    found |= {f"{name}_ci95": interval(getattr(laws, name)) for name in ("a", "b", "c")}
    low, high = found["c_ci95"]
    # At an end of what is looked through, the points say no more than "at least" or "at most".
    found["determined"] = bool(low > EXPONENTS[0] and high < EXPONENTS[-1])
    return found


def _too_few(scores: Scores) -> list[str]:
    found = []
    num_seeds, num_examples = scores.nll_KSN.shape[1:]
    if num_seeds < 2:
        found.append("one seed tells nothing of chance; raise --seeds")
    if num_examples < FEW_EXAMPLES:
        found.append(f"{num_examples} held-out examples are too few for an interval; give {FEW_EXAMPLES} or more")
    return found


def _rows(scores: Scores) -> list[str]:
    return [f"{size:,.0f}" for size in scores.size_K]


def _rises(scores: Scores, other_BK: FloatArray) -> list[str]:
    found, rows = [], _rows(scores)
    rise_K = np.diff(scores.mean_K)
    for k in range(len(rise_K)):
        low, _ = interval(np.diff(other_BK)[:, k], 2 * SURE - 1)
        if low > 0:
            found.append(f"held-out NLL rises by {rise_K[k]:.4f} from {rows[k]} to {rows[k + 1]} rows, beyond chance")
    return found


def _misfit(scores: Scores, law: Law, other_BK: FloatArray, laws: Law) -> list[str]:
    relative_K = scores.size_K / scores.size_K[-1]
    off_K = scores.mean_K - law.at(relative_K)
    off_BK = other_BK - (laws.a[:, None] + laws.b[:, None] * relative_K ** -laws.c[:, None])
    beyond_K = np.abs(off_K) - np.quantile(np.abs(off_BK - off_K), SURE, axis=0)
    worst = int(beyond_K.argmax())
    if beyond_K[worst] > 1e-9:  # rounding, where there are as many sizes as numbers in the law
        rows = _rows(scores)[worst]
        return [f"no power law goes through them: at {rows} rows it is off by {off_K[worst]:+.4f} nats"]
    return []


def _too_wide(low: float, high: float, parts: dict[str, float] | None) -> str:
    seeds = parts is not None and parts["seeds"] > parts["examples"]
    more = "raise --seeds" if seeds else "give more held-out rows"
    most = "seeds" if seeds else "held-out examples"
    return (
        f"twice the data could change held-out NLL by anything from {-high:+.4f} to {-low:+.4f} nats per token;"
        f" most of that is the chance of the {most}, so {more}"
    )


def _disagreeing(nats: float, half: float, slope: float) -> str:
    return (
        f"the last doublings lowered held-out NLL by {slope:.4f} nats per token beyond chance, and a law through all"
        f" sizes expects {nats:.4f} ± {half:.4f} of the next; give more --seeds, or leave out the smallest --shares,"
        " which may be trained too little to lie on one curve with the others"
    )


def _refuted(expected: float, room: dict[str, Any]) -> str:
    return (
        f"a law through them expects {expected:.4f} nats per token of the next doubling, yet held-out NLL lies no more"
        f" than {room['most']:.4f} above that of rows which were trained on, and can't fall below it; give more"
        " --seeds, or leave out the smallest --shares"
    )


def _verdict(
    kind: str,
    reasons: Sequence[str],
    doubling: dict[str, Any],
    room: dict[str, Any] | None,
    last: float,
    gained: float,
) -> str:
    nats, half = doubling["nats"], doubling["half_width"]
    low, high = doubling["ci95"]
    if kind == "falls":
        # A lopsided interval is no "x ± y": that would hold 0, and the interval does not.
        sure = f" ± {half:.4f}" if nats > half else ""
        return (
            f"Doubling the data is expected to lower held-out NLL by {nats:.4f}{sure} nats per token, from"
            f" {last:.4f} (95% interval of the fall [{low:.4f}, {high:.4f}])."
        )
    if kind == "saturated" and room and room["refutes"]:
        return (
            "More data of this kind is not expected to help training as it is set here: rows that were not trained on"
            f" are hardly less likely than rows that were, which more rows make no more likely, so doubling the data"
            f" can lower held-out NLL by {high:.4f} nats per token at best, where training gained {gained:.4f}."
        )
    if kind == "saturated":
        return (
            "More data of this kind is not expected to help training as it is set here: doubling it would lower"
            f" held-out NLL by {nats:.4f} ± {half:.4f} nats per token, no more than chance would, and by"
            f" {high:.4f} at best, where training gained {gained:.4f}."
        )
    return f"These points can't support an answer: {'; '.join(reasons)}."
