"""Families of rows: what would leak from one side of a split to the other.

They are rows that are near duplicates, and rows whose conversations begin with the same turns. Families are joined to
groups, and a group is held out or not as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from likely.data.audit import answers_of, prompt_of
from likely.data.duplicates import (
    Hashes,
    RunningHash,
    Signatures,
    digests,
    groups_of,
    near_pairs,
    to_signatures,
)
from likely.types import Conversation, IntArray

BATCH = 512


@dataclass(frozen=True)
class RowKeys:
    """What decides a row's family and its lot, one of each a row: the signature of its texts, a hash of how it begins,
    and a hash of all of it."""

    signatures: Signatures
    beginnings: Hashes
    contents: Hashes


def keys_of(conversations: Sequence[Conversation]) -> RowKeys:
    """The keys of rows; equal texts have equal ones, wherever they stand."""
    parts = [conversations[i : i + BATCH] for i in range(0, len(conversations), BATCH)]
    signatures = [
        to_signatures(np.minimum(digests(list(map(prompt_of, part))), digests(list(map(answers_of, part)))))
        for part in parts
    ]
    return RowKeys(
        np.concatenate(signatures) if signatures else to_signatures(digests([])),
        np.array([beginning_of(c) for c in conversations], np.uint64),
        np.array([content_of(c) for c in conversations], np.uint64),
    )


def split_rows(keys: RowKeys, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Indices ``(training, held_out)`` of the rows, each in the given order.

    A group is held out where the number that the seed and the group's rows draw falls into the first ``share`` of all
    numbers, so about that share of the groups is; the same rows in another order are split alike. If by that rule one
    side would be empty, the group with the least number is held out, or the one with the greatest is trained on.

    Args:
        share: of the groups, between 0 and 1.

    Raises:
        ValueError: all rows are one group, which can't be on both sides.
    """
    return split_groups(families(keys), keys, share, seed)


def split_groups(groups: IntArray, keys: RowKeys, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """:func:`split_rows` of rows whose groups are known."""
    if not len(groups) or groups.max() == 0:
        raise ValueError("all rows belong together: they are near duplicates or begin alike")
    place = _lots(groups, keys, seed)
    held = place < np.uint64(min(int(share * 2**64), 2**64 - 1))
    if not held.any():
        held[place.argmin()] = True
    if held.all():
        held[place.argmax()] = False
    out = held[groups]
    return np.flatnonzero(~out), np.flatnonzero(out)


def nested_rows(groups: IntArray, keys: RowKeys, shares: Sequence[float], seed: int) -> list[IntArray]:
    """Rows of growing subsets, each a part of the next: whole groups, in the order of the numbers that the seed and the
    groups' rows draw, as many as bring the rows nearest to each share of all. The same rows in another order give the
    same subsets.

    Args:
        groups: of :func:`families`.
        shares: ascending, above 0 and up to 1.

    Returns:
        Ascending indices of the rows for each share; equal ones where no group lies between two shares.
    """
    order = np.argsort(_lots(groups, keys, seed), kind="stable")
    rows_so_far = np.cumsum(np.bincount(groups)[order])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    last = [int(np.abs(rows_so_far - share * len(groups)).argmin()) for share in shares]
    return [np.flatnonzero(place[groups] <= i) for i in last]


def _lots(groups: IntArray, keys: RowKeys, seed: int) -> Hashes:
    """The number that a seed and its rows draw for each group."""
    # The least hash of a group's rows stands for all of them, in whatever order they come.
    content = np.full(int(groups.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(content, groups, keys.contents)
    return _mixed(content ^ _mixed(np.array([seed], np.uint64)))


def families(keys: RowKeys) -> IntArray:
    """A group number for each row: near duplicates share one, and so do rows whose first turns are the same."""
    _, first, inverse = np.unique(keys.beginnings, return_index=True, return_inverse=True)
    same = np.stack([first[inverse], np.arange(len(inverse))], 1)
    return groups_of(np.concatenate([near_pairs(keys.signatures), same.astype(np.int64)]), len(inverse))


def _mixed(values: Hashes) -> Hashes:
    """Numbers that look drawn by lot: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def content_of(conversation: Conversation) -> int:
    """A hash of all that a row says. It is of the row and not of its tokens: the same rows are held out for every
    model."""
    text = RunningHash()
    text.add(json.dumps(conversation.tools, sort_keys=True, default=str) if conversation.tools else "")
    if conversation.tokens is not None:
        text.add(repr(conversation.tokens))
    for message in conversation.messages:
        fields = json.dumps(dict(message.fields), sort_keys=True, default=str) if message.fields else ""
        text.add(f"{message.role}\0{message.content or ''}\0{fields}\0")
    return text.value()


def beginning_of(conversation: Conversation) -> int:
    """A hash of everything up to the first answer, but for a system prompt, which many families share."""
    text = RunningHash()
    if conversation.tokens is not None:
        supervised = conversation.tokens.supervised
        first = supervised.index(True) if True in supervised else len(supervised)
        text.add(repr(conversation.tokens.ids[:first] or conversation.tokens.ids))
    for message in conversation.messages:
        if message.role == "assistant":
            break
        if message.role != "system":
            text.add(f"{message.role}\0{message.content or ''}\0")
    else:
        return text.value()
    if conversation.messages[0].role == "assistant":  # nothing is asked, as in bare text
        text.add(conversation.messages[0].content or "")
    return text.value()
