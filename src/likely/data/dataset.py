"""Data files -> examples, and the order in which steps take them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar, overload

import numpy as np

from likely.data.formats import Reading, ReadOptions, Rejected
from likely.data.lengths import LengthCounts, OnTooLong, fit
from likely.data.mixture import Part, choose_rows, parse_parts
from likely.data.proof import prove_stops
from likely.data.render import Renderer
from likely.errors import DataError
from likely.types import ROLES, Conversation, Example, IntArray

MAX_REJECTED_TOLD = 20
Item = TypeVar("Item")
Track = Callable[[Iterable[Conversation], str, int], Iterable[Conversation]]


class OnDemand(Sequence[Item]):
    """``length`` things, the i-th of which is made by ``make(i)`` whenever somebody asks for it."""

    def __init__(self, length: int, make: Callable[[int], Item]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(index, slice):
            return tuple(map(self._make, range(self._length)[index]))
        return self._make(range(self._length)[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self._make, range(self._length))


@dataclass(frozen=True)
class File:
    """A file that was read, the hash of its bytes, and how many of its rows are used."""

    path: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Dataset:
    """Examples of one file or several. ``row_N`` is the index of each example's conversation: a conversation whose
    template rewrites history gives several. ``num_unweighted`` counts the examples left out since all their weights are
    0. ``told_of_files`` are the lines about each file that a person should see, ``told_of_rows`` those about all
    rows; ``rejected`` the rows that were left out as bad."""

    path: str
    files: tuple[File, ...]
    conversations: Sequence[Conversation]
    examples: Sequence[Example]
    row_N: tuple[int, ...]
    num_unweighted: int
    told_of_files: tuple[tuple[str, ...], ...] = ()
    told_of_rows: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    @property
    def told(self) -> list[str]:
        """What a person should see about the data, line by line."""
        told = [
            f"{file.path}: {line}" for file, lines in zip(self.files, self.told_of_files, strict=True) for line in lines
        ]
        if len(self.files) > 1:
            told.append("mixed: " + ", ".join(f"{file.rows:,} rows of {file.path}" for file in self.files))
        return [*told, *(f"{self.path}: {line}" for line in self.told_of_rows), *_told_rejected(self.rejected)]

    @property
    def sha256(self) -> str:
        """The hash of the file, or of the hashes of several."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def rejected_lines(self) -> str:
        """JSONL: the file, the line and the reason of each row that was left out."""
        return "".join(json.dumps(asdict(rejected), ensure_ascii=False) + "\n" for rejected in self.rejected)

    def tokens_per_role(self) -> dict[str, dict[str, float]]:
        """``{role: {"tokens": count, "supervised": count, "weight": sum}}`` over all examples."""
        counts = np.zeros((len(ROLES), 3))
        for example in self.examples:
            for column, values in enumerate(
                (np.ones(len(example.weights_T)), example.weights_T > 0, example.weights_T)
            ):
                counts[:, column] += np.bincount(example.role_T, weights=values, minlength=len(ROLES))
        return {
            role: {"tokens": int(tokens), "supervised": int(supervised), "weight": float(weight)}
            for role, (tokens, supervised, weight) in zip(ROLES, counts, strict=True)
            if tokens
        }


