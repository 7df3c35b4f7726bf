"""The rows that an export is verified with: what training made of them, and what whoever runs the export is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.data.dataset import Dataset
from likely.data.dialect import Dialect
from likely.data.encoding import ControlTokens
from likely.data.render import Renderer
from likely.types import Conversation, Example, Source


@dataclass(frozen=True)
class Spoken:
    """One row as it is told to whatever runs the model, and its token ids in training.

    ``messages`` end with the ``answer`` of the last assistant turn. A row that no template touches has ``text``
    instead. ``prompt_ids`` are the tokens before the answer (of a row with text, none), ``whole_ids`` those up to the
    answer's end.
    """

    source: Source
    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    text: str | None
    prompt_ids: list[int]
    whole_ids: list[int]


@dataclass(frozen=True)
class Sample:
    """``examples`` are scored, ``rows`` are tokenised; ``left_out`` says why some rows have no text to be tokenised."""

    origin: str
    examples: list[Example]
    rows: list[Spoken]
    left_out: dict[str, int]


def take_sample(dataset: Dataset, renderer: Renderer, origin: str, num_rows: int) -> Sample:
    """Up to ``num_rows`` examples, evenly spread over the data."""
    number = len(dataset.examples)
    chosen = sorted({int(i) for i in np.linspace(0, number - 1, min(num_rows, number))})
    examples = [dataset.examples[i] for i in chosen]
    left_out: Counter[str] = Counter()
    rows = []
    for index in dict.fromkeys(int(dataset.row_N[i]) for i in chosen):
        spoken = _spoken(dataset.conversations[index], renderer, left_out)
        if spoken is not None:
            rows.append(spoken)
    return Sample(origin, examples, rows, dict(left_out))


def _spoken(conversation: Conversation, renderer: Renderer, left_out: Counter[str]) -> Spoken | None:
    if conversation.tokens is not None:
        left_out["rows are token ids, not text"] += 1
        return None
    controls = ControlTokens(renderer.tokenizer)
    contents = [[m.content, m.fields] for m in conversation.messages]
    if next(controls.spelled([contents, list(conversation.tools)]), None) is not None:
        # In training it is text; other programs obey it, whatever is exported.
        left_out["rows spell a control token in their text"] += 1
        return None
    source, messages = conversation.source, conversation.messages
    whole_ids = renderer.render(conversation)[-1].token_ids_T.tolist()
    if conversation.plain and (len(messages) == 1 or not renderer.has_template):
        text = "".join(m.content or "" for m in messages)
        return Spoken(source, [], (), text, [], whole_ids)
    last = max(i for i, m in enumerate(messages) if m.role == "assistant")
    dialect = Dialect(renderer.template, Counter())
    told = [dialect.message(m, f"messages[{i}]", source) for i, m in enumerate(messages[: last + 1])]
    prompt_ids = renderer.prompt_ids(messages[:last], conversation.tools)
    return Spoken(source, told, conversation.tools, None, prompt_ids, whole_ids)
