"""Data sets of the Hugging Face hub, by the optional package ``datasets``: ``org/name``, ``org/name:split`` or
``org/name:config:split``. Nothing is fetched for a name that stands for a file, or looks like one that is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from likely.data.parquet import of_table
from likely.data.reading import BadRow, Rows
from likely.errors import DataError, first_line
from likely.types import Source

DEFAULT_SPLIT = "train"
INSTALL = "pip install datasets, or save the rows to a file"
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:(?::([\w.-]+))?:([A-Za-z][\w.-]*))?", re.ASCII)
_FILES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".zip", ".arrow"}


class HubRows:
    """The rows of a data set of the hub, like :class:`likely.data.reading.Rows` of a file: a row's line is its number,
    and ``sha256``, after the last row, is that of the rows as JSON, one a line. ``share_read`` is how much of them has
    been read.

    Raises:
        DataError: the package ``datasets`` is not installed; there is no such data set, config or split; or it can't be
            fetched.
    """

    num_blank = 0

    def __init__(self, path: str) -> None:
        self.path = path
        self.sha256 = ""
        self.share_read = 0.0
        self._found: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the data set in memory; 0 where it does not say."""
        found = self._found = self._found or self._load()
        return int(getattr(getattr(found, "data", None), "nbytes", 0))

    def __iter__(self) -> Iterator[tuple[Any, Source]]:
        digest = hashlib.sha256()
        found = self._found or self._load()
        size = len(found) if hasattr(found, "__len__") else 0
        rows = iter(found)
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise self._wrong(f"row {number + 1} can't be read: {first_line(error)}") from error
            if row is None:
                break
            number += 1
            self.share_read = number / size if size else 0.0
            row = of_table(row)
            digest.update(json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass") + b"\n")
            yield row, Source(self.path, number)
        self.sha256 = digest.hexdigest()

    def _load(self) -> Any:
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read when the package is imported: nothing is counted
        try:
            import datasets  # noqa: PLC0415  (optional, and slow to import)
        except ImportError as error:
            message = "no such file, and a data set of the hub needs the package datasets"
            raise DataError(message, place=self.path, way_out=INSTALL) from error
        name, config, split = _pieces(self.path)
        try:
            return datasets.load_dataset(name, config, split=split)
        except Exception as error:
            raise self._wrong(f"no such file, and not to be had from the hub: {first_line(error)}") from error

    def _wrong(self, message: str) -> DataError:
        return DataError(message, place=self.path, way_out="check its name and the connection, or save it as a file")


def rows_of(path: str | Path, on_bad_row: BadRow | None = None) -> Rows | HubRows:
    """The rows of a file, or of a data set of the hub; see :class:`likely.data.reading.Rows`."""
    return HubRows(str(path)) if is_hub_id(str(path)) else Rows(path, on_bad_row)


def is_hub_id(path: str) -> bool:
    """Whether a name is to be looked for on the hub: it has the form, no file has it, it ends like no file, and what
    stands before its slash is no folder here."""
    if not _ID.fullmatch(path) or os.path.lexists(path):
        return False
    name = path.split(":", maxsplit=1)[0]
    return not (Path(name).suffix.lower() in _FILES or os.path.isdir(name.split("/")[0]))  # noqa: PTH112


def full_name(path: str) -> str:
    """A name of the hub with its split; any other name as it is."""
    return f"{path}:{DEFAULT_SPLIT}" if is_hub_id(path) and ":" not in path else path


def _pieces(path: str) -> tuple[str, str | None, str]:
    match = _ID.fullmatch(path)
    assert match is not None  # noqa: S101  (the form was looked at before)
    return match[1], match[2], match[3] or DEFAULT_SPLIT
