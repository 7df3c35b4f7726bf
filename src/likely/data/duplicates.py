"""Exact and near duplicates among texts.

Near: the Jaccard similarity of two texts' sets of three-word shingles, estimated by MinHash (Broder 1997; the library
``rensa``) and looked for by locality-sensitive hashing: rows that agree in a whole band of their signature are
compared. With 128 values in 32 bands of 4, a pair of similarity 0.8 shares no band once in 10^7.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rensa import RMinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from likely.types import IntArray

NUM_VALUES = 128
BAND = 4  # four 16-bit values are one 64-bit key
SHINGLE = 3
SEED = 1
NEAR = 0.8

Signatures = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint64]
# Thai, Lao, Burmese, Khmer, Japanese and Chinese
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd and without pattern: 2^64 over the golden ratio


class RunningHash:
    """64 bits of all text so far. Two of a million different texts agree by chance once in 4 * 10^7."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> None:
        self._hash.update(text.encode())

    def value(self) -> int:
        return int.from_bytes(self._hash.digest(), "little")


def hash_of(text: str) -> int:
    """The :class:`RunningHash` of one text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def words_of(text: str) -> list[str]:
    """The words of a text, letter case aside; its characters where a script without spaces is used."""
    words = text.casefold().split()
    if text.isascii() or not _UNSPACED.search(text):
        return words or [""]
    return list("".join(words))


def digests(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """MinHash values of the texts' shingles, [texts, NUM_VALUES]. Those of two texts taken together are the smaller
    ones of theirs. A text of fewer words than a shingle has one shingle."""
    hashes = RMinHash.hash_token_sets([words_of(text) for text in texts])
    counts = np.array([len(row) for row in hashes], np.int64)
    flat = np.fromiter(itertools.chain.from_iterable(hashes), np.uint64, int(counts.sum()))
    ends = np.cumsum(counts)
    # A shingle's hash is made of its words'; words of the next text don't count.
    mixed = flat.copy()
    word = np.arange(len(flat)) - np.repeat(ends - counts, counts)
    left = np.repeat(counts, counts) - word
    for i in range(1, SHINGLE):
        mixed = mixed * MIX + np.where(left > i, np.roll(flat, -i), np.uint64(i))
    mixed ^= mixed >> np.uint64(31)
    kept = (left >= SHINGLE) | (word == 0)
    per_text = np.add.reduceat(kept.astype(np.int64), ends - counts) if len(counts) else counts
    offsets = np.concatenate([[0], np.cumsum(per_text)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(mixed[kept], offsets, NUM_VALUES, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_VALUES)


def to_signatures(digests_NK: npt.NDArray[np.uint32]) -> Signatures:
    """Sixteen bits of each value, to save memory: two different ones agree once in 65536."""
    return digests_NK.astype(np.uint16)


def similarity(a: Signatures, b: Signatures) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of corresponding rows; the standard error is at most 0.045."""
    return np.asarray((a == b).mean(axis=-1), np.float64)


def groups_of(pairs: IntArray, num_rows: int) -> IntArray:
    """A group number for each row: rows of a pair share one, and so does what is paired with them, and so on."""
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(num_rows, num_rows))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def near_pairs(signatures_NK: Signatures, threshold: float = NEAR) -> IntArray:
    """Pairs (smaller, larger row), [pairs, 2], that join all rows that are near. Within a bucket a row is compared
    with its neighbour and with the bucket's first, so the work grows with the rows and not with their pairs."""
    found = [np.empty((0, 2), np.int64)]
    keys_NB = np.ascontiguousarray(signatures_NK).view(np.uint64)
    for band in range(keys_NB.shape[1]):
        key = keys_NB[:, band]
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if not len(same):
            continue
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        first = starts[np.searchsorted(starts, same, side="right") - 1]
        candidates = np.unique(
            np.concatenate([np.stack([order[same - 1], order[same]], 1), np.stack([order[first], order[same]], 1)]),
            axis=0,
        )
        for part in np.array_split(candidates, 1 + len(candidates) // 100_000):
            near = similarity(signatures_NK[part[:, 0]], signatures_NK[part[:, 1]]) >= threshold
            found.append(np.sort(part[near], axis=1).astype(np.int64))
    return np.unique(np.concatenate(found), axis=0)
