"""Scores on the disk, pack by pack as they are computed: what a killed process scored is not scored again.

The file only grows: a key of 32 bytes that says what is scored, then for each entry of the plan a CRC-32 and the
float64 columns of its examples. The plan is a function of the examples, so every record's length is known beforehand.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from likely.data.table import OnDemand
from likely.errors import LockedError, ResourceError
from likely.insight.evaluate import NUM_COLUMNS, deal_plan, plan_scoring, score_together
from likely.model.forward import LanguageModel
from likely.training.log import Display
from likely.training.parallel import ALONE, Ranks
from likely.types import Example, ExampleScore

KEY_BYTES, CRC_BYTES = 32, 4
ROUND = 8  # entries for each rank between two writes
Track = Callable[[Iterable[list[int]], str, int], Iterable[list[int]]]


@contextmanager
def logged_scores(
    path: Path,
    key: bytes,
    model: LanguageModel,
    examples: Sequence[Example],
    pack_tokens: int,
    *,
    display: Display,
    ranks: Ranks = ALONE,
) -> Iterator[Sequence[ExampleScore]]:
    """The scores of all examples, read from the file when asked for; the file is left to whoever named it. Of several
    ranks the first writes the file, and is the only one that can read it.

    Args:
        key: 32 bytes; a file with another key is of other weights, data or settings, and is begun anew.

    Raises:
        LockedError: another process scores into this file.
        ResourceError: the disk refuses.
    """
    plan = plan_scoring(model, examples, pack_tokens)
    if not ranks.first:
        for _ in _records(model, examples, plan[ranks.first_says(None) :], display.track, ranks):
            pass  # it is the first rank's to write
        yield ()
        return
    tokens_N = np.array([max(0, len(e.token_ids_T) - 1) for e in examples], np.int64)
    bytes_P = [CRC_BYTES + 8 * NUM_COLUMNS * int(tokens_N[chosen].sum()) for chosen in plan]
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
            _lock(file, path)
            done = _whole_records(file, key, bytes_P)
            if done:
                display.say(f"{path}: {done:,} of {len(plan):,} packs were scored before")
            ranks.first_says(done)
            for data in _records(model, examples, plan[done:], display.track, ranks):
                file.write(zlib.crc32(data).to_bytes(CRC_BYTES, "little") + data)
                file.flush()
            yield _Reader(path, plan, bytes_P, tokens_N).scores()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(
            f"the scores can't be kept: {reason}",
            place=str(path),
            way_out="free some disk; the same command goes on from there",
        ) from error


def _records(
    model: LanguageModel, examples: Sequence[Example], plan: Sequence[list[int]], track: Track, ranks: Ranks
) -> Iterator[bytes]:
    """The columns of each entry, in order and on every rank; of several ranks each scores some entries of a round."""
    size = 1 if ranks.alone else ROUND * ranks.world_size
    rounds = [list(range(start, min(start + size, len(plan)))) for start in range(0, len(plan), size)]
    for entries in track(rounds, "scoring", len(rounds)):
        dealt = deal_plan(examples, [plan[entry] for entry in entries], ranks.world_size)
        own = [np.concatenate(score_together(model, examples, plan[entries[k]]), axis=1) for k in dealt[ranks.rank]]
        parts = ranks.gather(np.concatenate([*map(np.ravel, own), np.empty(0)]))
        found: dict[int, bytes] = {}
        for mine, values in zip(dealt, parts, strict=True):
            sizes = [sum(NUM_COLUMNS * (len(examples[i].token_ids_T) - 1) for i in plan[entries[k]]) for k in mine]
            for k, part in zip(mine, np.split(values, np.cumsum(sizes)[:-1]) if mine else (), strict=True):
                found[k] = part.tobytes()
        yield from (found[k] for k in range(len(entries)))


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError(
            "another process writes these scores", place=str(path), way_out="wait for it, or name another --output"
        ) from error


def _whole_records(file: BinaryIO, key: bytes, bytes_P: Sequence[int]) -> int:
    """How many records are as they were written; the file ends behind them, and is ready for the next."""
    done = 0
    end = KEY_BYTES
    if file.read(KEY_BYTES) == key:
        for size in bytes_P:
            record = file.read(size)
            if len(record) < size or zlib.crc32(record[CRC_BYTES:]).to_bytes(CRC_BYTES, "little") != record[:CRC_BYTES]:
                break
            done, end = done + 1, end + size
    else:
        file.seek(0)
        file.write(key)
    file.truncate(end)
    file.seek(end)
    return done


class _Reader:
    def __init__(
        self, path: Path, plan: Sequence[list[int]], bytes_P: Sequence[int], tokens_N: np.typing.NDArray[np.int64]
    ) -> None:
        self._bytes = np.memmap(path, np.uint8, "r")
        self._tokens_N = tokens_N
        # Where each example's pack begins, how many tokens that has, and where among them the example's own begin.
        self._where = np.full((len(tokens_N), 3), -1, np.int64)
        start = KEY_BYTES
        for chosen, size in zip(plan, bytes_P, strict=True):
            own = tokens_N[chosen]
            self._where[chosen, 0] = start + CRC_BYTES
            self._where[chosen, 1] = own.sum()
            self._where[chosen, 2] = np.cumsum(own) - own
            start += size

    def scores(self) -> Sequence[ExampleScore]:
        return OnDemand(len(self._tokens_N), self._score)

    def _score(self, i: int) -> ExampleScore:
        start, width, first = self._where[i].tolist()
        length = int(self._tokens_N[i])
        columns = np.full((NUM_COLUMNS, length + 1), np.nan)
        for row in range(NUM_COLUMNS) if start >= 0 else ():
            at = start + 8 * (row * width + first)
            columns[row, 1:] = self._bytes[at : at + 8 * length].view(np.float64)
        return ExampleScore(*columns)
