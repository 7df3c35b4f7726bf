"""Files of scored rows, as ``likely score`` writes them -> their records, all in order or one by its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from likely.errors import DataError

MAX_LINE = 256 << 20  # bytes: a record of 16,000 tokens has about 3 MB
FIRST_BYTES = 1 << 16
ROWS_AT_ONCE = 16  # of a Parquet file


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def is_score_file(path: Path) -> bool:
    """Whether a file begins as a file of scores does; no more than its beginning is read."""
    try:
        if is_parquet(path):
            from pyarrow import parquet  # noqa: PLC0415  (only where it is asked for)

            return {"source", "nll_nats", "tokens"} <= set(parquet.ParquetFile(path).schema_arrow.names)
        with path.open("rb") as file:
            beginning = file.read(FIRST_BYTES)
    except (OSError, ValueError):
        return False
    return beginning.startswith(b'{"source"') and b'"nll_nats"' in beginning


def read_records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """``(place, done, record)`` of each record: where it stands, for :func:`record_at`, and how many bytes of the file
    are read so far.

    Raises:
        DataError: a line is no record of scores.
        OSError: the file can't be read.
    """
    if is_parquet(path):
        yield from _read_parquet(path)
        return
    with path.open("rb") as file:
        place, line_number = 0, 0
        while line := file.readline(MAX_LINE + 1):
            line_number += 1
            done = place + len(line)
            if line.strip():
                yield place, done, _parse(line, f"{path.name}:{line_number}")
            place = done


def record_at(path: Path, place: int, most: int = MAX_LINE) -> dict[str, Any]:
    """The record at a place.

    Args:
        most: bytes that it may have.

    Raises:
        DataError: there is none, or it is longer.
        OSError: the file can't be read.
    """
    if is_parquet(path):
        return _parquet_at(path, place, most)
    with path.open("rb") as file:
        file.seek(place)
        return _parse(file.readline(most + 1), path.name, most)


def _parse(line: bytes, place: str, most: int = MAX_LINE) -> dict[str, Any]:
    if len(line) > most:
        raise _too_long(place, most)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "this is no record of likely score", place=place, way_out="give a file that likely score wrote"
        ) from error
    return _checked(record, place)


def _too_long(place: str, most: int) -> DataError:
    return DataError(f"a row of over {most >> 20} MB", place=place, way_out="score shorter rows")


def _checked(record: Any, place: str) -> dict[str, Any]:
    tokens = record.get("tokens") if isinstance(record, dict) else None
    if not isinstance(tokens, list) or "nll_nats" not in record or not all(isinstance(t, dict) for t in tokens):
        raise DataError("this is no record of likely score", place=place, way_out="give a file that likely score wrote")
    return dict(record)


def _open_parquet(path: Path) -> Any:
    import pyarrow  # noqa: PLC0415  (only where it is asked for)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        return parquet.ParquetFile(path, memory_map=False)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError("no Parquet file that can be read", place=path.name, way_out="write it anew") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    with _open_parquet(path) as table:
        size, place = path.stat().st_size, 0
        for batch in table.iter_batches(ROWS_AT_ONCE, use_threads=False):
            for record in batch.to_pylist():
                done = size * (place + 1) // max(1, table.metadata.num_rows)
                yield place, done, _checked(record, f"{path.name}, row {place + 1}")
                place += 1


def _parquet_at(path: Path, place: int, most: int) -> dict[str, Any]:
    with _open_parquet(path) as table:
        group = 0
        while group < table.num_row_groups and place >= table.metadata.row_group(group).num_rows:
            place -= table.metadata.row_group(group).num_rows
            group += 1
        groups = [group] if group < table.num_row_groups else []
        # A few rows at a time: other programs put a whole file into one group.
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, use_threads=False):
            if place < len(batch):
                row = batch.slice(place, 1)
                if row.nbytes > most:
                    raise _too_long(path.name, most)
                return _checked(row.to_pylist()[0], path.name)
            place -= len(batch)
    raise DataError("there is no such row", place=path.name)
