"""A run that is still being written: half lines, a cut by a resume, another file, and when it has gone stale."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from likely import storage
from likely.errors import ConfigError, LockedError
from likely.web import app, runs, tail
from likely.web.app import _News
from likely.web.runs import Run, Shelf, holder
from likely.web.tail import Tail


def line(step: int, nll: float = 1.0, **more: Any) -> str:
    values = {"tokens": 10, "distinct_tokens": 9, "supervised_tokens": 4, "grad_norm": 0.5, "learning_rate": 1e-3}
    return json.dumps({"step": step, "nll": nll, **values, "seconds": 2.0, **more}) + "\n"


def write(path: Path, text: str, mode: str = "a") -> None:
    with path.open(mode) as file:
        file.write(text)


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    found = Tail(path)
    found.refresh()
    assert found.since(0, 4)["steps"]["step"] == []
    whole = line(2, 0.5)
    write(path, line(1) + whole[:20])
    found.refresh()
    assert found.since(0, 4)["steps"]["step"] == [1]
    write(path, whole[20:])
    write(path, json.dumps({"step": 2, "evaluation": {"nll": 0.7, "ci95": [0.6, 0.8]}}) + "\n")
    write(path, json.dumps({"step": 3, "skipped": "<b>nan</b>"}) + "\n")
    found.refresh()
    news = found.since(1, 10)
    assert news["steps"]["nll"] == [0.5]
    assert news["evaluations"] == [{"step": 2, "nll": 0.7, "low": 0.6, "high": 0.8}]
    assert news["skipped"] == [{"step": 3, "told": "<b>nan</b>"}]
    assert news["pace"] == {"tokens_per_second": 5.0, "seconds_left": 14.0, "step": 3, "num_steps": 10}
    assert news["lines"] == 4
    assert found.since(4, 10)["steps"]["step"] == []


@pytest.mark.parametrize("how", ["cut", "cut and written on", "replaced", "removed"])
def test_a_file_that_does_not_go_on_is_read_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, line(1) + line(2) + line(3))
    found = Tail(path)
    found.refresh()
    assert found.generation == 0
    if how == "removed":
        path.unlink()
        found.refresh()
        assert found.num_lines == 0
        write(path, line(1))
    elif how == "replaced":
        write(tmp_path / "other", line(1) + line(2) + line(3) + line(4))
        (tmp_path / "other").replace(path)
    else:
        os.truncate(path, len(line(1)))
        if how != "cut":
            write(path, line(2, 9.0) + line(3, 9.0))
    found.refresh()
    assert found.generation == 1
    expected = [json.loads(text)["nll"] for text in path.read_text().splitlines()]
    assert found.since(0, None)["steps"]["nll"] == expected


def test_lines_that_no_run_wrote_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "MAX_LINE", 1000)
    path = tmp_path / "metrics.jsonl"
    bad = ["\n", "null\n", "[" * 300 + "\n", '{"step": "x"}\n', '{"step": 1e999}\n', "y" * 5000 + "\n", "\xff\n"]
    write(path, "".join(bad) + line(1, float("nan")) + line(2, 2.0, grad_norm="big", seconds=True))
    found = Tail(path)
    found.refresh()
    told = found.since(0, None)
    assert told["steps"]["nll"] == [None, 2.0]
    assert told["steps"]["grad_norm"][1] is None
    json.dumps(told, allow_nan=False)


def test_many_steps_become_means_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "MAX_POINTS", 10)
    path = tmp_path / "metrics.jsonl"
    write(path, "".join(line(i, float(i)) for i in range(1, 26)))
    found = Tail(path)
    found.refresh()
    told = found.since(0, None, thin=True)
    assert told["every"] == 3
    assert told["steps"]["nll"][0] == 2.0
    assert told["steps"]["step"][0] == 3
    assert told["steps"]["step"][-1] == 25
    assert found.since(0, None)["every"] == 1


def test_evaluations_are_thinned_and_what_was_left_out_is_not_all_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "MAX_POINTS", 10)
    monkeypatch.setattr(tail, "MOST_SKIPPED", 5)
    path = tmp_path / "metrics.jsonl"
    write(path, "".join(json.dumps({"step": i, "evaluation": {"nll": i / 2}}) + "\n" for i in range(1, 26)))
    write(path, "".join(json.dumps({"step": i, "skipped": "nan"}) + "\n" for i in range(26, 40)))
    found = Tail(path)
    found.refresh()
    told = found.since(0, None, thin=True)
    assert [each["step"] for each in told["evaluations"]] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert told["evaluations"][-1] == {"step": 25, "nll": 12.5, "low": None, "high": None}
    assert [each["step"] for each in told["skipped"]] == [35, 36, 37, 38, 39]
    assert found.last_step == 39


def test_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    """Eight numbers and a line's own: 72 bytes a step, and room for the arrays to grow."""
    path = tmp_path / "metrics.jsonl"
    write(path, "".join(line(i, i / 7) for i in range(20_000)))
    found = Tail(path)
    tracemalloc.start()
    found.refresh()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 20_000 * 130


