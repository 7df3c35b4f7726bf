"""Rows -> conversations: the shapes that people's data comes in, each read as its makers mean it and nothing guessed.

messages           {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
prompt_completion  {"prompt": ..., "completion": ...}     both strings, or both lists of messages
sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": ...}
alpaca             {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [[q, a], ...]}
text               {"text": "..."}                        every token is learnt
tokens             {"input_ids": [...], "labels": [...]}  label -100 is context
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal, get_args

from likely.data.strict_json import parse_json
from likely.errors import DataError, quoted
from likely.types import Conversation, Message, Role, Source, TokenRow

Shape = Literal["messages", "prompt_completion", "sharegpt", "alpaca", "text", "tokens"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
REQUIRED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "tokens": ("input_ids", "labels"),
}
OPTIONAL: dict[Shape, tuple[str, ...]] = {
    "messages": ("tools", "functions", "parallel_tool_calls"),
    "prompt_completion": ("tools", "functions", "parallel_tool_calls"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "text": (),
    "tokens": ("attention_mask",),
}
KNOWN_KEYS = {key for keys in (*REQUIRED.values(), *OPTIONAL.values()) for key in keys}
MESSAGE_KEYS = {"role", "content", "weight", "function_call"}
ROLE_OF: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
}
IGNORED_LABEL = -100
Notes = Counter[str]


def parse_messages(row: Mapping[str, Any], source: Source, notes: Notes) -> Conversation:
    _refuse_wrong_switch(row, source)
    messages = _messages(row["messages"], "messages", source)
    if any(m.role != "assistant" and "weight" in given for m, given in zip(messages, row["messages"], strict=True)):
        notes["rows give a weight to a system, user or tool message; only assistant messages are learnt"] += 1
    return Conversation(messages, source, _tools(row, source))


def parse_prompt_completion(row: Mapping[str, Any], source: Source, notes: Notes) -> Conversation:
    _refuse_wrong_switch(row, source)
    prompt, completion, tools = row["prompt"], row["completion"], _tools(row, source)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise DataError("the completion is empty", place=str(source), way_out="remove the row")
        return Conversation((Message("user", prompt), Message("assistant", completion)), source, tools, plain=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages(prompt, "prompt", source)
        if any(m.role == "assistant" and given.get("weight", 0) for m, given in zip(context, prompt, strict=True)):
            notes["rows give a weight to an answer inside their prompt; a prompt is context, so it counts as 0"] += 1
        # Only the completion is to be learnt, so answers inside the prompt are context.
        context = tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in context)
        return Conversation(context + _messages(completion, "completion", source), source, tools)
    raise DataError(
        f'"prompt" is {kind_of(prompt)} and "completion" is {kind_of(completion)}',
        place=str(source),
        way_out="make both strings, or both lists of messages",
    )


def parse_sharegpt(row: Mapping[str, Any], source: Source, _notes: Notes) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(f'"conversations" is {what}', place=str(source), way_out="write a list of from and value")
    messages = [_sharegpt_turn(turn, f"conversations[{i}]", source) for i, turn in enumerate(turns)]
    system = row.get("system")
    if system not in (None, ""):
        if messages[0].role == "system":
            raise DataError('the row has "system" and a system turn', place=str(source), way_out="keep one of them")
        messages.insert(0, Message("system", _text(system, '"system"', source)))
    return Conversation(tuple(messages), source, _tools(row, source))


def _sharegpt_turn(turn: Any, where: str, source: Source) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {kind_of(turn)}", place=str(source), way_out='write {"from": ..., "value": ...}')
    said_by = turn.get("from")
    role = SHAREGPT_ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        what = f".from is {quoted(said_by)}" if "from" in turn else ' has no "from"'
        raise DataError(f"{where}{what}", place=str(source), way_out=f"use one of {', '.join(SHAREGPT_ROLES)}")
    value = _text(turn.get("value"), f"{where}.value", source)
    message: dict[str, Any] = {"role": role, "content": value}
    if said_by in {"function_call", "tool_call"}:
        call = _json(value, f"{where}.value", source)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(f"{where}.value names no function", place=str(source), way_out='write {"name": ...}')
        message = {"role": role, "content": None, "tool_calls": [{"type": "function", "function": call}]}
    extra = {key: v for key, v in turn.items() if key not in {"from", "value"}}
    return _message({**extra, **message}, where, source)


def parse_alpaca(row: Mapping[str, Any], source: Source, notes: Notes) -> Conversation:
    asked = _text(row["instruction"], '"instruction"', source)
    extra = _text_or_none(row.get("input"), '"input"', source)
    answer = _text(row["output"], '"output"', source)
    if not answer:
        raise DataError('"output" is empty', place=str(source), way_out="remove the row")
    messages = []
    if system := _text_or_none(row.get("system"), '"system"', source):
        messages.append(Message("system", system))
    history = [] if row.get("history") in (None, "") else row["history"]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError('"history" is no list of pairs', place=str(source), way_out="write [[question, answer], ...]")
    for i, (question, past) in enumerate(history):
        messages.append(Message("user", _text(question, f'"history"[{i}][0]', source)))
        # What was said before is context, as in a prompt; rows often repeat it turn after turn.
        messages.append(Message("assistant", _text(past, f'"history"[{i}][1]', source), 0.0))
    if history:
        notes["rows have a history; its answers are context, only the output is learnt"] += 1
    messages += [Message("user", f"{asked}\n{extra}" if extra else asked), Message("assistant", answer)]
    return Conversation(tuple(messages), source)


def parse_text(row: Mapping[str, Any], source: Source, _notes: Notes) -> Conversation:
    text = _text(row["text"], '"text"', source)
    if not text:
        raise DataError("the text is empty", place=str(source), way_out="remove the row")
    return Conversation((Message("assistant", text),), source, plain=True)


def parse_tokens(row: Mapping[str, Any], source: Source, notes: Notes) -> Conversation:
    def wrong(message: str, way_out: str) -> DataError:
        return DataError(message, place=str(source), way_out=way_out)

    ids, labels, mask = row["input_ids"], row["labels"], row.get("attention_mask")
    for key, values in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if values is None and key == "attention_mask":
            continue
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            raise wrong(f'"{key}" is no list of whole numbers', "write one number a token")
        if len(values) != len(ids):
            raise wrong(f'"{key}" has {len(values)} entries for {len(ids)} tokens', "write one number a token")
    if len(ids) < 2:
        raise wrong(f"{len(ids)} tokens: nothing predicts the first", "remove the row")
    if mask is not None and set(mask) != {1}:
        raise wrong('"attention_mask" hides tokens', "leave padding out of the rows")
    other = next((t for t, label in enumerate(labels) if label not in (IGNORED_LABEL, ids[t])), None)
    if other is not None:
        raise wrong(
            f'"labels"[{other}] is {quoted(labels[other])} and "input_ids"[{other}] is {quoted(ids[other])}',
            "labels are the tokens themselves, not shifted, or -100",
        )
    notes["rows are tokens already: what they train is not proved"] += 1
    supervised = tuple(label != IGNORED_LABEL for label in labels)
    return Conversation((), source, tokens=TokenRow(tuple(ids), supervised))


PARSERS: dict[Shape, Callable[[Mapping[str, Any], Source, Notes], Conversation]] = {
    "messages": parse_messages,
    "prompt_completion": parse_prompt_completion,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "text": parse_text,
    "tokens": parse_tokens,
}


def _messages(value: Any, key: str, source: Source) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of(value)
        raise DataError(f'"{key}" is {what}', place=str(source), way_out="write a list of messages")
    return tuple(_message(m, f"{key}[{i}]", source) for i, m in enumerate(value))


def _message(value: Any, where: str, source: Source) -> Message:
    def wrong(message: str, way_out: str) -> DataError:
        return DataError(f"{where}{message}", place=str(source), way_out=way_out)

    if not isinstance(value, dict):
        raise wrong(f" is {kind_of(value)}", 'write {"role": ..., "content": ...}')
    said_by, weight = value.get("role"), value.get("weight", 1)
    role = ROLE_OF.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        what = f".role is {quoted(said_by)}" if "role" in value else " has no role"
        raise wrong(what, f"use one of {', '.join(ROLE_OF)}")
    fields = {key: v for key, v in value.items() if key not in MESSAGE_KEYS}
    if said_by == "developer":
        fields["role"] = "developer"  # for the templates that know it
    calls = _tool_calls(value, where, source) if role == "assistant" else value.get("tool_calls")
    if calls is not None:
        fields["tool_calls"] = calls
    content = _content(value.get("content"), f"{where}.content", source)
    if content is None and not (role == "assistant" and calls):
        raise wrong(" has no content", "write the text, or tool_calls on an assistant message")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise wrong(f".weight is {quoted(weight)}", "use a number from 0 to 1")
    return Message(role, content, float(weight), fields)


def _content(value: Any, where: str, source: Source) -> str | None:
    """Text, or OpenAI's parts of text, which are joined as they are."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} is {kind_of(value)}", place=str(source), way_out="write a string")
    if not value:
        raise DataError(f"{where} is an empty list", place=str(source), way_out="write a string")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {quoted(kind)}" if kind not in (None, "text") else "no part of text"
            way_out = 'only text can be learnt: write {"type": "text", "text": ...}'
            raise DataError(f"{where}[{i}] is {what}", place=str(source), way_out=way_out)
        if set(part) - {"type", "text"}:
            key = sorted(set(part) - {"type", "text"})[0]
            way_out = "weights belong to whole messages; leave other keys out"
            raise DataError(f"{where}[{i}] has the key {quoted(key)}", place=str(source), way_out=way_out)
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(message: Mapping[str, Any], where: str, source: Source) -> Any:
    """The calls with their arguments as objects, whether the row spells them so or as JSON text."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if legacy is not None:
        if calls:
            raise DataError(f"{where} has tool_calls and function_call", place=str(source), way_out="keep one of them")
        calls = [{"type": "function", "function": legacy}]
    if calls is None:
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}.tool_calls is no list of objects", place=str(source), way_out="write a list of calls")
    return [_tool_call(call, f"{where}.tool_calls[{i}]", source) for i, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str, source: Source) -> dict[str, Any]:
    if "function" not in call:
        return _with_arguments(call, where, source)
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}.function has no name", place=str(source), way_out='write {"name": ..., "arguments"}')
    return {**call, "function": _with_arguments(function, f"{where}.function", source)}


def _with_arguments(function: dict[str, Any], where: str, source: Source) -> dict[str, Any]:
    if "arguments" not in function:
        return function
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}.arguments", source)
    if not isinstance(arguments, dict):
        what = kind_of(arguments)
        raise DataError(f"{where}.arguments is {what}", place=str(source), way_out="write an object, or its JSON")
    return {**function, "arguments": arguments}


def _tools(row: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], ...]:
    value, legacy, key = row.get("tools"), row.get("functions"), "tools"
    if isinstance(value, str):
        value = _json(value, '"tools"', source) if value.strip() else None
    if legacy is not None:
        if value:
            raise DataError('the row has "tools" and "functions"', place=str(source), way_out="keep one of them")
        bare = isinstance(legacy, list) and all(isinstance(f, dict) for f in legacy)
        value = [{"type": "function", "function": f} for f in legacy] if bare else legacy
        key = "functions"
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f'"{key}" is not a list of objects', place=str(source), way_out="write a list of tool schemas")
    return tuple(value)


def _refuse_wrong_switch(row: Mapping[str, Any], source: Source) -> None:
    value = row.get("parallel_tool_calls")
    if value is not None and not isinstance(value, bool):
        message = f'"parallel_tool_calls" is {kind_of(value)}'
        raise DataError(message, place=str(source), way_out="write true or false, or leave it out")


def _text(value: Any, where: str, source: Source) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}", place=str(source), way_out="write a string")
    return value


def _text_or_none(value: Any, where: str, source: Source) -> str:
    return "" if value is None else _text(value, where, source)


def _json(text: str, where: str, source: Source) -> Any:
    try:
        return parse_json(text.encode(), Source(source.file, 0))
    except DataError as error:
        way_out = "write valid JSON inside the string"
        raise DataError(f"{where}: {error.message}", place=str(source), way_out=way_out) from error


def kind_of(value: Any) -> str:
    """The kind of a value in words of JSON; tables have a few more."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", bytes: "binary data"}
    names |= dict.fromkeys((int, float, Decimal), "a number") | dict.fromkeys((date, datetime, time), "a date or time")
    return "null" if value is None else names.get(type(value), "no JSON value")
