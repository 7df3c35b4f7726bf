"""A conversation -> the texts that the template makes of it, and their tokens: what proofs are made from.

Where content spells a control token, another character stands for it while the template works, and in the end it is
tokenised as the text that it is. That the template would have written the same around the real spelling is checked.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from likely.data.dialect import THOUGHT_KEYS, Dialect, split_thought
from likely.data.encoding import ControlTokens, Encoded, TextEncoder, common_length, has_stand_in
from likely.data.jinja_child import ELSEWHERE
from likely.data.roles import ends_of_messages, roles_of_tokens
from likely.data.template import Ask, ChatTemplate, Problem
from likely.errors import DataError, ModelError
from likely.types import Conversation, IntArray

MAX_CHARS_AT_ONCE = 1 << 20
_PROBE = "Delta 5, epsilon."


@dataclass(frozen=True)
class Shell:
    """What the template writes around a plain answer: the generation prompt, which belongs to the question, and in the
    answer's own turn ``lead`` before it and ``closing`` behind it."""

    generation_prompt: str = ""
    lead: str = ""
    closing: str = ""

    @property
    def header(self) -> str:
        """Of ``lead`` what no model needs to say: all but white space and the tags of an empty thought."""
        return _without_empty_thought(self.lead).strip()


class Writer:
    """Writes rows with one template and one tokenizer.

    Args:
        notes: counts the rows of which something must be said.
        prove_template: raises ModelError where the template can't even write a question and its answer.
    """

    def __init__(
        self,
        template: ChatTemplate,
        controls: ControlTokens,
        notes: Counter[str],
        prove_template: Callable[[], object],
    ) -> None:
        self.template, self.controls, self.notes, self.prove_template = template, controls, notes, prove_template
        self.dialect = Dialect(template, notes)

    def row(self, conversation: Conversation) -> Row:
        """The conversation on its way, with other characters where its texts spell control tokens.

        Raises:
            DataError: its texts have such characters too.
        """
        contents = [[m.content, m.fields] for m in conversation.messages]
        answers = [m.role == "assistant" for m in conversation.messages]
        spelled = any(
            next(self.controls.spelled(content, in_answer=answer), None)
            for content, answer in zip(contents, answers, strict=True)
        )
        if not spelled and next(self.controls.spelled(conversation.tools), None) is None:
            return Row(self, conversation, conversation)
        if has_stand_in([contents, conversation.tools]):
            raise DataError(
                "its texts spell a control token, and have characters that stand for such here (Tangut, rare ideographs"
                " or those of private use)",
                place=str(conversation.source),
                way_out="remove one or the other",
            )
        self.notes["rows spell a control token in their text; there it is text and not obeyed"] += 1
        hidden = self.controls.hidden
        messages = tuple(
            replace(m, content=hidden(m.content, in_answer=answer), fields=hidden(m.fields, in_answer=answer))
            for m, answer in zip(conversation.messages, answers, strict=True)
        )
        return Row(
            self, replace(conversation, messages=messages, tools=tuple(hidden(conversation.tools))), conversation
        )

    @cached_property
    def shell(self) -> Shell | None:
        """Found with a probe; None where the template can't write it, or puts no answer behind its question."""
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        asks = [Ask(2), Ask(1), Ask(1, with_prompt=True)]
        whole, question, prompt = self.template.texts(messages, (), asks)
        if isinstance(whole, Problem) or isinstance(question, Problem) or isinstance(prompt, Problem):
            return None
        if not whole.startswith(prompt) or _PROBE not in whole[len(prompt) :]:
            return None
        lead, _, closing = whole[len(prompt) :].partition(_PROBE)
        return Shell(prompt[common_length(prompt, question) :], lead, closing)

    def fetch(self, rows: Sequence[Row]) -> None:
        """Ask for the planned texts of many rows at once. A row of which something must be said asks for itself."""
        waiting: list[Row] = []
        size = 0
        for row in rows:
            if row.planned and not row.escaped:
                waiting.append(row)
                size += row.num_chars
            if size > MAX_CHARS_AT_ONCE:
                self._fetch(waiting)
                waiting, size = [], 0
        if waiting:
            self._fetch(waiting)

    def _fetch(self, rows: Sequence[Row]) -> None:
        asked, answered = [], []
        for row in rows:
            with contextlib.suppress(DataError):  # the row will say it again when its turn comes
                asked.append((row, row.question))
        for (row, (_, _, asks)), texts in zip(
            asked, self.template.texts_of_rows([question for _, question in asked]), strict=True
        ):
            if texts is not None:
                answered.append((row, asks, texts))
        # What is asked for first is the longest.
        longest = [str(texts[0]) for *_, texts in answered]
        for (row, asks, texts), whole in zip(answered, self.controls.encoder.encode_many(longest), strict=True):
            row.accept(asks, texts, whole)


