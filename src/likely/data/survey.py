"""Rows -> what there is to know about them, small enough to keep for millions of rows.

:class:`Surveyor` looks at one batch in a worker process; :class:`Facts` puts the batches together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from likely.data.audit import Finding, answers_of, find_in_row, prompt_of
from likely.data.duplicates import digests, hash_of, to_signatures
from likely.data.families import RowKeys, beginning_of, content_of
from likely.data.formats import ReadOptions
from likely.data.language import LANGUAGES, language_of
from likely.data.lengths import LengthCounts, OnTooLong, fit, without_hopeless
from likely.data.proof import count_stops, count_turns, is_text, leading, prove_stops, stop_id_of
from likely.data.render import Renderer
from likely.data.rows import Batch, Parsed, parse_batch
from likely.data.taught import Taught, answers_hash, combined
from likely.errors import DataError
from likely.types import ROLES, Conversation, Example, IntArray

MOST_LISTED = 50  # rows of one kind that are kept by name; all are counted
SIGNATURES = ("row", "prompt", "answer")


@dataclass
class Facts:
    """A batch, or all batches, of the files ``paths``. Suffixes of arrays: R rows that could be read, M examples of the
    rows that could be rendered, K answers and F pieces of them (:mod:`likely.data.taught`). Rows are named as
    ``file:line``."""

    paths: tuple[str, ...] = ()
    num_plain: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # rows of whose rendering something must be said
    noted: dict[str, dict[str, str]] = field(default_factory=dict)  # the first of them, by note
    refused: dict[str, str] = field(default_factory=dict)  # row -> why it can't be trained on
    found: dict[str, dict[str, str]] = field(default_factory=dict)  # kind -> row -> detail
    counts: Counter[str] = field(default_factory=Counter)  # of refused rows and of findings by kind
    arrays: dict[str, list[Any]] = field(default_factory=dict)
    # By role, of examples that something is learnt from: tokens, trained, weight.
    tokens: Any = field(default_factory=lambda: np.zeros((len(ROLES), 3)))
    turns: int = 0
    prompts: int = 0  # of turns that answer one
    stops: int = 0
    largest_token: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Facts) -> None:
        """Take in the next batch."""
        self.num_plain += other.num_plain
        self.turns += other.turns
        self.prompts += other.prompts
        self.stops += other.stops
        self.largest_token = max(self.largest_token, other.largest_token)
        self.tokens = self.tokens + other.tokens
        self.notes.update(other.notes)
        self.counts.update(other.counts)
        self.seconds.update(other.seconds)
        _keep(self.refused, other.refused)
        for mine, theirs in ((self.found, other.found), (self.noted, other.noted)):
            for kind, rows in theirs.items():
                _keep(mine.setdefault(kind, {}), rows)
        # Examples know their row by its place in the batch.
        offset = sum(map(len, self.arrays.get("line_R", [])))
        for name, parts in other.arrays.items():
            shift = offset if name.startswith("row_of_") else 0
            self.arrays.setdefault(name, []).extend(part + shift if shift else part for part in parts)

    def refuse(self, error: DataError) -> None:
        """Count a row that can't be trained on."""
        self.counts["refused"] += 1
        self.counts[f"refused in {error.place.rpartition(':')[0]}"] += 1
        self.counts["prompt differs"] += "the prompt is not a prefix" in error.message
        _keep(self.refused, {error.place: f"{error.message}; {error.way_out}" if error.way_out else error.message})

    def array(self, name: str) -> Any:
        """One array over all batches."""
        parts = self.arrays.get(name, [])
        if len(parts) > 1:
            self.arrays[name] = parts = [np.concatenate(parts)]
        return parts[0] if parts else np.empty(0, np.int64)

    @property
    def num_examples(self) -> int:
        """Examples that something is learnt from."""
        return int((self.array("trained_M") > 0).sum())

    def usable_M(self, max_length: int, on_too_long: OnTooLong) -> Any:  # noqa: N802  (a shape)
        """Which examples are trained on; where none may be too long, as if all could be."""
        trained, length = self.array("trained_M"), self.array("length_M")
        if on_too_long == "error":
            return trained > 0
        cut = {"drop": 0, "truncate_right": self.array("keep_start_M"), "truncate_left": self.array("keep_end_M")}
        return np.where(length > max_length, cut[on_too_long], trained) > 0

    def source(self, row: int) -> str:
        """The name of a row."""
        return f"{self.paths[self.array('file_R')[row]]}:{self.array('line_R')[row]}"

    def named(self, row: int) -> str:
        """A row beside others of the same data: its line, or its name where there are several files."""
        return f"line {self.array('line_R')[row]}" if len(self.paths) < 2 else self.source(row)

    def rows_rendered(self) -> tuple[IntArray, RowKeys]:
        """The rows that could be rendered, and their keys for a split."""
        rows = np.unique(self.array("row_of_M"))
        keys = RowKeys(*(self.array(name)[rows] for name in ("row_sign_R", "beginning_R", "content_R")))
        return rows.astype(np.int64), keys


