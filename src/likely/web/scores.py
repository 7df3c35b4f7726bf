"""The sets of scored rows that the viewer shows: found beside the runs, indexed once, then looked at."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likely.insight.score_reading import record_at
from likely.types import ROLES
from likely.web.access import RefusedError
from likely.web.index import folder_of, use
from likely.web.jobs import OVER, Job, Lane
from likely.web.runs import Run, Shelf, id_of
from likely.web.table import Table

TOKEN_COLUMNS = {
    "token_id": "id",
    "token_text": "text",
    "token_weight": "weight",
    "logprob": "logprob",
    "base_logprob": "base_logprob",
    "rank": "rank",
    "entropy": "entropy",
}
MAX_EXAMPLE = 16 << 20  # bytes of a row of some 80,000 tokens
READING = threading.Lock()  # long rows are read one after the other, so that their memory is needed once


@dataclass
class ScoreSet:
    """A file of scored rows, the run it belongs to, and its index once that is made."""

    path: Path
    run: Run | None
    table: Table | None = None
    job: Job | None = None
    index: Path | None = None
    asked: Path | None = None  # the index that the job makes
    lock: threading.Lock = field(default_factory=threading.Lock)
    own: bool = False  # written by the viewer, under a name that says nothing

    @property
    def id(self) -> str:
        return id_of(self.path)

    @property
    def name(self) -> str:
        if self.own and self.run is not None:
            return f"held-out rows of {self.run.name}"
        return self.path.name.encode(errors="replace").decode()

    def told(self) -> dict[str, Any]:
        """The set for the page."""
        facts = self.table.facts if self.table else {}
        job = self.job
        state = "ready" if self.table else "waiting"
        if self.table is None and job is not None:
            state = {"waiting": "waiting", "running": "indexing", "done": "indexing"}.get(job.state, "failed")
        return {
            "id": self.id,
            "name": self.name,
            "state": state,
            "done": job.done if job else 0,
            "total": (job.total if job else None) or 0,
            "unit": "bytes",
            "rows": facts.get("rows"),
            "has_base": facts.get("has_base"),
            "error": (job.error or "the index was not made") if job and state == "failed" else None,
            "roles": facts.get("roles", []),
            "sources": facts.get("sources", []),
        }

    def example(self, row: int) -> dict[str, Any]:
        """One row with all its tokens, in columns.

        Raises:
            RefusedError: there is no such row, or the file is no longer what was indexed.
        """
        table = self.ready()
        if not 0 <= row < table.num_rows:
            raise RefusedError(404, "there is no such row")
        (facts,) = table.rows([row])
        with READING:
            tokens = record_at(self.path, table.place(row), MAX_EXAMPLE)["tokens"]
        del facts["text"], facts["roles"]
        return {
            **facts,
            "run": self.run.id if self.run else None,
            "states": self.run.states() if self.run else [],
            "roles": list(ROLES),
            "token_role": [ROLES.index(token["role"]) for token in tokens],
            **{name: [token.get(key) for token in tokens] for name, key in TOKEN_COLUMNS.items()},
        }

    def ready(self) -> Table:
        """The table.

        Raises:
            RefusedError: it is not made yet, or the file has changed since.
        """
        if self.table is None:
            raise RefusedError(409, "the index of these scores is not ready yet")
        try:
            same = folder_of(self.path) == self.index
        except OSError:
            same = False
        if not same:
            raise RefusedError(409, "the file of scores has changed since it was indexed; reload the page")
        return self.table


class ScoreSets:
    """All sets. Indexes are made by a worker of their own, one at a time."""

    def __init__(self, shelf: Shelf, extra: list[Path], lane: Lane) -> None:
        self._shelf, self._lane = shelf, lane
        self._sets: dict[str, ScoreSet] = {}
        runs = shelf.runs()
        for path in extra:  # with one run, the scores are of its rows
            self._sets[id_of(path)] = ScoreSet(path, runs[0] if len(runs) == 1 else None)

    def add(self, path: Path, run: Run) -> ScoreSet:
        return self._sets.setdefault(id_of(path), ScoreSet(path, run, own=path == run.own_scores()))

    def look(self) -> None:
        """Find what is new; reads the disk."""
        for run in self._shelf.runs():
            for path in run.score_files():
                self.add(path, run)
        for each in list(self._sets.values()):
            self._open(each)

    def _open(self, each: ScoreSet) -> None:
        with each.lock:
            try:
                folder = folder_of(each.path)
            except OSError:
                return
            if each.table is not None and each.index == folder:
                return
            if (folder / "facts.json").is_file():
                try:
                    each.table = Table(folder)
                except (OSError, ValueError, KeyError, TypeError):  # a machine that went down while it was written
                    shutil.rmtree(folder, ignore_errors=True)
                    return
                each.index, each.job = folder, None
                use(folder)
            elif each.index is not None or (each.job is not None and each.asked != folder):
                if each.job is not None and each.job.state not in OVER:
                    return
                each.table, each.index, each.job = None, None, None  # another content: index it anew
            each.asked = folder

    def start(self) -> None:
        """Have made what is missing; belongs to the event loop."""
        for each in self._sets.values():
            if each.table is None and each.job is None and each.path.is_file():
                each.job = self._lane.submit(Job("index", {"scores": str(each.path)}))

    def of_run(self, run: Run) -> list[dict[str, Any]]:
        return [each.told() for each in self._sets.values() if each.run is not None and each.run.folder == run.folder]

    def all_told(self) -> list[dict[str, Any]]:
        return [each.told() for each in self._sets.values()]

    def find(self, name: str) -> ScoreSet:
        """The set of an id.

        Raises:
            RefusedError: there is none.
        """
        if name not in self._sets:
            raise RefusedError(404, "there are no such scores")
        return self._sets[name]
