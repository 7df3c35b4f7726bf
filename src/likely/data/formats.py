"""Data files -> conversations: which shape a row has, the map of its columns, and what becomes of rows that are wrong.

Every row is looked at, never the first alone. Rows of different shapes may stand in one file, since each is read and
proved by itself; how many there are of each is told. A row that fits two shapes is refused: it can't be known which is
meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from likely.data.hub import HubRows, rows_of
from likely.data.parquet import TableRow
from likely.data.reading import Rows
from likely.data.shapes import KNOWN_KEYS, OPTIONAL, PARSERS, REQUIRED, SHAPES, Notes, Shape, kind_of
from likely.errors import ConfigError, DataError, quoted
from likely.types import Conversation, Source

Format = Literal["auto"] | Shape
WRITE = 'rows of {"messages": [...]} or {"prompt": ..., "completion": ...}'
MAP = "or map columns, as in --columns prompt=question,completion=answer"
MAX_KEYS_TOLD = 100
# A template is asked about the beginnings of a conversation, one a message, so time grows with the square of their
# number: a row of 4,000 messages takes about seven seconds.
MAX_MESSAGES = 5_000
# What silences a turn in other trainers' data, and slips of the pen: read by nobody, such a turn is learnt in full.
OTHER_WEIGHTS = {"train", "training", "mask", "masked", "loss", "loss_weight", "Weight", "weights", "wieght", "weigth"}


@dataclass(frozen=True)
class Rejected:
    """A row that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """How a file's rows are read.

    ``columns`` maps a key of a shape to the column that holds it; only mapped columns are read then. With
    ``skip_bad_rows`` a row that is wrong is left out and listed, instead of stopping everything. ``seed`` chooses the
    rows of a mix of files.
    """

    format: Format = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: bool = False
    seed: int = 0


class Reading:
    """The conversations of one file: iterate it once.

    While and after that: ``shapes`` counts the rows of each shape, ``ignored`` the rows that have a key which nothing
    reads, ``notes`` the rows of which something must be said, ``rejected`` lists what was left out, ``sha256`` is the
    hash of the bytes that were read.

    Raises:
        DataError: the file or a row can't be read; with ``skip_bad_rows`` only the file.
    """

    def __init__(
        self, path: str | Path, options: ReadOptions | None = None, rows: Rows | HubRows | None = None
    ) -> None:
        self.path = str(path)
        self.options = options or ReadOptions()
        self.shapes: Counter[Shape] = Counter()
        self.ignored: Counter[str] = Counter()
        self.notes: Notes = Counter()
        self.rejected: list[Rejected] = []
        self._rows = rows or rows_of(path, self.reject if self.options.skip_bad_rows else None)

    @property
    def sha256(self) -> str:
        return self._rows.sha256

    @property
    def num_blank(self) -> int:
        return self._rows.num_blank

    def reject(self, error: DataError) -> None:
        """Leave out the row that ``error`` is about."""
        file, _, line = error.place.rpartition(":")
        self.rejected.append(Rejected(file, int(line), f"{error.message}; {error.way_out}"))

    def __iter__(self) -> Iterator[Conversation]:
        found = False
        for row, source in self._rows:
            try:
                conversation = self.parse(row, source)
            except DataError as error:
                if not self.options.skip_bad_rows:
                    raise
                self.reject(error)
                continue
            found = True
            yield conversation
        if not found:
            message = f"every row is bad ({len(self.rejected)})" if self.rejected else "the file has no rows"
            raise DataError(message, place=self.path, way_out=f"write {WRITE}, one a line")

    def parse(self, row: Any, source: Source) -> Conversation:
        """One decoded row, counted.

        Raises:
            DataError: the row is wrong, whatever the options say.
        """
        if self.options.columns:
            row = _mapped(row, self.options.columns, source)
        shape = shape_of(row, source, self.options.format)
        conversation = _parsed(row, shape, source, self.notes)
        self.shapes[shape] += 1
        for key in row:
            if key not in REQUIRED[shape] and key not in OPTIONAL[shape] and len(self.ignored) < MAX_KEYS_TOLD:
                self.ignored[key] += 1
        learnt = [message for message in conversation.messages if message.role == "assistant" and message.weight]
        said = {key for message in learnt for key in message.fields}
        for key in sorted(said & OTHER_WEIGHTS):
            self.notes[f'rows have "{key}" on an answer, which silences nothing: "weight" (0 to 1) does'] += 1
        return conversation

    def told(self) -> list[str]:
        """Lines for people: the shapes found, the keys that nothing reads, and what else must be said."""
        lines = [", ".join(f"{count:,} rows of {shape}" for shape, count in self.shapes.most_common())]
        if len(self.shapes) > 1:
            lines[0] += ": several shapes in one file; --format names the one that is meant"
        if self.ignored:
            keys = ", ".join(quoted(key) for key, _ in self.ignored.most_common(6))
            lines.append(f"keys that nothing reads: {keys}{' ...' if len(self.ignored) > 6 else ''}")
        lines += [f"{count:,} {note}" for note, count in self.notes.items()]
        lines += [f"{self.num_blank:,} blank lines are passed over"] if self.num_blank else []
        return lines


