"""What a tokenizer may cost: one from outside could take any time and memory for a short text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from likely.errors import ModelError

MAX_CONTROL_CHARS = 1000  # the memory to look for a control token grows with the square of its length
MAX_ADDED = 100_000
MAX_GROWTH = 256  # characters that a normalizer writes for one


def require_bounds(tokenizer: Any, place: str) -> None:
    """Refuse a tokenizer whose cost has no sensible bound.

    Raises:
        ModelError: it has a control token without end, very many of them, or a normalizer that makes much of little.
    """
    added = tokenizer.added_tokens_decoder.values()
    longest = max((len(token.content) for token in added), default=0)
    normalizer = tokenizer.backend_tokenizer.normalizer
    growth = _growth(json.loads(normalizer.__getstate__())) if normalizer is not None else 1
    for what, found, limit in (
        ("a control token has {} characters", longest, MAX_CONTROL_CHARS),
        ("it has {} added tokens", len(added), MAX_ADDED),
        ("its normalizer may write {} characters for one", growth, MAX_GROWTH),
    ):
        if found > limit:
            message = f"{what.format(f'{found:,}')}, over the limit of {limit:,}"
            raise ModelError(message, place=place, way_out="fetch or copy the model's files again")


def _growth(state: Any) -> int:
    """Most characters that the replacements of a normalizer make of one, each after the other."""
    written = (len(step["content"]) for step in _steps(state) if isinstance(step.get("content"), str))
    return math.prod(max(1, length) for length in written)


def _steps(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        yield state
        for inner in state.get("normalizers", ()):
            yield from _steps(inner)
