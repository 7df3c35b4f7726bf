"""A finished run with scores beside it, and a viewer of it: made once for all tests of the viewer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import HELD_OUT, Viewer

import likely


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("LIKELY_CACHE")
    os.environ["LIKELY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["LIKELY_CACHE"]
    else:
        os.environ["LIKELY_CACHE"] = before


def _rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished training with two checkpoints; ``run-scores.jsonl`` beside it holds its held-out rows."""
    folder = tmp_path_factory.mktemp("runs")
    data = _rows(folder / "train.jsonl", [(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(6)])
    held_out = _rows(folder / "held-out.jsonl", HELD_OUT)
    run = folder / "run"
    settings = {"steps": 4, "batch_size": 2, "save_every": 2, "eval_every": 2, "tune": "full", "learning_rate": 1e-3}
    likely.train(model=str(tiny_model_dir), data=str(data), eval_data=str(held_out), output=str(run), **settings)
    records = likely.score(model=str(run), base=str(tiny_model_dir), data=str(held_out))
    (folder / "run-scores.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return run


@pytest.fixture(scope="session")
def viewer(run_folder: Path) -> Iterator[Viewer]:
    """A viewer of that run, with a session."""
    running = Viewer(run_folder)
    yield running
    assert running.close() == 0


@pytest.fixture(scope="session")
def run_id(viewer: Viewer) -> str:
    (run,) = viewer.json("/api/runs")["runs"]
    return str(run["id"])


@pytest.fixture(scope="session")
def scores_id(viewer: Viewer, run_id: str) -> str:
    """The id of the scores beside the run, with their index made."""
    sets = viewer.json(f"/api/runs/{run_id}")["scores"]
    (name,) = [each["id"] for each in sets if each["name"] == "run-scores.jsonl"]
    assert viewer.ready(name)["state"] == "ready"
    return str(name)
