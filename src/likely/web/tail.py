"""metrics.jsonl of a run, read on as it grows: half a line waits for its rest, a cut or another file begins anew."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from array import array
from bisect import bisect_left
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAX_LINE = 1 << 20  # bytes; a longer line is none of ours and is passed over
MAX_POINTS = 4_000  # of a snapshot, before each is the mean of several steps, or one of several evaluations
MOST_STEPS = 1 << 53  # beyond it no number of a step is exact
MOST_SKIPPED = 1_000  # steps left out that are remembered, the latest
PACE_STEPS = 50  # the latest, whose time says how long the rest takes
STEP_COLUMNS = (
    "step",
    "nll",
    "grad_norm",
    "learning_rate",
    "tokens",
    "distinct_tokens",
    "supervised_tokens",
    "seconds",
)
EVALUATION_COLUMNS = ("step", "nll", "low", "high")


def open_file(path: Path) -> BinaryIO:
    """A file to be read. A pipe or a device, which may never end or never begin, is none.

    Raises:
        OSError: it can't be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "no regular file", str(path))


class _Columns:
    """Numbers of many lines in little memory: 8 bytes each, nan where one is unknown, with the number of its line."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._lines = array("q")
        self._values = {name: array("d") for name in names}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: int, values: dict[str, float | None]) -> None:
        self._lines.append(line)
        for name in self._names:
            value = values[name]
            self._values[name].append(np.nan if value is None else value)

    def latest(self, name: str, number: int) -> list[float]:
        return self._values[name][-number:].tolist()

    def since(self, line: int) -> dict[str, npt.NDArray[np.float64]]:
        """What stands in a line or behind it."""
        first = bisect_left(self._lines, line)
        return {name: np.array(values[first:]) for name, values in self._values.items()}


class Tail:
    """What metrics.jsonl says so far. ``generation`` counts how often it began anew, ``num_lines`` the whole lines.

    A resumed run cuts the file at a checkpoint and writes on: so besides a shorter file another content of the last
    line that was read is a new beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.generation = 0
        self._begin()

    def _begin(self) -> None:
        self._read = 0  # bytes of whole lines
        self._last = b""  # the last whole line, with its end
        self._inode = -1
        self.num_lines = 0
        self.changed: float | None = None
        self._steps = _Columns(STEP_COLUMNS)
        self._evaluations = _Columns(EVALUATION_COLUMNS)
        self._skipped: deque[tuple[int, dict[str, Any]]] = deque(maxlen=MOST_SKIPPED)  # each with its line

    def refresh(self) -> None:
        """Read what is new."""
        with self._lock:
            try:
                with open_file(self._path) as file:
                    self._refresh(file)
            except OSError:
                if self.num_lines:
                    self.generation += 1
                    self._begin()

    def _refresh(self, file: Any) -> None:
        told = os.fstat(file.fileno())
        if self.num_lines and (told.st_ino != self._inode or not self._goes_on(file, told.st_size)):
            self.generation += 1
            self._begin()
        self._inode, self.changed = told.st_ino, told.st_mtime
        file.seek(self._read)
        while line := file.readline(MAX_LINE):
            if not line.endswith(b"\n"):
                if len(line) < MAX_LINE:
                    return  # its rest is still to be written
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
            self._read, self._last = file.tell(), line
            self._take(line)
            self.num_lines += 1

    def _goes_on(self, file: Any, size: int) -> bool:
        if size < self._read:
            return False
        file.seek(self._read - len(self._last))
        return bool(file.read(len(self._last)) == self._last)

    def _take(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            step = int(found["step"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return
        if abs(step) > MOST_STEPS:
            return
        if "nll" in found:
            values = {name: _number(found.get(name)) for name in STEP_COLUMNS}
            self._steps.add(self.num_lines, {**values, "step": step})
        elif isinstance(found.get("evaluation"), dict):
            low, high = _pair(found["evaluation"].get("ci95"))
            nll = _number(found["evaluation"].get("nll"))
            self._evaluations.add(self.num_lines, {"step": step, "nll": nll, "low": low, "high": high})
        elif "skipped" in found:
            self._skipped.append((self.num_lines, {"step": step, "told": str(found["skipped"])[:500]}))

    @property
    def last_step(self) -> int:
        latest = self._steps.latest("step", 1) + [told["step"] for _, told in list(self._skipped)[-1:]]
        return int(max(latest, default=0))

    def since(self, line: int, num_steps: int | None, *, thin: bool = False) -> dict[str, Any]:
        """What was written from a line on, in columns."""
        with self._lock:
            steps, evaluations = self._steps.since(line), self._evaluations.since(line)
            skipped = [told for at, told in self._skipped if at >= line]
            told = {"generation": self.generation, "lines": self.num_lines, "pace": self._pace(num_steps)}
        every = _every(len(steps["step"])) if thin else 1
        if thin:
            steps = {name: _means(values) for name, values in steps.items()} | {"step": _lasts(steps["step"])}
            evaluations = {name: _lasts(values) for name, values in evaluations.items()}
        columns = [[_known(value) for value in evaluations[name].tolist()] for name in EVALUATION_COLUMNS]
        return {
            **told,
            "every": every,
            "steps": {name: [_known(value) for value in values.tolist()] for name, values in steps.items()},
            "evaluations": [dict(zip(EVALUATION_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)],
            "skipped": skipped,
        }

    def _pace(self, num_steps: int | None) -> dict[str, Any]:
        latest = self._steps.latest("seconds", PACE_STEPS)
        seconds, tokens = np.nansum(latest), np.nansum(self._steps.latest("tokens", PACE_STEPS))
        left = float(seconds) / len(latest) * max(0, num_steps - self.last_step) if latest and num_steps else None
        rate = float(tokens / seconds) if seconds else None
        return {"tokens_per_second": rate, "seconds_left": left, "step": self.last_step, "num_steps": num_steps}

    def usual_seconds(self) -> float:
        """How long a step takes of late."""
        return float(np.nanmax(self._steps.latest("seconds", PACE_STEPS) or [0.0], initial=0.0))


def _every(number: int) -> int:
    """How many lines make one point."""
    return max(1, -(-number // MAX_POINTS))


def _lasts(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each point's lines the last one."""
    every = _every(len(values))
    return values[np.minimum(np.arange(every - 1, len(values) + every - 1, every), len(values) - 1)]


def _means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of what is known of each point's lines, nan where nothing is."""
    if not len(values):
        return values
    starts = np.arange(0, len(values), _every(len(values)))
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    means = np.full(len(starts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 else None  # which no nan is either


def _pair(value: Any) -> tuple[float | None, float | None]:
    if isinstance(value, list) and len(value) == 2:
        return _number(value[0]), _number(value[1])
    return None, None
