"""Data files -> examples, and the order in which steps take them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from likely.data.formats import ReadOptions, Rejected
from likely.data.lengths import LengthCounts, OnTooLong
from likely.data.parallel import Workers
from likely.data.render import Renderer
from likely.data.rendering import (
    Job,
    Recipe,
    Rendered,
    identity_elsewhere,
    identity_of,
    render_batch,
    render_elsewhere,
)
from likely.data.rows import Advance, Intake, Progress, Run
from likely.data.table import Collected, Table
from likely.errors import DataError
from likely.types import ROLES, Conversation, Example, IntArray, Source

MAX_REJECTED_TOLD = 20
PARALLEL_BYTES = 8 << 20  # of data; less is rendered here before other processes have started


@dataclass(frozen=True)
class File:
    """A file that was read, the hash of its bytes, and how many of its rows are used."""

    path: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Dataset:
    """Examples of one file or several, and the rows that could be rendered. ``num_unweighted`` counts the examples left
    out since all their weights are 0, ``largest_token`` is the largest token id. ``told_of_files`` are the lines about
    each file that a person should see, ``told_of_rows`` those about all rows; ``rejected`` the rows that were left out
    as bad."""

    path: str
    files: tuple[File, ...]
    table: Table
    num_unweighted: int = 0
    largest_token: int = 0
    told_of_files: tuple[tuple[str, ...], ...] = ()
    told_of_rows: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    @property
    def conversations(self) -> Sequence[Conversation]:
        return self.table.conversations

    @property
    def examples(self) -> Sequence[Example]:
        return self.table.examples

    @property
    def row_N(self) -> IntArray:  # noqa: N802  (a shape)
        """The index of each example's conversation: one whose template rewrites history gives several."""
        return self.table.row_N

    @property
    def told(self) -> list[str]:
        """What a person should see about the data, line by line."""
        told = [
            f"{file.path}: {line}" for file, lines in zip(self.files, self.told_of_files, strict=True) for line in lines
        ]
        if len(self.files) > 1:
            told.append("mixed: " + ", ".join(f"{file.rows:,} rows of {file.path}" for file in self.files))
        return [*told, *(f"{self.path}: {line}" for line in self.told_of_rows), *_told_rejected(self.rejected)]

    @property
    def sha256(self) -> str:
        """The hash of the file, or of the hashes of several."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def rejected_lines(self) -> str:
        """JSONL: the file, the line and the reason of each row that was left out."""
        return "".join(json.dumps(asdict(rejected), ensure_ascii=False) + "\n" for rejected in self.rejected)

    def tokens_per_role(self) -> dict[str, dict[str, float]]:
        """``{role: {"tokens": count, "supervised": count, "weight": sum}}`` over all examples."""
        return {
            role: {"tokens": int(tokens), "supervised": int(supervised), "weight": float(weight)}
            for role, (tokens, supervised, weight) in zip(ROLES, self.table.counts_per_role(), strict=True)
            if tokens
        }


@dataclass(frozen=True)
class Request:
    """Data to be read and rendered, and how.

    Args:
        path: a file, several (``a.jsonl,b.jsonl``), or a mix of them (``a.jsonl:0.7,b.jsonl:0.3``); each may be a data
            set of the hub.
        max_length: the longest example allowed, in tokens.
        keep_unweighted: keep examples whose weights are all 0, to look at them.
    """

    path: str
    renderer: Renderer
    max_length: int
    options: ReadOptions = field(default_factory=ReadOptions)
    on_too_long: OnTooLong = "error"
    keep_unweighted: bool = False

    def job(self) -> Job:
        """What becomes of every batch."""
        return Job(self.options, self.max_length, self.on_too_long, self.keep_unweighted)

    def recipe(self) -> Recipe | None:
        """What another process can make the same renderer by; None where its tokenizer is nowhere to be loaded from."""
        folder = str(getattr(self.renderer.tokenizer, "name_or_path", "") or "")
        if not os.path.isdir(folder):  # noqa: PTH112
            return None
        use, date = self.renderer.identity()["use"]
        return Recipe(folder, self.renderer.supervision, use, date)


def load_dataset(
    path: str,
    renderer: Renderer,
    max_length: int,
    progress: Progress | None = None,
    options: ReadOptions | None = None,
    on_too_long: OnTooLong = "error",
    *,
    keep_unweighted: bool = False,
) -> Dataset:
    """:func:`read` of a :class:`Request` into memory."""
    request = Request(path, renderer, max_length, options or ReadOptions(), on_too_long, keep_unweighted)
    collected = Collected()
    loaded = read(request, collected, progress)
    return loaded.dataset(collected.arrays())


@dataclass
class Loaded:
    """Data that were read and rendered into columns, and what was counted on the way."""

    request: Request
    intake: Intake
    num_rows: list[int]
    num_examples: int = 0
    num_unweighted: int = 0
    largest_token: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    lengths: LengthCounts = field(default_factory=LengthCounts)
    rejected: list[Rejected] = field(default_factory=list)
    first_too_long: tuple[Source, int] | None = None
    num_too_long: int = 0
    longest: int = 0

    @property
    def num_weighted(self) -> int:
        """Examples that something would be learnt from, however long."""
        return self.num_examples - self.num_unweighted

    def add(self, done: Rendered) -> None:
        """Take in the counts of the next batch.

        Raises:
            DataError: a row is wrong, and such rows are not to be left out.
        """
        if done.stop:
            raise done.stop
        self.intake.note(done.part, done.parsed)
        self.num_rows[done.part] += done.num_rows
        self.num_examples += done.num_examples
        self.num_unweighted += done.num_unweighted
        self.largest_token = max(self.largest_token, int(done.columns["token_ids"].max(initial=0)))
        self.notes.update(done.notes)
        self.lengths.add(done.lengths)
        self.rejected.extend(done.rejected)
        if done.first_too_long and self.first_too_long is None:
            self.first_too_long = done.first_too_long, done.too_long[0]
        self.num_too_long += len(done.too_long)
        self.longest = max([self.longest, *done.too_long])

    def dataset(self, columns: Any) -> Dataset:
        """The data set of the columns."""
        renderer, paths = self.request.renderer, [part.path for part in self.intake.parts]
        renderer.notes.clear()
        renderer.notes.update(self.notes)
        hashes = self.intake.hashes
        return Dataset(
            self.request.path,
            tuple(map(File, paths, hashes, self.num_rows)),
            Table(columns, paths),
            self.num_unweighted,
            self.largest_token,
            self.intake.told(),
            (*renderer.told(), *self.lengths.told(self.request.max_length)),
            tuple(self.rejected),
        )


def read(request: Request, into: Collected, progress: Progress | None = None, intake: Intake | None = None) -> Loaded:
    """Read and render data, batch by batch; large ones by all processors.

    Args:
        into: takes the columns.
        progress: ``progress(title)`` is entered and told how far it is.
        intake: the rows, where somebody has looked at the files before.

    Raises:
        DataError: a row can't be read, rendered or proved; rows over ``max_length``; nothing left to train on.
        ConfigError: the request's ``path`` can't be understood.
    """
    intake = intake or Intake(request.path, request.options)
    job = request.job()
    loaded = Loaded(request, intake, [0] * len(intake.parts))
    num_kept = 0
    with _renderers(request, intake, job) as (run, render):
        if intake.is_mix:
            with _advancing(progress, "counting the rows of the mix") as advance:
                intake.choose(run, advance, partial(_complain, request.options, loaded.rejected))
        with _advancing(progress, "reading") as advance:
            for done in run(render, intake.batches()):
                loaded.add(done)
                into.add(done.columns)
                num_kept += len(done.columns["example_ends"])
                advance(done.parsed.num_rows, done.share_read)
    intake.require_rows()
    if loaded.first_too_long:
        raise too_long(*loaded.first_too_long, loaded.num_too_long, loaded.longest, loaded.num_weighted, request)
    if not num_kept:
        raise _nothing_left(request.path, loaded.lengths, loaded.rejected)
    return loaded


def _complain(options: ReadOptions, rejected: list[Rejected], bad: list[DataError]) -> None:
    if bad and not options.skip_bad_rows:
        raise bad[0]
    for error in bad:
        file, _, line = error.place.rpartition(":")
        rejected.append(Rejected(file, int(line), f"{error.message}; {error.way_out}"))


def _advancing(progress: Progress | None, title: str) -> Any:
    def ignore(_: int, __: float) -> None:
        pass

    return progress(title) if progress else nullcontext[Advance](ignore)


@contextmanager
def _renderers(request: Request, intake: Intake, job: Job) -> Iterator[tuple[Run, Any]]:
    """Who renders, and how it is asked: other processes, where there is enough to do and they render as this one."""
    recipe = request.recipe() if intake.num_bytes >= PARALLEL_BYTES else None
    if recipe is None:
        yield map, partial(render_batch, job, request.renderer)
        return
    with Workers() as workers:
        if next(workers.map(identity_elsewhere, [recipe])) == identity_of(request.renderer):
            yield workers.map, partial(render_elsewhere, job, recipe)
            return
    yield map, partial(render_batch, job, request.renderer)


def too_long(first: Source, length: int, num_over: int, longest: int, num_examples: int, request: Request) -> DataError:
    """What to say where ``num_over`` of the examples are too long and none may be."""
    return DataError(
        f"{length} tokens, and {num_over} of {num_examples} examples are over the limit of {request.max_length} tokens"
        f" (the longest has {longest})",
        place=str(first),
        way_out="raise --max-length if the model's context allows it, shorten the rows, or say --on-too-long",
    )


def _nothing_left(path: str, lengths: LengthCounts, rejected: Sequence[Rejected]) -> DataError:
    if rejected:
        first = rejected[0]
        message = f"every row is bad; the first is line {first.line}: {first.reason}"
        return DataError(message, place=path, way_out="correct the rows")
    if lengths.over:
        message = f"nothing is left to train on: {lengths.over} examples are too long"
        return DataError(message, place=path, way_out="raise --max-length or shorten the rows")
    return DataError("every weight is 0, so nothing to train on", place=path, way_out="give some message a weight")


def _told_rejected(rejected: Sequence[Rejected]) -> list[str]:
    lines = [f"left out: {r.file}:{r.line}: {r.reason}" for r in rejected[:MAX_REJECTED_TOLD]]
    if len(rejected) > MAX_REJECTED_TOLD:
        lines.append(f"left out: {len(rejected) - MAX_REJECTED_TOLD:,} more rows")
    return lines
