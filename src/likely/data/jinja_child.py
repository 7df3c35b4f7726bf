"""The program that runs chat templates, in a process of its own: a template is a program of whoever made the model.

It imports nothing of the package and is started by :mod:`likely.data.template`. A frame, on stdin and on stdout alike,
is four bytes of length (big-endian) and that many bytes of JSON:

    {"define": id, "templates": {name: source}, "variables": {...}, "date": "2024-07-26"}      -> {} or a problem
    {"use": id, "template": name, "messages": [...], "tools": [...] or null, "asks": [...]}    -> {"texts": [...]}
    {"rows": [frames like the one above]}                                                       -> {"rows": [answers]}

An ask is ``[end, with the generation prompt, index of a message whose content is replaced or -1]``. A text is a string,
or the number of its characters where it is a prefix of the first one, or a problem:
``{"kind": "refused" (by raise_exception) | "broken" | "failed", "message": ...}``.

The environment is that of ``apply_chat_template`` of transformers, but for the date, which stands still.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import select
import struct
import sys
import time
from typing import Any

import jinja2.debug  # imported by jinja2 while it handles an error, when memory may be short
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 16 * 2**20
MAX_MESSAGE_CHARS = 200
MAX_MEMORY_BYTES = 2**30
CPU_SECONDS = 5.0  # for one row, and a little more for each text asked for
CPU_SECONDS_PER_TEXT = 0.01
ELSEWHERE = "\ue000"


class RefusedError(Exception):
    """What ``raise_exception`` in a template raises."""


class TooLongError(Exception):
    """The template does not stop writing."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for other tools; here its body is text like any other."""

    tags = {"generation"}  # noqa: RUF012 (the name and type that jinja2 asks for)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def make_environment(date: str) -> ImmutableSandboxedEnvironment:
    today = datetime.datetime.fromisoformat(date)

    def raise_exception(message: Any) -> None:
        raise RefusedError(str(message))

    def tojson(value: Any, *, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    # The same row must give the same tokens each time.
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


def problem(error: BaseException) -> dict[str, str]:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    kind, message = "failed", lines[0]
    if isinstance(error, RefusedError):
        kind, message = "refused", " ".join(lines)
    elif isinstance(error, MemoryError):
        kind, message = "broken", f"it takes over {MAX_MEMORY_BYTES >> 20} MB of memory"
    elif isinstance(error, TooLongError):
        kind, message = "broken", f"it writes over {MAX_OUTPUT_CHARS >> 20} million characters"
    elif isinstance(error, (SecurityError, jinja2.TemplateSyntaxError, OverflowError, UnicodeEncodeError)):
        kind = "broken"
    elif isinstance(error, RecursionError):
        message = "nested too deeply"
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}..."
    return {"kind": kind, "message": message}


def render(template: jinja2.Template, **values: Any) -> str:
    pieces, total = [], 0
    for piece in template.generate(**values):
        total += len(piece)
        if total > MAX_OUTPUT_CHARS:
            raise TooLongError
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # half a surrogate pair is no text, and no tokenizer takes it
    return text


class Templates:
    """The templates that were defined, and the answers to what is asked of them."""

    def __init__(self) -> None:
        self._defined: dict[int, tuple[dict[str, jinja2.Template], dict[str, Any]]] = {}

    def answer(self, frame: dict[str, Any]) -> dict[str, Any]:
        try:
            if "define" in frame:
                environment = make_environment(frame["date"])
                compiled = {name: environment.from_string(source) for name, source in frame["templates"].items()}
                self._defined[frame["define"]] = (compiled, frame["variables"])
                return {}
            if "rows" in frame:
                return {"rows": [self.answer(row) for row in frame["rows"]]}
            return {"texts": self._texts(frame)}
        except Exception as error:
            return problem(error)

    def _texts(self, frame: dict[str, Any]) -> list[Any]:
        compiled, variables = self._defined[frame["use"]]
        texts: list[Any] = []
        for end, with_prompt, replaced in frame["asks"]:
            messages = frame["messages"][:end]
            if replaced >= 0:
                messages[replaced] = {**messages[replaced], "content": ELSEWHERE}
            try:
                text = render(
                    compiled[frame["template"]],
                    messages=messages,
                    tools=frame["tools"],
                    documents=None,
                    add_generation_prompt=with_prompt,
                    **variables,
                )
            except Exception as error:  # a template is a program and may raise anything
                texts.append(problem(error))
                continue
            first = texts[0] if texts else None
            texts.append(len(text) if isinstance(first, str) and first.startswith(text) else text)
        return texts


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system knows no such limits
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def limit_time(num_texts: int) -> None:
    """The system ends the process once it has used so much more of a processor."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415

        allowed = math.ceil(time.process_time() + CPU_SECONDS + CPU_SECONDS_PER_TEXT * num_texts)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def end_with_parent(lifeline: int) -> None:
    """Ends this process by a signal once the pipe ``lifeline`` ends, as it does with the process that asks: no Python
    would run to notice it in the midst of one long operation. Nothing is ever written to that pipe: a write to one that
    is read may raise its signal after it was read."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # elsewhere the limit on time is left
        import fcntl  # noqa: PLC0415

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        end = select.poll()
        end.register(lifeline, 0)
        if end.poll(0):  # it came before
            sys.exit()


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    limit_memory()
    templates = Templates()
    while head := sys.stdin.buffer.read(4):
        frame = json.loads(sys.stdin.buffer.read(struct.unpack(">I", head)[0]))
        limit_time(sum(len(row.get("asks", ())) for row in frame.get("rows", [frame])))
        raw = json.dumps(templates.answer(frame), separators=(",", ":")).encode()
        sys.stdout.buffer.write(struct.pack(">I", len(raw)) + raw)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
