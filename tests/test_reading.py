"""Bytes -> rows: what is read alike whatever it is packed in, and what is refused in bounded time and memory."""

from __future__ import annotations

import bz2
import copy
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from likely.data import reading, strict_json
from likely.data.formats import parse_row
from likely.data.parquet import BATCH_BYTES, BATCH_ROWS, sizes
from likely.data.reading import Rows
from likely.errors import DataError
from likely.types import Source

ROWS: list[dict[str, Any]] = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": 'a "quote", a comma', "completion": "two\nlines"},
    {"prompt": "Où ?", "completion": "東京 🙂"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'prompt,completion\r\n2 + 2 =, 4\r\n"a ""quote"", a comma","two\nlines"\r\nOù ?,東京 🙂\r\n'.encode()


def zstd(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return bytes(sink.getvalue())


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def tar(raw: bytes, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("train.jsonl")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def zipped(raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("train.jsonl", raw)
    return out.getvalue()


def put(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def refusal(path: Path | str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(Rows(path))
    error = caught.value
    assert error.exit_code == 3
    assert error.message
    assert error.way_out
    assert error.place.startswith(str(path))
    assert len(str(error).splitlines()) == 1
    return error


FILES: dict[str, tuple[bytes, list[int]]] = {
    "d.jsonl": (JSONL, [1, 2, 3]),
    "d.txt": (JSONL.replace(b"\n", b"\r\n")[:-2], [1, 2, 3]),
    "d.json": (json.dumps(ROWS).encode(), [1, 2, 3]),
    "pretty.json": (b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=4, ensure_ascii=False).encode() + b"\n", [1, 2, 3]),
    "d.jsonl.gz": (gzip.compress(JSONL), [1, 2, 3]),
    "members.gz": (gzip.compress(JSONL[:40]) + gzip.compress(JSONL[40:]), [1, 2, 3]),
    "d.json.gz": (gzip.compress(json.dumps(ROWS).encode()), [1, 2, 3]),
    "d.jsonl.zst": (zstd(JSONL), [1, 2, 3]),
    "frames.zst": (zstd(JSONL[:40]) + zstd(JSONL[40:]), [1, 2, 3]),
    "misnamed.jsonl": (gzip.compress(JSONL), [1, 2, 3]),
    "d.csv": (CSV, [2, 3, 5]),
    "mark.csv": (b"\xef\xbb\xbf" + CSV, [2, 3, 5]),
    "d.CSV.gz": (gzip.compress(CSV), [2, 3, 5]),
    "d.parquet": (parquet(ROWS), [1, 2, 3]),
    "misnamed.data": (parquet(ROWS), [1, 2, 3]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    raw, places = FILES[name]
    path = put(tmp_path, name, raw)
    rows = Rows(path)
    found = list(rows)
    assert [row for row, _ in found] == ROWS
    assert [str(source) for _, source in found] == [f"{path}:{place}" for place in places]
    assert rows.sha256 == hashlib.sha256(raw).hexdigest()
    assert path.read_bytes() == raw


def test_tabs_separate_a_tsv(tmp_path: Path) -> None:
    path = put(tmp_path, "d.tsv", b"prompt\tcompletion\na, b\tc\n\n")
    rows = Rows(path)
    assert [row for row, _ in rows] == [{"prompt": "a, b", "completion": "c"}]
    assert rows.num_blank == 1


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    rows = Rows(put(tmp_path, "d.jsonl", b"\n" + JSONL + b" \t\r\n\n"))
    assert [source.line for _, source in rows] == [2, 3, 4]
    assert rows.num_blank == 3


def test_nulls_of_a_parquet_schema_are_absent_keys(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 0.5}]
    path = put(tmp_path, "d.parquet", parquet([{"messages": messages, "tools": None}]))
    ((row, _),) = Rows(path)
    assert row == {"messages": [{"role": "user", "content": "a"}, messages[1]]}


def test_the_hash_is_of_the_bytes_that_were_parsed(tmp_path: Path) -> None:
    path = put(tmp_path, "d.jsonl", JSONL * 2000)  # longer than one block
    rows = Rows(path)
    iterator = iter(rows)
    next(iterator)
    path.rename(tmp_path / "old.jsonl")
    put(tmp_path, "d.jsonl", b"{}\n")  # somebody replaces the file meanwhile
    assert len(list(iterator)) == 5999
    assert rows.sha256 == hashlib.sha256(JSONL * 2000).hexdigest()


def test_an_array_is_read_through_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * (i * 997 % 40000), "n": i} for i in range(300)] + [[], {}, 1.5, "a\\"]
    path = put(tmp_path, "d.json", json.dumps(rows, indent=1).encode())
    assert [row for row, _ in Rows(path)] == rows
    assert [row for row, _ in Rows(put(tmp_path, "e.json", b"[ ]\n"))] == []


OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "d.zip": (zipped(JSONL), "zip archive"),
    "zip.jsonl": (zipped(JSONL), "zip archive"),
    "d.tar": (tar(JSONL), "tar archive"),
    "d.tar.gz": (tar(JSONL, "w:gz"), "tar archive"),
    "tar.jsonl": (tar(JSONL), "tar archive"),
    "d.bz2": (bz2.compress(JSONL), "bzip2"),
    "d.xz": (lzma.compress(JSONL), "xz"),
    "twice.gz": (gzip.compress(gzip.compress(JSONL)), "inside a packed file"),
    "zst.gz": (gzip.compress(zstd(JSONL)), "inside a packed file"),
    "parquet.gz": (gzip.compress(parquet(ROWS)), "inside a packed file"),
    "rows.parquet": (JSONL, "named .parquet"),
    "d.sqlite": (b"SQLite format 3\0" + b"\0" * 100, "SQLite"),
    "d.pkl": (b"\x80\x04\x95\0\0", "pickle"),
    "le.jsonl": (JSONL.decode().encode("utf-16"), "UTF-16"),
    "be.jsonl": (b"\xfe\xff" + JSONL.decode().encode("utf-16-be"), "UTF-16"),
    "bare.jsonl": (JSONL.decode().encode("utf-16-le"), "UTF-16"),
    "w.jsonl": (JSONL.decode().encode("utf-32"), "UTF-32"),
    "d.pdf": (b"%PDF-1.7\n", "PDF"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_files_are_named(tmp_path: Path, name: str) -> None:
    raw, says = OTHER_KINDS[name]
    assert says in refusal(put(tmp_path, name, raw)).message


BROKEN: dict[str, tuple[bytes, str, int | None]] = {
    "cut.gz": (gzip.compress(JSONL * 50)[:-20], "broken gzip", None),
    "flipped.gz": (gzip.compress(JSONL)[:-8] + b"\0\0\0\0" + gzip.compress(JSONL)[-4:], "broken gzip", None),
    "cut.zst": (zstd(JSONL * 50)[:-6], "broken zstd", None),
    "head.zst": (zstd(JSONL)[:6], "broken zstd", None),
    "cut.parquet": (parquet(ROWS)[:-20], "broken Parquet", None),
    "magic.parquet": (b"PAR1", "broken Parquet", None),
    "cr.jsonl": (JSONL.replace(b"\n", b"\r"), "broken JSON", 1),
    "last.jsonl": (JSONL + b'{"messages":[{"ro', "broken JSON", 4),
    "open.json": (json.dumps(ROWS).encode()[:-1], "the end of the file", 3),
    "cut.json": (json.dumps(ROWS).encode()[:-30], "broken JSON", 3),
    "commas.json": (b'[{"a": 1} {"a": 2}]', "after this row", 1),
    "trailing.json": (b'[{"a": 1},]', "broken JSON", 2),
    "after.json": (b'[{"a": 1}]\n{"a": 2}\n', "after the end", 1),
    "nan.json": (b'[{"a": 1}, {"a": NaN}]', "NaN is not JSON", 2),
    "twice.json": (b'[{"a": 1}, {"a": 1, "a": 2}]', "stands twice", 2),
    "half.json": (b'[{"a": 1}, {"a": "\\ud83d"}]', "surrogate", 2),
    "latin.json": (b'[{"a": 1}, {"a": "caf\xe9"}]', "not UTF-8", 1),
    "deep.json": (b"[" * 200_000, "nested too deeply", 1),
    "deep.jsonl": (b'{"a":' * 200_000, "nested too deeply", 1),
    "latin.csv": (b"prompt,completion\na,b\ncaf\xe9,c\n", "not UTF-8", 3),
    "ragged.csv": (b"prompt,completion\na,b\na,b,c\n", "3 fields", 3),
    "short.csv": (b"prompt,completion\na\n", "1 fields", 2),
    "header.csv": (b"prompt,prompt\na,b\n", "twice in the header", 1),
    "quote.csv": (b'prompt,completion\na,b\n"a,b\n', "broken CSV", 3),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_with_their_place(tmp_path: Path, name: str) -> None:
    raw, says, line = BROKEN[name]
    path = put(tmp_path, name, raw)
    error = refusal(path)
    assert says in error.message
    assert error.place == (f"{path}:{line}" if line else str(path))


def test_the_way_out_of_carriage_returns(tmp_path: Path) -> None:
    assert "LF" in refusal(put(tmp_path, "d.jsonl", JSONL.replace(b"\n", b"\r"))).way_out


def test_what_is_no_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero"), Path("/dev/null")):
        assert "not an ordinary file" in refusal(path).message
    assert "a folder" in refusal(tmp_path).message
    assert "no such file" in refusal(tmp_path / "missing.jsonl").message
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "missing.jsonl")
    assert "no such file" in refusal(tmp_path / "dangling.jsonl").message
    (tmp_path / "link.jsonl").symlink_to(put(tmp_path, "d.jsonl", JSONL))
    assert len(list(Rows(tmp_path / "link.jsonl"))) == 3
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(DataError):
            list(Rows(name))


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json", "bad.csv"])
def test_bad_rows_can_be_passed_over(tmp_path: Path, name: str) -> None:
    raw = {
        "bad.jsonl": b'{"a": 1}\n{"a": }\n{"a": "\xff"}\n{"a": 2}\n' + b"[" * 100_000 + b'\n{"a": 3}\n',
        "bad.json": b'[{"a": 1}, {"a": "\\ud800"}, {"a": 2}, {"a": 3}]',
        "bad.csv": b"a,b\n1,\n1,2,3\n2,\n3,\n",
    }[name]
    complaints: list[DataError] = []
    found = [row["a"] for row, _ in Rows(put(tmp_path, name, raw), complaints.append)]
    assert [int(a) for a in found] == [1, 2, 3]
    assert [e.place.rpartition(":")[2] for e in complaints] == {
        "bad.jsonl": ["2", "3", "5"],
        "bad.json": ["2"],
        "bad.csv": ["3"],
    }[name]


def test_a_row_over_the_cap_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(strict_json, "MAX_ROW_BYTES", 1000)
    long = json.dumps({"a": "x" * 5000}).encode()
    complaints: list[DataError] = []
    raw = b'{"a": 1}\n' + long + b'\n{"a": 2}\n' + long
    path = put(tmp_path, "d.jsonl", raw)
    assert [row["a"] for row, _ in Rows(path, complaints.append)] == [1, 2]
    assert [e.place for e in complaints] == [f"{path}:2", f"{path}:4"]
    assert "MB" in complaints[0].message
    array = put(tmp_path, "d.json", b'[{"a": 1}, ' + long + b', {"a": 2}]')
    assert [row["a"] for row, _ in Rows(array, complaints.append)] == [1, 2]
    assert complaints[-1].place == f"{array}:2"
    assert "large" in refusal(put(tmp_path, "d.csv", b"a,b\n" + b'"' + b"x\n" * 900 + b'",1\n')).message


def peak_of_reading(path: Path) -> tuple[str, int]:
    """What reading says, and how many MB the process grew by."""
    code = (
        "import resource, sys\n"
        "import pyarrow\n"
        "from likely.data.reading import Rows\n"
        "from likely.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    print(sum(1 for _ in Rows(sys.argv[1])))\n"
        "except DataError as error:\n"
        "    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()
    return said, int(grown)


def test_memory_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "one_line.jsonl").open("wb") as file:
        file.truncate(2**28)  # a sparse line of 256 MB
    said, grown = peak_of_reading(tmp_path / "one_line.jsonl")
    assert ":1: the line is over 16 MB" in said
    assert grown < 100
    bomb = gzip.compress((b" " * 4095 + b"\n") * 2**16, 9)
    said, grown = peak_of_reading(put(tmp_path, "bomb.gz", bomb))
    assert "times its size" in said
    assert grown < 60
    said, grown = peak_of_reading(put(tmp_path, "bomb.zst", zstd((b" " * 4095 + b"\n") * 2**16)))
    assert "times its size" in said
    assert grown < 60
    said, grown = peak_of_reading(put(tmp_path, "many.jsonl", b'{"a": 1}\n' * 300_000))
    assert said == "300000"
    assert grown < 30


def test_repetitive_rows_are_no_bomb(tmp_path: Path) -> None:
    raw = JSONL * 20_000  # 2 MB that pack 200:1 and better
    assert sum(1 for _ in Rows(put(tmp_path, "d.zst", zstd(raw)))) == 60_000


def test_a_file_that_can_t_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "d.jsonl", JSONL)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    opened: Callable[..., Any] = refuse
    monkeypatch.setattr(Path, "open", opened)
    assert "Permission denied" in refusal(path).message


def test_a_first_row_that_breaks_off_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a",\n{"text": "b"}\n{\n{"text": "c"}\n', encoding="utf-8")
    bad: list[DataError] = []
    assert [row["text"] for row, _ in Rows(path, bad.append)] == ["b", "c"]
    assert [error.place for error in bad] == [f"{path}:1", f"{path}:3"]
    path.write_text('{"text":', encoding="utf-8")
    bad.clear()
    assert not list(Rows(path, bad.append))
    assert [error.place for error in bad] == [f"{path}:1"]


def test_null_columns_of_a_table_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "id": 1}, {"messages": None, "id": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [row for row, _ in Rows(tmp_path / "d.parquet")]
    assert copy.deepcopy(found[1]).nulls == ("messages", "id")  # as rows are sent to workers
    with pytest.raises(DataError, match="the row has no keys, and null in 'messages', 'id'; write rows of"):
        parse_row(found[1], Source("d.parquet", 2))


def write_table(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("file", ["d.jsonl", "d.json"])
def test_nesting_that_other_parts_could_not_pass_on_is_refused(tmp_path: Path, file: str) -> None:
    def raw(depth: int) -> bytes:
        row = b'{"text": "a", "more": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
        return b"[" + row + b"]" if file == "d.json" else row

    path = tmp_path / file
    path.write_bytes(raw(strict_json.MAX_DEPTH))
    assert len(list(Rows(path))) == 1
    path.write_bytes(raw(strict_json.MAX_DEPTH + 1))
    with pytest.raises(DataError, match="nested too deeply: over 100") as raised:
        list(Rows(path))
    assert raised.value.place == f"{path}:1"


def test_many_rows_in_one_are_not_deep(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [{"a": [1]}] * 500}))
    assert len(list(Rows(tmp_path / "d.jsonl"))) == 1


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    path = write_table(tmp_path / "d.parquet", pa.table({"text": texts}))
    with pytest.raises(DataError, match="a value can't be read: 'utf-8' codec") as raised:
        list(Rows(path))
    assert raised.value.place == f"{path}:2"
    passed: list[DataError] = []
    rows = [(row["text"], source.line) for row, source in Rows(path, passed.append)]
    assert rows == [("a", 1), ("b", 3)]
    assert [error.place for error in passed] == [f"{path}:2"]


def test_times_beside_the_text_do_no_harm(tmp_path: Path) -> None:
    times = {
        "with nanoseconds": pa.array([1], pa.timestamp("ns")),
        "of an unknown zone": pa.array([1], pa.timestamp("us", tz="Mars/Phobos")),
        "of day": pa.array([1], pa.time64("ns")),
        "between": pa.array([1], pa.duration("ns")),
    }
    path = write_table(tmp_path / "d.parquet", pa.table({"text": ["a"], **times}))
    assert [row["text"] for row, _ in Rows(path)] == ["a"]
    late = pa.array([2**62], pa.timestamp("us"))
    with pytest.raises(DataError, match="a value can't be read: date value out of range"):
        list(Rows(write_table(tmp_path / "d.parquet", pa.table({"text": ["a"], "late": late}))))


def test_a_column_of_parquet_that_stands_twice(tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in "abc"]
    table = pa.Table.from_arrays(columns, names=["prompt", "prompt", "completion"])
    with pytest.raises(DataError, match="a column name stands twice"):
        list(Rows(write_table(tmp_path / "d.parquet", table)))


def test_parquet_that_swells_is_a_bomb(tmp_path: Path) -> None:
    texts = pa.array(["a" * 6_000_000] * 200).dictionary_encode()
    path = write_table(tmp_path / "d.parquet", pa.table({"text": texts}), compression="zstd")
    with pytest.raises(DataError, match="times its size"):
        list(Rows(path))


def test_large_values_of_a_dictionary_are_taken_in_small_batches(tmp_path: Path) -> None:
    text = os.urandom(1_000_000).hex()
    path = write_table(tmp_path / "d.parquet", pa.table({"text": pa.array([text] * 300).dictionary_encode()}))
    unpacked, most_rows = sizes(pq.ParquetFile(path).metadata)
    assert 2_000_000 < unpacked < 3_000_000
    assert 1 <= most_rows <= BATCH_BYTES // 2_000_000
    assert sum(row["text"] == text for row, _ in Rows(path)) == 300
    words = pa.table({"text": [f"word {i}" for i in range(300)]})
    assert sizes(pq.ParquetFile(write_table(path, words)).metadata)[1] == BATCH_ROWS


def test_a_list_of_parquet_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    lists = pa.table(
        {
            "ids": pa.array([[1, 2], [7] * 900, [3], []], pa.list_(pa.int8())),
            "map": pa.array([[("a", 1)], [], [], [("b", 2)] * 200], pa.map_(pa.string(), pa.int8())),
            "in": pa.array([{"x": [None]}, None, {"x": []}, {"x": []}], pa.struct([("x", pa.list_(pa.null()))])),
        }
    )
    bad: list[DataError] = []
    path = write_table(tmp_path / "d.parquet", lists)
    assert [row["ids"] for row, _ in Rows(path, bad.append)] == [[1, 2], [3]]
    assert [error.place for error in bad] == [f"{path}:2", f"{path}:4"]
    assert "MB; remove or split it" in str(bad[0])


def test_equal_values_of_a_list_of_parquet_are_a_bomb(tmp_path: Path) -> None:
    ones = pa.array([[1] * 3_000_000] * 3, pa.list_(pa.int8()))
    path = write_table(tmp_path / "d.parquet", pa.table({"input_ids": ones}), compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="over 250 times its size"):
        list(Rows(path))


def test_zstd_that_begins_with_a_frame_to_skip(tmp_path: Path) -> None:
    frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    assert sum(1 for _ in Rows(put(tmp_path, "d.jsonl.zst", frame + zstd(JSONL)))) == 3
