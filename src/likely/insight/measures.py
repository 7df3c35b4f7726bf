"""Every measure as a function of sums over examples, so that one resampling of examples gives the interval of each.

Calibration: supervised tokens are sorted into 15 bins of equal width by the probability of the model's first choice;
the expected calibration error is the weighted mean over bins of |share right - mean probability| (Naeini et al. 2015,
Guo et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from likely.data.trie import entropy_floor
from likely.insight.evaluate import RESAMPLES, bytes_of_answer, interval_of_ratio
from likely.types import Example, ExampleScore, FloatArray, IntArray

NUM_BINS = 15
NLL, WEIGHT, CORRECT, JOINT, TOKENS, PROMPT, PROMPT_TOKENS, BYTES, BINS = range(9)


def sums_per_example(examples: Sequence[Example], scores: Sequence[ExampleScore], tokenizer: Any) -> FloatArray:
    """(N, 8 + 3 * NUM_BINS): what the measures are made of, and for each bin its weight, first choices that are right,
    and probability."""
    rows = np.zeros((len(examples), BINS + 3 * NUM_BINS))
    for row, example, score in zip(rows, examples, scores, strict=True):
        weight_T, logprob_T = example.weights_T, np.nan_to_num(score.logprob_T)
        prompt_T = weight_T == 0
        prompt_T[:1] = False
        right_T = weight_T * (score.rank_T == 1)
        row[:BINS] = (
            -(weight_T * logprob_T).sum(),
            weight_T.sum(),
            right_T.sum(),
            -logprob_T.sum(),
            len(logprob_T) - 1,
            -logprob_T[prompt_T].sum(),
            prompt_T.sum(),
            bytes_of_answer(example, tokenizer),
        )
        supervised = np.flatnonzero(weight_T)
        sure = np.exp(score.best_logprob_T[supervised])
        own = np.minimum((sure * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        for i, values in enumerate((weight_T[supervised], right_T[supervised], weight_T[supervised] * sure)):
            at = BINS + i * NUM_BINS
            row[at : at + NUM_BINS] = np.bincount(own, weights=values, minlength=NUM_BINS)
    return rows


def _ratio(top: int, bottom: int) -> Callable[[FloatArray], FloatArray]:
    def measure(sums: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            result: FloatArray = sums[..., top] / sums[..., bottom]
        return result

    return measure


def _bins(sums: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    weight, right, sure = (sums[..., BINS + i * NUM_BINS : BINS + (i + 1) * NUM_BINS] for i in range(3))
    return weight, right, sure


def calibration_error(sums: FloatArray) -> FloatArray:
    weight, right, sure = _bins(sums)
    result: FloatArray = np.abs(right - sure).sum(-1) / weight.sum(-1)
    return result


MEASURES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "nll": _ratio(NLL, WEIGHT),
    "perplexity": lambda sums: np.exp(np.minimum(sums[..., NLL] / sums[..., WEIGHT], 700.0)),
    "bits_per_byte": lambda sums: _ratio(NLL, BYTES)(sums) / math.log(2),
    "token_accuracy": _ratio(CORRECT, WEIGHT),
    "calibration_error": calibration_error,
    "joint_nll": _ratio(JOINT, TOKENS),
    "prompt_nll": _ratio(PROMPT, PROMPT_TOKENS),
}


def calibration_bins(sums_NK: FloatArray) -> list[dict[str, float]]:
    """The bins that hold something: ``low`` and ``high`` bounds, summed ``weight``, mean ``probability`` of the first
    choice, and the share that is ``right``."""
    weight, right, sure = _bins(sums_NK.sum(0))
    return [
        {
            "low": b / NUM_BINS,
            "high": (b + 1) / NUM_BINS,
            "weight": float(weight[b]),
            "probability": float(sure[b] / weight[b]),
            "right": float(right[b] / weight[b]),
        }
        for b in range(NUM_BINS)
        if weight[b]
    ]


def compare_measures(tuned_NK: FloatArray, base_NK: FloatArray | None) -> dict[str, dict[str, Any]]:
    """``{measure: {"value", "ci95", "base", "change", "change_ci95"}}``, the last three None without a base; intervals
    resample examples, the same for both models. What can't be computed is None."""
    names = list(MEASURES)

    def of(sums: FloatArray) -> FloatArray:
        return np.stack([MEASURES[name](sums) for name in names])

    value, low_high = of(tuned_NK.sum(0)), _intervals(of, [tuned_NK])
    found: dict[str, dict[str, Any]] = {
        name: {"value": _number(value[i]), "ci95": _pair(low_high, i, value[i])} for i, name in enumerate(names)
    }
    base = of(base_NK.sum(0)) if base_NK is not None else None
    changes = _intervals(lambda a, b: of(a) - of(b), [tuned_NK, base_NK]) if base_NK is not None else None
    for i, name in enumerate(names):
        found[name]["base"] = _number(base[i]) if base is not None else None
        found[name]["change"] = _number(value[i] - base[i]) if base is not None else None
        found[name]["change_ci95"] = _pair(changes, i, value[i] - base[i]) if base is not None else None
    return found


