"""One family of errors. Each carries the process's exit code; the command line prints it as one line.

LikelyError            1  a bug of ours
├── ConfigError        2  usage or config
├── DataError          3  a data file or a row
├── ModelError         4  a model, tokenizer, template or checkpoint
├── ResourceError      5  disk, memory, device, port
├── NonFiniteError     6  a loss, gradient or weight that is not finite
├── LockedError        7  the run folder belongs to another process
└── GuardError         8  a model passed a bound that was set for it
"""

import json
import re
from typing import Any

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|failed to map segment", re.IGNORECASE
)


class LikelyError(Exception):
    """An error with a place and a way out, printed as ``error: PLACE: MESSAGE; WAY_OUT``.

    Args:
        message: what is wrong, with the offending value.
        place: where, as ``file:line`` or a path or a flag; empty where the message says it.
        way_out: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", way_out: str = "") -> None:
        self.message = message
        self.place = place
        self.way_out = way_out
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}; {self.way_out}" if self.way_out else text


class ConfigError(LikelyError):
    """A flag, a config key or a combination of them that can't be used."""

    exit_code = 2


class DataError(LikelyError):
    """A data file or a row that can't be trained on as it stands."""

    exit_code = 3


class ModelError(LikelyError):
    """A model, tokenizer, chat template or checkpoint that can't be used."""

    exit_code = 4


class ResourceError(LikelyError):
    """The machine lacks something: disk, memory, a device, a port."""

    exit_code = 5


class NonFiniteError(LikelyError):
    """A loss, a gradient or a weight is NaN or infinite; raised before the update, so the weights are still good."""

    exit_code = 6


class LockedError(LikelyError):
    """Another process holds the run folder."""

    exit_code = 7


def of_code(code: int) -> type[LikelyError]:
    """The class of errors that a process ends with a code for."""
    kinds = (ConfigError, DataError, ModelError, ResourceError, NonFiniteError, LockedError, GuardError)
    return next((kind for kind in kinds if kind.exit_code == code), LikelyError)


def quoted(value: object, length: int = 60) -> str:
    """A value of the user's, for one line of ours: a text in quotes and anything else as JSON, cut in its middle where
    it is longer than ``length`` characters."""
    if isinstance(value, str):
        return _cut(repr(_cut(value, 4 * length)), length)
    try:
        text = json.dumps(value, default=lambda other: type(other).__name__)
    except (ValueError, RecursionError):  # endless nesting, or a number of thousands of digits
        return f"{type(value).__name__} of great size"
    return _cut(text, length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 23]}...{text[-20:]}"


class GuardError(LikelyError):
    """A model gives an unwanted response more likelihood than the bound that was set allows. The work is done and
    written all the same; ``result`` is what the verb would have returned."""

    exit_code = 8

    def __init__(self, message: str, *, place: str = "", way_out: str = "", result: Any = None) -> None:
        self.result = result
        super().__init__(message, place=place, way_out=way_out)


def harmless(text: str) -> str:
    """Text for a terminal: a file's name or a template's words may have characters that steer it."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error of foreign code says, short enough for one line of ours: its first line, and the second where the
    first only announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the device's memory is used up; each library has words of its own for it."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))
