"""JSONL rows -> conversations. Every complaint names file and line, and nothing is guessed.

Two shapes are read:
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": ..., "completion": ...}     both strings, or both lists of messages
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from likely.errors import DataError
from likely.types import ROLES, Conversation, Message, Source

MESSAGE_KEYS = {"role", "content", "weight"}
SHAPES = 'rows of {"messages": [...]} or {"prompt": ..., "completion": ...}'


def read_conversations(path: str | Path) -> list[Conversation]:
    """All conversations of a JSONL file, in order.

    Raises:
        DataError: no such file, not UTF-8, broken JSON, or a row of another shape, with its line.
    """
    path = Path(path)
    conversations = [parse_row(row, source) for row, source in _rows(path)]
    if not conversations:
        raise DataError("the file has no rows", place=str(path), way_out=f"write {SHAPES}, one a line")
    return conversations


def _rows(path: Path) -> Iterator[tuple[Any, Source]]:
    if not path.exists():
        raise DataError("no such file", place=str(path), way_out="check the path")
    if path.is_dir():
        raise DataError("this is a folder", place=str(path), way_out="name a .jsonl file in it")
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield _parse_json(raw, Source(str(path), line)), Source(str(path), line)
    except OSError as error:
        raise DataError(error.strerror or str(error), place=str(path), way_out="make the file readable") from error


def _parse_json(raw: bytes, source: Source) -> Any:
    def wrong(message: str, way_out: str = "one JSON object a line (JSONL)") -> DataError:
        return DataError(message, place=str(source), way_out=way_out)

    try:
        text = raw.decode("utf-8-sig" if source.line == 1 else "utf-8")
        row = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
        if r"\ud" in text.lower():  # half a surrogate pair is JSON but no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise wrong(f"not UTF-8 at byte {error.start} of the line", "save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise wrong(r"half of a surrogate pair (\ud800 to \udfff)", "write the whole character") from error
    except json.JSONDecodeError as error:
        document = source.line == 1 and raw.strip() in {b"[", b"{"}
        hint = {"way_out": "this looks like one JSON document: write one row a line instead"} if document else {}
        raise wrong(f"broken JSON at column {error.pos + 1}: {error.msg}", **hint) from error
    except ValueError as error:
        raise wrong(f"broken JSON: {error}") from error
    except RecursionError as error:
        raise wrong("broken JSON: nested too deeply") from error
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs; a key that stands twice would lose one of its values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def parse_row(row: Any, source: Source) -> Conversation:
    """One decoded JSON row -> a conversation.

    Raises:
        DataError: the row is of neither shape, or a field has the wrong type.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row must be an object, this is {_kind(row)}", place=str(source), way_out=f"write {SHAPES}")
    if "weight" in row:
        raise DataError(
            "a weight on the whole row means different things to different providers",
            place=str(source),
            way_out='put "weight" on the assistant messages',
        )
    shapes = [key for key in ("messages", "prompt", "completion") if key in row]
    if "messages" in shapes and len(shapes) > 1:
        message = f'the row has both "messages" and "{shapes[1]}"'
        raise DataError(message, place=str(source), way_out="keep one of them")
    tools = _tools(row.get("tools"), source)
    if shapes == ["messages"]:
        conversation = Conversation(_messages(row["messages"], "messages", source), source, tools)
    elif shapes == ["prompt", "completion"]:
        conversation = _prompt_completion(row["prompt"], row["completion"], tools, source)
    else:
        keys = ", ".join(map(repr, list(row)[:6])) or "no keys"
        raise DataError(f"the row has {keys}", place=str(source), way_out=f"write {SHAPES}")
    return conversation


def _prompt_completion(prompt: Any, completion: Any, tools: tuple[dict[str, Any], ...], source: Source) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError("the completion is empty", place=str(source), way_out="remove the row")
        return Conversation((Message("user", prompt), Message("assistant", completion)), source, tools, plain=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        # Only the completion is to be learnt, so answers inside the prompt are context.
        context = tuple(
            replace(m, weight=0.0) if m.role == "assistant" else m for m in _messages(prompt, "prompt", source)
        )
        return Conversation(context + _messages(completion, "completion", source), source, tools)
    raise DataError(
        f'"prompt" is {_kind(prompt)} and "completion" is {_kind(completion)}',
        place=str(source),
        way_out="make both strings, or both lists of messages",
    )


def _messages(value: Any, key: str, source: Source) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else _kind(value)
        raise DataError(f'"{key}" is {what}', place=str(source), way_out="write a list of messages")
    return tuple(_message(m, f"{key}[{i}]", source) for i, m in enumerate(value))


def _message(value: Any, where: str, source: Source) -> Message:
    def wrong(message: str, way_out: str) -> DataError:
        return DataError(f"{where}{message}", place=str(source), way_out=way_out)

    if not isinstance(value, dict):
        raise wrong(f" is {_kind(value)}", 'write {"role": ..., "content": ...}')
    role, content, weight = value.get("role"), value.get("content"), value.get("weight", 1)
    if role not in ROLES:
        raise wrong(f".role is {role!r}" if "role" in value else " has no role", f"use one of {', '.join(ROLES)}")
    if content is None and not (role == "assistant" and value.get("tool_calls")):
        raise wrong(" has no content", "write the text, or tool_calls on an assistant message")
    if content is not None and not isinstance(content, str):
        raise wrong(f".content is {_kind(content)}", "write a string")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise wrong(f".weight is {weight!r}", "use a number from 0 to 1")
    fields = {key: v for key, v in value.items() if key not in MESSAGE_KEYS}
    return Message(role, content, float(weight), fields)


def _tools(value: Any, source: Source) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError('"tools" is not a list of objects', place=str(source), way_out="write a list of tool schemas")
    return tuple(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