def _keep(kept: dict[str, str], new: dict[str, str]) -> None:
    for row, text in new.items():
        if len(kept) == MOST_LISTED:
            return
        kept[row] = text


@dataclass(frozen=True)
class Surveyed:
    """A batch after its work."""

    part: int
    share_read: float
    parsed: Parsed
    facts: Facts


@dataclass(frozen=True)
class Surveyor:
    """What a worker needs to know: how rows are rendered, and the longest example allowed."""

    renderer: Renderer
    max_length: int
    options: ReadOptions = field(default_factory=ReadOptions)
    on_too_long: OnTooLong = "error"

    def survey(self, batch: Batch, *, separately: bool) -> Surveyed:
        """The facts of a batch. ``separately`` keeps signatures of prompts and answers too, not only of whole rows."""
        facts = Facts()
        clock = _Clock(facts.seconds)
        with clock("parsing"):
            every, parsed = parse_batch(self.options, batch)
            conversations, hopeless = without_hopeless(every, self.renderer, self.max_length, self.on_too_long)
        with clock("rendering and proof"):
            rendered, refused = self._render(conversations)
            facts.notes.update(self.renderer.notes)
            facts.noted = {note: {str(source): "" for source in rows} for note, rows in self.renderer.noted.items()}
        facts.num_plain = sum(c.plain and not is_text(c) for c in conversations)
        for error in sorted([*parsed.bad, *hopeless, *refused], key=_line):
            facts.refuse(error)
        with clock("counting"):
            self._count(conversations, rendered, facts)
        with clock("audit"):
            _audit(conversations, facts)
        with clock("what is taught"):
            _teach(conversations, rendered, self.renderer.control_ids, facts)
        with clock("duplicates"):
            _sign(conversations, facts, separately)
        facts.arrays["file_R"] = [np.full(len(conversations), batch.part, np.int32)]
        return Surveyed(batch.part, batch.share_read, parsed, facts)

    def render(self, batch: Batch) -> list[tuple[Example, ...]]:
        """The examples of each row.

        Raises:
            DataError: a row can't be read or rendered.
        """
        conversations, parsed = parse_batch(self.options, batch)
        for error in parsed.bad:
            raise error
        return [tuple(self.renderer.render(conversation)) for conversation in conversations]

    def _render(self, conversations: Sequence[Conversation]) -> tuple[list[list[Example]], list[DataError]]:
        rendered: list[list[Example]] = []
        self.renderer.notes.clear()
        self.renderer.noted.clear()
        refused = []
        for conversation, examples in zip(conversations, self.renderer.render_many(conversations), strict=True):
            try:
                if isinstance(examples, DataError):
                    raise examples
                prove_stops(conversation, examples, self.renderer)
                rendered.append(examples)
            except DataError as error:
                refused.append(error)
                rendered.append([])
        return rendered, refused

    def _count(self, conversations: Sequence[Conversation], rendered: Sequence[list[Example]], facts: Facts) -> None:
        supervision = self.renderer.supervision
        bos = self.renderer.tokenizer.bos_token_id
        rows: list[tuple[int, ...]] = []
        for row, (conversation, examples) in enumerate(zip(conversations, rendered, strict=True)):
            if examples and conversation.tokens is None:
                turns = count_turns(conversation, supervision)
                facts.turns += turns
                facts.prompts += 0 if is_text(conversation) else turns
                facts.stops += count_stops(examples, stop_id_of(conversation, self.renderer))
            for example in examples:
                trained = np.flatnonzero(example.weights_T)
                length = len(example.token_ids_T)
                facts.largest_token = max(facts.largest_token, int(example.token_ids_T.max(initial=0)))
                kept = self._kept(example) if length > self.max_length else (-1, -1, 0)
                last = int(trained[-1]) if len(trained) else 0
                rows.append((row, length, len(trained), last, leading(example, bos), *kept))
        # A training leaves out an example that teaches nothing, context and all.
        every = [example for examples in rendered for example in examples if example.weights_T.any()]
        if every:
            role_T = np.concatenate([example.role_T for example in every])
            weights_T = np.concatenate([example.weights_T for example in every])
            for column, values in enumerate((None, weights_T > 0, weights_T)):
                facts.tokens[:, column] += np.bincount(role_T, weights=values, minlength=len(ROLES))
        names = ("row_of_M", "length_M", "trained_M", "context_M", "bos_M", "keep_start_M", "keep_end_M", "no_stop_M")
        columns = np.array(rows, np.int32).reshape(len(rows), len(names)).T
        facts.arrays.update({name: [column.copy()] for name, column in zip(names, columns, strict=True)})

    def _kept(self, example: Example) -> tuple[int, int, int]:
        """Of an example that is too long: trained tokens that are left when its end or its start is cut off, and
        whether its last answer loses its stop token with its end."""
        counts = LengthCounts()
        start = fit(example, self.max_length, "truncate_right", counts)
        end = fit(example, self.max_length, "truncate_left", LengthCounts())
        left = [int((part.weights_T > 0).sum()) if part else 0 for part in (start, end)]
        return left[0], left[1], counts.stop_lost


