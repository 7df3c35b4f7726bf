"""Batches of rows -> columns of examples, here or in worker processes that make the same renderer for themselves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from likely.data.formats import ReadOptions, Rejected
from likely.data.lengths import LengthCounts, OnTooLong, fit, without_hopeless
from likely.data.proof import prove_stops
from likely.data.render import Renderer, Supervision, TemplateUse, load_tokenizer
from likely.data.rows import Batch, Parsed, parse_batch
from likely.data.table import Columns, columns_of
from likely.errors import DataError
from likely.types import Conversation, Example, Source


@dataclass(frozen=True)
class Recipe:
    """How to make a renderer; ``tokenizer`` is a folder or hub id."""

    tokenizer: str
    supervision: Supervision
    template: TemplateUse
    template_date: str

    def renderer(self) -> Renderer:
        """The same one each time, in one process."""
        return _made(self)


@cache
def _made(recipe: Recipe) -> Renderer:
    return Renderer(
        load_tokenizer(recipe.tokenizer), recipe.supervision, recipe.template, template_date=recipe.template_date
    )


def identity_of(renderer: Renderer) -> str:
    """SHA-256 of all that decides what a renderer renders."""
    return hashlib.sha256(json.dumps(renderer.identity(), sort_keys=True, default=repr).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """What becomes of every batch; the same in every process."""

    options: ReadOptions
    max_length: int
    on_too_long: OnTooLong
    keep_unweighted: bool


@dataclass
class Rendered:
    """A batch after its work: columns of its examples and of the rows that could be rendered, and what was counted.
    ``stop`` is why everything must stop; ``first_too_long`` the first example over the limit where none may be."""

    part: int
    share_read: float
    parsed: Parsed
    columns: Columns
    num_rows: int = 0
    num_examples: int = 0
    num_unweighted: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    lengths: LengthCounts = field(default_factory=LengthCounts)
    rejected: list[Rejected] = field(default_factory=list)
    stop: DataError | None = None
    first_too_long: Source | None = None
    too_long: list[int] = field(default_factory=list)


def render_elsewhere(job: Job, recipe: Recipe, batch: Batch) -> Rendered:
    """:func:`render_batch` in a worker process."""
    return render_batch(job, recipe.renderer(), batch)


def identity_elsewhere(recipe: Recipe) -> str:
    """In a worker process, what decides what it renders."""
    return identity_of(recipe.renderer())


def render_batch(job: Job, renderer: Renderer, batch: Batch) -> Rendered:
    """The examples of a batch within their length. The first row that is wrong stops the batch, unless such rows are to
    be left out."""
    conversations, parsed = parse_batch(job.options, batch)
    done = Rendered(batch.part, batch.share_read, parsed, {})
    _render(job, renderer, conversations, batch.path, done)
    return done


def render_conversations(
    job: Job, renderer: Renderer, conversations: Sequence[Conversation], part: int, path: str
) -> Rendered:
    """:func:`render_batch` of rows of one file that were parsed before."""
    done = Rendered(part, 1.0, Parsed(len(conversations), len(conversations)), {})
    _render(job, renderer, conversations, path, done)
    return done


def _render(job: Job, renderer: Renderer, conversations: Sequence[Conversation], path: str, done: Rendered) -> None:
    conversations, hopeless = without_hopeless(conversations, renderer, job.max_length, job.on_too_long)
    bad = [*done.parsed.bad, *hopeless]
    renderer.notes.clear()
    renderer.noted.clear()
    kept: list[Conversation] = []
    examples: list[Example] = []
    row_N: list[int] = []
    for conversation, rendered in zip(conversations, renderer.render_many(conversations), strict=True):
        try:
            if isinstance(rendered, DataError):
                raise rendered
            prove_stops(conversation, rendered, renderer)
        except DataError as error:
            bad.append(error)
            continue
        for example in rendered:
            fitted = _fitted(job, example, done)
            if fitted is not None:
                examples.append(fitted)
                row_N.append(len(kept))
        kept.append(conversation)
    done.notes = Counter(renderer.notes)
    bad.sort(key=_line)
    if bad and not job.options.skip_bad_rows:
        done.stop = bad[0]
    done.rejected = [Rejected(path, _line(e), f"{e.message}; {e.way_out}") for e in bad]
    done.num_rows = len(kept)
    done.columns = columns_of(done.part, kept, examples, row_N)


def _line(error: DataError) -> int:
    return int(error.place.rpartition(":")[2])


def _fitted(job: Job, example: Example, done: Rendered) -> Example | None:
    done.num_examples += 1
    if not (job.keep_unweighted or example.weights_T.any()):
        done.num_unweighted += 1
        return None
    if job.on_too_long == "error" and len(example.token_ids_T) > job.max_length:
        done.first_too_long = done.first_too_long or example.source
        done.too_long.append(len(example.token_ids_T))
        return None
    return fit(example, job.max_length, job.on_too_long, done.lengths)
