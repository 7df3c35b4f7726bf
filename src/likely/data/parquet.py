"""What tables, Parquet files above all, need to be read safely: how far they unpack, times as Python has them, and keys
that are absent where a column is null."""

from __future__ import annotations

from typing import Any

BATCH_ROWS = 256
BATCH_BYTES = 2**28


def sizes(metadata: Any) -> tuple[int, int]:
    """Bytes of all pages unpacked, and how many rows to take at once: a value of a dictionary may be large, takes no
    room for each row in the file and all of it in memory."""
    unpacked, dictionaries = 0, 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        ours = 0
        for column in map(group.column, range(group.num_columns)):
            unpacked += column.total_uncompressed_size
            if column.has_dictionary_page and column.dictionary_page_offset:
                packed = max(column.data_page_offset - column.dictionary_page_offset, 0)
                ours += packed * max(column.total_uncompressed_size // max(column.total_compressed_size, 1), 1)
        dictionaries = max(dictionaries, ours)
    return unpacked, min(BATCH_ROWS, max(1, BATCH_BYTES // max(dictionaries, 1)))


def in_microseconds(batch: Any) -> Any:
    """A batch with times as Python has them: no nanoseconds, which pandas writes, and no zone."""
    import pyarrow  # noqa: PLC0415

    schema = batch.schema
    for i, column in enumerate(schema):
        kind = column.type
        if pyarrow.types.is_timestamp(kind):
            schema = schema.set(i, column.with_type(pyarrow.timestamp("us")))
        elif kind in (pyarrow.time64("ns"), pyarrow.duration("ns")):
            schema = schema.set(i, column.with_type(getattr(pyarrow, str(kind).partition("[")[0])("us")))
    return batch.cast(schema, safe=False)


class TableRow(dict[str, Any]):
    """A row of a table, where every key of the schema stands in every row: null means that the key is absent. ``nulls``
    are the columns of which that is so."""

    nulls: tuple[str, ...] = ()


def of_table(row: dict[str, Any]) -> TableRow:
    """The row without the keys that are null, however deep."""
    found = TableRow(without_nulls(row))
    found.nulls = tuple(key for key, value in row.items() if value is None)
    return found


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value
