"""A scored row looked at once more: under another state of the model, or one of its tokens under the lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from likely.data.packing import default_pack_tokens
from likely.errors import DataError
from likely.insight.evaluate import score_examples
from likely.insight.lens import compare_next_token, next_token_logprobs
from likely.model.forward import LanguageModel
from likely.types import ROLES, Example, FloatArray, Source


def example_of(record: dict[str, Any]) -> Example:
    """The example that a record of ``likely score`` was made of."""
    tokens = record["tokens"]
    return Example(
        np.array([token["id"] for token in tokens], np.int64),
        np.array([token["weight"] for token in tokens], np.float64),
        np.array([ROLES.index(token["role"]) for token in tokens], np.int8),
        Source("scores", 0),
    )


def score_again(model: LanguageModel, record: dict[str, Any]) -> dict[str, list[float | None]]:
    """``{"logprob", "rank", "entropy"}`` of each token of a record, in nats, under a model; null where nothing predicts
    it.

    Raises:
        ModelError: the model has no such tokens.
    """
    example = example_of(record)
    (scores,) = score_examples(model, [example], default_pack_tokens(len(example.token_ids_T)))
    return {"logprob": _list(scores.logprob_T), "rank": _list(scores.rank_T), "entropy": _list(scores.entropy_T)}


def token_card(
    models: tuple[LanguageModel, LanguageModel], tokenizer: Any, record: dict[str, Any], position: int, rivals: int
) -> dict[str, Any]:
    """One token of a record under a base model and a tuned one: :class:`likely.insight.lens.Lens`, and the entropies of
    both distributions in nats.

    Raises:
        DataError: the record has no such token.
        ModelError: the models have none of its tokens.
    """
    ids = example_of(record).token_ids_T
    if not 1 <= position < len(ids):
        raise DataError(f"nothing predicts token {position} of {len(ids)}", place=str(record["source"]))
    context, gold = ids[:position].tolist(), int(ids[position])
    before, after = (next_token_logprobs(model, context) for model in models)
    card = asdict(compare_next_token(tokenizer, context, gold, before, after, rivals))
    return {**card, "entropy_before": _entropy(before), "entropy_after": _entropy(after)}


def _entropy(logp_V: FloatArray) -> float:
    return float(-(np.exp(logp_V) * logp_V).sum())


def _list(values: Sequence[float] | FloatArray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
