"""Run folders as the viewer sees them: only read, never locked, found again by ids that hold no path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likely import storage
from likely.errors import ConfigError
from likely.insight.score_reading import is_score_file
from likely.strict_yaml import YamlError, read_settings
from likely.web.tail import Tail, open_file

MOST_RUNS = 200
MAX_FILE = 64 << 20  # bytes of a JSON or YAML file
MAX_DEPTH = 64  # of lists and objects in one another
FRESH_SECONDS = 20.0  # a run that wrote so lately is at work, whatever can be seen of its lock
STALE_SECONDS = 180.0  # at least; steps may take longer
STALE_STEPS = 10.0
CHECKPOINT = re.compile(r"step-([0-9]{6,12})")
NO_SCORES = {"metrics.jsonl", "rejected.jsonl", "rejected-eval.jsonl"}
LOCKS = Path("/proc/locks")


def id_of(path: Path) -> str:
    """A name for a path that says nothing of it, the same at every start."""
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]


@dataclass
class Run:
    """One run folder and what was read of it."""

    folder: Path
    name: str = ""
    tail: Tail = field(init=False)
    _kept: dict[str, tuple[tuple[int, int], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tail = Tail(self.folder / "metrics.jsonl")
        self.name = self.name or _spelled(self.folder.name)

    @property
    def id(self) -> str:
        return id_of(self.folder)

    def _read(self, name: str, parse: Any) -> Any:
        """A small file's content, read again when it has changed; None where it is not there or not whole."""
        try:
            with open_file(self.folder / name) as file:
                told = os.fstat(file.fileno())
                stamp = (told.st_mtime_ns, told.st_size)
                if name not in self._kept or self._kept[name][0] != stamp:
                    if told.st_size > MAX_FILE:
                        return None
                    self._kept[name] = stamp, _shallow(parse(file.read(MAX_FILE).decode()))
                return self._kept[name][1]
        except (OSError, ValueError, RecursionError):
            return None

    @property
    def config(self) -> dict[str, Any] | None:
        return self._object("config.yaml", _yaml)

    @property
    def origins(self) -> dict[str, Any] | None:
        return self._object("run.json", _json)

    @property
    def report(self) -> dict[str, Any] | None:
        found = self._object("report.json", _json)
        return found if found and isinstance(found.get("verdict"), str) else None

    def _object(self, name: str, parse: Any) -> dict[str, Any] | None:
        found = self._read(name, parse)
        return found if isinstance(found, dict) else None

    @property
    def num_steps(self) -> int | None:
        value = (self.origins or {}).get("num_steps")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def entry(self) -> dict[str, Any]:
        """The run in a list."""
        self.tail.refresh()
        report = self.report
        state, told = self._state(report is not None)
        return {
            "id": self.id,
            "name": self.name,
            "state": state,
            "told": told,
            "verdict": report["verdict"] if report else None,
            "step": self.tail.last_step,
            "num_steps": self.num_steps,
            "changed": self._changed(),
        }

    def _changed(self) -> float | None:
        times = [self.tail.changed or 0.0]
        for name in ("run.json", "report.json", "checkpoints"):
            with suppress(OSError):
                times.append((self.folder / name).stat().st_mtime)
        return max(times) or None

    def _state(self, finished: bool) -> tuple[str, str]:
        if finished:
            return "finished", "The training is finished."
        step, total = self.tail.last_step, self.num_steps
        done = f"step {step} of {total}" if total else f"step {step}"
        changed = self._changed()
        if changed is None:
            return "stopped", "The run folder is empty, or gone."
        quiet = max(0.0, time.time() - changed)
        held = holder(self.folder) is not None
        if held and quiet > max(STALE_SECONDS, STALE_STEPS * self.tail.usual_seconds()):
            return "stale", f"The training's process lives, but nothing new was written for {_ago(quiet)} ({done})."
        if held or quiet < FRESH_SECONDS:
            words = done if step else "before its first step"
            return "running", f"Training: {words}."
        return "stopped", f"The training stopped {_ago(quiet)} ago after {done}; likely train --resume goes on with it."

    def states(self) -> list[dict[str, str]]:
        """The states of the model that can be looked at, the base first."""
        saved = []
        with suppress(OSError):
            for path in (self.folder / "checkpoints").iterdir():
                number = CHECKPOINT.fullmatch(path.name)
                if number and _is_folder(path / "model"):
                    saved.append((int(number[1]), path.name))
        found = [{"id": "base", "name": "base model"}]
        found += [{"id": name, "name": f"step {number}"} for number, name in sorted(saved)]
        if _is_folder(self.folder / "model"):
            found.append({"id": "tuned", "name": "tuned model"})
        return found

    def model_of(self, state: str) -> str | None:
        """The name by which a state's model is loaded; None where there is no such state."""
        if state not in {known["id"] for known in self.states()}:
            return None
        if state == "base":
            model = (self.config or {}).get("model")
            return model if isinstance(model, str) else None
        return str(self.folder) if state == "tuned" else f"{self.folder}@{state}"

    def latest(self) -> str | None:
        """The state that is scored: the tuned model, or the newest checkpoint of a training that goes on."""
        last = self.states()[-1]["id"]
        return None if last == "base" else last

    def stamp(self, state: str) -> str:
        """Changes whenever the weights of a state may have."""
        origins = self.origins or {}
        place = {"tuned": self.folder / "model", "base": None}.get(state, self.folder / "checkpoints" / state)
        when = ""
        if place is not None:
            with suppress(OSError):
                when = str(place.stat().st_mtime_ns)
        return f"{self.id} {origins.get('run_id')} {state} {when} {origins.get('base_sha256')}"

    def own_scores(self) -> Path:
        """Where the viewer keeps its scores of the held-out rows."""
        digest = hashlib.sha256(self.stamp(self.latest() or "").encode()).hexdigest()[:32]
        return storage.cache_folder() / "view" / f"scores-{digest}.jsonl"

    def score_files(self) -> list[Path]:
        """Files of scored rows in the run folder, and beside it where their names begin with the run's."""
        found = []
        with suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                if path.suffix in {".jsonl", ".parquet"} and path.name not in NO_SCORES:
                    found.append(path)
            for path in sorted(self.folder.parent.iterdir()):
                if path.suffix in {".jsonl", ".parquet"} and path.name.startswith(self.folder.name):
                    found.append(path)
        own = self.own_scores()
        return [path for path in [own, *found] if _is_file(path) and is_score_file(path)][:20]


