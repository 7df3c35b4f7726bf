"""What the worker processes of ``likely check`` do with a batch of rows; they alone load a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.data.formats import ReadOptions
from likely.data.lengths import LengthCounts, OnTooLong, fit
from likely.data.rendering import Recipe
from likely.data.rows import Batch
from likely.data.survey import Surveyed, Surveyor
from likely.model.place import Place, choose_max_length
from likely.types import ROLES, Example


@dataclass(frozen=True)
class Job:
    """How rows are rendered; the same in every worker."""

    place: Place
    recipe: Recipe
    options: ReadOptions
    max_length: int | None = None
    on_too_long: OnTooLong = "error"

    @property
    def limit(self) -> int:
        assert self.max_length is not None  # noqa: S101  (resolved)
        return self.max_length


def _surveyor(job: Job) -> Surveyor:
    return Surveyor(job.recipe.renderer(), job.limit, job.options, job.on_too_long)


def prepare(job: Job) -> tuple[int, bool]:
    """The longest example allowed, and whether the tokenizer has a chat template."""
    return choose_max_length(job.place, job.max_length), job.recipe.renderer().has_template


def survey_batch(job: Job, separately: bool, batch: Batch) -> Surveyed:
    """The facts of a batch; see :meth:`likely.data.survey.Surveyor.survey`."""
    return _surveyor(job).survey(batch, separately=separately)


def render_rows(job: Job, batch: Batch) -> list[tuple[tuple[int, int], list[Example]]]:
    """Each row, and those of its examples that are trained on."""
    rendered = []
    for (_, line), examples in zip(batch.rows, _surveyor(job).render(batch), strict=True):
        if job.on_too_long == "error":
            kept = [e for e in examples if e.weights_T.any()]
        else:
            fitted = [fit(e, job.limit, job.on_too_long, LengthCounts()) for e in examples if e.weights_T.any()]
            kept = [e for e in fitted if e]
        rendered.append(((batch.part, line), kept))
    return rendered


def pieces_of(job: Job, batch: Batch) -> list[dict[str, Any]]:
    """The examples of rows as runs of text that are trained alike."""
    tokenizer = job.recipe.renderer().tokenizer
    shown = []
    for example in [example for examples in _surveyor(job).render(batch) for example in examples]:
        changes = np.flatnonzero(np.diff(example.weights_T)) + 1
        runs = np.split(np.arange(len(example.token_ids_T)), changes)
        pieces = [
            {
                "text": tokenizer.decode(example.token_ids_T[run].tolist()),
                "tokens": len(run),
                "weight": float(example.weights_T[run[0]]),
                "role": ROLES[example.role_T[run[0]]],
            }
            for run in runs
        ]
        shown.append({"source": str(example.source), "tokens": len(example.token_ids_T), "pieces": pieces})
    return shown
