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

import numpy as np

from likely.data.dialect import Dialect
from likely.data.encoding import ControlTokens, Encoded, MadeOfTextError, common_length, has_stand_in
from likely.data.roles import ends_of_messages, roles_of_tokens
from likely.data.template import Ask, ChatTemplate, Problem
from likely.errors import DataError, ModelError
from likely.types import Conversation, IntArray

MAX_CHARS_AT_ONCE = 1 << 20
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "alpha",
        "description": "Finds beta.",
        "parameters": {"type": "object", "properties": {"beta": {"type": "string"}}, "required": ["beta"]},
    },
}
MAX_PLAIN = 4
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
        return without_empty_thought(self.lead).strip()


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
        self.count_spelled(conversation)
        hidden = self.controls.hidden
        messages = tuple(
            replace(m, content=hidden(m.content, in_answer=answer), fields=hidden(m.fields, in_answer=answer))
            for m, answer in zip(conversation.messages, answers, strict=True)
        )
        return Row(
            self, replace(conversation, messages=messages, tools=tuple(hidden(conversation.tools))), conversation
        )

    def count_spelled(self, conversation: Conversation) -> None:
        """Count a row whose texts spell control tokens.

        Raises:
            DataError: it has characters that stand for such here.
        """
        if has_stand_in([[[m.content, m.fields] for m in conversation.messages], conversation.tools]):
            raise DataError(
                "its texts spell a control token, and have characters that stand for such here (Tangut, rare ideographs"
                " or those of private use)",
                place=str(conversation.source),
                way_out="remove one or the other",
            )
        self.notes["rows spell a control token in their text; there it is text and not obeyed"] += 1

    @cached_property
    def reads_as_text(self) -> bool:
        """Whether the renamed control tokens leave everything else of a template's text as it was."""
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        text = self.template.texts(messages, (), [Ask(2)])[0] if self.template.sources.get("default") else _PROBE
        if isinstance(text, Problem):
            return True  # nothing can be written at all, and the row will say so
        renamed = self.controls.literal.encode(self.controls.shown(text))
        return np.array_equal(renamed.ids_T, self.controls.encoder.encode(text).ids_T)

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
    """One conversation on its way. ``escaped`` says that its texts are read with renamed control tokens, ``stands_in``
    that ``conversation`` is not quite the ``original``."""

    def __init__(self, writer: Writer, conversation: Conversation, original: Conversation) -> None:
        self.conversation, self.original = conversation, original
        self.escaped = self.stands_in = conversation is not original
        self.source = original.source
        self._writer = writer
        self._texts: dict[Ask, str | Problem] = {}
        self._asks: list[Ask] = []
        self._whole: Encoded | None = None

    def escape(self) -> None:
        """Read the texts anew, with renamed control tokens: content makes a control token that it does not spell.

        Raises:
            DataError: it has characters that stand for such here.
        """
        self._writer.count_spelled(self.original)
        self.escaped, self._whole = True, None

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
        return self.spoken, self.conversation.tools, self._asks

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
        return self._proved(self._whole) if self._whole.made is not None else self._whole

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
                self._prove_plain()
            raise DataError(
                f"the chat template refuses the row: {text.message}",
                place=str(self.source),
                way_out="write the conversation as the template wants it",
            )
        return text

    def _prove_plain(self) -> None:
        """A template that fails on the same turns in plain text is at fault itself, and not the row.

        Raises:
            ModelError: it does.
        """
        roles = [m.role for m in self.conversation.messages if m.role != "tool"]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            return
        messages = [{"role": role, "content": _PROBE} for role in roles]
        tools = [_PROBE_TOOL] if self.conversation.tools else []
        for text in self._ask(messages, tools, [Ask(end) for end in range(1, len(roles) + 1)][-MAX_PLAIN:]):
            if isinstance(text, Problem) and text.kind == "failed":
                raise ModelError(
                    f"the chat template fails on plain turns of {', '.join(roles[:4])}{' with a tool' * bool(tools)}:"
                    f" {text.message}",
                    place=str(self.source),
                    way_out="fix the chat template",
                )

    def _fetch(self, asks: list[Ask]) -> None:
        controls = self._writer.controls
        texts = self._ask(self.spoken, self.conversation.tools, asks)
        if self.stands_in:
            real = self._ask(controls.restored(self.spoken), self.original.tools, asks)
            for one, other in zip(texts, real, strict=True):
                if isinstance(one, str) and controls.restored(one) != other:
                    raise DataError(
                        "the chat template writes other text where content spells a control token",
                        place=str(self.source),
                        way_out="remove it from the text",
                    )
        self._texts |= zip(asks, texts, strict=True)

    @cached_property
    def spoken(self) -> list[dict[str, Any]]:
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

    @property
    def template(self) -> ChatTemplate:
        return self._writer.template

    def without_tools(self) -> str | Problem:
        """The longest text, as the template writes it where there are no tools."""
        return self._ask(self.spoken, (), [self.first])[0]

    def may_join(self, content: str) -> bool:
        """Whether a content could make a control token together with what stands around it."""
        return self._writer.controls.may_join(content)

    def num_controls(self, text: str) -> int:
        """Control tokens that a text of the template spells."""
        return len(self._writer.controls.pattern.findall(text))

    @property
    def shell(self) -> Shell | None:
        """What the template writes around a plain answer."""
        return self._writer.shell

    def texts_of(self, asks: Sequence[Ask]) -> list[str | Problem]:
        """The template's texts, asked for where they aren't here yet."""
        unknown = [ask for ask in asks if ask not in self._texts]
        if unknown:
            self._fetch(unknown)
        return [self._texts[ask] for ask in asks]

    def _readable(self, text: str) -> str:
        return self._writer.controls.shown(text) if self.escaped else text

    def encode(self, text: str) -> Encoded:
        """Tokens of a text of the template.

        Raises:
            MadeOfTextError: the tokenizer makes a control token out of mere text, and the row is not ``escaped``.
            DataError: it does so even where the control tokens are renamed.
        """
        encoder = self._writer.controls.literal if self.escaped else self._writer.controls.encoder
        return self._proved(encoder.encode(self._readable(text)))

    def _proved(self, encoded: Encoded) -> Encoded:
        if not self.escaped:
            if encoded.made is not None:
                raise MadeOfTextError(encoded.made)
        elif encoded.made is not None or not (self._writer.reads_as_text and self._writer.controls.has_all(encoded)):
            raise self._unwritable()
        return encoded

    def ids(self, text: str) -> IntArray:
        """:meth:`encode` of a text that begins as the longest one, without places.

        Raises:
            MadeOfTextError, DataError: as :meth:`encode`.
        """
        encoder = self._writer.controls.literal if self.escaped else self._writer.controls.encoder
        try:
            return encoder.ids(self._readable(text), self.whole, strict=True)
        except MadeOfTextError as error:
            if self.escaped:
                raise self._unwritable() from error
            raise

    def _unwritable(self) -> DataError:
        self._writer.prove_template()
        return DataError(
            "its text spells a control token that this tokenizer can't write as text",
            place=str(self.source),
            way_out="remove it from the text",
        )

    def roles(self, end: int) -> Any:
        """For each token of the first ``end`` messages, the role that it belongs to: int8 indices into ROLES."""
        text = self.text(Ask(end))
        messages = self.conversation.messages[:end]
        ends = ends_of_messages(messages, text, self.texts_of, self._readable)
        encoded = self.whole
        if self._readable(text) != encoded.text or not encoded.knows(ends):
            encoded = self.encode(text)
        return roles_of_tokens(messages, ends, encoded)


def without_empty_thought(text: str) -> str:
    """A text without the tags of an empty thought at its end."""
    bare = text.rstrip()
    if not bare.endswith("</think>"):
        return text
    start = bare.removesuffix("</think>").rstrip()
    return start.removesuffix("<think>") if start.endswith("<think>") else text
