"""Bytes of a data file -> rows, one at a time and in bounded memory. Every complaint names file and line.

JSONL (one object a line), one JSON array, CSV or TSV with a header, and Parquet; all but Parquet also as gzip or zstd.
What a file is, its first bytes say; CSV has none of its own, so there the extension does. The hash is taken of the very
bytes that are parsed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from likely.data import parquet
from likely.data.kinds import HEAD, PARQUET, USABLE, other_kind, packing, wide_encoding
from likely.data.parquet import of_table
from likely.data.strict_json import MAX_ROW_BYTES, Elements, breaks_off, parse_json
from likely.errors import DataError, first_line, quoted
from likely.types import Source

MAX_RATIO = 250  # unpacked bytes per packed byte; text of people packs about 4:1, a bomb 1000:1
FREE_BYTES = 4 * 2**20  # unpacked before the ratio counts: a small file of equal rows is no bomb
ENDINGS = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"}
MOST_NAMES, FILES_NAMED = 10_000, 3  # of a folder that are looked at, and told
UNPACK = "unpack it yourself if that is meant"
BadRow = Callable[[DataError], None]


class Rows:
    """The rows of a file: iterate it once for ``(row, source)``.

    Args:
        on_bad_row: called with the complaint about a row that can't be read, which is then passed over; without it the
            complaint is raised. A file that can't be read at all is raised either way.

    After the last row ``sha256`` is the hash of the file's bytes and ``num_blank`` the number of lines without content.
    ``share_read`` is how much of the file has been read so far, from 0 to 1.

    Raises:
        DataError: no such file, not an ordinary file, of another kind or encoding, or a row that can't be read.
    """

    def __init__(self, path: str | Path, on_bad_row: BadRow | None = None) -> None:
        self.path = str(path)
        self.sha256 = ""
        self.num_blank = 0
        self.share_read = 0.0
        self._on_bad_row = on_bad_row

    def __iter__(self) -> Iterator[tuple[Any, Source]]:
        self.num_blank = 0
        try:
            with self._open() as file:
                size = max(os.fstat(file.fileno()).st_size, 1)
                head = file.read(HEAD)
                file.seek(0)
                self._refuse_other_kinds(head)
                suffixes = Path(self.path).suffixes
                if head.startswith(PARQUET):
                    yield from self._parquet(file)
                    return
                if suffixes[-1:] == [".parquet"]:
                    raise self._wrong("named .parquet, but it does not begin as Parquet files do", USABLE)
                packed = packing(head)
                if packed:
                    self._refuse_bomb(file, packed)
                hashed = _Hashed(file)
                for row in self._stream(hashed, packed, suffixes):
                    self.share_read = min(hashed.num_bytes / size, 1.0)
                    yield row
                while hashed.read(1 << 20):
                    pass  # what an unpacker left behind belongs to the file too
                self.sha256 = hashed.digest.hexdigest()
        except OSError as error:
            raise self._wrong(error.strerror or str(error), "make the file readable") from error

    def _wrong(self, message: str, way_out: str, line: int = 0) -> DataError:
        return DataError(message, place=f"{self.path}:{line}" if line else self.path, way_out=way_out)

    def _bad_row(self, error: DataError) -> None:
        if self._on_bad_row is None:
            raise error
        self._on_bad_row(error)

    def _open(self) -> BinaryIO:
        try:
            mode = Path(self.path).stat().st_mode
        except FileNotFoundError as error:
            raise self._wrong("no such file", "check the path") from error
        except ValueError as error:  # a NUL in the name
            raise self._wrong(str(error), "check the path") from error
        if stat.S_ISDIR(mode):
            raise self._folder()
        if not stat.S_ISREG(mode):
            raise self._wrong("this is a pipe or a device, not an ordinary file", "save the rows to a file first")
        return Path(self.path).open("rb")

    def _folder(self) -> DataError:
        """What to say of a folder: which files of it could be meant."""
        with os.scandir(self.path) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES) if entry.is_file()]
        found = sorted(name for name in names if {*map(str.lower, Path(name).suffixes[-2:])} & ENDINGS)
        if not found:
            return self._wrong("this is a folder, and has no data file in it", f"{USABLE}, by the file's name")
        named = ",".join(str(Path(self.path) / name) for name in found[:FILES_NAMED])
        more = f" and {len(found) - FILES_NAMED:,} more" if len(found) > FILES_NAMED else ""
        return self._wrong("this is a folder", f"name its files, with commas between them: {named}{more}")

    def _refuse_other_kinds(self, head: bytes) -> None:
        other = other_kind(head)
        if other:
            kind, way_out = other
            raise self._wrong(f"this is {kind}", way_out)
        wide = wide_encoding(head)
        if wide:
            raise self._wrong(f"this is {wide}, not UTF-8", "save the file as UTF-8", line=1)

    def _refuse_bomb(self, file: BinaryIO, packed: str) -> None:
        """Look at the beginning of a packed file before any of its rows, each of which may take a while."""
        begun = _Unpacked(_Hashed(file), packed, self._wrong)
        left = 8 * FREE_BYTES
        while left > 0 and (data := begun.read(1 << 20)):
            left -= len(data)
        file.seek(0)

    def _stream(self, hashed: _Hashed, packed: str | None, suffixes: list[str]) -> Iterator[tuple[Any, Source]]:
        raw: Any = _Unpacked(hashed, packed, self._wrong) if packed else hashed
        stream: io.BufferedReader[Any] = io.BufferedReader(raw, 1 << 20)
        head = stream.peek(HEAD)[:HEAD]
        if packed:
            self._refuse_other_kinds(head)
            if packing(head) or head.startswith(PARQUET):
                raise self._wrong("a packed file inside a packed file", f"unpack it: {USABLE}")
        table = next((s for s in suffixes[-2:] if s.lower() in {".csv", ".tsv"}), None)
        if table:
            return self._csv(stream, "\t" if table.lower() == ".tsv" else ",")
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return self._array(stream)
        return self._jsonl(stream)

    def _jsonl(self, stream: io.BufferedReader[Any]) -> Iterator[tuple[Any, Source]]:
        opening: tuple[DataError, Source] | None = None  # a first row that may be a whole file's beginning
        first = True
        for line in itertools.count(1):
            raw = stream.readline(MAX_ROW_BYTES + 1)
            if not raw:
                break
            source = Source(self.path, line)
            try:
                raw = self._whole_line(raw, stream, line)
                if not raw.strip():
                    self.num_blank += 1
                    continue
                row = parse_json(raw, source)
            except DataError as error:
                if opening:
                    raise self._one_document(opening[1]) from error
                if first and len(raw) <= MAX_ROW_BYTES and breaks_off(raw):
                    opening, first = (error, source), False
                    continue
                self._bad_row(error)
                first = False
                continue
            if opening:
                self._bad_row(opening[0])
            opening, first = None, False
            yield row, source
        if opening:
            self._bad_row(opening[0])

    def _one_document(self, source: Source) -> DataError:
        message = "this is JSON over several lines, not one row a line"
        return self._wrong(message, "write one row a line (JSONL), or one JSON array of the rows", source.line)

    def _whole_line(self, raw: bytes, stream: io.BufferedReader[Any], line: int) -> bytes:
        if len(raw) <= MAX_ROW_BYTES:
            return raw
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(MAX_ROW_BYTES)
        raise self._wrong(f"the line is over {MAX_ROW_BYTES >> 20} MB", "one row a line; remove or split it", line)

    def _array(self, stream: io.BufferedReader[Any]) -> Iterator[tuple[Any, Source]]:
        for number, found in enumerate(Elements(io.TextIOWrapper(stream, "utf-8-sig", newline=""), self._wrong), 1):
            try:
                row = found.parsed(Source(self.path, number))
            except DataError as error:
                self._bad_row(error)
                continue
            yield row, Source(self.path, number)

    def _csv(self, stream: io.BufferedReader[Any], delimiter: str) -> Iterator[tuple[Any, Source]]:
        size, line = 0, 1  # bytes so far of the row that is being read, and where it begins

        def lines() -> Iterator[str]:
            nonlocal size
            for number in itertools.count(1):
                raw = stream.readline(MAX_ROW_BYTES + 1)
                if not raw:
                    return
                raw = self._whole_line(raw, stream, number)
                size += len(raw)
                if size > 2 * MAX_ROW_BYTES:  # the reader itself bounds one field
                    message = f"the row is over {2 * MAX_ROW_BYTES >> 20} MB"
                    raise self._wrong(message, "close its quotes, or remove or split it", line)
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    message = f"not UTF-8 at byte {error.start} of the line"
                    raise self._wrong(message, "save the file as UTF-8", number) from error

        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            size, line = 0, reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                way_out = "close every quote and double those inside; end lines with LF or CR LF"
                raise self._wrong(f"broken CSV: {error}", way_out, line) from error
            if values is None:
                return
            if not values:
                self.num_blank += 1
            elif names is None:
                names = values
                self._refuse_header(names, line)
            elif len(values) != len(names):
                message = f"{len(values)} fields under a header of {len(names)} columns"
                self._bad_row(self._wrong(message, "put quotes around text that holds the separator", line))
            else:
                yield dict(zip(names, values, strict=True)), Source(self.path, line)

    def _refuse_header(self, names: list[str], line: int) -> None:
        self._refuse_twice(names, line)
        if names[0].lower().startswith("sep=") and not "".join(names[1:]):
            raise self._wrong("a line that tells spreadsheets the separator", "remove it", line)
        other = next((mark for mark in ";\t|," if len(names) == 1 and mark in names[0]), None)
        if other:
            message = f"the header is one column, {quoted(names[0])}"
            raise self._wrong(message, "separate columns with commas, or with tabs in a file named .tsv", line)

    def _refuse_twice(self, names: list[str], line: int = 0) -> None:
        if len(set(names)) < len(names):
            raise self._wrong("a column name stands twice in the header", "name each column once", line)

    def _parquet(self, file: BinaryIO) -> Iterator[tuple[Any, Source]]:
        import pyarrow.parquet  # noqa: PLC0415  (slow to import, and few files are Parquet)

        before = os.fstat(file.fileno())
        hashed = _Hashed(file)
        while hashed.read(1 << 20):
            pass
        self.sha256 = hashed.digest.hexdigest()
        file.seek(0)
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            self._refuse_twice(table.schema_arrow.names)
            unpacked, most_rows = parquet.sizes(table.metadata)
            if unpacked > FREE_BYTES and unpacked > MAX_RATIO * before.st_size:
                raise self._wrong(f"unpacks to over {MAX_RATIO} times its size", UNPACK)
            for batch in table.iter_batches(batch_size=most_rows):
                for row in self._rows_of(parquet.in_microseconds(batch), number + 1):
                    number += 1
                    self.share_read = number / table.metadata.num_rows
                    if row is not None:
                        yield of_table(row), Source(self.path, number)
        except (pyarrow.ArrowException, OSError) as error:
            text = str(error).strip().splitlines()[0]
            raise self._wrong(f"broken Parquet: {text}", "write the file again", number) from error
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise self._wrong("the file was changed while it was read", "start again")

    def _rows_of(self, batch: Any, number: int) -> Iterator[dict[str, Any] | None]:
        """The rows of a batch whose first is that ``number``; None for one with a value that Python can't hold, as text
        that is not UTF-8 or a date beyond the year 9999."""
        if not parquet.is_too_large(batch, MAX_ROW_BYTES):
            try:
                yield from batch.to_pylist()
                return
            except (ValueError, LookupError, OverflowError):
                pass  # one of them; which, each row alone shows
        for i in range(batch.num_rows):
            alone = batch.slice(i, 1)
            if parquet.is_too_large(alone, MAX_ROW_BYTES):
                message = f"the row is over {MAX_ROW_BYTES >> 20} MB"
                self._bad_row(self._wrong(message, "remove or split it", number + i))
                yield None
                continue
            try:
                row = alone.to_pylist()[0]
            except (ValueError, LookupError, OverflowError) as error:
                row = None
                self._bad_row(self._wrong(f"a value can't be read: {first_line(error)}", "write it again", number + i))
            yield row


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        self.num_bytes += len(data)
        return len(data)


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as long as it does not swell beyond MAX_RATIO."""

    def __init__(self, packed: _Hashed, packing: str, wrong: Callable[[str, str], DataError]) -> None:
        import pyarrow  # noqa: PLC0415

        self._packed, self._packing, self._wrong = packed, packing, wrong
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), packing)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            raise self._wrong(f"broken {self._packing}: {error}", "copy or pack the file again") from error
        self._num_bytes += len(data)
        if self._num_bytes > FREE_BYTES and self._num_bytes > MAX_RATIO * self._packed.num_bytes:
            raise self._wrong(f"unpacks to over {MAX_RATIO} times its size", UNPACK)
        buffer[: len(data)] = data
        return len(data)
