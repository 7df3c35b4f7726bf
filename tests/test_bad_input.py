"""Bad input as people meet it: through the command line, each with its exit code, its place, one line, and nothing left
behind. The numbers are those of the list that this is held against."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatml import CHATML
from likely.data.formats import parse_row
from likely.data.render import Renderer, load_tokenizer
from likely.types import Source
from test_cli import Said, assert_refused, likely  # noqa: F401  (a fixture)

Likely = Callable[..., Said]
USER = {"role": "user", "content": "What is the capital?"}
ASSISTANT = {"role": "assistant", "content": "Paris."}
ROW = {"messages": [USER, ASSISTANT]}
LINE = json.dumps(ROW).encode() + b"\n"


def said(*turns: Any, **extra: Any) -> bytes:
    return json.dumps({"messages": list(turns), **extra}).encode() + b"\n"


# number and name -> (file name, bytes after one good line, place within the file, words)
REFUSED: dict[str, tuple[str, bytes, int | None, str]] = {
    "7 UTF-16": ("d.jsonl", LINE.decode().encode("utf-16"), 1, "UTF-16, not UTF-8"),
    "8 a byte that is not UTF-8": ("d.jsonl", LINE + LINE.replace(b"capital", b"caf\xe9"), 2, "not UTF-8 at byte"),
    "12 carriage returns alone": ("d.jsonl", LINE.replace(b"\n", b"\r") * 3, 1, "broken JSON"),
    "15 a last line that is cut": ("d.jsonl", LINE * 16 + b'{"messages":[{"ro', 17, "broken JSON"),
    "18 a pretty-printed object": ("d.jsonl", json.dumps(ROW, indent=2).encode(), 1, "one row a line"),
    "18 rows over several lines": (
        "d.json",
        (json.dumps(ROW, indent=2) + "\n").encode() * 3,
        1,
        "JSON over several lines, not one row a line",
    ),
    "18 a pretty-printed list in an object": (
        "d.json",
        json.dumps({"data": [ROW] * 3}, indent=1).encode(),
        1,
        "JSON over several lines",
    ),
    "rows inside an object": ("d.json", json.dumps({"data": [ROW] * 3}).encode(), 1, "rows inside 'data'"),
    "19 NaN": ("d.jsonl", LINE + LINE.replace(b'"Paris."', b'"Paris.", "score": NaN'), 2, "NaN is not JSON"),
    "20 a key that stands twice": ("d.jsonl", LINE + b'{"messages": [], "messages": []}\n', 2, "stands twice"),
    "21 endless nesting": ("d.jsonl", LINE + b"[" * 200_000 + b"\n", 2, "nested too deeply"),
    "21 endless nesting in an array": ("d.json", b"[" * 200_000, 1, "nested too deeply"),
    "23 a long line": ("d.jsonl", LINE + b" " * (17 * 2**20) + b"\n", 2, "over 16 MB"),
    "24 a bomb": ("d.jsonl.gz", gzip.compress((b" " * 4095 + b"\n") * 2**15), None, "times its size"),
    "24 a bomb of short rows": ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 2**21), None, "times its size"),
    "23 a row that no context holds": (
        "d.jsonl",
        LINE + said(USER, {**ASSISTANT, "content": "word " * 3_000_000}),
        2,
        "at least",
    ),
    "25 a zip archive": ("d.jsonl", b"PK\x03\x04" + b"\0" * 100, None, "zip archive"),
    "25 a cut Parquet file": ("d.jsonl", b"PAR1" + b"\0" * 100, 0, "broken Parquet"),
    "29 a list": ("d.jsonl", LINE + b"[1]\n", 2, "a list"),
    "29 a number": ("d.jsonl", LINE + b"7\n", 2, "a number"),
    "29 null": ("d.jsonl", LINE + b"null\n", 2, "null"),
    "29 a string": ("d.jsonl", LINE + b'"Hi"\n', 2, "a string"),
    "30 a key that is missing": ("d.jsonl", LINE + b'{"prompt": "a"}\n', 2, "the row has 'prompt'"),
    "31 messages as text": ("d.jsonl", LINE + b'{"messages": "hi"}\n', 2, '"messages" is a string'),
    "32 no messages": ("d.jsonl", LINE + b'{"messages": []}\n', 2, "an empty list"),
    "33 no answer": ("d.jsonl", LINE + said(USER), 2, "no assistant turn"),
    "34 an unknown role": ("d.jsonl", LINE + said({**USER, "role": "bot"}, ASSISTANT), 2, "role is 'bot'"),
    "36 null content": ("d.jsonl", LINE + said({"role": "user", "content": None}, ASSISTANT), 2, "no content"),
    "36 a picture": (
        "d.jsonl",
        LINE + said({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
        2,
        "'image_url'",
    ),
    "36 content as a number": ("d.jsonl", LINE + said({"role": "user", "content": 4}, ASSISTANT), 2, "is a number"),
    "38 a weight on the row": ("d.jsonl", LINE + said(USER, ASSISTANT, weight=0.5), 2, "weight on the whole row"),
    "38 a weight on a question": ("d.jsonl", LINE + said({**USER, "weight": 0.5}, ASSISTANT), 2, "on a user message"),
    "38 a weight above 1": ("d.jsonl", LINE + said(USER, {**ASSISTANT, "weight": 2}), 2, "weight is 2"),
    "39 a row over the limit": ("d.jsonl", LINE + said({**USER, "content": "a " * 900}, ASSISTANT), 2, "limit of"),
    "43 half a character": ("d.jsonl", LINE + said({**USER, "content": "\ud83d"}, ASSISTANT), 2, "surrogate"),
    "54 arguments that are no JSON": (
        "d.jsonl",
        LINE + said(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        2,
        "broken JSON",
    ),
    "54 tools that are no JSON": ("d.jsonl", LINE + said(USER, ASSISTANT, tools="["), 2, "broken JSON"),
    "two shapes in one row": ("d.jsonl", LINE + said(USER, ASSISTANT, text="a"), 2, "fits messages and text"),
    "a CSV without its columns": ("d.csv", b"question,answer\na,b\n", 2, "'question', 'answer'"),
    "a CSV that breaks off": ("d.csv", b'prompt,completion\na,b\n"a,b', 3, "broken CSV"),
    "tokens of another model": (
        "d.jsonl",
        b'{"input_ids": [1, 99999], "labels": [1, 99999]}\n',
        1,
        "the tokenizer has",
    ),
    "labels that are shifted": ("d.jsonl", b'{"input_ids": [1, 2], "labels": [2, 1]}\n', 1, "labels"),
    "a role in capitals": ("d.jsonl", LINE + said({**USER, "role": "User"}, ASSISTANT), 2, "role is 'User'"),
    "a role that is null": ("d.jsonl", LINE + said({**USER, "role": None}, ASSISTANT), 2, "role is null"),
    "a message as a list": ("d.jsonl", LINE + said([USER], ASSISTANT), 2, "messages[0] is a list"),
    "a weight that is too large": (
        "d.jsonl",
        LINE + LINE.replace(b'"Paris."', b'"Paris.", "weight": 1e400'),
        2,
        "the number '1e400' is too large",
    ),
    "a number without end": ("d.jsonl", LINE + b'{"id": ' + b"9" * 5000 + b"}\n", 2, "a number of 5,000 digits"),
    "a number without end in an array": ("d.json", b'[{"id": ' + b"9" * 5000 + b"}]", 1, "a number of 5,000 digits"),
    "arguments that name a key twice": (
        "d.jsonl",
        LINE
        + said(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1,"a":2}'}}]}),
        2,
        "arguments: broken JSON: the key 'a' stands twice",
    ),
    "null among tokens": ("d.jsonl", b'{"input_ids": [1, null], "labels": [1, null]}\n', 1, "no list of whole numbers"),
    "a separator of JSON text sequences": ("d.jsonl", LINE + b"\x1e" + LINE, 2, "broken JSON at column 1"),
    "a next-line character for an end": ("d.jsonl", LINE.rstrip() + b"\xc2\x85" + LINE, 1, "Extra data"),
    "a garbage byte behind gzip": (
        "d.jsonl.gz",
        gzip.compress(LINE * 3) + gzip.compress(LINE)[:20],
        None,
        "broken gzip",
    ),
    "a name that steers a terminal": ("\x1b[31mred.jsonl", LINE + b"{\n", 2, "broken JSON"),
    "a thought that is a number": ("d.jsonl", LINE + said(USER, {**ASSISTANT, "thinking": 3}), 2, "thinking is 3"),
    "a thought in parts": (
        "d.jsonl",
        LINE + said(USER, {**ASSISTANT, "reasoning_content": [{"type": "text", "text": "a"}]}),
        2,
        "write the thought as a string",
    ),
    "tools that no template shows": (
        "d.jsonl",
        LINE + said(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "f"}}]),
        2,
        "does not show the row's tools",
    ),
    "a call that the template can't write": (
        "d.jsonl",
        LINE + said(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}),
        2,
        "(not null) to a string",
    ),
    "two objects in a line": ("d.jsonl", LINE.rstrip() + LINE, 1, "Extra data"),
    "single quotes": ("d.jsonl", LINE + b"{'messages': []}\n", 2, "broken JSON at column 2"),
    "rows that are lists of messages": ("d.json", json.dumps([[USER, ASSISTANT]]).encode(), 1, "this is a list"),
    "tokens in a nest": ("d.jsonl", b'{"input_ids": [[1, 2]], "labels": [[1, 2]]}\n', 1, "no list of whole numbers"),
    "a column that stands twice": ("d.csv", b"prompt,prompt\na,b\n", 1, "stands twice"),
    "a mark where files were joined": ("d.jsonl", LINE + b"\xef\xbb\xbf" + LINE, 2, "remove the byte order mark"),
    "what a crash leaves": ("d.jsonl", LINE * 3 + b"\0" * 4096, 4, "remove the NUL bytes"),
    "UTF-16 without a mark": ("d.csv", "prompt,completion\n".encode("utf-16-le"), 1, "UTF-16, not UTF-8"),
    "UTF-16, the other way round": ("d.csv", "prompt,completion\n".encode("utf-16-be"), 1, "UTF-16, not UTF-8"),
    "UTF-32 without a mark": ("d.jsonl", LINE.decode().encode("utf-32-le"), 1, "UTF-32, not UTF-8"),
    "a pointer of Git LFS": ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", None, "git lfs pull"),
    "a page in place of the data": ("d.jsonl", b"\n<!DOCTYPE html><html>404</html>\n", None, "this is HTML or XML"),
    "an lz4 file": ("d.jsonl", b"\x04\x22\x4d\x18" + b"\0" * 50, None, "an lz4 file"),
    "a NumPy array": ("d.jsonl", b"\x93NUMPY\x01\0" + b"\0" * 50, None, "a NumPy array"),
    "a CSV with semicolons": ("d.csv", b"prompt;completion\na;b\n", 1, "the header is one column"),
    "a TSV with commas": ("d.tsv", b"prompt,completion\na,b\n", 1, "the header is one column"),
    "a line for spreadsheets": ("d.csv", b"sep=,\nprompt,completion\na,b\n", 1, "tells spreadsheets the separator"),
    "a CSV row without end": (
        "d.csv",
        b"prompt,completion,c\n" + b",".join([b'"' + b"a b\n" * 3_000_000 + b'"'] * 3) + b"\n",
        2,
        "the row is over 32 MB",
    ),
    "functions that are numbers": ("d.jsonl", LINE + said(USER, ASSISTANT, functions=[5]), 2, "not a list of objects"),
    "a conversation without end": (
        "d.jsonl",
        LINE + said(*[{**USER, "content": ""}, {**ASSISTANT, "content": ""}] * 5000),
        2,
        "a conversation of 10,000 messages, and the limit is 5,000",
    ),
    "2 an empty file": ("d.jsonl", b"", None, "no rows"),
    "16 blank lines only": ("d.jsonl", b"\n \n\r\n", None, "no rows"),
    "an empty array": ("d.json", b"[]", None, "no rows"),
    "a header alone": ("d.csv", b"prompt,completion\n", None, "no rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_data(likely: Likely, tmp_path: Path, tiny_model_dir: Path, name: str) -> None:  # noqa: F811
    file, raw, line, words = REFUSED[name]
    (tmp_path / file).write_bytes(raw)
    started = time.monotonic()
    told = likely("train", "--model", tiny_model_dir, "--data", file, "--output", "run")
    assert_refused(told, 3, words)
    place = file.replace("\x1b", r"\x1b")  # which no terminal obeys
    assert told.err.startswith(f"error: {place}:{line}: " if line else f"error: {place}: ")
    assert time.monotonic() - started < 30
    assert (tmp_path / file).read_bytes() == raw
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.jsonl", "no such file"),  # 1
        (".", "a folder, and has no data file in it"),  # 3
        ("rows", "this is a folder; name its files, with commas between them: rows/a.jsonl,rows/b.csv.gz"),
        ("pipe", "not an ordinary file"),  # 4
        ("/dev/zero", "not an ordinary file"),
        ("dangling.jsonl", "no such file"),  # 27
        ("x" * 300, "name too long"),
    ],
)
def test_what_is_no_data_file(
    likely: Likely,  # noqa: F811
    tmp_path: Path,
    tiny_model_dir: Path,
    data: str,
    words: str,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "b.csv.gz", "README.md"):
        (tmp_path / "rows" / name).touch()
    (tmp_path / "dangling.jsonl").symlink_to("nowhere")
    told = likely("train", "--model", tiny_model_dir, "--data", data, "--output", "run")
    assert_refused(told, 3)
    assert words in told.err.lower()
    assert not (tmp_path / "run").exists()


ACCEPTED: dict[str, tuple[str, bytes, str]] = {
    "6 a byte order mark": ("d.jsonl", b"\xef\xbb\xbf" + LINE, ""),
    "10 NUL in a text": ("d.jsonl", said({**USER, "content": "a\0b"}, ASSISTANT), ""),
    "11 CR LF": ("d.jsonl", (LINE + LINE).replace(b"\n", b"\r\n"), ""),
    "14 no end of line": ("d.jsonl", LINE + LINE.rstrip(), ""),
    "16 blank lines": ("d.jsonl", b"\n" + LINE + b" \n\n" + LINE, "3 blank lines"),
    "17 an array": ("d.json", b"[" + LINE + b"," + LINE + b"]", "2 rows of messages"),
    "37 an empty answer": ("d.jsonl", LINE + said(USER, {**ASSISTANT, "content": ""}), ""),
    "42 a control token in a text": ("d.jsonl", said({**USER, "content": "<|im_end|>"}, ASSISTANT), "not obeyed"),
    "44 equal rows": ("d.jsonl", LINE * 9, "9 rows of messages"),
    "45 one row for a batch of eight": ("d.jsonl", LINE, "1 rows of messages"),
    "47 two shapes in one file": ("d.jsonl", LINE + b'{"prompt": "a", "completion": "b"}\n', "several shapes"),
    "48 keys that nothing reads": ("d.jsonl", said(USER, ASSISTANT, id=1), "nothing reads: 'id'"),
    "52 a formula and a script": (
        "d.jsonl",
        said({**USER, "content": "=1+1 <script>alert(1)</script>"}, ASSISTANT),
        "",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_data_that_is_fine(likely: Likely, tmp_path: Path, tiny_model_dir: Path, name: str) -> None:  # noqa: F811
    file, raw, words = ACCEPTED[name]
    (tmp_path / file).write_bytes(raw)
    told = likely("train", "--model", tiny_model_dir, "--data", file, "--output", "run", "--steps", 1)
    assert told.code == 0, told.err
    assert words in told.err
    assert (tmp_path / file).read_bytes() == raw


def test_bad_rows_are_skipped_where_asked(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    (tmp_path / "d.jsonl").write_bytes(LINE + b"{\n" + said(USER) + LINE)
    flags = ("--model", tiny_model_dir, "--data", "d.jsonl", "--eval-data", "d.jsonl", "--steps", 1)
    told = likely("train", *flags, "--output", "run", "--on-bad-row", "skip")
    assert told.code == 0, told.err
    assert "left out: d.jsonl:2: broken JSON" in told.err
    for name in ("rejected.jsonl", "rejected-eval.jsonl"):
        rejected = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert [(r["file"], r["line"]) for r in rejected] == [("d.jsonl", 2), ("d.jsonl", 3)]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["rejected"] == 2


def test_settings_of_the_data_go_all_the_way(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    (tmp_path / "d.csv").write_text("q,a\nHi,Hello\nBye," + "b " * 900 + "\n")
    (tmp_path / "e.jsonl").write_bytes(LINE)
    flags = ("--model", tiny_model_dir, "--columns", "prompt=q,completion=a", "--steps", 1)
    told = likely("train", *flags, "--data", "d.csv", "--output", "run", "--on-too-long", "drop", "--template", "raw")
    assert told.code == 0, told.err
    assert "1 examples over 512 tokens: 1 left out" in told.err
    assert "joined as they are" in told.err
    told = likely("train", "--model", tiny_model_dir, "--data", "e.jsonl", "--format", "text", "--output", "r2")
    assert_refused(told, 3, "e.jsonl:1", "format text wants 'text'")
    told = likely("train", "--model", tiny_model_dir, "--data", "e.jsonl", "--columns", "p=q", "--output", "r3")
    assert_refused(told, 2, "'p'")
    told = likely("train", "--model", tiny_model_dir, "--data", "e.jsonl", "--template", "raw", "--output", "r4")
    assert_refused(told, 3, "e.jsonl:1", "template raw")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES: dict[str, tuple[str | None, int, str]] = {
    "95 none": (None, 4, "no chat template"),
    "95 a mistake in it": ("{% for %}", 4, "broken"),
    "95 into Python": ("{{ ''.__class__.__mro__ }}", 4, "unsafe"),
    "95 an endless loop": (LOOP + CHATML, 4, "over 5 s"),
    "95 a long output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", 4, "16 million"),
    "95 a refusal": ("{{ raise_exception('No\nsystem!') }}" + CHATML, 3, "No system!"),
    "96 no end of turn": ("{% for m in messages %}{{ m.content }}{% endfor %}", 4, "no control token"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(
    likely: Likely,  # noqa: F811
    tmp_path: Path,
    chat_tokenizer: PreTrainedTokenizerFast,
    tiny_model_dir: Path,
    name: str,
) -> None:
    source, code, words = TEMPLATES[name]
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, model)
    if source is not None:
        (model / "chat_template.jinja").write_text(source)
    (tmp_path / "d.jsonl").write_bytes(LINE + LINE)
    told = likely("train", "--model", model, "--data", "d.jsonl", "--output", "run")
    assert_refused(told, code, words)
    if code == 3:
        assert told.err.startswith("error: d.jsonl:1: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("raw", [None, b"", b"{", b"not a tokenizer", b"{}", b"\xff\xfe"])
def test_94_tokenizers_that_cannot_be_read(
    likely: Likely,  # noqa: F811
    tmp_path: Path,
    tiny_model_dir: Path,
    raw: bytes | None,
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.name != "tokenizer.json":
            shutil.copy(file, model)
    if raw is not None:
        (model / "tokenizer.json").write_bytes(raw)
    (tmp_path / "d.jsonl").write_bytes(LINE)
    told = likely("train", "--model", model, "--data", "d.jsonl", "--output", "run")
    assert_refused(told, 4, "model")


def with_tokenizer(folder: Path, source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model whose tokenizer.json is changed."""
    shutil.copytree(source, folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def test_94_a_control_token_that_is_a_part_of_words(likely: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    letter = {"id": 359, "content": "e", "special": True, "normalized": False}
    letter |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = with_tokenizer(tmp_path / "model", tiny_model_dir, lambda spec: spec["added_tokens"].append(letter))
    (tmp_path / "d.jsonl").write_bytes(LINE)
    told = likely("train", "--model", model, "--data", "d.jsonl", "--output", "run")
    assert_refused(told, 4, "is a part of its words too")


def test_a_tokenizer_that_drops_merges_by_chance_is_read_without(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = with_tokenizer(tmp_path / "model", tiny_model_dir, lambda spec: spec["model"].update(dropout=0.5))
    plain, other = (Renderer(load_tokenizer(folder)) for folder in (tiny_model_dir, model))
    row = parse_row(ROW, Source("d.jsonl", 1))
    for _ in range(5):
        assert other.render(row)[0].token_ids_T.tolist() == plain.render(row)[0].token_ids_T.tolist()
