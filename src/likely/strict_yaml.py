"""YAML that means what it looks like: one mapping, without aliases, tags, duplicate keys and surprising numbers.

YAML 1.1, which PyYAML reads, takes 010 as eight, 1:30 as ninety and 2024-01-01 as a date; the last of two equal keys
wins silently; and a few aliases of aliases make gigabytes. None of that helps a file of settings, so it is refused with
its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 16
MAX_DEPTH = 8
_TAG = "tag:yaml.org,2002:"
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,99})|[-+]?[0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I)


class YamlError(ValueError):
    """What is wrong in a text, and where: 1-based line and column, or 0 where no place can be named."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line, self.column = line, column


@dataclass(frozen=True)
class Settings:
    """The values of a mapping, and the ``(line, column)`` of each key and of its value."""

    values: dict[Any, Any]
    key_places: dict[Any, tuple[int, int]]
    value_places: dict[Any, tuple[int, int]]


def read_settings(text: str) -> Settings:
    """The mapping that a YAML text holds.

    Raises:
        YamlError: it is not such a text.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"over {MAX_CHARACTERS:,} characters, too long for settings")
    loader = yaml.SafeLoader("")
    try:
        _check_events(text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise YamlError("not a mapping of keys to values")
        _check_nodes(node)
        values = loader.construct_document(node)
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"broken YAML: {', '.join(filter(None, (error.context, error.problem)))}"
        raise YamlError(message, *((mark.line + 1, mark.column + 1) if mark else ())) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        message = f"broken YAML: the character U+{error.character:04X} is not allowed"
        raise YamlError(message, line, column) from error
    finally:
        loader.dispose()
    return Settings(
        values,
        dict(zip(keys, (_place(key) for key, _ in node.value), strict=True)),
        dict(zip(keys, (_place(value) for _, value in node.value), strict=True)),
    )


def _place(node: Any) -> tuple[int, int]:
    """Of a node or an event, 1-based."""
    return node.start_mark.line + 1, node.start_mark.column + 1


def _check_events(text: str) -> None:
    """What must be known before nodes are made: they would be made by recursion, and share what aliases repeat."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"broken YAML: the alias *{event.anchor} is not read; write the value out", *_place(event))
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise YamlError(f"broken YAML: the tag {tag[:80]} is not read; remove it", *_place(event))
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError("broken YAML: nested too deeply", *_place(event))


def _check_nodes(root: yaml.MappingNode) -> None:
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    raise YamlError(f"broken YAML: the key {key.value[:80]!r} stands twice", *_place(key))
                seen.add((key.tag, str(key.value)))
        elif isinstance(node, yaml.ScalarNode):
            kind = node.tag.removeprefix(_TAG)
            if kind == "timestamp" or (kind in {"int", "float"} and not _PLAIN_NUMBER.fullmatch(node.value)):
                what = "a date" if kind == "timestamp" else "a number in another notation"
                message = f"YAML reads {node.value[:80]} as {what}; put text in quotes, write numbers plainly"
                raise YamlError(message, *_place(node))
            if kind == "merge":
                raise YamlError("broken YAML: << is not read; write the keys out", *_place(node))


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for inner in pair:
                yield from _nodes(inner)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _nodes(inner)
