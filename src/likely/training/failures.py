"""Failures as several processes tell them to each other: in what JSON knows, and which of them all have heard of."""

from __future__ import annotations

from typing import Any

from likely import errors, stops
from likely.errors import LikelyError, ResourceError, first_line

_agreed = "_agreed"  # the attribute of an exception that all ranks have heard of


class CalledAwayError(Exception):
    """Another rank failed, and will not come to the exchange that this one waits in."""


def exit_code_of(error: BaseException) -> int:
    """What the process ends with."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(getattr(error, "exit_code", LikelyError.exit_code))


def heard(error: Any) -> Any:
    setattr(error, _agreed, True)
    return error


def was_heard(error: BaseException | None) -> bool:
    """Whether all ranks know of the error, or of the one that it came of."""
    while error is not None and not getattr(error, _agreed, False):
        error = error.__cause__ or error.__context__
    return error is not None


def told(error: BaseException) -> dict[str, Any]:
    """An error in what JSON knows."""
    if isinstance(error, LikelyError):
        return {"code": error.exit_code, "words": [error.message, error.place, error.way_out]}
    if errors.is_out_of_memory(error):
        return {"code": ResourceError.exit_code, "words": ["out of memory", "", "lower --pack-tokens"]}
    code, text = exit_code_of(error), f"{type(error).__name__}: {first_line(error)}"
    if code in {128 + signum for signum in stops.SIGNALS}:
        text = str(stops.Stopped(code - 128))
    return {"code": code, "words": [text, "", ""]}


def error_of(speaker: int, code: int, words: list[str]) -> BaseException:
    message, place, way_out = words
    if code > 128:
        return stops.Stopped(code - 128, f"rank {speaker} was {message}")
    kind = errors.of_code(code)
    return kind(f"rank {speaker}: {message}", place=place, way_out=way_out)