class _Clock:
    def __init__(self, seconds: Counter[str]) -> None:
        self._seconds = seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started  # type: ignore[assignment]


def _audit(conversations: Sequence[Conversation], facts: Facts) -> None:
    languages, lines = [], []
    prompts, sizes, beginnings, contents = [], [], [], []
    for conversation in conversations:
        for finding in find_in_row(conversation):
            _note(facts, finding, str(conversation.source))
        answer = answers_of(conversation)
        lines.append(conversation.source.line)
        languages.append(LANGUAGES.index(language_of(answer)))
        prompts.append(hash_of(prompt_of(conversation).strip()))
        sizes.append(len(answer))
        beginnings.append(beginning_of(conversation))
        contents.append(content_of(conversation))
    facts.arrays |= {
        "line_R": [np.array(lines, np.int64)],
        "language_R": [np.array(languages, np.int8)],
        "prompt_R": [np.array(prompts, np.uint64)],
        "content_R": [np.array(contents, np.uint64)],
        "beginning_R": [np.array(beginnings, np.uint64)],
        "size_R": [np.array(sizes, np.int32)],
    }


def _teach(
    conversations: Sequence[Conversation], rendered: Sequence[list[Example]], control_ids: IntArray, facts: Facts
) -> None:
    """What the tokens of the rows teach; a row that can't be rendered is like no other."""
    taught = Taught()
    wholes, answers = [], []
    for row, (conversation, examples) in enumerate(zip(conversations, rendered, strict=True)):
        num_examples, num_answers = len(taught.ids_M), len(taught.said_K)
        taught.add(row, examples, control_ids)
        answers.append(answers_hash(taught.said_K[num_answers:]))
        wholes.append(combined(taught.ids_M[num_examples:]) if examples else hash_of(str(conversation.source)))
        if is_text(conversation):  # texts answer nothing, so two of them are no two answers
            del taught.row_of_K[num_answers:], taught.context_K[num_answers:], taught.said_K[num_answers:]
    facts.arrays |= {name: [column] for name, column in taught.arrays().items()}
    facts.arrays |= {"whole_R": [np.array(wholes, np.uint64)], "answer_R": [np.array(answers, np.uint64)]}


def _line(error: DataError) -> int:
    return int(error.place.rpartition(":")[2])


def _note(facts: Facts, finding: Finding, source: str) -> None:
    facts.counts[finding.kind] += 1
    _keep(facts.found.setdefault(finding.kind, {}), {source: finding.detail})


def _sign(conversations: Sequence[Conversation], facts: Facts, separately: bool) -> None:
    prompt = digests([prompt_of(c) for c in conversations])
    answer = digests([answers_of(c) for c in conversations])
    facts.arrays["row_sign_R"] = [to_signatures(np.minimum(prompt, answer))]
    if separately:
        facts.arrays |= {"prompt_sign_R": [to_signatures(prompt)], "answer_sign_R": [to_signatures(answer)]}
