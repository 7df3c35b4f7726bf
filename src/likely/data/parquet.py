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
    in_lists = [metadata.schema.column(c).max_repetition_level > 0 for c in range(metadata.num_columns)]
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        ours = 0
        for column, in_list in zip(map(group.column, range(group.num_columns)), in_lists, strict=True):
            # A list's equal values take no room in a page, and some in memory each.
            unpacked += max(column.total_uncompressed_size, column.num_values if in_list else 0)
            if column.has_dictionary_page and column.dictionary_page_offset:
                packed = max(column.data_page_offset - column.dictionary_page_offset, 0)
                ours += packed * max(column.total_uncompressed_size // max(column.total_compressed_size, 1), 1)
        dictionaries = max(dictionaries, ours)
    return unpacked, min(BATCH_ROWS, max(1, BATCH_BYTES // max(dictionaries, 1)))


def is_too_large(batch: Any, limit: int) -> bool:
    """Whether a batch would be over ``limit`` bytes as JSON, which has two or more for each value of a list."""
    return bool(batch.nbytes > limit) or sum(map(_num_values, batch.columns)) > limit // 2


def _num_values(column: Any) -> int:
    """Values of an Arrow array at all depths."""
    import pyarrow  # noqa: PLC0415

    kind = column.type
    if pyarrow.types.is_struct(kind):
        return sum(map(_num_values, column.flatten()))
    if pyarrow.types.is_map(kind):
        first, end = int(column.offsets[0].as_py()), int(column.offsets[-1].as_py())
        return len(column) + 2 * (end - first) + _num_values(column.items.slice(first, end - first))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return len(column) + _num_values(column.flatten())
    return len(column)


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
