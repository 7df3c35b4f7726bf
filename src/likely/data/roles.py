"""Which message each token belongs to: for display and counts only, what is supervised never depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from likely.data.encoding import Encoded, common_length
from likely.data.jinja_child import ELSEWHERE
from likely.data.template import Ask, Problem
from likely.types import ROLES, Message

Texts = Callable[[Sequence[Ask]], list[str | Problem]]


def ends_of_messages(
    messages: Sequence[Message], text: str, texts_of: Texts, readable: Callable[[str], str]
) -> list[int]:
    """Where each message ends in ``text``, what the template writes for them: behind what the message says and what the
    template closes it with.

    Args:
        texts_of: the template's texts for other asks about the same messages.
        readable: a template's text -> the form in which it is tokenised, which the ends are meant for.
    """
    shorter = texts_of([Ask(i + 1) for i in range(len(messages) - 1)])
    ends: list[int] = []
    for i, (message, start) in enumerate(zip(messages, [*shorter, text], strict=True)):
        before = ends[-1] if ends else 0
        if isinstance(
            start, Problem
        ):  # some templates refuse a lone system message: its tokens count as the next one's
            end = before
        elif text.startswith(start) and (message.content or "").strip() in start[before:]:
            end = len(start)
        else:
            end = _end_by_replacing(i, text, texts_of, len(messages), before)
        ends.append(end)
    return [len(readable(text[:end])) for end in ends] if readable(text) != text else ends


def roles_of_tokens(messages: Sequence[Message], ends: Sequence[int], encoded: Encoded) -> Any:
    """For each token the index into ROLES of its message."""
    message_T = np.searchsorted(np.maximum.accumulate(ends), encoded.end_T).clip(max=len(messages) - 1)
    return np.array([ROLES.index(m.role) for m in messages], np.int8)[message_T]


def _end_by_replacing(i: int, text: str, texts_of: Texts, num_messages: int, before: int) -> int:
    """Another content in its place shows where the content ends, and what the template puts behind it."""
    other, closed = texts_of([Ask(num_messages, replaced=i), Ask(i + 1, replaced=i)])
    if isinstance(other, Problem) or isinstance(closed, Problem):
        return before
    end = len(text) - common_length(text[::-1], other[::-1])
    return end + common_length(text[end:], closed.rpartition(ELSEWHERE)[2])
