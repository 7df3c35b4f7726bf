"""Held-out rows, when none are given: whole families, chosen by the seed and by their content, never by their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np

from likely.data.dataset import Dataset, Request, too_long
from likely.data.families import RowKeys, families, split_groups
from likely.data.formats import Rejected
from likely.data.parallel import in_batches
from likely.data.rendering import render_conversations
from likely.data.rows import BATCH_ROWS
from likely.data.table import Collected, Table
from likely.errors import DataError
from likely.types import Conversation, IntArray

SHARE = 0.05  # held out unasked
MOST_GROUPS = 500  # held out unasked
FEWEST_GROUPS = 100  # of which some are held out unasked
WAY_OUT = "give --eval-data, or leave out --eval-share"
MOST_ROWS = 2_000_000  # beyond which comparing all of them takes minutes


def share_unasked(groups: IntArray) -> float:
    """The share of the groups of rows that is held out where nobody said: none of a few rows, and never many."""
    num_groups = int(groups.max(initial=-1)) + 1
    return 0.0 if num_groups < FEWEST_GROUPS else min(SHARE, MOST_GROUPS / num_groups)


def groups_unasked(keys: RowKeys) -> IntArray:
    """The rows' groups; none where there are too many rows to find out unasked."""
    return families(keys) if FEWEST_GROUPS <= len(keys.contents) <= MOST_ROWS else np.empty(0, np.int64)


def none_held_out(error: ValueError) -> str:
    """What is wrong where the rows are one group."""
    return f"no rows can be held out: {error}"


def one_side_empty(num_training: int, num_held_out: int) -> str:
    """What is wrong where a side of the split teaches nothing."""
    return f"{num_training} rows to train on and {num_held_out} held out, and one side has no weight"


def hold_out(dataset: Dataset, share: float | None, seed: int, judge: Request) -> tuple[Dataset, Dataset | None, float]:
    """A data set's examples -> those to train on and those to be judged by, and the share that was used.

    Args:
        share: of the groups of rows; None for :func:`share_unasked`.
        judge: how the held-out rows are rendered anew: they are judged by their answers, whatever training gives weight
            to.

    Raises:
        DataError: nothing can be held out, or nothing in the held-out rows is an answer with weight, though it was
            asked for; or a held-out row can't be judged, or is too long.
    """
    keys = dataset.table.keys
    groups = groups_unasked(keys) if share is None else families(keys)
    used = share_unasked(groups) if share is None else share
    if not used:
        return dataset, None, 0.0
    try:
        train, held_out = split_groups(groups, keys, used, seed)
    except ValueError as error:
        raise DataError(none_held_out(error), place=dataset.path, way_out=WAY_OUT) from error
    training = replace(dataset, table=dataset.table.select(train), num_unweighted=0)
    judged = _judged(dataset, held_out, judge)
    if not len(training.examples) or not len(judged.examples):
        if share is None:
            return dataset, None, 0.0
        message = one_side_empty(len(train), len(held_out))
        raise DataError(message, place=dataset.path, way_out="give --eval-data, or another --eval-share")
    return training, judged, used


def told_of_split(data: Dataset, eval_data: Dataset | None, *, asked: bool) -> str:
    """What a person should know of the rows that were held out of the training data."""
    if eval_data is None:
        return f"{data.path}: no rows are held out, so the report will have no verdict; give --eval-data for one"
    held_out, rest = len(eval_data.conversations), len(data.conversations)
    told = f"{data.path}: {held_out:,} of {held_out + rest:,} rows are held out to score the model, in whole families"
    return told if asked else f"{told}; give --eval-data instead, or --eval-share 0 to train on all of them"


def _judged(dataset: Dataset, rows: IntArray, judge: Request) -> Dataset:
    """Some rows, rendered anew within their length, without the examples that have no weight.

    Raises:
        DataError: a row can't be judged and such rows are not to be left out, or is too long and none may be.
    """
    chosen = dataset.table.select(rows)
    collected, rejected, over = Collected(), list[Rejected](), list[int]()
    first, num_weighted = None, 0
    for path, conversations in _by_file(chosen.conversations):
        done = render_conversations(judge.job(), judge.renderer, conversations, dataset.table.paths.index(path), path)
        if done.stop:
            raise done.stop
        collected.add(done.columns)
        rejected += done.rejected
        first = first or done.first_too_long
        over += done.too_long
        num_weighted += done.num_examples - done.num_unweighted
    if first:
        raise too_long(first, over[0], len(over), max(over), num_weighted, judge)
    table = Table(collected.arrays(), dataset.table.paths)
    return replace(dataset, table=table, num_unweighted=0, rejected=tuple(rejected))


def _by_file(conversations: Iterable[Conversation]) -> Iterator[tuple[str, list[Conversation]]]:
    """Rows in batches of one file each, in order."""
    for path, of_file in groupby(conversations, lambda conversation: conversation.source.file):
        for batch in in_batches(of_file, BATCH_ROWS):
            yield path, batch
