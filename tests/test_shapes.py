"""Rows -> conversations beside the golden ones: which shape a row has, what each refuses, and what is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from likely.data.formats import Reading, ReadOptions, Rejected, parse_columns, parse_row, read_conversations, shape_of
from likely.errors import ConfigError, DataError
from likely.types import Message, Source

SOURCE = Source("rows.jsonl", 3)
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
PAIR = {"prompt": "a", "completion": "b"}
ALPACA = {"instruction": "a", "output": "b"}
TOKENS = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


def said(*turns: Any, **extra: Any) -> dict[str, Any]:
    return {"messages": list(turns), **extra}


def shared(*turns: tuple[str, Any], **extra: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **extra}


def refusal(row: Any, format: Any = "auto") -> DataError:  # noqa: A002
    with pytest.raises(DataError) as caught:
        parse_row(row, SOURCE, format)
    error = caught.value
    assert error.place == "rows.jsonl:3"
    assert error.exit_code == 3
    assert error.message
    assert error.way_out
    assert len(str(error).splitlines()) == 1
    return error


def write(folder: Path, *rows: Any, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (said(USER, ASSISTANT), "messages"),
        (PAIR, "prompt_completion"),
        (shared(("human", "a"), ("gpt", "b")), "sharegpt"),
        (ALPACA, "alpaca"),
        ({**ALPACA, "input": "", "system": None, "history": []}, "alpaca"),
        ({"text": "a"}, "text"),
        (TOKENS, "tokens"),
    ],
)
def test_the_shape_of_a_row(row: dict[str, Any], shape: str) -> None:
    assert shape_of(row, SOURCE) == shape
    assert shape_of({**row, "id": 1}, SOURCE, shape) == shape  # type: ignore[arg-type]
    assert parse_row(row, SOURCE)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**PAIR, "text": "ab"}, "fits prompt_completion and text"),
        ({**said(USER, ASSISTANT), "text": "ab"}, "fits messages and text"),
        ({**ALPACA, **PAIR}, "fits prompt_completion and alpaca"),
        ({**TOKENS, "text": "ab"}, "fits text and tokens"),
        (said(USER, ASSISTANT, prompt="a"), 'both "messages" and "prompt"'),
    ],
)
def test_a_row_of_two_shapes_needs_a_word(row: dict[str, Any], says: str) -> None:
    error = refusal(row)
    assert says in error.message
    assert "--format" in error.way_out


def test_the_format_can_be_named() -> None:
    row = {**said(USER, ASSISTANT), "prompt": "x", "text": "y"}
    assert len(parse_row(row, SOURCE, "messages").messages) == 2
    assert parse_row(row, SOURCE, "text").messages == (Message("assistant", "y"),)
    assert "'instruction' and 'output'" in refusal(row, "alpaca").way_out
    assert "weight on the whole row" in refusal({"text": "a", "weight": 0.5}, "text").message


CALLING = {"role": "assistant", "content": None}
REFUSED: dict[str, tuple[Any, str]] = {
    "part of another type": (said({"role": "user", "content": [{"type": "input_audio"}]}), "'input_audio'"),
    "part that is text": (said({"role": "user", "content": ["a"]}), "content[0] is no part of text"),
    "part without text": (said({"role": "user", "content": [{"type": "text"}]}), "no part of text"),
    "part with a weight": (
        said({"role": "user", "content": [{"type": "text", "text": "a", "weight": 0}]}),
        "has the key 'weight'",
    ),
    "no parts": (said({"role": "user", "content": []}), "is an empty list"),
    "arguments that are no JSON": (
        said(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": "{a}"}}]}),
        "messages[1].tool_calls[0].function.arguments: broken JSON",
    ),
    "arguments with a key twice": (
        said(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}),
        "stands twice",
    ),
    "arguments that are a list": (
        said(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        "arguments is a list",
    ),
    "call without a name": (said(USER, {**CALLING, "tool_calls": [{"function": {}}]}), "function has no name"),
    "calls as an object": (said(USER, {**CALLING, "tool_calls": {"a": 1}}), "no list of objects"),
    "both kinds of calls": (
        said(USER, {**CALLING, "tool_calls": [{"id": "1"}], "function_call": {"name": "f"}}),
        "tool_calls and function_call",
    ),
    "tools that are no JSON": (said(USER, ASSISTANT, tools="[{]"), '"tools": broken JSON'),
    "tools and functions": (said(USER, ASSISTANT, tools=[{"a": 1}], functions=[{"name": "f"}]), "functions"),
    "functions as text": (said(USER, ASSISTANT, functions="f"), '"functions" is not a list'),
    "parallel tool calls": (said(USER, ASSISTANT, parallel_tool_calls="yes"), "parallel_tool_calls"),
    "sharegpt without turns": (shared(), "empty list"),
    "sharegpt as text": ({"conversations": "a"}, '"conversations" is a string'),
    "sharegpt turn": ({"conversations": ["a"]}, "conversations[0] is a string"),
    "sharegpt role": (shared(("bot", "a")), ".from is 'bot'"),
    "sharegpt no role": ({"conversations": [{"value": "a"}]}, 'has no "from"'),
    "sharegpt value": (shared(("human", 1)), "conversations[0].value is a number"),
    "sharegpt no value": ({"conversations": [{"from": "human"}]}, "value is null"),
    "sharegpt two systems": (shared(("system", "a"), ("gpt", "b"), system="c"), "a system turn"),
    "sharegpt system": (shared(("human", "a"), system=1), '"system" is a number'),
    "sharegpt call": (shared(("human", "a"), ("function_call", "f(1)")), "broken JSON"),
    "sharegpt call without a name": (shared(("function_call", '{"a": 1}')), "names no function"),
    "alpaca instruction": ({"instruction": None, "output": "b"}, '"instruction" is null'),
    "alpaca input": ({**ALPACA, "input": ["a"]}, '"input" is a list'),
    "alpaca input of nothing": ({**ALPACA, "input": 0}, '"input" is a number'),
    "alpaca system of nothing": ({**ALPACA, "system": False}, '"system" is true or false'),
    "alpaca history of nothing": ({**ALPACA, "history": {}}, "no list of pairs"),
    "alpaca output": ({**ALPACA, "output": ""}, '"output" is empty'),
    "alpaca history": ({**ALPACA, "history": [["a"]]}, "no list of pairs"),
    "alpaca history as text": ({**ALPACA, "history": "a"}, "no list of pairs"),
    "alpaca history of numbers": ({**ALPACA, "history": [["a", 1]]}, '"history"[0][1] is a number'),
    "no text": ({"text": ""}, "the text is empty"),
    "text as a number": ({"text": 4}, '"text" is a number'),
    "tokens as text": ({**TOKENS, "input_ids": "a"}, "no list of whole numbers"),
    "tokens as floats": ({**TOKENS, "input_ids": [1.0, 2, 3]}, "no list of whole numbers"),
    "tokens as switches": ({**TOKENS, "labels": [True, 2, 3]}, "no list of whole numbers"),
    "labels that are shifted": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, '"labels"[0] is 2'),
    "too few labels": ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "2 entries for 3 tokens"),
    "padding": ({**TOKENS, "attention_mask": [1, 1, 0]}, "hides tokens"),
    "mask of another length": ({**TOKENS, "attention_mask": [1, 1]}, "2 entries"),
    "one token": ({"input_ids": [1], "labels": [1]}, "nothing predicts the first"),
    "no tokens": ({"input_ids": [], "labels": []}, "nothing predicts the first"),
    "tokens without labels": ({"input_ids": [1, 2]}, "'input_ids'"),
}


@pytest.mark.parametrize(("row", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_shape_refuses(row: Any, says: str) -> None:
    assert says in refusal(row).message


def test_arguments_as_text_and_as_an_object_are_the_same_conversation() -> None:
    def calling(arguments: Any) -> Any:
        return parse_row(
            said(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}), SOURCE
        )

    assert calling('{"a": [1, "é"]}') == calling({"a": [1, "é"]})
    assert calling("{}") == calling({})


def told(path: Path, options: ReadOptions | None = None) -> str:
    reading = Reading(path, options)
    assert list(reading)
    return "\n".join(reading.told())


def test_what_is_told_about_a_file(tmp_path: Path) -> None:
    rows = [said(USER, ASSISTANT, id=1, topic="x")] * 3 + [PAIR] * 2 + [ALPACA | {"history": [["a", "b"]]}]
    text = told(write(tmp_path, *rows, "", {**PAIR, "id": 2}))
    assert "3 rows of messages, 3 rows of prompt_completion, 1 rows of alpaca: several shapes in one file" in text
    assert "keys that nothing reads: 'id', 'topic'" in text
    assert "only the output is learnt" in text
    assert "1 blank lines" in text
    assert "several" not in told(write(tmp_path, *[PAIR] * 3))


def test_weights_that_do_nothing_are_told(tmp_path: Path) -> None:
    text = told(write(tmp_path, said({**USER, "weight": 1}, ASSISTANT), said({**USER, "weight": 0}, ASSISTANT)))
    assert "2 rows give a weight to a system, user or tool message" in text
    weighed = {"prompt": [USER, {**ASSISTANT, "weight": 1}, USER], "completion": [ASSISTANT]}
    assert "1 rows give a weight to an answer inside their prompt" in told(write(tmp_path, weighed))
    assert "inside their prompt" not in told(write(tmp_path, {**weighed, "prompt": [USER, ASSISTANT, USER]}))


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a", "answer": "b", "prompt": "not this", "weight": 3})
    options = ReadOptions(columns=parse_columns("prompt=question, completion=answer"))
    (conversation,) = read_conversations(path, options)
    assert conversation.messages == (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(DataError, match=r"d.jsonl:1: no column 'response': the row has 'question'"):
        read_conversations(path, ReadOptions(columns={"text": "response"}))
    csv = tmp_path / "d.csv"
    csv.write_text("q,a\nx,y\n")
    (conversation,) = read_conversations(csv, ReadOptions(columns={"prompt": "q", "completion": "a"}))
    assert conversation.messages[1].content == "y"


@pytest.mark.parametrize("text", ["", "prompt", "prompt=", "=a", "prompt=a,", "question=a", "prompt=a,prompt=b"])
def test_maps_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_columns(text)
    assert caught.value.exit_code == 2
    assert caught.value.way_out


def test_bad_rows_are_passed_over_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, "{", {"prompt": "a"}, PAIR, 7, said(USER, {**ASSISTANT, "role": "bot"}))
    reading = Reading(path, ReadOptions(skip_bad_rows=True))
    assert [c.source.line for c in reading] == [1, 4]
    assert [r.line for r in reading.rejected] == [2, 3, 5, 6]
    assert all(isinstance(r, Rejected) and r.file == str(path) and r.reason for r in reading.rejected)
    assert reading.sha256
    with pytest.raises(DataError, match=r"every row is bad \(2\)"):
        list(Reading(write(tmp_path, "{", 7), ReadOptions(skip_bad_rows=True)))


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path, *[PAIR] * 50_000, "{")
    iterator = iter(Reading(path))
    assert next(iterator).source.line == 1  # though the file ends badly
    make: Callable[[], list[Any]] = lambda: list(iterator)  # noqa: E731
    with pytest.raises(DataError, match="50001"):
        make()
