"""What rendered examples teach, as hashes of their token ids: at which context, what, with which weight.

Ids are what is trained, so rows that differ only in what the template does not write (the id of a tool call), or in the
way that a thought is spelled, are the same here.

For the entropy of the next token (:func:`likely.data.trie.entropy_floor`) a supervised stretch of tokens is cut behind
each control token and where its weight changes. Two such pieces that begin at the same context and end with their only
control token are equal or part before either ends, so along them the entropies add up to that of choosing among whole
pieces, ``w log(W / w)`` for each token of weight w, and one hash stands for all tokens of a piece. A piece that ends
otherwise could be the beginning of another one; it is taken token by token, and of it no more than OPEN_TOKENS. What is
left out can only raise the entropy, so what is counted is never too much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from likely.types import ROLES, Example, FloatArray, IntArray

OPEN_TOKENS = 16
_ASSISTANT = ROLES.index("assistant")
_OPEN = 0x9E3779B97F4A7C15


@dataclass
class Taught:
    """Of a batch of rows. Suffixes: M examples, K answers (runs of the assistant's supervised tokens), F pieces."""

    ids_M: list[int] = field(default_factory=list)
    row_of_K: list[int] = field(default_factory=list)
    context_K: list[int] = field(default_factory=list)
    said_K: list[int] = field(default_factory=list)
    context_F: list[int] = field(default_factory=list)
    said_F: list[int] = field(default_factory=list)
    weight_F: list[float] = field(default_factory=list)

    def add(self, row: int, examples: Sequence[Example], control_ids: IntArray) -> None:
        """Take in a row's examples."""
        for example in examples:
            ids = np.ascontiguousarray(example.token_ids_T, np.int64)
            self.ids_M.append(hash_of_ids(ids))
            starts, stops = _stretches((example.weights_T > 0) & (example.role_T == _ASSISTANT))
            contexts = _prefix_hashes(ids, starts)
            self.row_of_K += [row] * len(starts)
            self.context_K += contexts
            self.said_K += [hash_of_ids(ids[a:b]) for a, b in zip(starts, stops, strict=True)]
            self._add_pieces(ids, example.weights_T, control_ids)

    def _add_pieces(self, ids: IntArray, weights_T: FloatArray, control_ids: IntArray) -> None:
        is_control = _among(ids, control_ids)
        starts, stops = _pieces(weights_T, is_control)
        closed = [bool(is_control[stop - 1]) for stop in stops]
        for (start, stop), whole, context in zip(
            zip(starts, stops, strict=True), closed, _prefix_hashes(ids, starts), strict=True
        ):
            weight = float(weights_T[start])
            if whole:
                self.context_F.append(context)
                self.said_F.append(hash_of_ids(ids[start:stop]))
                self.weight_F.append(weight)
                continue
            places = list(range(start, min(stop, start + OPEN_TOKENS)))
            # Whole pieces and single tokens that begin at one context can't be counted together.
            self.context_F += [context ^ _OPEN for context in _prefix_hashes(ids, places)]
            self.said_F += [hash_of_ids(ids[place : place + 1]) for place in places]
            self.weight_F += [weight] * len(places)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The columns by name."""
        kinds = {"row_of_K": np.int32, "weight_F": np.float64}
        return {name: np.array(values, kinds.get(name, np.uint64)) for name, values in vars(self).items()}


def hash_of_ids(ids: IntArray) -> int:
    """64 bits of some token ids."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def combined(hashes: Sequence[int]) -> int:
    """One hash of several, in order."""
    return hash_of_ids(np.array(hashes, np.uint64).view(np.int64))


def answers_hash(said: Sequence[int]) -> int:
    """A hash of all answers of a row; 0 where there is none."""
    return combined(said) if said else 0


def _prefix_hashes(ids: IntArray, ends: Sequence[int]) -> list[int]:
    """The hash of the ids before each of some ascending places."""
    digest = hashlib.blake2b(digest_size=8)
    found, done = [], 0
    for end in ends:
        digest.update(ids[done:end].tobytes())
        found.append(int.from_bytes(digest.copy().digest(), "little"))
        done = end
    return found


def _stretches(wanted_T: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Where runs of True begin, and one past where they end."""
    padded = np.zeros(len(wanted_T) + 2, bool)
    padded[1:-1] = wanted_T
    edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return edges[::2], edges[1::2]


def _among(ids: IntArray, some: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the ids are among some ascending ones: for so few, several times faster than numpy.isin."""
    if not len(some):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = some.take(np.searchsorted(some, ids), mode="clip") == ids
    return found


def _pieces(weights_T: FloatArray, is_control: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Where pieces of one positive weight begin, and one past where they end: behind each control token, or where the
    weight changes."""
    if not len(weights_T):
        return [], []
    cuts = np.flatnonzero((weights_T[1:] != weights_T[:-1]) | is_control[:-1]) + 1
    starts, stops = np.append(0, cuts), np.append(cuts, len(weights_T))
    taken = weights_T[starts] > 0
    return starts[taken].tolist(), stops[taken].tolist()