class Row:
    """One conversation on its way. ``escaped`` says that ``conversation`` is not quite the ``original``."""

    def __init__(self, writer: Writer, conversation: Conversation, original: Conversation) -> None:
        self.conversation, self.original = conversation, original
        self.escaped = conversation is not original
        self.source = original.source
        self._writer = writer
        self._texts: dict[Ask, str | Problem] = {}
        self._asks: list[Ask] = []
        self._whole: Encoded | None = None

    def plan(self, turns: Sequence[int], end: int, *, with_prompt: bool = False) -> None:
        """Which texts are needed: all for a proof of these turns, and those that show where messages end."""
        self.first = Ask(end, with_prompt)
        needed = [self.first, *(ask for i in turns for ask in (Ask(i, with_prompt=True), Ask(i + 1)))]
        self._asks = list(dict.fromkeys([*needed, *(Ask(i + 1) for i in range(end - 1))]))

    @property
    def planned(self) -> bool:
        return bool(self._asks)

    @property
    def end(self) -> int:
        """How many messages are written."""
        return self.first.end

    @property
    def num_chars(self) -> int:
        return sum(len(m.content or "") for m in self.conversation.messages)

    @property
    def question(self) -> tuple[list[dict[str, Any]], Sequence[Any], list[Ask]]:
        """Messages, tools and asks of what was planned.

        Raises:
            DataError: the template has no words for some message.
        """
        return self._spoken, self.conversation.tools, self._asks

    def accept(self, asks: Sequence[Ask], texts: Sequence[str | Problem], whole: Encoded | None = None) -> None:
        """The template's texts for some asks, and the tokens of the longest."""
        self._texts |= zip(asks, texts, strict=True)
        self._whole = whole

    def write(self, turns: Sequence[int], end: int, *, with_prompt: bool = False) -> None:
        """Plan, and get the texts if they aren't here yet."""
        self.plan(turns, end, with_prompt=with_prompt)
        if self.first not in self._texts:
            self._fetch(self._asks)

    @property
    def whole(self) -> Encoded:
        """The tokens of the longest text that was asked for."""
        if self._whole is None:
            self._whole = self.encode(self.text(self.first))
        return self._whole

    def text(self, ask: Ask) -> str:
        """What the template writes.

        Raises:
            DataError: the template refuses the row.
            ModelError: it can't write any row.
        """
        text = self._texts[ask]
        if isinstance(text, Problem):
            if text.kind != "refused":
                self._writer.prove_template()
            raise DataError(
                f"the chat template refuses the row: {text.message}",
                place=str(self.source),
                way_out="write the conversation as the template wants it",
            )
        return text

    def _fetch(self, asks: list[Ask]) -> None:
        controls = self._writer.controls
        texts = self._ask(self._spoken, self.conversation.tools, asks)
        if self.escaped:
            real = self._ask(controls.restored(self._spoken), self.original.tools, asks)
            for one, other in zip(texts, real, strict=True):
                if isinstance(one, str) and controls.restored(one) != other:
                    raise DataError(
                        "the chat template writes other text where content spells a control token",
                        place=str(self.source),
                        way_out="remove it from the text",
                    )
        self._texts |= zip(asks, texts, strict=True)

    @cached_property
    def _spoken(self) -> list[dict[str, Any]]:
        """The messages in the words of the template."""
        return [
            self._writer.dialect.message(m, f"messages[{i}]", self.source)
            for i, m in enumerate(self.conversation.messages)
        ]

    def _ask(self, messages: list[dict[str, Any]], tools: Sequence[Any], asks: list[Ask]) -> list[str | Problem]:
        try:
            return self._writer.template.texts(messages, tools, asks)
        except ModelError as error:
            raise ModelError(error.message, place=str(self.source), way_out=error.way_out) from error

    def _texts_of(self, asks: Sequence[Ask]) -> list[str | Problem]:
        unknown = [ask for ask in asks if ask not in self._texts]
        if unknown:
            self._fetch(unknown)
        return [self._texts[ask] for ask in asks]

    @property
    def _encoder(self) -> TextEncoder:
        return self._writer.controls.literal if self.escaped else self._writer.controls.encoder

    def _readable(self, text: str) -> str:
        return self._writer.controls.shown(text) if self.escaped else text

    def encode(self, text: str) -> Encoded:
        """Tokens of a text of the template.

        Raises:
            DataError: the tokenizer makes a control token out of mere text.
        """
        encoded = self._encoder.encode(self._readable(text))
        if self.escaped and not self._writer.controls.all_meant(encoded):
            raise DataError(
                "its text spells a control token that this tokenizer can't write as text",
                place=str(self.source),
                way_out="remove it from the text",
            )
        return encoded

    def ids(self, text: str) -> IntArray:
        return self._encoder.ids(self._readable(text), self.whole)

    def roles(self, end: int) -> Any:
        """For each token of the first ``end`` messages, the role that it belongs to: int8 indices into ROLES."""
        text = self.text(Ask(end))
        messages = self.conversation.messages[:end]
        ends = ends_of_messages(messages, text, self._texts_of, self._readable)
        encoded = self.whole
        if self._readable(text) != encoded.text or not encoded.knows(ends):
            encoded = self.encode(text)
        return roles_of_tokens(messages, ends, encoded)

    def lost(self, turn: int, text: str) -> str:
        """What an answer says and its ``text`` does not, as half a sentence; empty where all is there."""
        message = self.conversation.messages[turn]
        for key in THOUGHT_KEYS:
            thought = message.fields.get(key)
            if isinstance(thought, str) and message.weight and thought.strip() not in text:
                return f"drops its thought ({key})"
        calls = message.fields.get("tool_calls") or ()
        for call in calls:
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in text:
                return f"drops its tool call {name!r}"
        content = self._spoken[turn]["content"] or ""
        if (message.weight or calls) and content.strip() and not self._is_whole(turn, content, text):
            if calls and (split_thought(content) or ("", content))[1].strip() not in text:
                return "drops its text because of its tool calls"
            return f"drops or changes part of its text: {_excerpt(content)} becomes {_excerpt(text)}"
        return ""

    def _is_whole(self, turn: int, content: str, text: str) -> bool:
        """Whether a turn's text is the answer, white space around it aside, and what the template writes around every
        answer. A template that moves a thought may put it between tags of its own, and nothing else may change."""
        spoken, shell = self._spoken[turn], self._writer.shell
        field = next((spoken[key] for key in THOUGHT_KEYS if isinstance(spoken.get(key), str)), None)
        thought, answer = (field, content) if field is not None else split_thought(content) or (None, content)
        moved = ("<think>", thought or "", "</think>", answer)
        if shell and _reads(text, shell.lead, content, shell.closing):
            return True
        if shell and thought is not None and _reads(text, *moved, shell.closing):
            return True
        # Tool calls, or a template of another kind: the same turn with another content shows what is around it.
        around = self._texts_of([Ask(turn + 1, replaced=turn)])[0]
        if isinstance(around, Problem):
            return content.strip() in text
        whole, prompt = self.text(Ask(turn + 1)), self.text(Ask(turn, with_prompt=True))
        if around.count(ELSEWHERE) != prompt.count(ELSEWHERE) + 1:
            return False
        before, _, after = around.rpartition(ELSEWHERE)
        if _reads(whole, before, content, after):
            return True
        return field is None and thought is not None and _reads(whole, _without_empty_thought(before), *moved, after)


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


def _without_empty_thought(text: str) -> str:
    bare = text.rstrip()
    if not bare.endswith("</think>"):
        return text
    start = bare.removesuffix("</think>").rstrip()
    return start.removesuffix("<think>") if start.endswith("<think>") else text


def _excerpt(text: str, length: int = 60) -> str:
    text = text.strip()
    return repr(text if len(text) <= length else f"{text[: length - 23]}...{text[-20:]}")
