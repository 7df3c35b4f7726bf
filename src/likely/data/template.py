"""A chat template, run where it can do no harm: in a child process with limits on time, memory and output.

One child serves all templates of a process and lives as long as it behaves; a row costs one question and one answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from likely.data.jinja_child import CPU_SECONDS, CPU_SECONDS_PER_TEXT
from likely.errors import ModelError, ResourceError, first_line

DEFAULT_DATE = "2024-07-26"  # what Llama 3's templates fall back to where they are told no date
# Far above the limit on processor time, which stops a template first unless the machine stands still.
PATIENCE = 12.0
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_ids = itertools.count()
_WORDS = {
    "NoneType": "null",
    "None": "null",
    "dict": "an object",
    "list": "an array",
    "tuple": "an array",
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
}
_KINDS = re.compile(
    rf"""(?:\b(?:object|argument)\ of\ type\ )?(?P<quote>['"])(?P<kind>{"|".join(_WORDS)})(?:\ object)?(?P=quote)"""
    r"""(?:\ object)?|\b(?P<bare>str|dict|NoneType)\b""",
    re.VERBOSE,
)


class Ask(NamedTuple):
    """The text of the first ``end`` messages; ``replaced`` is one whose content a private character stands for."""

    end: int
    with_prompt: bool = False
    replaced: int = -1


@dataclass(frozen=True)
class Problem:
    """Why there is no text: the template refused with ``raise_exception``, it failed on this row, or it is broken."""

    kind: str
    message: str


class ChatTemplate:
    """One tokenizer's template, or its named ones, with the variables that they may read.

    Args:
        sources: ``{"default": source}``, and ``tool_use`` where a tokenizer has a template of its own for tools.
        variables: the special tokens by name (``bos_token`` ...).
        date: what ``strftime_now`` says, as YYYY-MM-DD: tokens must not depend on the day of training.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any], date: str = DEFAULT_DATE) -> None:
        self.sources, self.variables, self.date = dict(sources), dict(variables), date
        self._id = next(_ids)

    @property
    def writes_date(self) -> bool:
        return any("strftime_now" in source for source in self.sources.values())

    def mentions(self, word: str) -> bool:
        return any(word in source for source in self.sources.values())

    def texts(self, messages: Sequence[Any], tools: Sequence[Any], asks: Sequence[Ask]) -> list[str | Problem]:
        """What the template writes for each ask.

        Raises:
            ModelError: the template is broken: no valid template, or it takes too much time, memory or output.
        """
        child = _running()
        try:
            self._define(child)
            answer = child.ask(self._frame(messages, tools, asks), len(asks))
        except RecursionError:
            return [Problem("failed", "nested too deeply") for _ in asks]
        except _Died as error:
            child.stop()
            raise _broken(str(error)) from error
        if "texts" not in answer:
            return [_problem(answer) for _ in asks]
        texts = _texts_of(answer)
        broken = next((text for text in texts if isinstance(text, Problem) and text.kind == "broken"), None)
        if broken:
            raise _broken(broken.message)
        return texts

    def texts_of_rows(
        self, rows: Sequence[tuple[Sequence[Any], Sequence[Any], Sequence[Ask]]]
    ) -> list[list[str | Problem] | None]:
        """:meth:`texts` of many ``(messages, tools, asks)`` with one question, which is much cheaper; None for each row
        that had better be asked about by itself, to hear what is wrong with it."""
        child = _running()
        try:
            self._define(child)
            frames = [self._frame(*row) for row in rows]
            answers = child.ask({"rows": frames}, sum(len(asks) for *_, asks in rows)).get("rows", [])
        except (RecursionError, ModelError):
            answers = []
        except _Died:
            child.stop()
            answers = []
        if len(answers) != len(rows):
            return [None] * len(rows)
        texts = [_texts_of(answer) if "texts" in answer else None for answer in answers]
        return [None if t is None or any(isinstance(text, Problem) for text in t) else t for t in texts]

    def _frame(self, messages: Sequence[Any], tools: Sequence[Any], asks: Sequence[Ask]) -> dict[str, Any]:
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        return {
            "use": self._id,
            "template": name,
            "messages": list(messages),
            "tools": list(tools) or None,
            "asks": asks,
        }

    def _define(self, child: _Child) -> None:
        if self._id not in child.defined:
            answer = child.ask(
                {"define": self._id, "templates": self.sources, "variables": self.variables, "date": self.date}, 1
            )
            if answer:
                raise _broken(answer["message"])
            child.defined.add(self._id)


def plain_words(message: str) -> str:
    """What Python says of a value, in words of JSON."""
    return _KINDS.sub(lambda found: _WORDS[found["kind"] or found["bare"]], message)


def _problem(answer: Mapping[str, str]) -> Problem:
    kind, message = answer["kind"], answer["message"]
    return Problem(kind, message if kind == "refused" else plain_words(message))


def _texts_of(answer: dict[str, Any]) -> list[str | Problem]:
    first = answer["texts"][0]
    return [
        _problem(text) if isinstance(text, dict) else first[:text] if isinstance(text, int) else text
        for text in answer["texts"]
    ]


def _broken(message: str) -> ModelError:
    return ModelError(f"the chat template is broken: {message}", way_out="use a model with a sound chat template")


class _Died(Exception):  # noqa: N818
    """The child is no more, or had to be ended; says why."""


class _Child:
    """The process that runs templates. ``defined`` are the ids of those that it holds."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("jinja_child.py")
        environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        try:
            childs_end, self._lifeline = os.pipe()
            try:
                # Of this Python and from this package, with nothing of the user's in its arguments.
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-P", str(program), str(childs_end)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    env=environment,
                    pass_fds=(childs_end,),
                    start_new_session=True,  # Ctrl-C is for us; the child ends with its pipes
                )
            except OSError:
                os.close(self._lifeline)
                raise
            finally:
                os.close(childs_end)
        except OSError as error:
            message = f"the process for chat templates can't be started: {first_line(error)}"
            raise ResourceError(message, way_out="free some memory, or end other processes") from error
        self.owner = os.getpid()
        self.defined: set[int] = set()
        self._poll = select.poll()
        assert self._process.stdout is not None  # noqa: S101  (both are pipes)
        self._poll.register(self._process.stdout, select.POLLIN)
        self.stop = weakref.finalize(self, _end, self._process, self._lifeline, self.owner)

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.stop.alive and self._process.poll() is None

    def ask(self, frame: dict[str, Any], num_texts: int) -> dict[str, Any]:
        """One frame there and one back.

        Raises:
            _Died: the child ended itself, or was slower than any template may be.
        """
        raw = json.dumps(frame, separators=(",", ":")).encode()
        limit = PATIENCE * (CPU_SECONDS + CPU_SECONDS_PER_TEXT * num_texts)
        deadline = time.monotonic() + limit
        assert self._process.stdin is not None  # noqa: S101
        left = memoryview(struct.pack(">I", len(raw)) + raw)
        try:
            while left:
                left = left[self._process.stdin.write(left) :]
        except OSError as error:
            raise _Died(self._why(limit)) from error
        size = struct.unpack(">I", self._read(4, deadline, limit))[0]
        answer: dict[str, Any] = json.loads(self._read(size, deadline, limit))
        return answer

    def _read(self, size: int, deadline: float, limit: float) -> bytes:
        assert self._process.stdout is not None  # noqa: S101
        blocks = []
        while size:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Died(f"no text within {limit:.0f} s")
            block = os.read(self._process.stdout.fileno(), min(size, 1 << 20))
            if not block:
                raise _Died(self._why(limit))
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def _why(self, limit: float) -> str:
        """Of a child that is ending."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=5)
            if -code in (signal.SIGXCPU, signal.SIGKILL):
                return f"it takes over {CPU_SECONDS:.0f} s for one row"
            return f"it ended its process (code {code})"
        return f"no text within {limit:.0f} s"


def _end(process: subprocess.Popen[bytes], lifeline: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked process must leave its parent's child alone
    process.kill()
    process.wait()
    os.close(lifeline)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


_child: list[_Child] = []


def _running() -> _Child:
    """This process's child; a new one where there is none yet, or the last one had to be ended."""
    if not (_child and _child[0].usable):
        _child[:] = [_Child()]
    return _child[0]
