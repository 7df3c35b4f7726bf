"""What its prompt does for an answer: how much less surprising it is there than behind the prompts of other rows.

The difference in nats is the pointwise mutual information of prompt and answer (Church & Hanks 1990), with a mean over
a few other prompts in the place of the answer's own probability. Its share of the nats behind other prompts (Theil's
uncertainty coefficient, for one row) says how much of the answer the prompt explains. An answer that belongs to another
question is explained by nothing, however easy or hard its words are by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from likely.data.table import OnDemand
from likely.insight.evaluate import Track, score_examples
from likely.model.forward import LanguageModel
from likely.training.parallel import ALONE, Ranks
from likely.types import Example, ExampleScore, FloatArray, IntArray

NUM_PROMPTS = 4
ROWS_AT_ONCE = 4096  # whose scores behind other prompts are held


def last_answer(example: Example) -> tuple[int, int] | None:
    """Where the last run of supervised tokens begins and ends; None where there is none, or nothing before it."""
    supervised = np.flatnonzero(example.weights_T > 0)
    if not len(supervised):
        return None
    end = int(supervised[-1]) + 1
    unsupervised = np.flatnonzero(example.weights_T[:end] <= 0)
    start = int(unsupervised[-1]) + 1
    # The first token has no weight in any case; what stands behind it alone has no prompt.
    return (start, end) if start > 1 else None


def explained_by_prompts(
    model: LanguageModel,
    examples: Sequence[Example],
    own: Sequence[ExampleScore] | None,
    pack_tokens: int,
    max_tokens: int,
    track: Track | None = None,
    ranks: Ranks = ALONE,
) -> FloatArray:
    """For each row ``1 - nats(last answer | its prompt) / nats(last answer | prompts of other rows)``, with the mean
    over ``NUM_PROMPTS`` of them: 1 where the prompt explains all of the answer, 0 or less where it explains nothing.
    nan where a row has no prompt, and where all rows have the same one.

    The other prompts are the same for all rows, so that each is computed once (:mod:`likely.data.trie`).

    Args:
        own: the examples' scores where they stand; None on ranks that don't have them, whose result is nan.
        max_tokens: behind a prompt that would make an answer end later than that it is not looked at.
    """
    prompts = _choose(examples)
    share_N = np.full(len(examples), np.nan)
    for start in range(0, len(examples), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(examples)))
        places = [
            (i, prompt, span)
            for i in rows
            if (span := last_answer(examples[i]))
            for prompt in prompts
            if len(prompt) + span[1] - span[0] <= max_tokens
            and not np.array_equal(prompt, examples[i].token_ids_T[: span[0]])
        ]
        moved = OnDemand(len(places), partial(_moved, examples, places))
        scores = score_examples(model, moved, pack_tokens, track, ranks)
        if own is None:
            continue
        nats: dict[tuple[int, int, int], list[float]] = {}
        for (i, prompt, span), score in zip(places, scores, strict=True):
            elsewhere = -float((examples[i].weights_T[slice(*span)] * score.logprob_T[len(prompt) :]).sum())
            nats.setdefault((i, *span), []).append(elsewhere)
        for (i, first, end), behind_others in nats.items():
            answer = slice(first, end)
            here = -float((examples[i].weights_T[answer] * own[i].logprob_T[answer]).sum())
            share_N[i] = 1 - here / max(float(np.mean(behind_others)), np.finfo(float).tiny)
    return share_N


def _choose(examples: Sequence[Example]) -> list[IntArray]:
    """Distinct prompts, by chance that is a function of the number of rows alone."""
    found: dict[bytes, IntArray] = {}
    order = np.random.default_rng(len(examples)).permutation(len(examples))
    for i in order[: 64 * NUM_PROMPTS].tolist():
        if span := last_answer(examples[i]):
            prompt = examples[i].token_ids_T[: span[0]]
            found.setdefault(prompt.tobytes(), prompt)
        if len(found) == NUM_PROMPTS:
            break
    return list(found.values())


def _moved(examples: Sequence[Example], places: Sequence[tuple[int, IntArray, tuple[int, int]]], k: int) -> Example:
    """A row's last answer behind another prompt."""
    i, prompt_T, span = places[k]
    example, answer = examples[i], slice(*span)
    nothing = len(prompt_T)
    return Example(
        np.concatenate([prompt_T, example.token_ids_T[answer]]),
        np.concatenate([np.zeros(nothing), example.weights_T[answer]]),
        np.concatenate([np.zeros(nothing, np.int8), example.role_T[answer]]),
        example.source,
    )
