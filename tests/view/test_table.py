"""The index of scored rows beside the definition: a list of records, filtered and sorted by hand."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likely.errors import DataError
from likely.insight.score_file import record_writer
from likely.insight.score_reading import is_score_file, read_records, record_at
from likely.web import table as tables
from likely.web.index import SORTED, build_index, facts_of, folder_of
from likely.web.jobs import Lane
from likely.web.runs import Shelf
from likely.web.scores import ScoreSets
from likely.web.table import Filter, Table, inert

WORDS = ["Paris", "paris", "ÉTÉ", "été", "東京", "<b>", "=SUM(A1)", "\n", "🙂", "STRASSE", "straße", " "]


def make_record(number: int, rng: random.Random) -> dict[str, Any]:
    """A record as ``likely score`` writes them; some without weight, some without a base, with ties."""
    tokens = []
    for i in range(rng.randint(2, 12)):
        role = rng.choice(["system", "user", "assistant", "assistant", "tool"])
        trained = role == "assistant" and rng.random() < 0.8
        logprob = None if i == 0 else -rng.randint(0, 6) / 2
        tokens.append(
            {
                "id": rng.randint(0, 50),
                "text": rng.choice(WORDS),
                "role": role,
                "weight": float(trained and i > 0),
                "logprob": logprob,
                "rank": 1,
                "entropy": 0.5,
                "base_logprob": None if logprob is None else logprob - 0.25,
            }
        )
    weight = sum(t["weight"] for t in tokens)
    nll = -sum(t["weight"] * (t["logprob"] or 0.0) for t in tokens)
    base = None if number % 7 == 0 else nll + rng.randint(-2, 2) / 4
    return {
        "source": f"{rng.choice(['a.jsonl', 'b.jsonl'])}:{number + 1}",
        "nll_nats": nll,
        "joint_nll_nats": nll,
        "num_tokens": weight,
        "base_nll_nats": base,
        "base_joint_nll_nats": base,
        "shortfall_nats": 0.0,
        "prompt_explains": None if number % 5 == 0 else number / 300,
        "contradiction": None,
        "tokens": tokens,
    }


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    rng = random.Random(3)  # noqa: S311
    return [make_record(i, rng) for i in range(300)]


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def table(request: Any, records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Table:
    path = tmp_path_factory.mktemp("scores") / f"scores.{request.param}"
    with record_writer(path) as write:
        for record in records:
            write(record)
    told: list[tuple[int, int]] = []
    found = Table(build_index(path, lambda done, total: told.append((done, total))))
    assert told[-1] == (path.stat().st_size, path.stat().st_size)
    return found


def naive_facts(record: dict[str, Any]) -> dict[str, Any]:
    weight = record["num_tokens"]
    trained = [t for t in record["tokens"] if t["weight"] > 0]
    stops = []
    for token, following in itertools.zip_longest(record["tokens"], record["tokens"][1:]):
        if token["weight"] > 0 and not (following and following["weight"] > 0):
            stops.append(math.exp(token["logprob"]))
    tuned = record["nll_nats"] / weight if weight else None
    base = record["base_nll_nats"] / weight if weight and record["base_nll_nats"] is not None else None
    return {
        "nll_tuned": tuned,
        "nll_base": base,
        "change": None if tuned is None or base is None else tuned - base,
        "tokens": weight,
        "length": len(record["tokens"]),
        "surprise": max((-t["logprob"] for t in trained), default=None),
        "stop": min(stops, default=None),
    }


def naive_rows(records: list[dict[str, Any]], wanted: Filter, key: str, descending: bool) -> list[int]:
    facts = [naive_facts(record) for record in records]
    files = list(dict.fromkeys(r["source"].rpartition(":")[0] for r in records))

    def passes(i: int) -> bool:
        record = records[i]
        text = facts_of(record)["text"].casefold()
        return (
            wanted.text.casefold() in text
            and (not wanted.role or any(t["role"] == wanted.role for t in record["tokens"]))
            and (wanted.source is None or record["source"].startswith(files[wanted.source]))
            and (not wanted.worse or (facts[i]["change"] or 0) > 0)
            and (not wanted.stop_unlikely or (facts[i]["stop"] is not None and facts[i]["stop"] < 0.5))
        )

    ids = [i for i in range(len(records)) if passes(i)]
    if key == "id":
        return ids[::-1] if descending else ids
    known = sorted((i for i in ids if facts[i][key] is not None), key=lambda i: (facts[i][key], i), reverse=descending)
    return known + [i for i in ids if facts[i][key] is None]


FILTERS = [
    Filter(),
    Filter(text="PARIS"),
    Filter(text="ÉTÉ"),
    Filter(text="strasse"),
    Filter(text="not there"),
    Filter(role="tool"),
    Filter(source=1),
    Filter(worse=True),
    Filter(stop_unlikely=True),
    Filter(text="東京", role="user", source=0, worse=True, stop_unlikely=True),
]


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_pages_are_the_naive_order_forward_and_back(
    table: Table, records: list[dict[str, Any]], wanted: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK", 37)  # so that pages cross blocks
    monkeypatch.setattr(tables, "MOST_TRIED", 90)  # and rare texts are looked for in all rows
    monkeypatch.setattr(tables, "TRIED_AT_ONCE", 20)
    for key, descending in itertools.product((*SORTED, "id"), (False, True)):
        expected = naive_rows(records, wanted, key, descending)
        cursor, pages = None, []
        while True:
            page = table.page(wanted, key, descending=descending, limit=41, cursor=cursor)
            pages.append([row["id"] for row in page.rows])
            if page.next is None:
                break
            cursor = page.next
        assert list(itertools.chain(*pages)) == expected, (key, descending)
        back = []
        while page.previous is not None:
            page = table.page(wanted, key, descending=descending, limit=41, cursor=page.previous)
            back.append([row["id"] for row in page.rows])
        assert back[::-1] == pages[:-1]
    assert table.count(wanted) == len(expected)


def test_the_facts_of_rows_are_those_of_the_definition(table: Table, records: list[dict[str, Any]]) -> None:
    for row in table.rows(list(range(len(records)))):
        record, expected = records[row["id"]], naive_facts(records[row["id"]])
        assert {key: row[key] for key in expected} == pytest.approx(expected, nan_ok=True)
        assert row["source"] == record["source"]
        assert sum(row["roles"].values()) == row["length"]
        assert len(row["text"]) <= 300
    assert table.facts["has_base"] is True
    assert sum(source["rows"] for source in table.facts["sources"]) == len(records)


def test_a_row_is_found_again_in_its_file(table: Table, records: list[dict[str, Any]], tmp_path: Path) -> None:
    for ending in ("jsonl", "parquet"):
        path = tmp_path / f"s.{ending}"
        with record_writer(path) as write:
            for record in records:
                write(record)
        assert is_score_file(path)
        for (place, _, record), original in zip(read_records(path), records, strict=True):
            assert record == original
            assert record_at(path, place) == original
        place, _, _ = next(read_records(path))
        with pytest.raises(DataError, match="a row of over 0 MB"):
            record_at(path, place, 20)
    with pytest.raises(DataError, match="no such row"):
        record_at(tmp_path / "s.parquet", len(records))


def test_the_sample_is_even_and_the_same_every_time(table: Table, records: list[dict[str, Any]]) -> None:
    sample = table.scatter(Filter(), 50)
    known = [i for i, r in enumerate(records) if naive_facts(r)["change"] is not None]
    assert sample["of"] == len(known)
    assert len(sample["id"]) == 50
    assert sample["id"][0] == known[0]
    assert sample["id"][-1] == known[-1]
    assert sample == table.scatter(Filter(), 50)
    assert table.scatter(Filter(text="not there"), 50) == {"id": [], "base": [], "tuned": [], "of": 0}


def test_names_of_many_files_are_not_all_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rng = random.Random(0)  # noqa: S311
    names = [f"{'x' * 5000 if i == 3 else 'data'}-{i}.jsonl" for i in range(150)]
    rows = [make_record(i, rng) | {"source": f"{name}:1"} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table(build_index(path, lambda *_: None))
    assert [each["name"] for each in table.facts["sources"][98:]] == ["data-98.jsonl", "data-99.jsonl"]
    assert [row["source"] for row in table.rows([149, 0])] == ["data-149.jsonl:1", "data-0.jsonl:1"]
    assert table.rows([3])[0]["source"] == f"{names[3][-4096:]}:1"
    assert table.count(Filter(source=149)) == 1


def test_a_text_that_is_cut_begins_with_a_word() -> None:
    record = make_record(1, random.Random(0))  # noqa: S311
    record["tokens"] = [
        {"id": 0, "text": " word", "role": "user", "weight": 0.0, "logprob": None, "rank": 1, "entropy": 0.0}
    ] * 60 + [{"id": 0, "text": "yes", "role": "assistant", "weight": 1.0, "logprob": -1.0, "rank": 1, "entropy": 0.0}]
    text = facts_of(record)["text"]
    assert re.fullmatch(r"…(word )+word … yes", text)
    record["tokens"] = record["tokens"][-3:]
    assert facts_of(record)["text"] == " word word … yes"


def test_csv_holds_the_filtered_rows_and_no_formula(table: Table, records: list[dict[str, Any]]) -> None:
    text = b"".join(table.csv(Filter(role="tool"), "change", descending=True)).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["id"]) for row in rows] == naive_rows(records, Filter(role="tool"), "change", True)
    for row in rows:
        assert not row["text"].startswith(("=", "+", "-", "@"))
    assert inert("=1") == "'=1"
    assert inert(-1.5) == -1.5


def test_the_index_is_made_once_and_anew_for_another_content(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rng = random.Random(0)  # noqa: S311
    path.write_text(json.dumps(make_record(1, rng)) + "\n")
    folder = build_index(path, lambda *_: None)
    stamp = (folder / "facts.json").stat().st_mtime_ns
    assert build_index(path, lambda *_: None) == folder
    assert (folder / "facts.json").stat().st_mtime_ns == stamp
    with path.open("a") as file:
        file.write("\n" + json.dumps(make_record(2, rng)) + "\n")
    assert folder_of(path) != folder
    assert Table(build_index(path, lambda *_: None)).num_rows == 2
    long_ago = time.time() - 31 * 86_400
    os.utime(folder, (long_ago, long_ago))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    nothing = Table(build_index(empty, lambda *_: None))
    assert not folder.exists()  # nobody used it for a month
    assert folder_of(path).exists()
    assert nothing.page(Filter(text="a"), "change", descending=True, limit=5, cursor=None).rows == []


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        "[" * 100_000,
        '{"source": "a:1", "nll_nats": 1, "num_tokens": 1, "tokens": [1]}',
        '{"source": "a:1", "nll_nats": 1, "num_tokens": 1, "tokens": [{"role": "x"}]}',
        '{"source": "a:1", "nll_nats": "x", "num_tokens": 1, "tokens": []}',
        '{"source": "a:1", "nll_nats": 1e999999, "num_tokens": [], "tokens": []}',
    ],
)
def test_a_line_that_is_no_record_is_one_sentence_and_leaves_nothing(line: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(make_record(1, random.Random(0))) + "\n" + line + "\n")  # noqa: S311
    with pytest.raises(DataError, match="no record of likely score"):
        build_index(path, lambda *_: None)
    assert not folder_of(path).exists()
    assert not list(folder_of(path).parent.glob(".tmp-*"))


def test_numbers_that_are_not_finite_are_unknown(tmp_path: Path) -> None:
    record = make_record(1, random.Random(0))  # noqa: S311
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({**record, "nll_nats": math.inf, "num_tokens": 2.0, "base_nll_nats": math.nan}) + "\n")
    (row,) = Table(build_index(path, lambda *_: None)).rows([0])
    assert row["nll_tuned"] is None
    assert row["change"] is None
    assert np.isfinite(row["tokens"])


@pytest.mark.parametrize(("name", "content"), [("facts.json", "{"), ("facts.json", "{}"), ("nll_tuned.col", "1" * 16)])
def test_an_index_that_is_not_whole_is_made_anew(tmp_path: Path, name: str, content: str) -> None:
    """Such as a machine leaves behind that went down."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps(make_record(0, random.Random(0))) + "\n")  # noqa: S311
    folder = build_index(tmp_path / "rows.jsonl", lambda *_: None)
    (folder / name).write_text(content)
    sets = ScoreSets(Shelf([run]), [tmp_path / "rows.jsonl"], Lane([]))
    sets.look()
    assert [each["state"] for each in sets.all_told()] == ["waiting"]
    build_index(tmp_path / "rows.jsonl", lambda *_: None)
    sets.look()
    assert [each["state"] for each in sets.all_told()] == ["ready"]
