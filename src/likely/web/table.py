"""Pages, counts and samples of a table of scored rows, from its index.

A page is walked to from a place in an order that never changes, so the cursor is that place, and a page costs the same
wherever it stands.
"""

from __future__ import annotations

import csv
import io
import json
import math
import mmap
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from likely.types import ROLES
from likely.web.index import INTEGERS, NUMBERS, SEPARATOR, SORTED, fold

BLOCK = 20_000  # rows of an order that are looked at together
MOST_TRIED, TRIED_AT_ONCE = 4_000, 500  # rows whose texts are looked into one by one
MASKS_KEPT = 16
CSV_ROWS = 2_000
UNLIKELY = 0.5
Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted; the default is all of them."""

    text: str = ""
    role: str = ""
    source: int | None = None
    worse: bool = False
    stop_unlikely: bool = False


@dataclass(frozen=True)
class Page:
    """Rows of one page, and the cursors of the pages beside it, None where there is none."""

    rows: list[dict[str, Any]]
    next: str | None
    previous: str | None


class Table:
    """The index in a folder, which :func:`likely.web.index.build_index` made; it may be read by several threads.

    Raises:
        OSError, ValueError, KeyError, TypeError: the index is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.num_rows = int(self.facts["rows"])
        self._columns = {name: self._map(f"{name}.col", np.int64) for name in (*INTEGERS, "text_ends", "folded_ends")}
        self._source_ends = self._map("source_ends.col", np.int64)
        self._columns |= {name: self._map(f"{name}.col", np.float64) for name in NUMBERS}
        self._orders = {name: self._map(f"{name}.order", np.int32) for name in SORTED}
        lengths = {len(each) for each in (*self._columns.values(), *self._orders.values())}
        if lengths != {self.num_rows} or len(self._source_ends) != self.facts["files"]:
            raise ValueError("the index is not whole")
        # Rows without the value stand last, in either direction.
        self._known = {
            name: int(np.isfinite(self._columns[name]).sum()) if name in NUMBERS else self.num_rows for name in SORTED
        }
        self._masks: OrderedDict[Any, Mask] = OrderedDict()
        self._lock = threading.Lock()

    def _map(self, name: str, kind: Any) -> Any:
        path = self._folder / name
        return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)

    def place(self, row: int) -> int:
        """Where the record of a row stands in the file of scores."""
        return int(self._columns["place"][row])

    # --- orders ---

    def _ids(self, key: str, descending: bool, start: int, stop: int) -> Ids:
        """Rows that stand at ``start`` to ``stop`` of an order."""
        at = np.arange(start, stop)
        if key == "id":
            return self.num_rows - 1 - at if descending else at
        if descending:
            known = self._known[key]
            at = np.where(at < known, known - 1 - at, at)
        return np.asarray(self._orders[key][at], np.int64)

    # --- filters ---

    def _mask(self, wanted: Filter) -> Mask | None:
        """The rows that pass all but the text; None where all do."""
        if wanted.role and wanted.role not in ROLES:
            return np.zeros(self.num_rows, bool)
        parts: list[Any] = []
        if wanted.role:
            parts.append(self._columns[wanted.role] > 0)
        if wanted.source is not None:
            parts.append(self._columns["file"] == wanted.source)
        if wanted.worse:
            parts.append(self._columns["change"] > 0)
        if wanted.stop_unlikely:
            parts.append(self._columns["stop"] < UNLIKELY)
        return np.logical_and.reduce(parts) if parts else None

    def _kept(self, key: Any, make: Any) -> Any:
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        made = make()
        with self._lock:
            self._masks[key] = made
            while len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        return made

    def _rows_with(self, text: str) -> Mask:
        """All rows whose text holds ``text``, by one pass over the texts."""
        wanted = fold(text).encode(errors="replace")
        mask = np.zeros(self.num_rows, bool)
        places = array("q")
        with self._folded() as texts:
            at = texts.find(wanted)
            while at >= 0:
                places.append(at)
                at = texts.find(wanted, texts.find(SEPARATOR, at))
        mask[np.searchsorted(self._columns["folded_ends"], np.frombuffer(places, np.int64), "right")] = True
        return mask

    def _folded(self) -> Any:
        """The texts, mapped for as long as they are looked at: they are most of the index, and are to be in memory no
        longer than that."""
        descriptor = os.open(self._folder / "folded.bin", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return closing(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)

    def _holding(self, rows: Ids, text: bytes, texts: mmap.mmap) -> Ids:
        """Those of some rows whose text holds ``text``."""
        ends = self._columns["folded_ends"]
        last = ends[rows]
        first = np.where(rows > 0, ends[rows - 1], 0)
        found = [texts.find(text, a, b) >= 0 for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        return np.array(found, bool)

    def _full_mask(self, wanted: Filter) -> Mask | None:
        """The rows that pass everything; None where all do."""
        mask = self._kept((wanted.role, wanted.source, wanted.worse, wanted.stop_unlikely), lambda: self._mask(wanted))
        if not wanted.text or not self.num_rows:
            return mask  # type: ignore[no-any-return]
        with_text = self._kept(wanted.text, lambda: self._rows_with(wanted.text))
        return with_text if mask is None else mask & with_text  # type: ignore[no-any-return]

    # --- what is asked ---

    def count(self, wanted: Filter) -> int:
        mask = self._full_mask(wanted)
        return self.num_rows if mask is None else int(mask.sum())

    def page(self, wanted: Filter, key: str, *, descending: bool, limit: int, cursor: str | None) -> Page:
        """Rows in the order of a column, from a cursor on, or before it.

        Raises:
            ValueError: the cursor is none of this table.
        """
        backward, at = parse_cursor(cursor)
        if at > self.num_rows:
            raise ValueError("the cursor is of another table")
        walk = _Walk(self, wanted, key, descending)
        if backward:
            found = list(reversed(walk.take(at, limit + 1, -1)))
            more_before, found = len(found) > limit, found[-limit:]
            after = at < self.num_rows and bool(walk.take(at, 1, 1))
        else:
            found = walk.take(at, limit + 1, 1)
            after, found = len(found) > limit, found[:limit]
            more_before = at > 0 and bool(walk.take(at, 1, -1))
        rows = self.rows([row for _, row in found])
        return Page(
            rows,
            f"n{found[-1][0] + 1}" if found and after else None,
            f"p{found[0][0]}" if found and more_before else None,
        )

    def rows(self, ids: list[int]) -> list[dict[str, Any]]:
        """What the table shows of some rows."""
        columns = {name: self._columns[name][ids].tolist() for name in (*INTEGERS, *NUMBERS)}
        texts = self._texts("text", self._columns["text_ends"], ids)
        names = self._texts("source", self._source_ends, columns["file"])
        return [
            {
                "id": row,
                "source": f"{names[i]}:{columns['line'][i]}",
                **{name: _number(columns[name][i]) for name in NUMBERS},
                "length": columns["length"][i],
                "roles": {role: columns[role][i] for role in ROLES if columns[role][i]},
                "text": texts[i],
            }
            for i, row in enumerate(ids)
        ]

    def _texts(self, name: str, ends: Any, ids: list[int]) -> list[str]:
        with (self._folder / f"{name}.bin").open("rb") as file:
            found = []
            for row in ids:
                first = int(ends[row - 1]) if row else 0
                file.seek(first)
                found.append(file.read(int(ends[row]) - first - 1).decode(errors="replace"))
        return found

    def scatter(self, wanted: Filter, limit: int) -> dict[str, Any]:
        """An even sample of the rows that pass and have a base: the same rows every time."""
        known = np.isfinite(self._columns["change"])
        mask = self._full_mask(wanted)
        ids = np.flatnonzero(known if mask is None else known & mask)
        number = len(ids)
        if number > limit:
            ids = ids[np.linspace(0, number - 1, limit).astype(np.int64)]
        return {
            "id": ids.tolist(),
            "base": self._columns["nll_base"][ids].tolist(),
            "tuned": self._columns["nll_tuned"][ids].tolist(),
            "of": number,
        }

    def csv(self, wanted: Filter, key: str, *, descending: bool) -> Iterator[bytes]:
        """The filtered table as CSV, in pieces."""
        names = ["id", "source", *NUMBERS, "length", *ROLES, "text"]
        yield _csv_lines([names])
        mask = self._full_mask(wanted)
        for start in range(0, self.num_rows, CSV_ROWS):
            ids = self._ids(key, descending, start, min(start + CSV_ROWS, self.num_rows))
            ids = ids if mask is None else ids[mask[ids]]
            rows = self.rows(ids.tolist())
            yield _csv_lines([[inert({**row, **row["roles"]}.get(name, "")) for name in names] for row in rows])


class _Walk:
    """Steps through an order, over the rows that pass a filter."""

    def __init__(self, table: Table, wanted: Filter, key: str, descending: bool) -> None:
        self._table, self._wanted, self._key, self._descending = table, wanted, key, descending
        self._tried = 0
        self._mask: Mask | None = None

    def take(self, at: int, number: int, direction: int) -> list[tuple[int, int]]:
        """``(place in the order, row)`` of the next rows from ``at`` on (1), or of those before it (-1)."""
        found: list[tuple[int, int]] = []
        total = self._table.num_rows
        while len(found) < number and (at < total if direction > 0 else at > 0):
            start, stop = (at, min(at + BLOCK, total)) if direction > 0 else (max(at - BLOCK, 0), at)
            places = np.arange(start, stop)
            rows = self._table._ids(self._key, self._descending, start, stop)
            if direction < 0:
                places, rows = places[::-1], rows[::-1]
            keep = self._passing(rows, number - len(found))
            found += zip(places[keep].tolist(), rows[keep].tolist(), strict=True)
            at = stop if direction > 0 else start
        return found[:number]

    def _passing(self, rows: Ids, number: int) -> Ids:
        """Which of some rows pass; of more than ``number`` perhaps not all."""
        table, wanted = self._table, self._wanted
        if wanted.text and self._mask is None and wanted.text not in table._masks:
            found = self._by_trying(rows, number)
            if found is not None:
                return found
        if self._mask is None:  # once for all blocks
            self._mask = table._full_mask(wanted)
        return np.arange(len(rows)) if self._mask is None else np.flatnonzero(self._mask[rows])

    def _by_trying(self, rows: Ids, number: int) -> Ids | None:
        """The same, text by text: a common one is found soon. None where it is not: then one pass over all texts is
        cheaper, and finds little."""
        table, wanted = self._table, self._wanted
        mask = table._full_mask(replace(wanted, text=""))
        keep = np.arange(len(rows)) if mask is None else np.flatnonzero(mask[rows])
        text, found = fold(wanted.text).encode(errors="replace"), [np.empty(0, np.int64)]
        with table._folded() as texts:
            for part in np.array_split(keep, max(1, len(keep) // TRIED_AT_ONCE)):
                if self._tried >= MOST_TRIED:
                    return None
                self._tried += len(part)
                found.append(part[table._holding(rows[part], text, texts)])
                if sum(map(len, found)) >= number:
                    break
        return np.concatenate(found)


def parse_cursor(cursor: str | None) -> tuple[bool, int]:
    """Whether it goes backward, and its place in the order.

    Raises:
        ValueError: it is no cursor.
    """
    if not cursor:
        return False, 0
    if cursor[0] not in "np" or not cursor[1:].isascii() or not cursor[1:].isdigit() or len(cursor) > 12:
        raise ValueError("this is no cursor")
    return cursor[0] == "p", int(cursor[1:])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _csv_lines(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="replace")


def inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