def load_dataset(
    path: str,
    renderer: Renderer,
    max_length: int,
    track: Track | None = None,
    options: ReadOptions | None = None,
    on_too_long: OnTooLong = "error",
    *,
    keep_unweighted: bool = False,
) -> Dataset:
    """Read and render data.

    Args:
        path: a file, several (``a.jsonl,b.jsonl``), or a mix of them (``a.jsonl:0.7,b.jsonl:0.3``).
        max_length: the longest example allowed, in tokens.
        track: shows progress: called with the rows, a title and their number.
        keep_unweighted: keep examples whose weights are all 0, to look at them.

    Raises:
        DataError: a row can't be read, rendered or proved; rows over ``max_length``; nothing left to train on.
        ConfigError: ``path`` can't be understood.
    """
    parts = parse_parts(path)
    readings = [Reading(part.path, options) for part in parts]
    chosen = _choose(parts, readings, options.seed if options else 0)
    conversations = [conversation for taken in chosen for conversation in taken]
    owners = [reading for reading, taken in zip(readings, chosen, strict=True) for _ in taken]
    renderer.notes.clear()
    lengths = LengthCounts()
    examples: list[Example] = []
    row_N: list[int] = []
    too_long: list[Example] = []
    num_rendered = num_unweighted = 0
    for row, conversation in enumerate(track(conversations, "reading", len(conversations)) if track else conversations):
        for example in _rendered(renderer, conversation, owners[row]):
            num_rendered += 1
            if not (keep_unweighted or example.weights_T.any()):
                num_unweighted += 1
                continue
            if on_too_long == "error" and len(example.token_ids_T) > max_length:
                too_long.append(example)
                continue
            fitted = fit(example, max_length, on_too_long, lengths)
            if fitted is not None:
                examples.append(fitted)
                row_N.append(row)
    if too_long:
        raise _too_long(too_long, num_rendered - num_unweighted, max_length)
    rejected = tuple(r for reading in readings for r in reading.rejected)
    if not examples:
        raise _nothing_left(path, lengths, rejected)
    files = tuple(File(r.path, r.sha256, len(taken)) for r, taken in zip(readings, chosen, strict=True))
    return Dataset(
        *(path, files, tuple(conversations), tuple(examples), tuple(row_N), num_unweighted),
        told_of_files=tuple(tuple(reading.told()) for reading in readings),
        told_of_rows=(*renderer.told(), *lengths.told(max_length)),
        rejected=rejected,
    )


def _choose(parts: Sequence[Part], readings: Sequence[Reading], seed: int) -> list[list[Conversation]]:
    """The rows of each file that are used."""
    rows = [list(reading) for reading in readings]
    chosen = choose_rows(parts, [len(found) for found in rows], seed)
    return [[found[i] for i in taken] for found, taken in zip(rows, chosen, strict=True)]


def _rendered(renderer: Renderer, conversation: Conversation, reading: Reading) -> list[Example]:
    try:
        examples = renderer.render(conversation)
        prove_stops(conversation, examples, renderer)
        return examples
    except DataError as error:
        if not reading.options.skip_bad_rows:
            raise
        reading.reject(error)
        return []


def _too_long(examples: list[Example], num_examples: int, max_length: int) -> DataError:
    first = examples[0]
    return DataError(
        f"{len(first.token_ids_T)} tokens, and {len(examples)} of {num_examples} examples are over the limit of"
        f" {max_length} tokens (the longest has {max(len(e.token_ids_T) for e in examples)})",
        place=str(first.source),
        way_out="raise --max-length if the model's context allows it, shorten the rows, or say --on-too-long",
    )


def _nothing_left(path: str, lengths: LengthCounts, rejected: tuple[Rejected, ...]) -> DataError:
    if rejected:
        first = rejected[0]
        message = f"every row is bad; the first is line {first.line}: {first.reason}"
        return DataError(message, place=path, way_out="correct the rows")
    if lengths.over:
        message = f"nothing is left to train on: {lengths.over} examples are too long"
        return DataError(message, place=path, way_out="raise --max-length or shorten the rows")
    return DataError("every weight is 0, so nothing to train on", place=path, way_out="give some message a weight")


def _told_rejected(rejected: tuple[Rejected, ...]) -> list[str]:
    lines = [f"left out: {r.file}:{r.line}: {r.reason}" for r in rejected[:MAX_REJECTED_TOLD]]
    if len(rejected) > MAX_REJECTED_TOLD:
        lines.append(f"left out: {len(rejected) - MAX_REJECTED_TOLD:,} more rows")
    return lines


def num_steps(num_examples: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run; the last, smaller batch of an epoch is a step like any other."""
    per_epoch = -(-num_examples // batch_size)
    return steps if steps is not None else max(1, round(per_epoch * epochs))


def examples_of_step(step: int, num_examples: int, batch_size: int, seed: int) -> IntArray:
    """Indices of the examples of 1-based ``step``: a pure function of (seed, epoch), so that a run can be resumed,
    repeated or spread over any number of processes without a change of order."""
    per_epoch = -(-num_examples // batch_size)
    epoch, batch = divmod(step - 1, per_epoch)
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)
    return order[batch * batch_size : (batch + 1) * batch_size]
