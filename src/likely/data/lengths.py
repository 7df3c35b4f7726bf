"""What becomes of examples that are longer than allowed: nothing is cut unless the user says so, and what is cut is
counted. A stop token is never made up, and an example in which nothing is left to learn is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from likely.data.render import Renderer
from likely.errors import DataError
from likely.types import ROLES, Conversation, Example

OnTooLong = Literal["error", "drop", "truncate_left", "truncate_right"]
_ASSISTANT = ROLES.index("assistant")


@dataclass
class LengthCounts:
    """Of the examples over the limit: how many there were, were left out whole, were cut, lost the stop token of an
    answer that stays, or had nothing left to learn and so were left out too."""

    over: int = 0
    dropped: int = 0
    cut: int = 0
    stop_lost: int = 0
    nothing_left: int = 0

    def add(self, other: LengthCounts) -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def told(self, max_length: int) -> list[str]:
        if not self.over:
            return []
        parts = {
            "left out": self.dropped,
            "cut": self.cut,
            "of these without the stop token of their last answer": self.stop_lost,
            "left out, since nothing to learn was left": self.nothing_left,
        }
        what = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
        return [f"{self.over:,} examples over {max_length:,} tokens: {what}"]


def fit(example: Example, max_length: int, policy: OnTooLong, counts: LengthCounts) -> Example | None:
    """The example within ``max_length`` tokens, or None where it is left out.

    ``truncate_left`` keeps the end, ``truncate_right`` the beginning. The first token that is kept has nothing before
    it to be predicted from, so its weight is 0.
    """
    length = len(example.token_ids_T)
    if length <= max_length:
        return example
    counts.over += 1
    if policy == "drop":
        counts.dropped += 1
        return None
    kept = slice(length - max_length, length) if policy == "truncate_left" else slice(0, max_length)
    weights_T = example.weights_T[kept].copy()
    weights_T[:1] = 0.0
    if not weights_T.any():
        counts.nothing_left += 1
        return None
    counts.cut += 1
    if kept.stop < length:
        around = slice(kept.stop - 1, kept.stop + 1)
        inside = (example.weights_T[around] > 0) & (example.role_T[around] == _ASSISTANT)
        counts.stop_lost += bool(inside.all())
    return Example(example.token_ids_T[kept].copy(), weights_T, example.role_T[kept].copy(), example.source)


def without_hopeless(
    conversations: Sequence[Conversation], renderer: Renderer, max_length: int, policy: OnTooLong
) -> tuple[Sequence[Conversation], list[DataError]]:
    """The rows without those whose texts alone are more tokens than an example may have, however they are tokenised,
    and what is wrong with these: to tokenise some megabytes takes seconds and a hundred times their size. Where rows
    may be dropped or cut, and where the tokenizer gives no bound, all are kept."""
    if policy != "error":
        return conversations, []
    kept, hopeless = [], []
    for conversation in conversations:
        fewest = _fewest_tokens(conversation, renderer, max_length)
        if fewest <= max_length:
            kept.append(conversation)
            continue
        hopeless.append(
            DataError(
                f"at least {fewest:,} tokens, over the limit of {max_length:,} tokens",
                place=str(conversation.source),
                way_out="raise --max-length if the model's context allows it, shorten the row, or say --on-too-long",
            )
        )
    return kept, hopeless


def _fewest_tokens(conversation: Conversation, renderer: Renderer, enough: int) -> int:
    """Tokens that the longest example of a row has at least, by the bytes of its texts: it holds all of them, but for
    white space around them and for thoughts. 0 where nothing is known, or where they are few beside ``enough``."""
    num_characters = sum(len(m.content or "") for m in conversation.messages)
    if num_characters <= enough or not any(m.role == "assistant" and m.weight > 0 for m in conversation.messages):
        return 0
    texts = ((m.content or "").rpartition("</think>")[2].strip() for m in conversation.messages)
    return sum(map(renderer.fewest.of, texts))
