"""Where the probability went, from the scores of two states: the examples and tokens that moved most, and what a model
gives the first token of an answer and the token that ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from likely.insight.measures import positions
from likely.types import Example, ExampleScore, FloatArray, IntArray

NUM_ROWS = 5  # in each direction
CONTEXT = 16  # tokens shown before an answer
WINDOW = 96  # tokens shown of an example
NUM_BINS = 10  # of probability


@dataclass(frozen=True)
class TokenMove:
    """One token: its supervised ``weight``; natural log of its probability, its rank, and the model's first choice in
    its place, before and after; None where nothing predicts it."""

    text: str
    weight: float
    logprob_before: float | None
    logprob_after: float | None
    rank_before: int | None
    rank_after: int | None
    choice_before: str | None
    choice_after: str | None


@dataclass(frozen=True)
class RowMove:
    """One example: ``gain`` nats of weighted log-likelihood over its whole answer, ``weight`` its supervised weight,
    and its ``tokens`` from number ``first`` of ``num_tokens`` on (0-based), the stretch where most was moved."""

    source: str
    gain: float
    weight: float
    nll_before: float
    nll_after: float
    first: int
    num_tokens: int
    tokens: tuple[TokenMove, ...]


def moved_rows(
    examples: Sequence[Example], before: Sequence[ExampleScore], after: Sequence[ExampleScore], tokenizer: Any
) -> list[RowMove]:
    """The examples whose answers gained most log-likelihood, the first first, then those that lost most, the worst
    first. Memory is that of one number an example, and the rows that are shown."""

    @cache
    def text_of(token: int) -> str:
        return str(tokenizer.decode([token]))

    nll_N = np.array(
        [(_nll(example, was), _nll(example, now)) for example, was, now in zip(examples, before, after, strict=True)]
    ).reshape(-1, 2)
    gain_N = nll_N[:, 0] - nll_N[:, 1]
    order = np.argsort(-gain_N, kind="stable")
    gained = [int(i) for i in order[:NUM_ROWS] if gain_N[i] > 0]
    lost = [int(i) for i in order[::-1][:NUM_ROWS] if gain_N[i] < 0]
    found = []
    for i in [*gained, *lost]:
        example, was, now = examples[i], before[i], after[i]
        start, stop = _window(example.weights_T, now.logprob_T - was.logprob_T)
        found.append(
            RowMove(
                source=str(example.source),
                gain=float(gain_N[i]),
                weight=float(example.weights_T.sum()),
                nll_before=float(nll_N[i, 0]),
                nll_after=float(nll_N[i, 1]),
                first=start,
                num_tokens=len(example.token_ids_T),
                tokens=tuple(_token(t, example, was, now, text_of) for t in range(start, stop)),
            )
        )
    return found


def _nll(example: Example, score: ExampleScore) -> float:
    return float(-np.nansum(example.weights_T * score.logprob_T))


def _window(weights_T: FloatArray, change_T: FloatArray) -> tuple[int, int]:
    """First and one past the last token to show: from a little before the answer on, or where most was moved."""
    length = len(weights_T)
    first = max(0, int((weights_T > 0).argmax()) - CONTEXT)
    if length - first <= WINDOW:
        return first, length
    moved_T = np.concatenate([[0.0], np.cumsum(np.abs(np.nan_to_num(change_T * weights_T)))])
    inside = moved_T[first + WINDOW :] - moved_T[first : length + 1 - WINDOW]
    start = first + int(inside.argmax())
    return start, start + WINDOW


def _token(t: int, example: Example, was: ExampleScore, now: ExampleScore, text_of: Any) -> TokenMove:
    predicted = not np.isnan(now.logprob_T[t])
    return TokenMove(
        text=text_of(int(example.token_ids_T[t])),
        weight=float(example.weights_T[t]),
        logprob_before=float(was.logprob_T[t]) if predicted else None,
        logprob_after=float(now.logprob_T[t]) if predicted else None,
        rank_before=int(was.rank_T[t]) if predicted else None,
        rank_after=int(now.rank_T[t]) if predicted else None,
        choice_before=text_of(int(was.best_T[t])) if predicted else None,
        choice_after=text_of(int(now.best_T[t])) if predicted else None,
    )


def ends_of_answers(
    examples: Sequence[Example], before: Sequence[ExampleScore], after: Sequence[ExampleScore], stops: set[int]
) -> dict[str, dict[str, Any]]:
    """``{"first" | "stop": {"num", "edges", "before": counts, "after": counts, "median_before", "median_after",
    "nll_before", "nll_after"}}``: the probability of the first supervised token of each answer and of the token that
    ends it, every answer counting once, in bins of equal width (the last with its upper edge); ``nll`` is the mean of
    -log p, in nats. What no answer has is left out.

    Args:
        stops: ids of the tokens that end a turn.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("first", "stop"):
        pairs = [
            np.stack([was.logprob_T[mask_T], now.logprob_T[mask_T]])
            for example, was, now in zip(examples, before, after, strict=True)
            for mask_T in _masks(example, name, stops)
        ]
        if not pairs:
            continue
        logprob_2A = np.concatenate(pairs, axis=1)
        p_2A = np.exp(logprob_2A)
        edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
        found[name] = {"num": p_2A.shape[1], "edges": edges.tolist()}
        for state, p_A, logprob_A in zip(("before", "after"), p_2A, logprob_2A, strict=True):
            counts: IntArray = np.histogram(p_A, bins=edges)[0]
            found[name] |= {
                state: counts.tolist(),
                f"median_{state}": float(np.median(p_A)),
                f"nll_{state}": float(-logprob_A.mean()),
            }
    return found


def _masks(example: Example, name: str, stops: set[int]) -> Iterable[Any]:
    supervised_T, _, position_T = positions(example, stops)
    mask_T = supervised_T & (position_T == name)
    return [mask_T] if mask_T.any() else []
