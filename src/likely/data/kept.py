"""What of a row reaches the text that its template makes of it: an answer that is learnt is the row's own, and what the
answer is learnt from is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from likely.data.dialect import THOUGHT_KEYS, split_thought
from likely.data.jinja_child import ELSEWHERE
from likely.data.template import Ask, Problem
from likely.data.writing import Row, without_empty_thought
from likely.errors import DataError, quoted
from likely.types import Role

CHANGED = "rows have a message that the chat template writes in other words"

# A shorter text is found by accident in what a template writes itself.
SHORTEST_TOLD, MAX_KNOWN = 12, 100_000
SAYS: dict[Role, str] = {"system": "system prompt", "user": "question", "tool": "tool's answer", "assistant": "answer"}


class Context:
    """Proves for rows of one template that what an answer is learnt from is in the row's text: templates leave out
    roles that they don't know, and tools, without a word. ``notes`` counts the rows of which something must be said."""

    def __init__(self, notes: Counter[str]) -> None:
        self._notes = notes
        # Templates go by the roles of a row, so what they showed of one they show of all that are built alike.
        self._shown: set[tuple[Any, ...]] = set()

    def prove(self, row: Row, turns: Sequence[int], asks: Sequence[Ask]) -> None:
        """Each message before the last of the proved ``turns``, but for these themselves, and the tools are shown in
        one of the texts that are learnt from (``asks``).

        Raises:
            DataError: one is not, or the template makes control tokens of one.
        """
        built = (tuple(m.role for m in row.conversation.messages[: row.end]), bool(row.conversation.tools))
        text = row.text(asks[0])
        if row.conversation.tools and not self._shows_tools(row, built, text):
            raise DataError(
                "the chat template does not show the row's tools",
                place=str(row.source),
                way_out="use a model whose template has a place for tools, take them out of the row, or leave such rows"
                " out with --on-bad-row skip",
            )
        contents = [(message.get("content") or "").strip() for message in row.spoken[: row.end]]
        for i, content in enumerate(contents):
            if content and row.may_join(content) and "</think>" not in content:
                later = [ask for ask in asks if ask.end > i]
                others = row.texts_of([ask._replace(replaced=i) for ask in later])
                _prove_controls(row, i, [row.text(ask) for ask in later], others)
        told = [i for i, content in enumerate(contents) if content and i not in turns]
        place = 0
        in_order = True
        for i in told:
            found = text.find(contents[i], place)
            in_order = in_order and found >= 0
            place = found + len(contents[i])
        changed = False
        for i in told:
            if not in_order or len(contents[i]) < SHORTEST_TOLD:
                changed |= not self._proved(row, i, [ask for ask in asks if ask.end > i], built)
        if changed:
            self._notes[CHANGED] += 1

    def _proved(self, row: Row, i: int, asks: Sequence[Ask], built: tuple[tuple[str, ...], bool]) -> bool:
        """Whether a message is shown as it stands in the row."""
        message, content = row.conversation.messages[i], row.spoken[i]["content"].strip()
        texts = [row.text(ask) for ask in asks]
        verbatim = any(form in text for text in texts for form in _forms(content))
        if verbatim and (built, i) in self._shown:
            return True
        # The same texts with another content in its place.
        others = row.texts_of([ask._replace(replaced=i) for ask in asks])
        if texts == others:
            raise DataError(
                f"messages[{i}]: the chat template drops the {SAYS[message.role]} {quoted(content)}",
                place=str(row.source),
                way_out="move it into a message that the template shows, or leave such rows out with --on-bad-row skip",
            )
        if verbatim and len(self._shown) < MAX_KNOWN:
            self._shown.add((built, i))
        if verbatim or message.role == "assistant":  # a thought in an earlier answer may go
            return True
        _prove_controls(row, i, texts, others)
        return False

    def _shows_tools(self, row: Row, built: tuple[tuple[str, ...], bool], text: str) -> bool:
        if not row.template.mentions("tools"):
            return False
        if built in self._shown or any(form in text for said in _descriptions(row) for form in _forms(said)):
            return True
        shown = row.without_tools() != text
        if shown and len(self._shown) < MAX_KNOWN:
            self._shown.add(built)
        return shown


def _prove_controls(row: Row, i: int, texts: Sequence[str], others: Sequence[str | Problem]) -> None:
    """A template writes as many control tokens around any content."""
    for text, other in zip(texts, others, strict=True):
        if isinstance(other, str) and row.num_controls(text) != row.num_controls(other):
            said, content = SAYS[row.conversation.messages[i].role], row.spoken[i]["content"].strip()
            raise DataError(
                f"messages[{i}]: the chat template makes control tokens of the {said} {quoted(content)}",
                place=str(row.source),
                way_out="remove them from the text",
            )


def _descriptions(row: Row) -> list[str]:
    functions = [tool.get("function", tool) for tool in row.conversation.tools]
    said = [function.get("description") for function in functions if isinstance(function, Mapping)]
    return [text for text in said if isinstance(text, str) and len(text) >= SHORTEST_TOLD]


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is and inside JSON, as templates write it."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def lost_of_answer(row: Row, turn: int, text: str) -> str:
    """What an answer says and its ``text`` does not, as half a sentence; empty where all is there."""
    message = row.conversation.messages[turn]
    for key in THOUGHT_KEYS:
        thought = message.fields.get(key)
        if isinstance(thought, str) and message.weight and thought.strip() not in text:
            return f"drops its thought ({key})"
    calls = message.fields.get("tool_calls") or ()
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            return f"drops its tool call {quoted(name)}"
    content = row.spoken[turn]["content"] or ""
    if (message.weight or calls) and content.strip() and not _is_whole(row, turn, content, text):
        if calls and (split_thought(content) or ("", content))[1].strip() not in text:
            return "drops its text because of its tool calls"
        return f"drops or changes part of its text: {quoted(content.strip())} becomes {quoted(text.strip())}"
    return ""


def _is_whole(row: Row, turn: int, content: str, text: str) -> bool:
    """Whether a turn's text is the answer, white space around it aside, and what the template writes around every
    answer. A template that moves a thought may put it between tags of its own, and nothing else may change."""
    spoken, shell = row.spoken[turn], row.shell
    field = next((spoken[key] for key in THOUGHT_KEYS if isinstance(spoken.get(key), str)), None)
    thought, answer = (field, content) if field is not None else split_thought(content) or (None, content)
    moved = ("<think>", thought or "", "</think>", answer)
    if shell and _reads(text, shell.lead, content, shell.closing):
        return True
    if shell and thought is not None and _reads(text, *moved, shell.closing):
        return True
    # Tool calls, or a template of another kind: the same turn with another content shows what is around it.
    around = row.texts_of([Ask(turn + 1, replaced=turn)])[0]
    if isinstance(around, Problem):
        return content.strip() in text
    whole, prompt = row.text(Ask(turn + 1)), row.text(Ask(turn, with_prompt=True))
    if around.count(ELSEWHERE) != prompt.count(ELSEWHERE) + 1:
        return False
    before, _, after = around.rpartition(ELSEWHERE)
    if _reads(whole, before, content, after):
        return True
    return field is None and thought is not None and _reads(whole, without_empty_thought(before), *moved, after)


def _reads(text: str, *pieces: str) -> bool:
    """Whether a text is these pieces one after the other, with any white space around each."""
    place = 0
    for piece in pieces:
        bare = piece.strip()
        while bare and place < len(text) and text[place].isspace():
            place += 1
        if not text.startswith(bare, place):
            return False
        place += len(bare)
    return not text[place:].strip()
