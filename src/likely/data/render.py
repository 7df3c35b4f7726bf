"""Conversation -> Example: the tokenizer's own chat template, and a proof of what is supervised.

For each assistant turn i, with R(...) the template's text and ids(...) its tokens:

    prompt_i = ids(R(messages before i, with the generation prompt))      what inference will feed the model
    turn_i   = ids(R(messages up to and with i))                          what a perfect model would have produced

The proof is that prompt_i is a prefix of turn_i, and that turn_i ends with the template's end-of-turn token and the
fixed text that follows it. Then the tokens after prompt_i, up to and with the end-of-turn token, are exactly what the
model must say in that turn, and nothing else is. Where it can't be shown the row is refused.

    tokens      <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n   Hello  !  <|im_end|>  \\n
    weights           0       0   0  0      0      0        0           0      0     1    1      1       0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from likely.errors import DataError, ModelError, first_line
from likely.types import ROLES, Conversation, Example, IntArray, Message, Source

TrainOn = Literal["assistant", "last_assistant", "all"]
PROBES = ("Alpha, beta.", "Gamma 7 delta")
_ELSEWHERE = "\ue000"  # a private character, so that it has nothing in common with any content
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
    except Exception as error:
        raise ModelError(f"no tokenizer that can be read: {first_line(error)}", place=str(folder)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no tokenizer.json", place=str(folder), way_out="convert it to the fast form"
        )
    return tokenizer


@dataclass(frozen=True)
class EndOfTurn:
    """How the template closes an assistant turn: the token that stops generation, and the fixed tokens after it."""

    token_id: int
    tail: tuple[int, ...]


@dataclass(frozen=True)
class Supervision:
    """Which tokens get weight. ``prompt_weight`` in [0, 1] is the weight of what is not an answer."""

    train_on: TrainOn = "assistant"
    prompt_weight: float = 0.0

    @property
    def weighs_prompts(self) -> bool:
        return self.train_on == "all" or self.prompt_weight > 0


class Renderer:
    """Renders conversations with one tokenizer and one idea of what is supervised."""

    def __init__(self, tokenizer: Any, supervision: Supervision | None = None) -> None:
        self.tokenizer = tokenizer
        self.supervision = supervision or Supervision()
        self.has_template = tokenizer.chat_template is not None
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        controls = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")

    def render(self, conversation: Conversation) -> list[Example]:
        """The conversation's examples: one where the template keeps history as it was said, else one an assistant turn.

        Raises:
            DataError: what is supervised can't be proved for this row.
            ModelError: the tokenizer's template can't be used at all.
        """
        self._check(conversation)
        if conversation.plain and not self.has_template:
            return [self._render_plain(conversation)]
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        if self.supervision.train_on == "last_assistant":
            turns = turns[-1:]
        spans = [self._prove(conversation, i) for i in turns]
        end = len(conversation.messages) if self.supervision.train_on == "all" else turns[-1] + 1
        text = self._text(conversation, end)
        whole = self._ids(text)
        marked = [
            (start, stop, conversation.messages[i].weight) for i, (_, start, stop) in zip(turns, spans, strict=True)
        ]
        if all(np.array_equal(ids[:stop], whole[:stop]) for ids, _, stop in spans):
            return [self._example(conversation, whole, self._roles(conversation, text, end), marked)]
        if self.supervision.weighs_prompts:
            raise DataError(
                "the chat template rewrites earlier turns, so the conversation has no single joint likelihood",
                place=str(conversation.source),
                way_out="train on assistant turns only (train_on assistant, prompt_weight 0)",
            )
        return [
            self._example(conversation, ids, self._roles(conversation, self._text(conversation, i + 1), i + 1), [span])
            for i, (ids, _, _), span in zip(turns, spans, marked, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Tokens that inference feeds the model before it answers."""
        if not self.has_template:
            return self._plain_prompt_ids("".join(m.content or "" for m in messages))
        conversation = Conversation(tuple(messages), source=_NOWHERE, tools=tuple(tools))
        ids: list[int] = self._ids(self._text(conversation, len(messages), prompt=True)).tolist()
        return ids

    @cached_property
    def end_of_turn(self) -> EndOfTurn:
        """Found by rendering two probes that differ in the answer only: what follows the answer is the template's.

        Raises:
            ModelError: the template adds nothing a model could stop at.
        """
        if not self.has_template:
            token_id = self.tokenizer.eos_token_id
            if token_id is None:
                raise ModelError("the tokenizer has no end-of-text token", way_out="set eos_token in its config")
            return EndOfTurn(token_id, ())
        first, second = (self._probe(answer) for answer in PROBES)
        if first != second:
            raise ModelError("what follows the assistant's turn depends on the answer", way_out="fix the chat template")
        return first

    def _probe(self, answer: str) -> EndOfTurn:
        """What the template writes after an answer, as tokens in their place."""
        try:
            text = self._text(Conversation((Message("user", "Hi"), Message("assistant", answer)), _NOWHERE), 2)
        except DataError as error:
            raise ModelError(error.message, way_out="fix the chat template") from error
        if answer not in text:
            raise ModelError("the chat template does not show the assistant's answer", way_out="fix the chat template")
        control = self._control.search(text, text.rindex(answer) + len(answer))
        if control is None:
            raise ModelError(
                "the chat template ends the assistant's turn with no control token: a model can't learn to stop",
                way_out="use a template with an end-of-turn token",
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoding["input_ids"], [start for start, _ in encoding["offset_mapping"]]
        # A token may have taken in the white space before it.
        index = max(i for i, start in enumerate(starts) if start <= control.start())
        return EndOfTurn(ids[index], tuple(ids[index + 1 :]))

    def _check(self, conversation: Conversation) -> None:
        def wrong(message: str, way_out: str) -> DataError:
            return DataError(message, place=str(conversation.source), way_out=way_out)

        if not any(m.role == "assistant" for m in conversation.messages):
            raise wrong("no assistant turn, so nothing to train on", "add an assistant message or remove the row")
        texts = [(f"the {m.role}'s text spells", [m.content, m.fields]) for m in conversation.messages]
        for who, text in (*texts, ("the tools spell", conversation.tools)):
            spelled = next(filter(None, map(self._control.search, _strings(text))), None)
            if spelled:
                raise wrong(
                    f"{who} the control token {spelled[0]!r}, which would be obeyed",
                    "remove it from the text; the chat template adds its own",
                )
        for message in conversation.messages:
            if self.supervision.weighs_prompts and message.role != "assistant" and message.weight != 1:
                raise wrong(
                    f"weight {message.weight:g} on a {message.role} message", "give weights to assistant messages"
                )
        if not self.has_template and not conversation.plain:
            raise ModelError(
                "the tokenizer has no chat template, and the row has messages",
                place=str(conversation.source),
                way_out="use an instruct model, or rows of prompt and completion strings",
            )

    def _prove(self, conversation: Conversation, turn: int) -> tuple[IntArray, int, int]:
        """``(ids, start, stop)``: the tokens up to and with the turn, and its supervised span, proved."""

        def wrong(message: str, way_out: str) -> DataError:
            return DataError(
                f"assistant turn messages[{turn}]: {message}", place=str(conversation.source), way_out=way_out
            )

        prompt_text = self._text(conversation, turn, prompt=True)
        text = self._text(conversation, turn + 1)
        prompt, ids = self._ids(prompt_text), self._ids(text)
        if not np.array_equal(ids[: len(prompt)], prompt):
            same = int(np.argmin([*(ids[: len(prompt)] == prompt[: len(ids)]), False]))
            raise wrong(
                f"the prompt is not a prefix of the prompt with its answer: at token {same} inference sees"
                f" {self._show(prompt[same:])} and training would see {self._show(ids[same:])}",
                "strip white space at the start of the answer, or fix the chat template's generation prompt",
            )
        message = conversation.messages[turn]
        if message.fields.get("tool_calls") and (message.content or "").strip() not in text[len(prompt_text) :]:
            raise wrong(
                "the chat template drops its text because of its tool calls",
                "make the text a turn of its own, or remove it",
            )
        end = self.end_of_turn
        stop = len(ids) - len(end.tail)
        if stop - 1 < len(prompt) or ids[stop - 1] != end.token_id or tuple(ids[stop:].tolist()) != end.tail:
            raise wrong(
                f"it ends with {self._show(ids[-4:])}, not with the end-of-turn token {self._show([end.token_id])}",
                "fix the chat template so that every assistant turn ends alike",
            )
        if int((ids[len(prompt) : stop] == end.token_id).sum()) != 1:
            raise wrong("its end-of-turn token stands more than once", "remove it from the answer")
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

    def _roles(self, conversation: Conversation, text: str, num_messages: int) -> Any:
        """The message that each token belongs to: up to the end of its content and of what the template closes it with.
        Only for display and counts: what is supervised never depends on it."""
        messages = conversation.messages[:num_messages]
        ends: list[int] = []
        for i, message in enumerate(messages):
            # Another content in its place shows where the content ends, and what the template puts behind it.
            changed = (*messages[:i], replace(message, content=_ELSEWHERE), *messages[i + 1 :])
            try:
                other = self._text(replace(conversation, messages=changed), num_messages)
                closing = self._text(replace(conversation, messages=changed), i + 1).rpartition(_ELSEWHERE)[2]
            except DataError:  # some templates refuse a lone system message: its tokens count as the next one's
                ends.append(ends[-1] if ends else 0)
                continue
            end = len(text) - _num_common(text[::-1], other[::-1])
            ends.append(end + _num_common(text[end:], closing))
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        last_T = np.array([end for _, end in encoding["offset_mapping"]], np.int64)
        message_T = np.searchsorted(np.maximum.accumulate(ends), last_T).clip(max=len(messages) - 1)
        return np.array([ROLES.index(m.role) for m in messages], np.int8)[message_T]

    def _render_plain(self, conversation: Conversation) -> Example:
        """Prompt and completion joined as they are, and the end-of-text token, for a tokenizer without a template."""
        prompt_text, completion = (m.content or "" for m in conversation.messages)
        prompt = self._plain_prompt_ids(prompt_text)
        whole = self._plain_prompt_ids(prompt_text + completion)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"the prompt ends inside a token of the joined text ({self._show(prompt[-2:])} becomes"
                f" {self._show(whole[len(prompt) - 1 :][:2])})",
                place=str(conversation.source),
                way_out="move the white space at the end of the prompt to the start of the completion",
            )
        if not prompt:
            raise DataError("the prompt has no tokens", place=str(conversation.source), way_out="give it some text")
        ids = np.array([*whole, self.end_of_turn.token_id], np.int64)
        role_T = np.full(len(ids), ROLES.index("user"), np.int8)
        return self._example(conversation, ids, role_T, [(len(prompt), len(ids), conversation.messages[-1].weight)])

    def _plain_prompt_ids(self, text: str) -> list[int]:
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        # Some tokenizers close every text with the end-of-text token; a prompt is not at its end.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _text(self, conversation: Conversation, end: int, *, prompt: bool = False) -> str:
        messages = [{"role": m.role, "content": m.content, **m.fields} for m in conversation.messages[:end]]
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program and may raise anything
            raise DataError(
                f"the chat template refuses the row: {first_line(error)}",
                place=str(conversation.source),
                way_out="write the conversation as the template wants it",
            ) from error
        return text

    def _ids(self, text: str) -> Any:
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    def _show(self, ids: Sequence[int] | Any) -> str:
        return repr(self.tokenizer.decode([int(i) for i in ids[:6]]))


def _num_common(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, however deep."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, Sequence):
            left += value