def _intervals(of: Callable[..., FloatArray], tables: Sequence[FloatArray]) -> FloatArray | None:
    """(2, measures): percentile bootstrap over examples of a function of their summed rows."""
    num = len(tables[0])
    if num < 2:
        return None

    whole = np.nan_to_num(of(*(table.sum(0) for table in tables)))

    def statistic(index: IntArray, axis: int) -> FloatArray:  # noqa: ARG001  (always the last)
        flat = np.atleast_2d(index)
        counts = np.bincount((flat + num * np.arange(len(flat))[:, None]).ravel(), minlength=num * len(flat))
        drawn = counts.reshape(len(flat), num).astype(np.float64)
        # What a draw leaves without a denominator says nothing, and counts as no deviation.
        found = of(*(drawn @ table for table in tables))
        found = np.where(np.isfinite(found), found, whole[:, None])
        return found[..., 0] if index.ndim == 1 else found

    result = bootstrap(
        (np.arange(num),),
        statistic,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // num),
        rng=np.random.default_rng(0),
    )
    return np.stack([result.confidence_interval.low, result.confidence_interval.high])


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pair(low_high: FloatArray | None, i: int, value: Any) -> tuple[float, float] | None:
    if low_high is None or not np.isfinite(value):
        return None
    return float(low_high[0, i]), float(low_high[1, i])


def gap_closed(examples: Sequence[Example], base: float, tuned: float) -> dict[str, float] | None:
    """How much of the way from the base's NLL to the least that any model can reach on these examples was gone; None
    where the base is there already."""
    floor = entropy_floor(examples)
    return None if base <= floor else {"floor": floor, "share": (base - tuned) / (base - floor)}


# --- slices ---

LENGTHS = (16, 64, 256)
POSITIONS = ("first", "middle", "last", "stop")
MAX_TURN = 8


def slices(
    examples: Sequence[Example], tuned: Sequence[ExampleScore], base: Sequence[ExampleScore] | None, stops: set[int]
) -> dict[str, list[dict[str, Any]]]:
    """``{"source" | "turn" | "position" | "length": [{"name", "num_examples", "num_tokens", "nll", "base_nll",
    "change", "change_ci95"}]}``. A turn is a run of the assistant's tokens; its first supervised token is "first", the
    token that ends it "stop", the one before that "last"; a length is that of an answer, in supervised tokens.

    Args:
        stops: ids of the tokens that end a turn.
    """
    totals: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for i, example in enumerate(examples):
        own = -np.nan_to_num(tuned[i].logprob_T) * example.weights_T
        other = -np.nan_to_num(base[i].logprob_T) * example.weights_T if base is not None else own
        for key, mask_T in _masks(example, stops):
            weight = float(example.weights_T[mask_T].sum())
            totals.setdefault(key, []).append((float(own[mask_T].sum()), float(other[mask_T].sum()), weight))
    found: dict[str, list[dict[str, Any]]] = {"source": [], "turn": [], "position": [], "length": []}
    for (kind, name), rows in sorted(totals.items(), key=lambda item: _order(*item[0])):
        own_N, other_N, weight_N = np.array(rows).T
        num = float(weight_N.sum())
        entry = {"name": name, "num_examples": len(rows), "num_tokens": num, "nll": float(own_N.sum()) / num}
        entry |= {"base_nll": None, "change": None, "change_ci95": None}
        if base is not None:
            change_N = own_N - other_N
            entry |= {"base_nll": float(other_N.sum()) / num, "change": float(change_N.sum()) / num}
            entry |= {"change_ci95": interval_of_ratio(change_N, weight_N)}
        found[kind].append(entry)
    return found


def _order(kind: str, name: str) -> tuple[str, int, str]:
    number = POSITIONS.index(name) if name in POSITIONS else int("".join(c for c in name if c.isdigit())[:4] or 0)
    return kind, number if kind != "source" else 0, name


def positions(example: Example, stops: set[int]) -> tuple[Any, IntArray, Any]:
    """For each token: whether it is supervised, the number of its answer (from 1), and its place there, one of
    ``POSITIONS``; the last two mean nothing where it is not."""
    supervised_T = example.weights_T > 0
    # A run of supervised tokens begins where the token before it is none, or is another message's end.
    ends_T = np.isin(example.token_ids_T, list(stops)) & supervised_T
    starts_T = supervised_T & ~np.concatenate([[False], supervised_T[:-1] & ~ends_T[:-1]])
    turn_T = np.cumsum(starts_T)
    next_T = np.concatenate([ends_T[1:], [False]])
    position_T = np.where(ends_T, "stop", np.where(starts_T, "first", np.where(next_T, "last", "middle")))
    return supervised_T, turn_T, position_T


def _masks(example: Example, stops: set[int]) -> list[tuple[tuple[str, str], Any]]:
    supervised_T, turn_T, position_T = positions(example, stops)
    if not supervised_T.any():
        return []
    masks = [(("source", example.source.file), supervised_T)]
    for turn in range(1, int(turn_T[-1]) + 1):
        own_T = supervised_T & (turn_T == turn)
        name = str(turn) if turn < MAX_TURN else f"{MAX_TURN} and later"
        masks += [(("turn", name), own_T), (("length", _length(int(own_T.sum()))), own_T)]
    masks += [(("position", name), supervised_T & (position_T == name)) for name in POSITIONS]
    return [(key, mask) for key, mask in masks if mask.any()]


def _length(tokens: int) -> str:
    low = 1
    for high in LENGTHS:
        if tokens <= high:
            return f"{low} to {high} tokens"
        low = high + 1
    return f"{low} tokens or more"
