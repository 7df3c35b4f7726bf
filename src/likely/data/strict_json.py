"""JSON as strict as data needs it: no NaN, no key twice, no half characters, no endless nesting, no endless row."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from likely.errors import DataError, quoted
from likely.types import Source

MAX_ROW_BYTES = 16 * 2**20
MAX_DIGITS = 4300
MAX_DEPTH = 100  # of lists and objects in each other; Python's own limit is met elsewhere at several hundred


class Element:
    """One element of a JSON array, still with its text."""

    def __init__(self, value: Any, text: str) -> None:
        self._value, self._text = value, text

    def parsed(self, source: Source) -> Any:
        if len(self._text) > MAX_ROW_BYTES:
            message = f"the row is over {MAX_ROW_BYTES >> 20} MB"
            raise DataError(message, place=str(source), way_out="remove or split it")
        return _refuse_odd(self._value, self._text, source)


class Elements:
    """The elements of one JSON array, decoded from a window of the file that moves on."""

    def __init__(self, text: io.TextIOWrapper, wrong: Callable[[str, str, int], DataError]) -> None:
        self._text, self._wrong = text, wrong
        self._window, self._at, self._at_end = "", 0, False
        self._decoder = json.JSONDecoder(**_STRICT)

    def __iter__(self) -> Iterator[Element]:
        self._expect("[", 1)
        number = 1
        if self._peek(1) == "]":
            self._at += 1
        else:
            while True:
                self._peek(number)
                yield self._element(number)
                if self._expect(",]", number) == "]":
                    break
                number += 1
        if self._peek(number):
            raise self._wrong("text after the end of the JSON array", "write one array, or one row a line", number)

    def _more(self, number: int) -> None:
        size = max(1 << 16, len(self._window) - self._at)
        try:
            found = self._text.read(size)
        except UnicodeDecodeError as error:
            raise self._wrong("not UTF-8 in or after this row", "save the file as UTF-8", number) from error
        self._window, self._at, self._at_end = self._window[self._at :] + found, 0, not found

    def _peek(self, number: int) -> str:
        """The next character that is no white space, without taking it; empty at the end of the file."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in " \t\r\n":
                    return self._window[self._at]
                self._at += 1
            if self._at_end:
                return ""
            self._more(number)

    def _expect(self, wanted: str, number: int) -> str:
        found = self._peek(number)
        if not found or found not in wanted:
            seen = repr(found) if found else "the end of the file"
            raise self._wrong(f"broken JSON array: {seen} after this row", "put commas between rows", number)
        self._at += 1
        return found

    def _element(self, number: int) -> Element:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
                if end < len(self._window) or self._at_end:
                    text, self._at = self._window[self._at : end], end
                    return Element(value, text)
            except json.JSONDecodeError as error:
                if self._at_end or len(self._window) - self._at > MAX_ROW_BYTES:
                    size = f" (and the row is over {MAX_ROW_BYTES >> 20} MB)" if not self._at_end else ""
                    raise self._wrong(f"broken JSON: {error.msg}{size}", "fix this row of the array", number) from error
            except ValueError as error:
                raise self._wrong(f"broken JSON: {error}", "fix this row of the array", number) from error
            except RecursionError as error:
                raise self._wrong("broken JSON: nested too deeply", "fix this row of the array", number) from error
            self._more(number)


def parse_json(raw: bytes, source: Source) -> Any:
    """The value of one line of JSONL.

    Raises:
        DataError: not UTF-8, not JSON, a key that stands twice, or half a character.
    """

    def wrong(message: str, way_out: str = "one JSON object a line (JSONL)") -> DataError:
        return DataError(message, place=str(source), way_out=way_out)

    try:
        text = raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
        row = json.loads(text, **_STRICT)
    except UnicodeDecodeError as error:
        raise wrong(f"not UTF-8 at byte {error.start} of the line", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = {}
        if text.startswith("\ufeff"):
            hint = {"way_out": "remove the byte order mark at its beginning: files were joined that had one each"}
        elif text.startswith("\0"):
            hint = {"way_out": "remove the NUL bytes: the file was cut off while it was written"}
        elif b"\r" in raw.rstrip(b"\r\n"):
            hint = {"way_out": "end lines with LF: here several rows stand between bare carriage returns"}
        raise wrong(f"broken JSON at column {error.pos + 1}: {error.msg}", **hint) from error
    except ValueError as error:
        raise wrong(f"broken JSON: {error}") from error
    except RecursionError as error:
        raise wrong("broken JSON: nested too deeply") from error
    return _refuse_odd(row, text, source)


def breaks_off(raw: bytes) -> bool:
    """Whether a line is the beginning of a JSON object or array that goes on behind it."""
    try:
        json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return raw.lstrip()[:1] in b"{[" and not error.doc[error.pos :].strip()
    except (ValueError, RecursionError):
        return False
    return False


def is_deeper(value: Any, limit: int = MAX_DEPTH) -> bool:
    """Whether lists and objects stand in each other more than ``limit`` times."""
    level = [value]
    for _ in range(limit):
        inside = (child for v in level for child in (v.values() if isinstance(v, dict) else v))
        level = [child for child in inside if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _refuse_odd(row: Any, text: str, source: Source) -> Any:
    """The value, unless it is nested too deeply to be passed on or holds half a character."""
    if text.count("[") + text.count("{") > MAX_DEPTH and isinstance(row, (dict, list)) and is_deeper(row):
        message = f"nested too deeply: over {MAX_DEPTH} lists and objects in each other"
        raise DataError(message, place=str(source), way_out="flatten the row")
    if r"\ud" in text.lower():  # half a surrogate pair is JSON but no text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            message = r"half of a surrogate pair (\ud800 to \udfff)"
            raise DataError(message, place=str(source), way_out="write the whole character") from error
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {quoted(digits)} is too large")
    return number


def _short(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # what Python takes, which says it in words of its own
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs; a key that stands twice would lose one of its values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {quoted(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return found


_STRICT: dict[str, Any] = {
    "parse_constant": _no_constant,
    "parse_float": _finite,
    "parse_int": _short,
    "object_pairs_hook": _object,
}
