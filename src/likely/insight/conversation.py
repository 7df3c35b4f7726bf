"""A conversation with one model or two: who said what, in the tokens that training would see."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likely import storage
from likely.data.render import Renderer
from likely.errors import ConfigError
from likely.model.generate import Choose, Speaker
from likely.types import Conversation, Message, Source

_HERE = Source("this conversation", 1)
# From likely to unlikely, told apart without red and green: blue, light blue, grey, orange, dark orange.
_SHADES = ((0.9, "38;5;33"), (0.5, "38;5;117"), (0.2, "38;5;250"), (0.05, "38;5;215"), (0.0, "1;38;5;202"))


@dataclass(frozen=True)
class Said:
    """A token of an answer: its text, and the log of the probability that the model gave it (nats)."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Reply:
    """An answer. ``stopped``: it ended by itself, and not at the limit."""

    text: str
    tokens: tuple[Said, ...]
    stopped: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``{"answer", "stopped", "tokens_per_second", "tokens": [{"id", "text", "logprob"}]}``."""
        return {
            "answer": self.text,
            "stopped": self.stopped,
            "tokens_per_second": len(self.tokens) / max(self.seconds, 1e-9),
            "tokens": [{"id": t.token_id, "text": t.text, "logprob": t.logprob} for t in self.tokens],
        }


@dataclass
class Voice:
    """One model in a conversation of its own: ``likely.chat`` gives one of these.

    >>> voice = likely.chat(run="runs/1")  # doctest: +SKIP
    >>> print(voice.reply("What is the capital of Peru?").text)  # doctest: +SKIP

    ``choose`` picks tokens; ``max_tokens`` bounds an answer, and ``max_length`` prompt and answer together.
    """

    title: str
    speaker: Speaker
    renderer: Renderer
    choose: Choose
    max_tokens: int
    max_length: int
    messages: list[Message] = field(default_factory=list)
    last: Reply | None = None

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages = [m for m in self.messages if m.role == "system"]
        self.last = None

    def instruct(self, text: str) -> None:
        """Begin anew with this system message, or without one.

        Raises:
            ConfigError: the model has no chat template, and so no place for one; text that is none.
        """
        _require_text(text)
        if text and not self.renderer.has_template:
            raise ConfigError("the model has no chat template, so it can't be told a system message")
        self.messages = [Message("system", text)] if text else []
        self.last = None

    def reply(self, text: str) -> Reply:
        """The whole answer; see :meth:`stream`."""
        for _ in self.stream(text):
            pass
        assert self.last is not None  # noqa: S101
        return self.last

    def stream(self, text: str) -> Generator[str, None, None]:
        """The answer piece by piece; it is part of the conversation once it is whole. Closing the iterator takes the
        turn back.

        Raises:
            ConfigError: text that is none, or more tokens than the model's context holds.
            DataError: the chat template refuses the conversation.
        """
        _require_text(text)
        # Without a template nothing tells one turn from the next.
        before = self.messages if self.renderer.has_template else []
        asked = [*before, Message("user", text)]
        prompt = self.renderer.prompt_ids(asked)
        room = min(self.max_tokens, self.max_length - len(prompt))
        if room <= 0:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, and the model's context holds {self.max_length}",
                way_out="begin a new one with /reset",
            )
        yield from self._answer(asked, prompt, room)

    def _answer(self, asked: list[Message], prompt: Sequence[int], room: int) -> Iterator[str]:
        decode = self.renderer.tokenizer.decode
        stops = frozenset({self.renderer.end_of_turn.token_id, self.renderer.tokenizer.eos_token_id} - {None})
        tokens: list[Said] = []
        said, started = "", time.perf_counter()
        with closing(self.speaker.answer(prompt, self.choose, stops)) as answer:
            for _, (token_id, logprob) in zip(range(room), answer, strict=False):
                tokens.append(Said(token_id, decode([token_id]), logprob))
                text = decode([t.token_id for t in tokens], skip_special_tokens=True)
                if text.startswith(said) and not text.endswith("\ufffd"):  # else a character is still to be completed
                    yield text[len(said) :]
                    said = text
        text = decode([t.token_id for t in tokens], skip_special_tokens=True)
        if text.startswith(said):
            yield text[len(said) :]
        stopped = tokens[-1].token_id in stops
        self.messages = [*asked, Message("assistant", text)]
        self.last = Reply(text, tuple(tokens), stopped, time.perf_counter() - started)

    def save(self, path: Path) -> None:
        """Add the conversation to a JSONL file, as a row to train on.

        Raises:
            ConfigError: nothing was said yet, or the file holds something else.
            DataError: training would refuse the row.
            ResourceError: the disk refuses.
        """
        if self.last is None:
            raise ConfigError("nothing was answered yet, so there is nothing to save")
        self.renderer.render(Conversation(tuple(self.messages), _HERE, plain=not self.renderer.has_template))
        if self.renderer.has_template:
            row: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        else:
            row = {"prompt": self.messages[0].content, "completion": self.messages[1].content}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with storage.disk_errors(path, "the row", "name another file, or free some disk"):
            storage.append(path, (b"" if _ends_whole(path) else b"\n") + line)
            storage.sync_file(path)


def _require_text(text: str) -> None:
    """
    Raises:
        ConfigError: bytes that are no UTF-8 were typed, or half a character.
    """
    if not text.isascii() and text.encode(errors="replace").decode() != text:
        raise ConfigError("this is no text in UTF-8")


def _ends_whole(path: Path) -> bool:
    """Whether a JSONL file, if there is one, ends with the end of a line.

    Raises:
        ConfigError: it is no JSONL file.
    """
    if path.suffix != ".jsonl":
        raise ConfigError("rows are saved as JSONL", place=str(path), way_out="name a file that ends in .jsonl")
    if not path.exists():
        return True
    if not path.is_file():
        raise ConfigError("this is no file", place=str(path), way_out="name another one")
    *_, last = path.read_bytes().rstrip(b"\r\n").rpartition(b"\n")
    try:
        whole = not last.strip() or isinstance(json.loads(last), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise ConfigError("its last line is no JSON object", place=str(path), way_out="mend it, or name another file")
    return path.stat().st_size == 0 or path.read_bytes()[-1:] == b"\n"


def likelihood_text(reply: Reply, *, colour: bool) -> str:
    """The tokens of an answer with the probability that the model gave each: as colours, or as numbers."""
    mean = -sum(t.logprob for t in reply.tokens) / len(reply.tokens)
    summary = f"{len(reply.tokens)} tokens, NLL {mean:.4f} nats per token, {_rate(reply)}"
    if not colour:
        shown = " ".join(f"{json.dumps(t.text, ensure_ascii=False)}:{math.exp(t.logprob):.3f}" for t in reply.tokens)
        return f"{shown}\n{summary}"
    painted = "".join(f"\x1b[{_shade(t.logprob)}m{harmless(t.text)}\x1b[0m" for t in reply.tokens)
    legend = "  ".join(f"\x1b[{code}m>= {least:g}\x1b[0m" for least, code in _SHADES)
    return f"{painted}\n{legend}   {summary}"


def _rate(reply: Reply) -> str:
    return f"{len(reply.tokens) / max(reply.seconds, 1e-9):.1f} tokens/s"


def _shade(logprob: float) -> str:
    return next(code for least, code in _SHADES if math.exp(logprob) >= least)


def harmless(text: str) -> str:
    """A text for a terminal: what would steer it is shown as a symbol instead."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd" for c in text
    )
