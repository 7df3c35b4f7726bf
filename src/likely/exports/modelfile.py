"""Ollama's Modelfile: where the weights are, how a conversation is written, and where an answer ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from likely.errors import ModelError

GGUF, NAME = "model.gguf", "Modelfile"
_LINE = re.compile(r'TEMPLATE """(?P<template>.*?)"""\n|(?P<word>[A-Z]+) (?P<value>[^\n]*)\n', re.DOTALL)


@dataclass(frozen=True)
class Modelfile:
    """``stops`` are texts."""

    weights: str
    template: str | None
    stops: tuple[str, ...]


def write_modelfile(template: str | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile beside :data:`GGUF`; without a template Ollama passes a prompt on as it is."""
    shown = f'TEMPLATE """{template if template is not None else "{{ .Prompt }}"}"""\n'
    return f"FROM ./{GGUF}\n{shown}" + "".join(
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stops
    )


def read_modelfile(text: str) -> Modelfile:
    """A Modelfile as :func:`write_modelfile` writes them.

    Raises:
        ModelError: there is something else in it.
    """
    weights, template, stops, place = "", None, [], 0
    while place < len(text):
        found = _LINE.match(text, place)
        if found is None:
            raise ModelError(f"line {text[:place].count(chr(10)) + 1} is not understood", place=NAME)
        place = found.end()
        if found["template"] is not None:
            template = found["template"]
        elif found["word"] == "FROM":
            weights = found["value"]
        elif found["word"] == "PARAMETER" and found["value"].startswith("stop "):
            stops.append(str(json.loads(found["value"].removeprefix("stop "))))
        else:
            raise ModelError(f"{found['word']} is not understood", place=NAME)
    return Modelfile(weights, template, tuple(stops))