def test_a_page_that_is_far_behind_is_told_to_ask_for_all_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_POINTS", 3)
    run = Run(make_run(tmp_path / "run"))
    news = _News(run, 0, 0)
    assert [name for name, _ in news._news()] == ["state"]
    write(run.folder / "metrics.jsonl", "".join(map(line, range(1, 4))))
    ((name, told), _) = news._news()
    assert (name, told["steps"]["step"]) == ("metrics", [1, 2, 3])
    write(run.folder / "metrics.jsonl", "".join(map(line, range(4, 9))))
    assert news._news()[0] == ("reset", {"generation": 0})
    write(run.folder / "metrics.jsonl", line(9))
    assert news._news()[0][1]["steps"]["step"] == [9]


def make_run(folder: Path, **origins: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": "1", "num_steps": 9, **origins}))
    return folder


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in folder.iterdir():
        os.utime(path, (then, then))


def test_what_a_run_is_at(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    write(folder / "metrics.jsonl", line(1))
    assert Run(folder).entry()["state"] == "running"  # it wrote a moment ago
    age(folder, 1000.0)
    assert Run(folder).entry()["state"] == "stopped"
    assert "--resume" in Run(folder).entry()["told"]
    with storage.locked(folder):
        age(folder, 60.0)
        assert Run(folder).entry()["state"] == "running"
        age(folder, 1000.0)
        entry = Run(folder).entry()
        assert entry["state"] == "stale"
        assert "17 minutes" in entry["told"]
        assert holder(folder) == os.getpid()
    (folder / "report.json").write_text(json.dumps({"verdict": "good"}))
    entry = Run(folder).entry()
    assert (entry["state"], entry["verdict"], entry["step"], entry["num_steps"]) == ("finished", "good", 1, 9)


def test_a_lock_that_its_process_left_behind_holds_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    (folder / storage.LOCK).write_text(f"{os.getpid()}\n")  # alive, but it holds no lock
    assert holder(folder) is None
    (folder / storage.LOCK).write_text("../../etc\n")
    assert holder(folder) is None


def test_elsewhere_a_living_process_counts_as_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LOCKS", tmp_path / "none")
    folder = make_run(tmp_path / "r")
    (folder / storage.LOCK).write_text(f"{os.getpid()}\n")
    assert holder(folder) == os.getpid()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / storage.LOCK).write_text(f"{ended.pid}\n")
    assert holder(folder) is None
    (folder / storage.LOCK).write_text("9" * 20 + "\n")
    assert holder(folder) is None


def test_looking_never_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that starts while somebody looks must not be refused."""
    folder = make_run(tmp_path / "r")
    with storage.locked(folder):
        pass
    calls: list[Any] = []
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: calls.append(arguments))
    Run(folder).entry()
    assert not calls
    monkeypatch.undo()
    with storage.locked(folder):
        Run(folder).entry()
        with pytest.raises(LockedError), storage.locked(folder):
            pass


def test_hostile_files_of_a_run_are_not_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<script>")
    for name in ("run.json", "report.json"):
        for text in ("{", "[" * 100_000, "[1]", '{"verdict": 3}', "\x00"):
            (folder / name).write_text(text)
            entry = Run(folder).entry()
            assert entry["verdict"] is None
            assert entry["num_steps"] is None
    (folder / "config.yaml").write_text("a: &a [1]\nb: [*a, *a]\n" * 3)
    assert Run(folder).config is None
    (folder / "report.json").write_text('{"verdict": "v", "x": NaN, "__proto__": Infinity}')
    assert Run(folder).report == {"verdict": "v", "x": None, "__proto__": None}


def test_what_never_ends_or_begins_is_no_file_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("config.yaml", "report.json", "metrics.jsonl", storage.LOCK):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)  # to open it would wait for a writer
    assert Run(folder).entry()["verdict"] is None
    assert Run(folder).config is None
    for name in ("config.yaml", "report.json", "metrics.jsonl", storage.LOCK):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
    assert Run(folder).entry()["step"] == 0
    assert Run(folder).config is None


@pytest.mark.parametrize("depth", [50, 900, 990, 5_000])
def test_a_report_is_written_again_or_is_none(tmp_path: Path, depth: int) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "report.json").write_text('{"verdict": "v", "x": ' + "[" * depth + "]" * depth + "}")
    report = Run(folder).report
    assert (report is not None) == (depth == 50)
    assert json.dumps(report)


def test_runs_that_are_gone_leave_their_place_and_one_that_is_hidden_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST_RUNS", 2)
    shelf = Shelf([make_run(tmp_path / "runs" / "0").parent])
    for i in range(4):
        (run,) = shelf.runs()
        assert run.folder.name == str(i)
        run.folder.rename(tmp_path / str(i))
        assert shelf.find(run.id) is None
        make_run(tmp_path / "runs" / str(i + 1))
    monkeypatch.setattr(runs, "MOST_RUNS", 9)
    make_run(tmp_path / "runs" / "secret")
    is_file = Path.is_file

    def refusing(path: Path) -> bool:
        if path.parent.name == "secret":
            raise PermissionError
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refusing)
    assert [run.folder.name for run in shelf.runs()] == ["4"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    places = [make_run(tmp_path / name) for name in ("a/x/run", "b/x/run", "b/y/run", "b/y/other")]
    shelf = Shelf(places)
    assert [run.entry()["name"] for run in shelf.runs()] == ["a/x/run", "b/x/run", "b/y/run", "other"]
    for place in places[1:3]:
        shutil.rmtree(place)
    assert [run.entry()["name"] for run in shelf.runs()] == ["run", "other"]


def test_runs_come_up_and_states_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one")
    shelf = Shelf([tmp_path / "runs"])
    (one,) = shelf.runs()
    two = make_run(tmp_path / "runs" / "two")
    for name in ("step-000002/model", "step-000010/model", ".tmp-step-000011/model", "step-x/model", "step-000012"):
        (two / "checkpoints" / name).mkdir(parents=True)
    found = next(run for run in shelf.runs() if run is not one)
    assert [state["id"] for state in found.states()] == ["base", "step-000002", "step-000010"]
    assert found.latest() == "step-000010"
    assert found.model_of("step-000002") == f"{two}@step-000002"
    for state in ("tuned", "step-000012", "../../etc", ""):
        assert found.model_of(state) is None
    (two / "model").mkdir()
    assert found.model_of("tuned") == str(two)
    assert "/" not in found.id
    for wrong in (tmp_path / "nothing", tmp_path / "runs" / "two" / "model"):
        with pytest.raises(ConfigError):
            Shelf([wrong])