def read_conversations(path: str | Path, options: ReadOptions | None = None) -> list[Conversation]:
    """All conversations of a file, in order; :class:`Reading` gives them one at a time.

    Raises:
        DataError: the file or a row can't be read, with its line.
    """
    return list(Reading(path, options))


def parse_row(row: Any, source: Source, format: Format = "auto") -> Conversation:  # noqa: A002 (the word of the config)
    """One decoded row -> a conversation.

    Raises:
        DataError: the row is of no shape, of two, or a field has the wrong type.
    """
    return _parsed(row, shape_of(row, source, format), source, Counter())


def _parsed(row: Any, shape: Shape, source: Source, notes: Notes) -> Conversation:
    conversation = PARSERS[shape](row, source, notes)
    if len(conversation.messages) > MAX_MESSAGES:
        raise DataError(
            f"a conversation of {len(conversation.messages):,} messages, and the limit is {MAX_MESSAGES:,}",
            place=str(source),
            way_out="split it into several rows",
        )
    return conversation


def shape_of(row: Any, source: Source, format: Format = "auto") -> Shape:  # noqa: A002
    """Which shape a row has.

    Raises:
        DataError: none, or more than one.
    """

    def wrong(message: str, way_out: str) -> DataError:
        return DataError(message, place=str(source), way_out=way_out)

    if not isinstance(row, dict):
        raise wrong(f"a row must be an object, this is {kind_of(row)}", f"write {WRITE}")
    if "weight" in row:
        raise wrong(
            "a weight on the whole row means different things to different providers",
            'put "weight" on the assistant messages',
        )
    keys = keys_of_row(row)
    if format != "auto":
        if not all(key in row for key in REQUIRED[format]):
            wanted = " and ".join(map(repr, REQUIRED[format]))
            raise wrong(f"the row has {keys}", f"format {format} wants {wanted}, {MAP}")
        return format
    fitting = [shape for shape in SHAPES if all(key in row for key in REQUIRED[shape])]
    if "messages" in fitting and ({"prompt", "completion"} & row.keys()):
        other = "prompt" if "prompt" in row else "completion"
        raise wrong(f'the row has both "messages" and "{other}"', "keep one of them, or say which with --format")
    if len(fitting) > 1:
        raise wrong(f"the row fits {' and '.join(fitting)}", "keep the keys of one, or say which with --format")
    if not fitting:
        inside = next((key for key, value in row.items() if _are_rows(value)), None)
        if inside is not None:
            raise wrong(
                f"the row has {keys}, and rows inside {quoted(inside)}", "write those, one a line, or their list"
            )
        raise wrong(f"the row has {keys}", f"write {WRITE}, {MAP}")
    return fitting[0]


def keys_of_row(row: Mapping[str, Any]) -> str:
    """What a row has, for people: some of its keys, and the columns of a table that are null in it."""
    keys = ", ".join(map(quoted, list(row)[:6])) or "no keys"
    nulls = row.nulls if isinstance(row, TableRow) else ()
    return f"{keys}, and null in {', '.join(map(quoted, nulls[:6]))}" if nulls else keys


def _are_rows(value: Any) -> bool:
    """Whether this is a list of rows of some shape."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(first.keys() >= set(REQUIRED[shape]) for shape in SHAPES)


def read_options(format: Format, columns: str | None, skip_bad: bool = False, seed: int = 0) -> ReadOptions:  # noqa: A002
    """The options as settings spell them, with ``columns`` as :func:`parse_columns` reads it.

    Raises:
        ConfigError: ``columns`` can't be understood.
    """
    return ReadOptions(format, parse_columns(columns) if columns is not None else {}, skip_bad, seed)


def parse_columns(text: str) -> dict[str, str]:
    """``prompt=question,completion=answer`` -> ``{"prompt": "question", "completion": "answer"}``.

    Raises:
        ConfigError: not of that form, or a key that no shape has.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not (key and equals and column):
            raise ConfigError(f"columns has {quoted(part)}", way_out="write prompt=question,completion=answer")
        if key not in KNOWN_KEYS:
            raise ConfigError(
                f"columns maps {quoted(key)}, which no format has", way_out=f"use {', '.join(sorted(KNOWN_KEYS))}"
            )
        if key in found:
            raise ConfigError(f"columns maps {quoted(key)} twice", way_out="keep one of them")
        found[key] = column
    return found


def _mapped(row: Any, columns: Mapping[str, str], source: Source) -> Any:
    if not isinstance(row, dict):
        return row
    missing = next((column for column in columns.values() if column not in row), None)
    if missing is not None:
        message = f"no column {quoted(missing)}: the row has {keys_of_row(row)}"
        raise DataError(message, place=str(source), way_out="correct --columns")
    return {key: row[column] for key, column in columns.items()}
