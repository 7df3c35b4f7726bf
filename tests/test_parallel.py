"""Large data are rendered by several processes and streamed into the cache: the same data, in the same order."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likely.data import cache, dataset, parallel
from likely.data.cache import load_kept
from likely.data.dataset import Request, load_dataset
from likely.data.formats import ReadOptions
from likely.data.render import Renderer, load_tokenizer
from likely.data.rows import BATCH_ROWS
from likely.data.table import Collected
from likely.errors import DataError, ResourceError
from likely.types import Conversation, Example


@pytest.fixture
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer(load_tokenizer(tiny_model_dir))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(number: int) -> list[Any]:
    return [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(number)]


@pytest.fixture
def everything_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKELY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setattr(dataset, "PARALLEL_BYTES", 0)


@pytest.mark.usefixtures("everything_is_large")
def test_other_processes_render_the_same(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [*rows(700), {"prompt": "x"}, *rows(10), {"messages": []}]
    options = ReadOptions(skip_bad_rows=True, seed=2)
    path = write(tmp_path / "one.jsonl", bad) + ":0.8," + write(tmp_path / "two.jsonl", rows(90)) + ":0.2"
    monkeypatch.setattr(dataset, "render_batch", None)  # not here
    found = load_kept(Request(path, renderer, 40, options, "drop"))
    monkeypatch.undo()
    expected = load_dataset(path, renderer, 40, None, options, "drop")
    assert found.files == expected.files
    assert found.told == expected.told
    assert [(r.file, r.line) for r in found.rejected] == [(str(tmp_path / "one.jsonl"), line) for line in (701, 712)]
    assert len(found.examples) == len(expected.examples) > 400
    for mine, theirs in zip(found.examples, expected.examples, strict=True):
        assert mine.source == theirs.source
        for key in ("token_ids_T", "weights_T", "role_T"):
            assert np.array_equal(getattr(mine, key), getattr(theirs, key))
    assert list(map(repr, found.conversations)) == list(map(repr, expected.conversations))


@pytest.mark.usefixtures("everything_is_large")
def test_an_error_is_that_of_the_first_row_and_leaves_nothing(tmp_path: Path, renderer: Renderer) -> None:
    path = write(
        tmp_path / "d.jsonl", [*rows(300), {"messages": [{"role": "user", "content": "?"}]}, *rows(500), {"prompt": 3}]
    )
    with pytest.raises(DataError) as caught:
        load_kept(Request(path, renderer, 512))
    assert caught.value.place == f"{path}:301"
    assert list((tmp_path / "cache" / "data").iterdir()) == []


@pytest.mark.usefixtures("everything_is_large")
def test_a_process_that_would_render_otherwise_is_not_asked(
    tmp_path: Path, renderer: Renderer, tiny_model_dir: Path
) -> None:
    """As where a folder was changed, or the tokenizer in memory was."""
    other = load_tokenizer(tiny_model_dir)
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|im_start|> ")
    path = write(tmp_path / "d.jsonl", rows(3))
    (changed, *_), (usual, *_) = (load_kept(Request(path, r, 512)).examples for r in (Renderer(other), renderer))
    assert changed.token_ids_T.tolist() != usual.token_ids_T.tolist()


def test_a_script_needs_no_guard(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Processes that are spawned would run it again, from the top."""
    script = tmp_path / "script.py"
    path = write(tmp_path / "d.jsonl", rows(4))
    script.write_text(
        textwrap.dedent(f"""
        print("once")
        import likely
        print(likely.check(model={str(tiny_model_dir)!r}, data={path!r}, processes=1)["data"]["rows"])
        """),
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["once", "4"], done.stderr


def test_no_more_than_a_batch_is_held(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows nor examples as objects of Python, while data become an entry and when they are read."""
    monkeypatch.setenv("LIKELY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setattr(Collected, "arrays", None)
    alive: list[int] = []

    def count() -> None:
        alive.append(sum(type(thing) in {Conversation, Example} for thing in gc.get_objects()))

    @contextmanager
    def progress(_: str) -> Iterator[Callable[[int, float], None]]:
        yield lambda *_: count()

    count()
    path = write(tmp_path / "d.jsonl", rows(2000))
    kept = load_kept(Request(path, renderer, 512), progress)
    assert len(alive) == 9
    for number, _ in enumerate(kept.examples):
        if not number % 500:
            count()
    assert max(alive) - alive[0] <= 4 * BATCH_ROWS
    assert max(alive[9:]) - alive[0] <= 2
    assert isinstance(kept.table.keys.contents.base, np.memmap)


def test_a_stop_while_results_are_on_their_way_does_not_hang() -> None:
    """A worker that is ended in the middle of a result leaves a part of it."""
    script = """
        import faulthandler
        from likely.data.parallel import Workers
        faulthandler.dump_traceback_later(30, exit=True)
        for stop in range(4):
            try:
                with Workers(2) as workers:
                    for number, _ in enumerate(workers.map(bytes, [3_000_000] * 100)):
                        if number == stop:
                            raise ValueError
            except ValueError:
                print("stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["stopped"] * 4, done.stderr


def die_while_writing(_: int) -> None:
    """What a process that the system kills for its memory may leave: the beginning of a result."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1000) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_in_the_middle_of_a_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 0.2)
    started = time.monotonic()
    with pytest.raises(ResourceError, match="a worker process died"), parallel.Workers(2) as workers:
        list(workers.map(die_while_writing, range(4)))
    assert time.monotonic() - started < 60
