"""The rows of a data set's files in batches, in order, for whoever renders or surveys them.

Rows that can't be read stand in their place, as the complaint about them. Memory does not grow with the files, but for
the numbers of the rows that a mix chooses.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from likely import storage
from likely.data.formats import MAX_KEYS_TOLD, WRITE, Reading, ReadOptions
from likely.data.hub import HubRows, rows_of
from likely.data.mixture import choose_rows, parse_parts
from likely.data.parallel import in_batches
from likely.data.reading import Rows
from likely.errors import DataError
from likely.types import Conversation, IntArray, Source

BATCH_ROWS = 256
FEW_ROWS = 32  # of which only some of a file are wanted
Row = tuple[Any, int]  # decoded, or a DataError; and its line
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # such as map
Advance = Callable[[int, float], None]  # so many rows more, and the share of all the data that is done
Progress = Callable[[str], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Batch:
    """Rows of one file, and the share of all the data that was read with them."""

    part: int
    path: str
    rows: list[Row]
    share_read: float


@dataclass
class Parsed:
    """What parsing found in rows of one file. ``good`` are those of a batch that could be parsed, by their number in
    it."""

    num_rows: int = 0
    num_good: int = 0
    good: list[int] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    bad: list[DataError] = field(default_factory=list)

    def add(self, other: Parsed) -> None:
        """Take in the counts of the next batch."""
        self.num_rows += other.num_rows
        self.num_good += other.num_good
        self.shapes.update(other.shapes)
        self.notes.update(other.notes)
        for key, count in other.ignored.items():
            if key in self.ignored or len(self.ignored) < MAX_KEYS_TOLD:
                self.ignored[key] += count


def parse_batch(options: ReadOptions, batch: Batch) -> tuple[list[Conversation], Parsed]:
    """The conversations of a batch, and what was found on the way."""
    reading = Reading(batch.path, options)
    parsed = Parsed(len(batch.rows))
    conversations = []
    for number, (row, line) in enumerate(batch.rows):
        try:
            if isinstance(row, DataError):
                raise row
            conversation = reading.parse(row, Source(batch.path, line))
            _require_json(conversation)
            conversations.append(conversation)
            parsed.good.append(number)
        except DataError as error:
            parsed.bad.append(error)
    parsed.num_good = len(conversations)
    parsed.shapes.update(reading.shapes)
    parsed.ignored, parsed.notes = reading.ignored, reading.notes
    return conversations, parsed


def _require_json(conversation: Conversation) -> None:
    """Parquet holds dates and bytes, which no template could be told."""
    if not conversation.tools and not any(m.fields for m in conversation.messages):
        return
    try:
        json.dumps([dict(m.fields) for m in conversation.messages] + list(conversation.tools), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a message or a tool holds what JSON can't: {error}",
            place=str(conversation.source),
            way_out="write it as text, or leave the field out",
        ) from error


def _parse_only(options: ReadOptions, batch: Batch) -> tuple[int, Parsed, float]:
    return batch.part, parse_batch(options, batch)[1], batch.share_read


class Intake:
    """The rows of all files that ``data`` names. Files that are mixed by shares are read twice: first to know how many
    rows each has.

    ``parsed`` counts what was found, file by file: fill it by :meth:`choose` and :meth:`note`.

    Raises:
        ConfigError: ``path`` can't be understood.
        DataError: a file can't be read, or has no row that can be.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.parts = parse_parts(path)
        self.options = options
        self.parsed = [Parsed() for _ in self.parts]
        self.hashes = [""] * len(self.parts)
        self._unread: list[DataError] = []
        self._rows = [rows_of(part.path, self._unread.append) for part in self.parts]
        self._chosen: list[IntArray] | None = None

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each file; 0 where there is no such file."""
        sizes = []
        for rows in self._rows:
            if isinstance(rows, HubRows):
                sizes.append(rows.num_bytes)
            else:
                sizes.append(os.path.getsize(rows.path) if _is_file(rows.path) else 0)  # noqa: PTH202
        return sizes

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(self._sizes)

    def contents(self) -> list[str] | None:
        """What names the content of each file, to be known before it is read: the SHA-256 of its bytes. None where a
        file can't be read, which its reader will say better, or is a data set of the hub, whose package has no public
        name for a content."""
        if not all(isinstance(rows, Rows) and _is_file(rows.path) for rows in self._rows):
            return None
        return [storage.hash_file(Path(rows.path)) for rows in self._rows]

    def contents_read(self) -> list[str]:
        """:meth:`contents` of what was read, which may have been changed since that was asked for."""
        return list(self.hashes)

    @property
    def is_mix(self) -> bool:
        """Whether not all rows are taken, so that :meth:`choose` must come first."""
        return self.parts[0].share is not None

    def choose(self, run: Run, advance: Advance, complain: Callable[[list[DataError]], None]) -> None:
        """Read the files of a mix to the end and choose its rows among those that can be parsed.

        Args:
            run: does the work, as ``map`` would.
            complain: is given the complaints of each batch.
        """
        good: list[list[IntArray]] = [[] for _ in self.parts]
        for part, parsed, share in run(partial(_parse_only, self.options), self._batches()):
            complain(parsed.bad)
            good[part].append(np.array(parsed.good, np.int64) + self.parsed[part].num_rows)
            self.parsed[part].add(parsed)
            advance(parsed.num_rows, share)
        numbers = [np.concatenate(found) if found else np.empty(0, np.int64) for found in good]
        self.require_rows()
        taken = choose_rows(self.parts, list(map(len, numbers)), self.options.seed)
        self._chosen = [rows[chosen] for rows, chosen in zip(numbers, taken, strict=True)]

    def note(self, part: int, parsed: Parsed) -> None:
        """Count what was found in a batch of :meth:`batches`; that of a mix has been counted before."""
        if not self.is_mix:
            self.parsed[part].add(parsed)

    def batches(self) -> Iterator[Batch]:
        """The rows that are used."""
        assert not self.is_mix or self._chosen is not None  # noqa: S101
        return self._batches()

    def find(self, wanted: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """The rows of some ``(file's number, line)``, as far as they can be read, whether they are used or not."""
        by_part: dict[int, set[int]] = {}
        for part, line in wanted:
            by_part.setdefault(part, set()).add(line)
        for part, lines in sorted(by_part.items()):
            path = self.parts[part].path
            found = ((row, source.line) for row, source in rows_of(path, lambda _: None) if source.line in lines)
            for rows in in_batches(islice(found, len(lines)), FEW_ROWS):
                yield Batch(part, path, rows, 0.0)

    def require_rows(self) -> None:
        """Once all is read: refuse a file without any row that can be parsed.

        Raises:
            DataError: as said.
        """
        for part, parsed in zip(self.parts, self.parsed, strict=True):
            if not parsed.num_good:
                message = f"every row is bad ({parsed.num_rows})" if parsed.num_rows else "the file has no rows"
                raise DataError(message, place=part.path, way_out=f"write {WRITE}, one a line")

    def told(self) -> tuple[tuple[str, ...], ...]:
        """What a person should see about each file, line by line."""
        told = []
        for part, parsed, rows in zip(self.parts, self.parsed, self._rows, strict=True):
            reading = Reading(part.path, self.options)
            reading.shapes.update(parsed.shapes)  # type: ignore[arg-type]
            reading.ignored, reading.notes = parsed.ignored, parsed.notes
            lines = reading.told() if parsed.shapes else []
            told.append((*lines, *([f"{rows.num_blank:,} blank lines are passed over"] if rows.num_blank else [])))
        return tuple(told)

    def _batches(self) -> Iterator[Batch]:
        known = all(self._sizes)
        before, total = 0.0, sum(self._sizes) if known else len(self._sizes)
        for part, num_bytes in enumerate(self._sizes):
            path, size = self.parts[part].path, (num_bytes if known else 1) / total
            for rows, share in self._rows_of(part):
                yield Batch(part, path, rows, before + size * share)
            before += size

    def _rows_of(self, part: int) -> Iterator[tuple[list[Row], float]]:
        rows = self._rows[part]
        self._unread.clear()
        found = _in_order(rows, self._unread)
        if self._chosen is not None:
            found = _picked(found, self._chosen[part])
        for batch in in_batches(found, BATCH_ROWS):
            yield batch, rows.share_read
        if self.hashes[part] not in {"", rows.sha256}:
            raise DataError("the file was changed while it was read", place=rows.path, way_out="start again")
        self.hashes[part] = rows.sha256


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)  # noqa: PTH113  (a Path raises where a name is too long)
    except ValueError:  # a NUL in the name
        return False


def _in_order(rows: Iterable[tuple[Any, Source]], unread: list[DataError]) -> Iterator[Row]:
    """The rows with those that can't be read in their place."""
    for row, source in rows:
        yield from _drain(unread)
        yield row, source.line
    yield from _drain(unread)


def _drain(unread: list[DataError]) -> Iterator[Row]:
    for error in unread:
        yield error, int(error.place.rpartition(":")[2])
    unread.clear()


def _picked(rows: Iterator[Row], wanted: IntArray) -> Iterator[Row]:
    position = 0
    for number, row in enumerate(rows):
        if position < len(wanted) and wanted[position] == number:
            position += 1
            yield row
