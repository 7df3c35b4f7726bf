"""Rows of JSONL -> conversations: every accepted shape, and every refusal with its place, exit code and way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from likely.data.formats import Reading, parse_row, read_conversations
from likely.errors import DataError
from likely.types import ROLES, Conversation, Message, Source

GOOD = {"prompt": "2 + 2 =", "completion": " 4"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SOURCE = Source("data.jsonl", 1)

ReadBytes = Callable[[bytes], list[Conversation]]
Refused = Callable[[bytes], DataError]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.fixture
def read(path: Path) -> ReadBytes:
    def call(raw: bytes) -> list[Conversation]:
        path.write_bytes(raw)
        return read_conversations(path)

    return call


@pytest.fixture
def refused(read: ReadBytes) -> Refused:
    def call(raw: bytes) -> DataError:
        with pytest.raises(DataError) as caught:
            read(raw)
        return caught.value

    return call


def assert_one_clear_line(error: DataError, place: str) -> None:
    """``FILE:LINE: what is wrong; what to do``, and the exit code of bad data."""
    assert error.exit_code == 3
    assert error.place == place
    assert error.message
    assert error.way_out
    assert str(error) == f"{place}: {error.message}; {error.way_out}"
    assert len(str(error).splitlines()) == 1


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# --- what is accepted ---


def test_messages(read: ReadBytes, path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    tool = {"role": "tool", "content": "21"}
    (conversation,) = read(lines({"messages": [system, USER, ASSISTANT, tool]}))
    assert conversation == Conversation(
        (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello!"), Message("tool", "21")),
        Source(str(path), 1),
    )
    assert not conversation.plain


def test_prompt_and_completion_as_strings_are_marked_plain(read: ReadBytes) -> None:
    (conversation,) = read(lines(GOOD))
    assert conversation.messages == (Message("user", "2 + 2 ="), Message("assistant", " 4"))
    assert conversation.plain


def test_an_empty_prompt_string_is_text_like_any_other(read: ReadBytes) -> None:
    # Whether something predicts the first token is the tokenizer's to say: with a first-token mark this can be learnt.
    (conversation,) = read(lines({"prompt": "", "completion": "Once upon a time"}))
    assert conversation.messages[0] == Message("user", "")


def test_prompt_and_completion_as_lists_supervise_the_completion_only() -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, USER, {**ASSISTANT, "weight": 0.5}]}
    conversation = parse_row(row, SOURCE)
    assert [m.role for m in conversation.messages] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert [m.weight for m in conversation.messages if m.role == "assistant"] == [0, 1, 0.5]
    assert not conversation.plain


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}, GOOD])
def test_tools_come_along_in_every_shape(row: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    assert parse_row({**row, "tools": [tool]}, SOURCE).tools == (tool,)
    assert parse_row({**row, "tools": []}, SOURCE).tools == ()
    assert parse_row({**row, "tools": None}, SOURCE).tools == ()


def test_other_keys_of_a_row_are_free_and_those_of_a_message_are_kept_for_the_template() -> None:
    extra = {"name": "Ann", "tool_calls": [{"id": "1"}], "reasoning_content": "why"}
    conversation = parse_row({"messages": [USER, {**ASSISTANT, **extra}], "id": 7, "topic": "greeting"}, SOURCE)
    assert conversation.messages == (Message("user", "Hi"), Message("assistant", "Hello!", 1.0, extra))


def test_null_content_beside_tool_calls() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
    assert parse_row({"messages": [USER, call]}, SOURCE).messages[1].content is None
    del call["content"]
    assert parse_row({"messages": [USER, call]}, SOURCE).messages[1].content is None


@pytest.mark.parametrize("weight", [0, 1, 0.25, 1.0, 1e-300])
def test_weights_in_range(weight: float) -> None:
    message = parse_row({"messages": [USER, {**ASSISTANT, "weight": weight}]}, SOURCE).messages[1]
    assert message.weight == weight
    assert type(message.weight) is float
    assert "weight" not in message.fields


def test_lines_are_counted_as_an_editor_counts_them(read: ReadBytes) -> None:
    # Blank lines count, CR LF is one end of line, the last line may have no end, and U+2028 inside a string is no line.
    row = json.dumps({"prompt": "one\u2028two\x85", "completion": "x"}, ensure_ascii=False).encode()
    conversations = read(b"\n" + row + b"\r\n \t\r\n\n" + row)
    assert [c.source.line for c in conversations] == [2, 5]
    assert conversations[0].messages[0].content == "one\u2028two\x85"


def test_a_byte_order_mark_on_the_first_line(read: ReadBytes) -> None:
    assert [c.source.line for c in read(b"\xef\xbb\xbf" + lines(GOOD, GOOD))] == [1, 2]


def test_long_lines_and_odd_characters_survive(read: ReadBytes) -> None:
    text = '\0\x1b é 東京 🙂\n\t\\" \ufeff\u202e' + "x" * 3_000_000
    (conversation,) = read(lines({"messages": [USER, {"role": "assistant", "content": text}]}))
    assert conversation.messages[1].content == text


# --- what is refused ---


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "a", "completion": "b"', "broken JSON"),
        ("{'prompt': 'a', 'completion': 'b'}", "broken JSON"),
        ('{"prompt": "a", "completion": "b",}', "broken JSON"),
        ('{"prompt": "a", "completion": "b"} {}', "broken JSON"),
        ('{"prompt": "a\tb", "completion": "b"}', "broken JSON"),
        ("prompt,completion", "broken JSON"),
        ('{"prompt": "a", "completion": NaN}', "NaN is not JSON"),
        ('{"messages": [{"role": "user", "content": "a", "score": Infinity}]}', "Infinity is not JSON"),
        ('{"messages": [{"role": "user", "content": "a", "score": -Infinity}]}', "-Infinity is not JSON"),
        ('{"messages": [{"role": "user", "content": "a", "weight": ' + "9" * 5000 + "}]}", "broken JSON"),
    ],
    ids=lambda text: text[:30],
)
def test_broken_json_is_named_with_its_line(refused: Refused, path: Path, bad: str, says: str) -> None:
    error = refused(lines(*[GOOD] * 16) + bad.encode() + b"\n" + lines(GOOD))
    assert_one_clear_line(error, f"{path}:17")
    assert says in error.message


def test_the_message_of_broken_json_speaks_of_no_other_line(refused: Refused, path: Path) -> None:
    # The parser sees one line of the file, and would count its end of line as the beginning of a line 2.
    error = refused(lines(GOOD, GOOD) + b'{"prompt": "a",\n' + lines(GOOD))
    assert_one_clear_line(error, f"{path}:3")
    assert not re.search(r"line \d", error.message)


@pytest.mark.parametrize("opening", [b"[", b"{"])
def test_nesting_without_end_is_refused(refused: Refused, path: Path, opening: bytes) -> None:
    nested = b'{"a":' if opening == b"{" else b"["
    error = refused(lines(GOOD) + nested * 100_000)
    assert_one_clear_line(error, f"{path}:2")
    assert "nested too deeply" in error.message


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (lines(GOOD) + b'{"prompt": "caf\xe9", "completion": "x"}', 2),
        (lines(GOOD).decode().encode("utf-16"), 1),
        (b'{"prompt": "\xed\xa0\x80", "completion": "x"}', 1),  # half of a surrogate pair, spelled in bytes
    ],
)
def test_other_encodings(refused: Refused, path: Path, raw: bytes, line: int) -> None:
    error = refused(raw)
    assert_one_clear_line(error, f"{path}:{line}")
    assert "UTF-8" in error.message


def test_a_byte_order_mark_elsewhere_is_refused(refused: Refused, path: Path) -> None:
    assert_one_clear_line(refused(lines(GOOD) + b"\xef\xbb\xbf" + lines(GOOD)), f"{path}:2")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_with_the_number_of_each_row(read: ReadBytes, path: Path, indent: int | None) -> None:
    rows = read(json.dumps([GOOD, GOOD], indent=indent).encode())
    assert rows == [parse_row(GOOD, Source(str(path), number)) for number in (1, 2)]


def test_a_pretty_printed_object_is_told_what_jsonl_is(refused: Refused, path: Path) -> None:
    error = refused(json.dumps(GOOD, indent=2).encode())
    assert_one_clear_line(error, f"{path}:1")
    assert "one row a line" in error.way_out


@pytest.mark.parametrize("raw", [b"", b"\n \r\n\n"])
def test_a_file_without_rows(refused: Refused, path: Path, raw: bytes) -> None:
    error = refused(raw)
    assert_one_clear_line(error, str(path))
    assert "no rows" in error.message


def test_no_file(path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        read_conversations(path)
    assert_one_clear_line(caught.value, str(path))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder") as caught:
        read_conversations(str(tmp_path))
    assert_one_clear_line(caught.value, str(tmp_path))


def messages(*given: Any) -> dict[str, Any]:
    return {"messages": list(given)}


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "null": (None, "null"),
    "number": (3, "a number"),
    "string": ("Hi", "a string"),
    "bool": (True, "true or false"),
    "list": ([USER, ASSISTANT], "a list"),
    "no keys": ({}, "no keys"),
    "other keys": ({"question": "a", "answer": "b"}, "'question', 'answer'"),
    "prompt alone": ({"prompt": "a"}, "'prompt'"),
    "completion alone": ({"completion": "a"}, "'completion'"),
    "messages and prompt": ({**messages(USER, ASSISTANT), **GOOD}, 'both "messages" and "prompt"'),
    "messages and completion": ({**messages(USER), "completion": "Hello!"}, '"completion"'),
    "weight on the row": ({**GOOD, "weight": 1}, "weight on the whole row"),
    "null weight on the row": ({**messages(USER, ASSISTANT), "weight": None}, "weight on the whole row"),
    "string and list": ({"prompt": "a", "completion": [ASSISTANT]}, '"prompt" is a string and "completion" is a list'),
    "list and string": ({"prompt": [USER], "completion": "a"}, '"prompt" is a list and "completion" is a string'),
    "null prompt": ({"prompt": None, "completion": "a"}, '"prompt" is null'),
    "object as completion": ({"prompt": "a", "completion": ASSISTANT}, '"completion" is an object'),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "empty prompt list": ({"prompt": [], "completion": [ASSISTANT]}, '"prompt" is an empty list'),
    "empty completion list": ({"prompt": [USER], "completion": []}, '"completion" is an empty list'),
    "no messages": (messages(), '"messages" is an empty list'),
    "messages null": ({"messages": None}, '"messages" is null'),
    "messages as an object": ({"messages": USER}, '"messages" is an object'),
    "message as a string": (messages(USER, "Hello"), "messages[1] is a string"),
    "message in completion": ({"prompt": [USER], "completion": [ASSISTANT, 7]}, "completion[1] is a number"),
    "unknown role": (messages(USER, {"role": "bot", "content": "a"}), "messages[1].role is 'bot'"),
    "role in capitals": (messages({"role": "User", "content": "a"}), "messages[0].role is 'User'"),
    "no role": (messages({"from": "user", "content": "a"}), "messages[0] has no role"),
    "role as a list": (messages({"role": ["user"], "content": "a"}), 'messages[0].role is ["user"]'),
    "no content": (messages({"role": "user"}, ASSISTANT), "messages[0] has no content"),
    "null content": (messages(USER, {"role": "assistant", "content": None}), "messages[1] has no content"),
    "no tool calls": (messages({"role": "assistant", "content": None, "tool_calls": []}), "has no content"),
    "a user's tool calls": (messages({"role": "user", "content": None, "tool_calls": [1]}), "has no content"),
    "content as parts": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}),
        "messages[0].content[0] is of type 'image_url'",
    ),
    "content as a number": (messages(USER, {"role": "assistant", "content": 4}), "messages[1].content is a number"),
    "weight below": (messages(USER, {**ASSISTANT, "weight": -0.1}), "messages[1].weight is -0.1"),
    "weight above": (messages(USER, {**ASSISTANT, "weight": 1.5}), "messages[1].weight is 1.5"),
    "weight true": (messages(USER, {**ASSISTANT, "weight": True}), "messages[1].weight is true"),
    "weight null": (messages(USER, {**ASSISTANT, "weight": None}), "messages[1].weight is null"),
    "weight as text": (messages(USER, {**ASSISTANT, "weight": "1"}), "messages[1].weight is '1'"),
    "tools as an object": ({**GOOD, "tools": {"name": "a"}}, '"tools" is not a list'),
    "tools as strings": ({**GOOD, "tools": ["a"]}, '"tools" is not a list of objects'),
}


@pytest.mark.parametrize(("row", "says"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_rows_of_another_shape(refused: Refused, path: Path, row: Any, says: str) -> None:
    error = refused(lines(GOOD) + b"\n" + lines(row, GOOD))
    assert_one_clear_line(error, f"{path}:3")
    assert says in error.message


@pytest.mark.parametrize("weight", ["NaN", "1e400", "-1e400"])
def test_weights_that_are_no_finite_number(refused: Refused, path: Path, weight: str) -> None:
    row = f'{{"messages": [{{"role": "assistant", "content": "a", "weight": {weight}}}]}}'
    assert_one_clear_line(refused(row.encode()), f"{path}:1")


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a", "completion": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
    ],
)
def test_a_key_that_stands_twice_is_refused(refused: Refused, path: Path, row: str) -> None:
    # JSON leaves open which of them counts; to take the last would drop data without a word.
    assert_one_clear_line(refused(row.encode()), f"{path}:1")


# --- both ways ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.dictionaries(
    st.sampled_from(["name", "reasoning_content", "tool_call_id", "Content"]) | st.text(max_size=5), JSON, max_size=2
).map(lambda fields: {k: v for k, v in fields.items() if k not in {"role", "content", "weight"}})
TEXT = st.text(max_size=20)
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
SPOKEN = st.builds(Message, st.sampled_from(ROLES), TEXT, WEIGHTS, FIELDS)
CALLING = st.builds(
    Message, st.just("assistant"), st.none(), WEIGHTS, FIELDS.map(lambda fields: {**fields, "tool_calls": [{"id": 1}]})
)
MESSAGES = st.lists(SPOKEN | CALLING, min_size=1, max_size=4)
TOOLS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=2), max_size=2)


@st.composite
def rows(draw: st.DrawFn) -> tuple[dict[str, Any], Conversation, int]:
    """A row as JSON, the conversation it stands for, and how many of its messages stand in a prompt list."""
    tools = draw(TOOLS)
    row: dict[str, Any] = {"tools": tools} if tools or draw(st.booleans()) else {}

    def spelled(message: Message) -> dict[str, Any]:
        spoken = {"role": message.role, "content": message.content, **message.fields}
        if message.content is None and draw(st.booleans()):
            del spoken["content"]
        return spoken if message.weight == 1 and draw(st.booleans()) else {**spoken, "weight": message.weight}

    shape = draw(st.sampled_from(["messages", "strings", "lists"]))
    if shape == "strings":
        row |= {"prompt": draw(TEXT), "completion": draw(st.text(min_size=1, max_size=20))}
        pair = (Message("user", row["prompt"]), Message("assistant", row["completion"]))
        return row, Conversation(pair, SOURCE, tuple(tools), plain=True), 0
    said = draw(MESSAGES)
    if shape == "messages":
        row |= {"messages": [spelled(m) for m in said]}
        return row, Conversation(tuple(said), SOURCE, tuple(tools)), 0
    prompt = draw(MESSAGES)
    row |= {"prompt": [spelled(m) for m in prompt], "completion": [spelled(m) for m in said]}
    return row, Conversation((*prompt, *said), SOURCE, tuple(tools)), len(prompt)


@given(
    st.lists(st.tuples(rows(), st.sampled_from(["", "\n", " \r\n\n"]), st.sampled_from(["\n", "\r\n"])), min_size=1),
    st.booleans(),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink])
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    given_rows: list[tuple[tuple[dict[str, Any], Conversation, int], str, str]],
    ascii_only: bool,
    mark: bytes,
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    if given_rows[0][1]:
        mark = b""  # the mark must stand before the first row
    text, line_numbers = "", []
    for (row, _, _), blank, end in given_rows:
        line_numbers.append((text + blank).count("\n") + 1)
        text += blank + json.dumps(row, ensure_ascii=ascii_only) + end
    path.write_bytes(mark + text.encode())

    found = read_conversations(path)

    assert [c.source for c in found] == [Source(str(path), line) for line in line_numbers]
    for conversation, ((_, expected, num_prompt), _, _) in zip(found, given_rows, strict=True):
        assert conversation.plain == expected.plain
        assert conversation.tools == expected.tools
        assert len(conversation.messages) == len(expected.messages)
        for i, (message, said) in enumerate(zip(conversation.messages, expected.messages, strict=True)):
            assert (message.role, message.content, message.fields) == (said.role, said.content, said.fields)
            if i >= num_prompt:
                assert message.weight == said.weight
            elif message.role == "assistant":
                assert message.weight == 0


def test_what_silences_a_turn_elsewhere_is_told(path: Path) -> None:
    def reading(**extra: Any) -> Reading:
        path.write_text(json.dumps({"messages": [USER, {**ASSISTANT, **extra}]}) + "\n")
        found = Reading(path)
        assert len(list(found)) == 1
        return found

    assert reading(training=False).told()[1:] == [
        '1 rows have "training" on an answer, which silences nothing: "weight" (0 to 1) does'
    ]
    assert not reading(weight=0, wieght=0).notes
    assert not reading(weight=0.5, name="Ann").notes
