"""metrics.jsonl of a run, read on as it grows: half a line waits for its rest, a cut or another file begins anew."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE = 1 << 20  # bytes; a longer line is none of ours and is passed over
MAX_POINTS = 4_000  # of a snapshot, before each is the mean of several steps
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
        # Each with the number of its line.
        self.steps: list[tuple[int, list[float | None]]] = []
        self.evaluations: list[tuple[int, dict[str, Any]]] = []
        self.skipped: list[tuple[int, dict[str, Any]]] = []

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
        if "nll" in found:
            self.steps.append((self.num_lines, [_number(found.get(name)) for name in STEP_COLUMNS]))
        elif isinstance(found.get("evaluation"), dict):
            low, high = _pair(found["evaluation"].get("ci95"))
            nll = _number(found["evaluation"].get("nll"))
            self.evaluations.append((self.num_lines, {"step": step, "nll": nll, "low": low, "high": high}))
        elif "skipped" in found:
            self.skipped.append((self.num_lines, {"step": step, "told": str(found["skipped"])[:500]}))

    @property
    def last_step(self) -> int:
        latest = [self.steps[-1][1][0]] if self.steps else []
        latest += [self.skipped[-1][1]["step"]] if self.skipped else []
        return int(max((value for value in latest if value is not None), default=0))

    def since(self, line: int, num_steps: int | None, *, thin: bool = False) -> dict[str, Any]:
        """What was written from a line on, in columns."""
        with self._lock:
            steps = _from(self.steps, line)
            every = -(-len(steps) // MAX_POINTS) if thin and steps else 1
            points = [_mean(steps[i : i + every]) for i in range(0, len(steps), every)] if every > 1 else steps
            return {
                "generation": self.generation,
                "lines": self.num_lines,
                "every": every,
                "steps": {name: [point[i] for point in points] for i, name in enumerate(STEP_COLUMNS)},
                "evaluations": _from(self.evaluations, line),
                "skipped": _from(self.skipped, line),
                "pace": self._pace(num_steps),
            }

    def _pace(self, num_steps: int | None) -> dict[str, Any]:
        latest = [step for _, step in self.steps[-PACE_STEPS:]]
        seconds = sum(step[7] or 0.0 for step in latest)
        tokens = sum(step[4] or 0.0 for step in latest)
        left = seconds / len(latest) * max(0, num_steps - self.last_step) if latest and num_steps else None
        rate = tokens / seconds if seconds else None
        return {"tokens_per_second": rate, "seconds_left": left, "step": self.last_step, "num_steps": num_steps}

    def usual_seconds(self) -> float:
        """How long a step takes of late."""
        latest = [step[7] or 0.0 for _, step in self.steps[-PACE_STEPS:]]
        return max(latest, default=0.0)


def _from(entries: list[tuple[int, Any]], line: int) -> list[Any]:
    first = len(entries)
    while first and entries[first - 1][0] >= line:
        first -= 1
    return [entry for _, entry in entries[first:]]


def _mean(points: list[list[float | None]]) -> list[float | None]:
    """One point of several: the last step's number, sums of counts divided alike, so that every column is a mean."""
    columns = zip(*points, strict=True)
    means = [_mean_of([value for value in column if value is not None]) for column in columns]
    return [points[-1][0], *means[1:]]


def _mean_of(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 else None  # which no nan is either


def _pair(value: Any) -> tuple[float | None, float | None]:
    if isinstance(value, list) and len(value) == 2:
        return _number(value[0]), _number(value[1])
    return None, None