class Shelf:
    """All runs that the user named, and those that come up in the folders named."""

    def __init__(self, places: list[Path]) -> None:
        self._places = places
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        for place in places:
            if not _is_folder(place):
                raise ConfigError("there is no such run folder", place=str(place), way_out="name a run folder")
            if not is_run(place) and not _runs_in(place):
                raise ConfigError(
                    "no run folder, and none stands in it",
                    place=str(place),
                    way_out="name the --output of a training, or a folder of such",
                )

    def runs(self) -> list[Run]:
        with self._lock:
            for name, run in list(self._runs.items()):
                if not _is_folder(run.folder):
                    del self._runs[name]  # and leave its place to another
            for place in self._places:
                for folder in [place] if is_run(place) else _runs_in(place):
                    if len(self._runs) < MOST_RUNS:
                        self._runs.setdefault(id_of(folder), Run(folder))
            _name_apart(self._runs.values())
            return list(self._runs.values())

    def find(self, name: str) -> Run | None:
        found = self._runs.get(name)
        if found is not None and _is_folder(found.folder):
            return found
        return next((run for run in self.runs() if run.id == name), None)


def _name_apart(runs: Iterable[Run]) -> None:
    """Give runs whose folders have the same name as much of what is above as tells them apart."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.folder.name, []).append(run)
    for group in alike.values():
        depth = 1
        while len({run.folder.parts[-depth:] for run in group}) < len(group):
            depth += 1
        for run in group:
            run.name = _spelled("/".join(run.folder.parts[-depth:]))


def is_run(folder: Path) -> bool:
    return _is_file(folder / "run.json")


def _is_file(path: Path) -> bool:
    """Whether there is a file, as far as may be seen: one that may not be looked at hides no others."""
    with suppress(OSError):
        return path.is_file()
    return False


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _runs_in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if is_run(path))[:MOST_RUNS]
    return []


def holder(folder: Path) -> int | None:
    """The process that holds a run folder's lock; None where nobody does. The lock itself is not touched: who tried it
    would hold it for a moment, and a training that starts in that moment would be refused."""
    try:
        with open_file(folder / storage.LOCK) as file:
            told = os.fstat(file.fileno())
            text = file.read(20).decode().strip()
    except (OSError, ValueError):
        return None
    if not text.isdigit():
        return None
    pid = int(text)
    try:
        lines = [line.split() for line in LOCKS.read_text().splitlines()]
        held = any(line[1] == "FLOCK" and line[5].rpartition(":")[2] == str(told.st_ino) for line in lines)
        return pid if held else None
    except (OSError, IndexError):
        return pid if _lives(pid) else None  # no Linux


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _json(text: str) -> Any:
    """JSON whose numbers every reader knows: what is not finite is null."""
    return json.loads(text, parse_constant=lambda _: None)


def _shallow(value: Any) -> Any:
    """A value that can be written as JSON again wherever it stands.

    Raises:
        ValueError: it is nested too deeply.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _yaml(text: str) -> Any:
    try:
        return read_settings(text).values
    except YamlError as error:
        raise ValueError(str(error)) from error


def _spelled(name: str) -> str:
    return name.encode(errors="replace").decode() if not name.isascii() else name


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
