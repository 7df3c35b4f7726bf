"""Conversation -> Example: the tokenizer's own chat template, and a proof of what is supervised.

For each assistant turn i, with R(...) the template's text and ids(...) its tokens:

    prompt_i = ids(R(messages before i, with the generation prompt))      what inference will feed the model
    turn_i   = ids(R(messages up to and with i))                          what a perfect model would have produced

The proof is that prompt_i is a prefix of turn_i, and that turn_i ends with the template's end-of-turn token and the
fixed text that follows it. Then the tokens after prompt_i, up to and with the end-of-turn token, are exactly what the
model must say in that turn, and nothing else is. Where it can't be shown the row is refused.

Text that spells a control token is text: ids(...) obeys the control tokens of the template and no others.

    tokens      <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n   Hello  !  <|im_end|>  \\n
    weights           0       0   0  0      0      0        0           0      0     1    1      1       0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from likely.data.bounds import require_bounds
from likely.data.encoding import ControlTokens, FewestTokens, MadeOfTextError
from likely.data.ending import PROBES, EndOfTurn, find_end_of_turn
from likely.data.kept import Context, lost_of_answer
from likely.data.template import DEFAULT_DATE, Ask, ChatTemplate
from likely.data.writing import Row, Writer
from likely.errors import DataError, ModelError, first_line, quoted
from likely.types import ROLES, Conversation, Example, IntArray, Message, Source

TrainOn = Literal["assistant", "last_assistant", "all"]
TemplateUse = Literal["auto", "chat", "raw"]
Made = TypeVar("Made")
_NOWHERE = Source("the chat template", 0)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder or hub id; code that comes with it is never run.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer, logging  # noqa: PLC0415  (it imports torch, which this floor must not need)

    logging.set_verbosity_error()  # complaints are ours to show
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # a panic of Rust is no Exception, and has no class to be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = f"no tokenizer that can be read: {first_line(error)}"
        raise ModelError(message, place=str(folder), way_out="fetch or copy the model's files again") from error
    if not tokenizer.is_fast:
        message = "the tokenizer has no tokenizer.json"
        raise ModelError(message, place=str(folder), way_out="convert it to the fast form")
    require_bounds(tokenizer, str(folder))
    return tokenizer


@dataclass(frozen=True)
class Supervision:
    """Which tokens get weight. ``prompt_weight`` in [0, 1] is the weight of what is not an answer."""

    train_on: TrainOn = "assistant"
    prompt_weight: float = 0.0

    @property
    def weighs_prompts(self) -> bool:
        return self.train_on == "all" or self.prompt_weight > 0


class Renderer:
    """Renders conversations with one tokenizer and one idea of what is supervised.

    Args:
        template: ``auto`` sends prompt and completion strings through the chat template where the tokenizer has one,
            ``chat`` insists on it, ``raw`` joins them as they are.
        template_date: the date that ``strftime_now`` of a template says, YYYY-MM-DD.

    ``notes`` counts the rows of which something must be said, ``noted`` names them; both are for the caller to clear.

    Raises:
        ModelError: ``chat`` with a tokenizer that has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        supervision: Supervision | None = None,
        template: TemplateUse = "auto",
        template_date: str = DEFAULT_DATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.supervision = supervision or Supervision()
        self.notes: Counter[str] = Counter()
        self.noted: dict[str, list[Source]] = {}
        self._use = template
        self.has_template = tokenizer.chat_template is not None and template != "raw"
        if template == "chat" and not self.has_template:
            raise ModelError("the tokenizer has no chat template", way_out="use template raw, or an instruct model")
        source = tokenizer.chat_template or ""
        sources = source if isinstance(source, Mapping) else {"default": source}
        self.template = ChatTemplate(sources, tokenizer.special_tokens_map, template_date)
        self._controls = ControlTokens(tokenizer)
        self._writer = Writer(self.template, self._controls, self.notes, lambda: self.end_of_turn)
        self.fewest = FewestTokens(tokenizer.backend_tokenizer)
        self.control_ids = self._controls.ids  # of the tokens that are obeyed and not read, ascending
        self._num_tokens = len(tokenizer)
        self._context = Context(self.notes)

    def identity(self) -> dict[str, Any]:
        """Everything that decides what is rendered, for JSON: equal for two renderers that give the same."""
        return {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "kind": [type(self.tokenizer).__name__, len(self.tokenizer), self.tokenizer.eos_token_id],
            "special_tokens": {key: str(value) for key, value in self.tokenizer.special_tokens_map.items()},
            "template": self.tokenizer.chat_template,
            "use": [self._use, self.template.date],
            "supervision": [self.supervision.train_on, self.supervision.prompt_weight],
        }

    def told(self) -> list[str]:
        """Lines for people about what was rendered so far."""
        lines = [f"{count:,} {note}" for note, count in self.notes.items()]
        if self.has_template and self.template.writes_date:
            lines.append(f"the chat template writes a date: it says {self.template.date} (template_date)")
        return lines

    def render(self, conversation: Conversation) -> list[Example]:
        """The conversation's examples: one where the template keeps history as it was said, else one an assistant turn.

        Raises:
            DataError: what is supervised can't be proved for this row.
            ModelError: the tokenizer's template can't be used at all.
        """
        return self._render_planned(conversation, None)

    def render_many(self, conversations: Sequence[Conversation]) -> list[list[Example] | DataError]:
        """:meth:`render` of each, faster: the template is asked about all of them at once. What would be raised for a
        row stands in its place.

        Raises:
            ModelError: the tokenizer's template can't be used at all.
        """
        planned: list[tuple[Row, list[int]] | None] = []
        for conversation in conversations:
            try:
                planned.append(self._plan(conversation))
            except (DataError, RecursionError):  # to be raised again, in its turn
                planned.append(None)
        self._writer.fetch([plan[0] for plan in planned if plan])
        results: list[list[Example] | DataError] = []
        for conversation, plan in zip(conversations, planned, strict=True):
            try:
                results.append(self._render_planned(conversation, plan))
            except DataError as error:
                results.append(error)
        return results

    def _render_planned(self, conversation: Conversation, plan: tuple[Row, list[int]] | None) -> list[Example]:
        if conversation.tokens is not None:
            return [self._render_tokens(conversation)]
        before = self.notes.copy()
        try:
            examples = self._as_text(plan or self._plan(conversation), self._render)
            for note in self.notes - before:
                self.noted.setdefault(note, []).append(conversation.source)
            return examples
        except RecursionError as error:
            way_out = "flatten its tools or fields"
            raise DataError("nested too deeply", place=str(conversation.source), way_out=way_out) from error

    def _as_text(self, plan: Any, render: Callable[[Row, list[int]], Made]) -> Made:
        """What ``render`` makes of a planned row, once more with renamed control tokens where content makes some."""
        row, turns = plan
        notes = self.notes.copy()
        try:
            return render(row, turns)
        except MadeOfTextError:
            self.notes.clear()
            self.notes.update(notes)
            row.escape()
            return render(row, turns)

    def _plan(self, conversation: Conversation) -> tuple[Row, list[int]] | None:
        """The row with what is to be asked of the template, and the turns to prove; None for a row of tokens."""
        if conversation.tokens is not None:
            return None
        self._check(conversation)
        row = self._writer.row(conversation)
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self.supervision.train_on == "last_assistant":
            turns = turns[-1:]
        if self.has_template and not (conversation.plain and len(conversation.messages) == 1):
            row.plan(turns, len(conversation.messages) if self.supervision.train_on == "all" else turns[-1] + 1)
        return row, turns

    def _render(self, row: Row, turns: list[int]) -> list[Example]:
        conversation = row.original
        if conversation.plain and len(conversation.messages) == 1:
            return [self._render_text(row)]
        if conversation.plain and not self.has_template:
            self.notes["rows of prompt and completion are joined as they are, and the end-of-text token added"] += 1
            return [self._render_plain(row)]
        if conversation.plain:
            self.notes["rows of prompt and completion go through the chat template, as user and assistant"] += 1
        end = row.end
        row.write(turns, end)
        spans = [self._prove(row, i) for i in turns]
        whole = row.whole.ids_T
        weights = [conversation.messages[i].weight for i in turns]
        past = self.end_of_turn.past
        if self.end_of_turn.end_of_text is not None:
            self.notes["rows have the end-of-text token behind each end of turn; the model learns to say both"] += 1
        if all(np.array_equal(ids[:stop], whole[:stop]) for ids, _, stop in spans):
            self._context.prove(row, turns, [row.first])
            marked = [(start, past(whole, stop), w) for (_, start, stop), w in zip(spans, weights, strict=True)]
            return [self._example(conversation, whole, row.roles(end), marked)]
        if self.supervision.weighs_prompts:
            raise DataError(
                "the chat template rewrites earlier turns, so the conversation has no single joint likelihood",
                place=str(conversation.source),
                way_out="train on assistant turns only (train_on assistant, prompt_weight 0)",
            )
        self._context.prove(row, turns, [Ask(i + 1) for i in turns])
        return [
            self._example(conversation, ids, row.roles(i + 1), [(start, past(ids, stop), w)])
            for i, (ids, start, stop), w in zip(turns, spans, weights, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Tokens that inference feeds the model before it answers."""
        conversation = Conversation(tuple(messages), source=_NOWHERE, tools=tuple(tools))
        return self._as_text((self._writer.row(conversation), []), self._prompt_ids)

    def _prompt_ids(self, row: Row, _turns: list[int]) -> list[int]:
        messages = row.conversation.messages
        if not self.has_template:
            return self._plain_ids("".join(m.content or "" for m in messages), row)
        row.write([], len(messages), with_prompt=True)
        ids: list[int] = row.whole.ids_T.tolist()
        return ids

    @cached_property
    def end_of_turn(self) -> EndOfTurn:
        """How a turn ends; without a template, with the end-of-text token.

        Raises:
            ModelError: the template adds nothing a model could stop at.
        """
        if self.has_template:
            return find_end_of_turn(self.tokenizer, self._writer, self._controls)
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token", way_out="set eos_token in its config")
        return EndOfTurn(self.tokenizer.eos_token_id, ())

    def _check(self, conversation: Conversation) -> None:
        def wrong(message: str, way_out: str) -> DataError:
            return DataError(message, place=str(conversation.source), way_out=way_out)

        if not any(m.role == "assistant" for m in conversation.messages):
            raise wrong("no assistant turn, so nothing to train on", "add an assistant message or remove the row")
        for message in conversation.messages:
            if message.role == "assistant" or message.weight == 1:
                continue
            if self.supervision.weighs_prompts or message.weight > 0:
                raise wrong(
                    f"weight {message.weight:g} on a {message.role} message",
                    "give weights to assistant messages; prompt_weight is that of all the others",
                )
        if not self.has_template and not conversation.plain:
            if self._use == "raw":
                raise wrong("template raw joins strings, and the row has messages", "use template auto")
            raise ModelError(
                "the tokenizer has no chat template, and the row has messages",
                place=str(conversation.source),
                way_out="use an instruct model, or rows of prompt and completion strings",
            )

    def _prove(self, row: Row, turn: int) -> tuple[IntArray, int, int]:
        """``(ids, start, stop)``: the tokens up to and with the turn, and its supervised span, proved."""

        def wrong(message: str, way_out: str) -> DataError:
            return DataError(f"assistant turn messages[{turn}]: {message}", place=str(row.source), way_out=way_out)

        prompt_text, text = row.text(Ask(turn, with_prompt=True)), row.text(Ask(turn + 1))
        prompt, ids = row.ids(prompt_text), row.ids(text)
        if not np.array_equal(ids[: len(prompt)], prompt):
            same = int(np.argmin([*(ids[: len(prompt)] == prompt[: len(ids)]), False]))
            raise wrong(
                f"the prompt is not a prefix of the prompt with its answer: at token {same} inference sees"
                f" {self._show(prompt[same:])} and training would see {self._show(ids[same:])}",
                "strip white space at the start of the answer, or fix the chat template's generation prompt",
            )
        end, shell = self.end_of_turn, self._writer.shell
        header = shell.generation_prompt.strip() if shell else ""
        said = text[len(prompt_text) :]
        if header and not prompt_text.rstrip().endswith(header) and said.lstrip().startswith(header):
            raise wrong(
                f"the chat template writes no generation prompt here, so its header {quoted(header)} would be learnt",
                "begin the row with a user message, or fix the chat template",
            )
        stop = len(ids) - len(end.tail)
        if stop - 1 < len(prompt) or ids[stop - 1] != end.token_id or tuple(ids[stop:].tolist()) != end.tail:
            raise wrong(
                f"it ends with {self._show(ids[-4:])}, not with the end-of-turn token {self._show([end.token_id])}",
                "fix the chat template so that every assistant turn ends alike",
            )
        if int((ids[len(prompt) : stop] == end.token_id).sum()) != 1:
            raise wrong("its end-of-turn token stands more than once", "remove it from the answer")
        lost = lost_of_answer(row, turn, said)
        if lost:
            raise wrong(f"the chat template {lost}", "make it a turn of its own, or remove it")
        return ids, len(prompt), stop

    def _example(
        self, conversation: Conversation, ids: IntArray, role_T: Any, marked: Sequence[tuple[int, int, float]]
    ) -> Example:
        """``marked`` are the supervised spans ``(start, stop, weight)`` of the assistant turns."""
        weights_T = np.full(len(ids), 1.0 if self.supervision.train_on == "all" else self.supervision.prompt_weight)
        for start, stop, weight in marked:
            weights_T[start:stop] = weight
            role_T[start:stop] = ROLES.index("assistant")
        weights_T[:1] = 0.0
        return Example(ids, weights_T, role_T, conversation.source)

    def _render_plain(self, row: Row) -> Example:
        """Prompt and completion joined as they are, and the end-of-text token, for a tokenizer without a template."""
        prompt_text, completion = (m.content or "" for m in row.conversation.messages)
        prompt = self._plain_ids(prompt_text, row)
        whole = self._plain_ids(prompt_text + completion, row)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"the prompt ends inside a token of the joined text ({self._show(prompt[-2:])} becomes"
                f" {self._show(whole[len(prompt) - 1 :][:2])})",
                place=str(row.source),
                way_out="move the white space at the end of the prompt to the start of the completion",
            )
        if not prompt:
            raise DataError("the prompt has no tokens", place=str(row.source), way_out="give it some text")
        ids = np.array([*whole, self.end_of_turn.token_id], np.int64)
        role_T = np.full(len(ids), ROLES.index("user"), np.int8)
        return self._example(row.original, ids, role_T, [(len(prompt), len(ids), row.original.messages[-1].weight)])

    def _render_text(self, row: Row) -> Example:
        """Bare text and the end-of-text token: all of it is learnt but the first token, which nothing predicts."""
        token_id = self.tokenizer.eos_token_id
        if token_id is None:
            raise ModelError("the tokenizer has no end-of-text token", way_out="set eos_token in its config")
        message = row.conversation.messages[0]
        ids = np.array([*self._plain_ids(message.content or "", row), token_id], np.int64)
        role_T = np.full(len(ids), ROLES.index("assistant"), np.int8)
        return self._example(row.original, ids, role_T, [(0, len(ids), message.weight)])

    def _render_tokens(self, conversation: Conversation) -> Example:
        assert conversation.tokens is not None  # noqa: S101
        ids = np.array(conversation.tokens.ids, object)  # no number is too large for it
        outside = np.flatnonzero((ids < 0) | (ids >= self._num_tokens))
        if len(outside):
            first = int(outside[0])
            raise DataError(
                f'"input_ids"[{first}] is {quoted(ids[first])}, and the tokenizer has {self._num_tokens} tokens',
                place=str(conversation.source),
                way_out="tokenise with this model's tokenizer",
            )
        supervised = np.array(conversation.tokens.supervised)
        weights_T = np.where(supervised, 1.0, self.supervision.prompt_weight)
        if self.supervision.train_on == "all":
            weights_T[:] = 1.0
        weights_T[0] = 0.0
        role_T = np.where(supervised, ROLES.index("assistant"), ROLES.index("user")).astype(np.int8)
        return Example(ids.astype(np.int64), weights_T, role_T, conversation.source)

    def _plain_ids(self, text: str, row: Row | None) -> list[int]:
        """The ids of a text with what the tokenizer puts around every text, but for an end of text behind it."""
        if row is None or not row.escaped:
            ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
            if row is not None and self._controls.num_obeyed(ids) > self._controls.num_obeyed(self._around):
                row.encode(text)  # which raises where content made one of them
            # Some tokenizers close every text with the end-of-text token; a prompt is not at its end.
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        bare = self._controls.encoder.encode(PROBES[0]).ids_T
        before = self._around[: len(self._around) - len(bare)]
        return [*before, *row.encode(text).ids_T.tolist()]

    @cached_property
    def _around(self) -> list[int]:
        """A short text with what the tokenizer puts before every text."""
        return self._plain_ids(PROBES[0], None)

    def _show(self, ids: Sequence[int] | Any) -> str:
        return quoted(self.tokenizer.decode([int(i) for i in ids[:6]]))
