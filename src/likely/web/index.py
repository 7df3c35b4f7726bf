"""An index of a file of scored rows: columns of numbers, their orders and texts, made once and mapped from then on.

The index is a folder named by the file's place, size and time of change. A million rows take about 200 MB on the disk
and are looked at without being loaded: a page is a slice of an order, a filter is a mask over a column.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from likely import storage
from likely.errors import DataError
from likely.insight.score_reading import read_records
from likely.types import ROLES

SCHEMA = 3
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 150, 147  # of a row's text; together with " … " 300
LONGEST_WORD = 30  # characters that are left out so that a text begins with a whole word
SEPARATOR = b"\xff"  # is in no UTF-8, so no search reaches over the end of a row
ROWS_BETWEEN_TOLD = 2_000
MOST_SOURCES = 100  # that can be chosen by name
MAX_SOURCE = 4096  # characters of a file's name
KEPT_SECONDS = 30 * 86_400  # since an index or scores of the viewer's own were last used
INTEGERS = ("place", "file", "line", "length", *ROLES)
TEXTS = ("text", "folded", "source")
NUMBERS = ("nll_base", "nll_tuned", "change", "tokens", "surprise", "stop")
SORTED = ("nll_base", "nll_tuned", "change", "length", "tokens", "surprise", "stop")
Progress = Callable[[int, int], None]


def folder_of(scores: Path) -> Path:
    """Where the index of a file is kept: another content of the file has another folder."""
    told = scores.stat()
    name = f"{SCHEMA} {scores.absolute()} {told.st_size} {told.st_mtime_ns}"
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return storage.cache_folder() / "view" / f"index-{digest[:32]}"


def build_index(scores: Path, progress: Progress) -> Path:
    """The folder of the file's index, made if it is not there.

    Args:
        progress: is told bytes read and bytes in all.

    Raises:
        DataError: the file is none of scores.
        ResourceError: the index can't be written.
    """
    folder = folder_of(scores)
    if (folder / "facts.json").is_file():
        return folder
    with storage.disk_errors(folder, "the index"):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _forget_unused(folder.parent)
        unfinished = storage.unfinished_name(folder)
        unfinished.mkdir(mode=0o700)
        try:
            _write(scores, unfinished, progress)
            if not folder.exists():
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def use(folder: Path) -> None:
    """Note that an index is used, so that it stays."""
    with suppress(OSError):
        os.utime(folder)


def _forget_unused(cache: Path) -> None:
    """Remove what of the viewer's cache nobody used for long; all of it can be made again."""
    for path in list(cache.iterdir()):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write(scores: Path, folder: Path, progress: Progress) -> None:
    size = scores.stat().st_size
    columns = {name: array("q") for name in INTEGERS} | {name: array("d") for name in NUMBERS}
    files: dict[str, int] = {}
    with ExitStack() as stack:
        texts = [_Texts(stack.enter_context((folder / f"{name}.bin").open("wb"))) for name in TEXTS[:2]]
        for number, (place, done, record) in enumerate(read_records(scores)):
            facts = facts_of(record)
            columns["place"].append(place)
            columns["file"].append(files.setdefault(facts.pop("file"), len(files)))
            text = facts.pop("text")
            texts[0].add(text)
            texts[1].add(fold(text))
            for name, value in facts.items():
                columns[name].append(value)
            if number % ROWS_BETWEEN_TOLD == 0:
                progress(done, size)
        sources = _Texts(stack.enter_context((folder / "source.bin").open("wb")))
        for name in files:
            sources.add(name)
        ends = {f"{name}_ends": text.ends for name, text in zip(TEXTS, (*texts, sources), strict=True)}
    for name, values in (columns | ends).items():
        (folder / f"{name}.col").write_bytes(values.tobytes())
    for name in SORTED:
        key = np.frombuffer(columns[name], np.int64 if name in INTEGERS else np.float64)
        (folder / f"{name}.order").write_bytes(np.argsort(key, kind="stable").astype(np.int32).tobytes())
    rows = np.bincount(np.frombuffer(columns["file"], np.int64), minlength=len(files)).tolist()
    facts = {
        "rows": len(columns["place"]),
        "has_base": bool(np.isfinite(np.frombuffer(columns["nll_base"], np.float64)).any()) if files else False,
        "roles": [role for role in ROLES if any(columns[role])],
        "files": len(files),
        "sources": [{"id": i, "name": name, "rows": rows[i]} for name, i in islice(files.items(), MOST_SOURCES)],
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    progress(size, size)


class _Texts:
    """Texts one behind the other, each with a separator behind it, and where each ends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.ends = array("q")

    def add(self, text: str) -> None:
        data = text.encode(errors="replace")
        self._file.write(data + SEPARATOR)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(data) + 1)


def fold(text: str) -> str:
    """A text as it is searched: whatever its case."""
    return text.casefold()


def facts_of(record: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one record. Likelihoods are nats per unit of weight, nan where they are unknown.

    ``surprise`` is the greatest ``-log P`` of a token with weight; ``stop`` the least probability of a token that ends
    a trained stretch: a turn's end-of-turn token.

    Raises:
        DataError: a value of the record is not of its kind.
    """
    try:
        return _facts_of(record)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(
            f"this is no record of likely score ({type(error).__name__})",
            place=str(record.get("source"))[:200],
            way_out="give a file that likely score wrote",
        ) from error


def _facts_of(record: dict[str, Any]) -> dict[str, Any]:
    tokens = record["tokens"]
    weight = float(record["num_tokens"])
    base = _per_token(record.get("base_nll_nats"), weight)
    tuned = _per_token(record["nll_nats"], weight)
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    surprise, stop = math.nan, math.nan
    trained = False
    last = math.nan
    for token in tokens:
        counts[token["role"]] += 1
        if token["weight"] > 0:
            last = math.nan if token["logprob"] is None else float(token["logprob"])
            surprise = -_least(-surprise, last)
            trained = True
        elif trained:
            stop, trained = _least(stop, last), False
    if trained:
        stop = _least(stop, last)
    file, _, line = str(record["source"]).rpartition(":")
    return {
        "file": (file or str(record["source"]))[-MAX_SOURCE:],
        "line": int(line) if line.isdigit() and len(line) < 19 else 0,
        "nll_base": base,
        "nll_tuned": tuned,
        "change": tuned - base,
        "tokens": _finite(weight),
        "length": len(tokens),
        "surprise": _finite(surprise),
        "stop": math.exp(min(stop, 0.0)) if not math.isnan(stop) else math.nan,
        **counts,
        "text": _text_of(tokens),
    }


def _least(one: float, other: float) -> float:
    """The lesser of what is known."""
    if math.isnan(one) or math.isnan(other):
        return other if math.isnan(one) else one
    return min(one, other)


def _per_token(nats: Any, weight: float) -> float:
    return _finite(float(nats) / weight if nats is not None and weight else math.nan)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _text_of(tokens: list[dict[str, Any]]) -> str:
    """The end of what stands before the first trained token, which is where a prompt says what it wants, then the
    beginning of what is trained."""
    first = next((i for i, token in enumerate(tokens) if token["weight"]), len(tokens))
    prompt, i = "", first
    while i and len(prompt) < PROMPT_CHARACTERS:
        i -= 1
        prompt = str(tokens[i]["text"])[-PROMPT_CHARACTERS:] + prompt
    if i or len(prompt) > PROMPT_CHARACTERS:  # it is cut: at a word, where one begins soon
        prompt = prompt[1 - PROMPT_CHARACTERS :]
        space = prompt.find(" ", 0, LONGEST_WORD)
        prompt = f"…{prompt[space + 1 :]}"
    answer = _joined((t for t in tokens if t["weight"]), ANSWER_CHARACTERS)
    return f"{prompt} … {answer}" if prompt and answer else prompt or answer


def _joined(tokens: Any, limit: int) -> str:
    text = ""
    for token in tokens:
        text += str(token["text"])
        if len(text) >= limit:
            return text[:limit]
    return text
