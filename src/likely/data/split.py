"""Held-out rows, when none are given: whole families, chosen by the seed and by what is in them, never by their order.

A family is what would leak from one side to the other: rows that are near duplicates, and rows whose conversations
begin with the same turns. Families are joined to groups, and a group is held out or not as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from likely.data.audit import answers_of, prompt_of
from likely.data.dataset import Dataset, OnDemand
from likely.data.duplicates import RunningHash, digests, groups_of, hash_of, near_pairs, to_signatures
from likely.data.render import Renderer
from likely.errors import DataError
from likely.types import Conversation, IntArray

BATCH = 512


def hold_out(dataset: Dataset, share: float, seed: int, judge: Renderer) -> tuple[Dataset, Dataset]:
    """A file's examples -> those to train on and those to be judged by, by :func:`split_rows`.

    Args:
        judge: renders the held-out rows anew: they are judged by their answers, whatever training gives weight to.

    Raises:
        DataError: nothing can be held out, or nothing in the held-out rows is an answer with weight.
    """
    try:
        train, held_out = split_rows(dataset.conversations, share, seed)
    except ValueError as error:
        message = f"no rows can be held out: {error}"
        raise DataError(message, place=dataset.path, way_out="give --eval-data, or leave out --eval-share") from error
    kept = {row: i for i, row in enumerate(train)}
    mine = [i for i, row in enumerate(dataset.row_N) if row in kept]
    rows = [dataset.conversations[row] for row in held_out]
    judged = [(e, i) for i, row in enumerate(rows) for e in judge.render(row) if e.weights_T.any()]
    if not judged or not mine:
        message = f"{len(train)} rows to train on and {len(held_out)} held out, and one side has no weight"
        raise DataError(message, place=dataset.path, way_out="give --eval-data, or another --eval-share")
    training = replace(
        dataset,
        conversations=OnDemand(len(train), lambda i: dataset.conversations[train[i]]),
        examples=OnDemand(len(mine), lambda i: dataset.examples[mine[i]]),
        row_N=tuple(kept[dataset.row_N[i]] for i in mine),
        num_unweighted=0,
    )
    examples, row_N = zip(*judged, strict=True)
    return training, replace(dataset, conversations=tuple(rows), examples=examples, row_N=row_N, num_unweighted=0)


def split_rows(conversations: Sequence[Conversation], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices ``(training, held_out)`` of the rows, each in the given order.

    A group is held out where a hash of the seed and of the group's rows falls into the first ``share`` of all hashes,
    so about that share of the groups is; the same rows in another order are split alike. If by that rule one side
    would be empty, the group with the least hash is held out, or the one with the greatest is trained on.

    Args:
        share: of the groups, between 0 and 1.

    Raises:
        ValueError: all rows are one group, which can't be on both sides.
    """
    groups = families(conversations)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    place = {int(groups[rows[0]]): _place(conversations, rows.tolist(), seed) for rows in members}
    if len(place) < 2:
        raise ValueError("all rows belong together: they are near duplicates or begin alike")
    ranked = sorted(place, key=lambda group: place[group])
    held = {group for group in ranked if place[group] < share} or {ranked[0]}
    held -= {ranked[-1]} if len(held) == len(ranked) else set()
    out = np.isin(groups, list(held))
    return np.flatnonzero(~out).tolist(), np.flatnonzero(out).tolist()


def families(conversations: Sequence[Conversation]) -> IntArray:
    """A group number for each row: near duplicates share one, and so do rows whose first turns are the same."""
    parts = [conversations[i : i + BATCH] for i in range(0, len(conversations), BATCH)]
    signatures = [
        to_signatures(np.minimum(digests(list(map(prompt_of, part))), digests(list(map(answers_of, part)))))
        for part in parts
    ]
    near = near_pairs(np.concatenate(signatures)) if signatures else np.empty((0, 2), np.int64)
    first_of: dict[int, int] = {}
    same = [(first_of.setdefault(key, i), i) for i, c in enumerate(conversations) for key in (_beginning(c),)]
    return groups_of(np.concatenate([near, np.array(same, np.int64).reshape(-1, 2)]), len(conversations))


def _beginning(conversation: Conversation) -> int:
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


def _place(conversations: Sequence[Conversation], rows: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that is drawn by the seed and the contents of a group, in whatever order they stand."""
    contents = sorted({hash_of(repr((c.messages, c.tools, c.tokens))) for c in (conversations[i] for i in rows)})
    digest = hashlib.blake2b(f"{seed}:{contents}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
