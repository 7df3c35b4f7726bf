"""``likely curve`` from end to end: nested shares, one model for all trainings, and a kill at any time."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import likely
from likely import learning_curve, manifest
from likely.data.families import families, keys_of, nested_rows
from likely.data.formats import parse_row
from likely.inputs import read_inputs
from likely.model.load import Restart, Tuning, load_for_training
from likely.training.log import Display
from likely.types import Source
from likely.verb_settings import CurveSettings
from test_cli import Likely, assert_refused, write_rows
from test_cli import likely as likely_cli  # noqa: F401

WORDS = [
    "river",
    "stone",
    "garden",
    "window",
    "paper",
    "silver",
    "morning",
    "market",
    "yellow",
    "summer",
    "letter",
    "bridge",
]


def rows(number: int, first: int = 0) -> list[dict[str, str]]:
    """Questions that are no near duplicates, and one kind of answer."""
    made = []
    for i in range(first, first + number):
        choice = random.Random(i)  # noqa: S311
        words = [f"{choice.choice(WORDS)}{choice.randrange(50)}" for _ in range(8)]
        made.append({"prompt": " ".join(words), "completion": f"It is {words[0]}."})
    return made


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    write_rows(tmp_path / "d.jsonl", *rows(16))
    write_rows(tmp_path / "e.jsonl", *rows(20, first=100))
    return {
        "model": str(tiny_model_dir), "data": str(tmp_path / "d.jsonl"), "eval_data": str(tmp_path / "e.jsonl"),
        "seeds": 2, "shares": "1/4,1/2,1", "epochs": 2.0, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4,
        "dtype": "float32",
    }  # fmt: skip


def test_shares_are_nested_whole_families_and_a_function_of_seed_and_content() -> None:
    many = [row for row in rows(60) for _ in range(1 + len(row["completion"]) % 3)]
    made = [parse_row(dict(row), Source("f", line)) for line, row in enumerate(many, 1)]
    keys = keys_of(made)
    groups = families(keys)
    subsets = nested_rows(groups, keys, [0.125, 0.25, 0.5, 1.0], 3)
    for smaller, larger in itertools.pairwise(subsets):
        assert set(smaller.tolist()) < set(larger.tolist())
    for share, subset in zip([0.125, 0.25, 0.5, 1.0], subsets, strict=True):
        inside = np.isin(np.arange(len(made)), subset)
        assert all(inside[groups == group].all() or not inside[groups == group].any() for group in set(groups))
        assert abs(len(subset) - share * len(made)) <= np.bincount(groups).max() / 2
    assert len(subsets[-1]) == len(made)
    order = np.random.default_rng(0).permutation(len(made))
    shuffled = [made[i] for i in order]
    again = keys_of(shuffled)
    for subset, other in zip(subsets, nested_rows(families(again), again, [0.125, 0.25, 0.5, 1.0], 3), strict=True):
        texts = [sorted(str(rows[i].messages) for i in chosen) for rows, chosen in ((made, subset), (shuffled, other))]
        assert texts[0] == texts[1]
    assert set(nested_rows(groups, keys, [0.25], 4)[0].tolist()) != set(subsets[1].tolist())


@pytest.mark.parametrize("tuning", [Tuning(4, None, 0), Tuning(None, None, 0)])
def test_a_restarted_model_is_a_loaded_one_to_the_bit(tiny_model_dir: Path, tuning: Tuning) -> None:
    def load(seed: int) -> Any:
        own = Tuning(tuning.lora_rank, tuning.lora_alpha, seed)
        return load_for_training(str(tiny_model_dir), own, compute_dtype=torch.float32)

    model = load(0)
    restart = Restart(model, tuning)
    for seed in (0, 5):
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        restart.begin(seed)
        fresh = dict(load(seed).network.named_parameters())
        found = dict(model.network.named_parameters())
        assert found.keys() == fresh.keys()
        for name, parameter in found.items():
            assert parameter.requires_grad == fresh[name].requires_grad, name
            assert torch.equal(parameter, fresh[name]), name
    assert not model.causal_lm.training


def test_a_curve(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = likely.curve(**settings, output=str(tmp_path / "c"))
    folder = tmp_path / "c"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "origins.json", "points", "curve.json", "curve.csv", "curve.svg", "curve.html",
    }  # fmt: skip
    assert json.loads((folder / "curve.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found.result))
    points = found.result["points"]
    assert [(p["rows"], p["seed"]) for p in points] == [(4, 0), (8, 0), (16, 0), (4, 1), (8, 1), (16, 1)]
    assert [p["steps"] for p in points] == [2, 4, 8] * 2  # two passes each, in batches of four
    assert not [p for p in folder.rglob("*") if p.suffix == ".safetensors"]
    for point in points:
        lines = (folder / point["folder"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == point["steps"]
    # All rows with a seed: the same training as likely train's, and the base is the same too.
    for seed in (0, 1):
        shared = {k: v for k, v in settings.items() if k not in {"seeds", "shares"}}
        run = likely.train(**shared, seed=seed, output=str(tmp_path / f"run{seed}"))
        (own,) = [p for p in points if p["rows"] == 16 and p["seed"] == seed]
        assert own["nll"] == run.report["tuned"]["nll"]
        assert found.result["base"]["nll"] == run.report["base"]["nll"]
    sizes = found.result["sizes"]
    assert sizes[0]["nll"] == pytest.approx((points[0]["nll"] + points[3]["nll"]) / 2)
    assert sizes[0]["nll_of_seeds"] == [points[0]["nll"], points[3]["nll"]]
    table = list(csv.DictReader((folder / "curve.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(row["nll"]) for row in table] == [found.result["base"]["nll"], *(p["nll"] for p in points)]
    ET.parse(folder / "curve.svg")  # noqa: S314  (of our own)
    page = (folder / "curve.html").read_text(encoding="utf-8")
    assert found.verdict.split(";")[0].replace("'", "&#39;") in page
    assert not re.search(r"(src|href|url\()[\s=\"']*http", page)  # names of XML's vocabularies aside, no address
    assert "held fixed" in page


def test_a_run_that_is_stopped_by_patience_is_judged_by_its_best(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"eval_every": 1, "patience": 2, "seeds": 1, "learning_rate": 0.05, "epochs": 6.0}
    found = likely.curve(**settings, output=str(tmp_path / "c"))
    for point in found.result["points"]:
        text = (tmp_path / "c" / point["folder"] / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [line for line in map(json.loads, text.splitlines()) if "evaluation" in line]
        evaluated = {line["step"]: line["evaluation"]["nll"] for line in lines}
        assert point["nll"] == pytest.approx(min(evaluated.values()), abs=1e-12)
        assert evaluated[point["judged_after"]] == min(evaluated.values())
    assert "best evaluation" in found.result["held_fixed"]
    assert "one seed tells nothing" in found.verdict


class Killed(BaseException):
    """What ends a process in the middle."""


def test_what_is_done_is_not_done_again(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the middle of each training in turn, and one point damaged: the same curve.json."""
    whole = likely.curve(**settings, output=str(tmp_path / "whole")).result
    real, calls = learning_curve.engine.train, []

    def train(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        real(*arguments, **more)
        if len(calls) in stop_after:
            raise Killed

    monkeypatch.setattr(learning_curve.engine, "train", train)
    stop_after = {1, 3}
    for resume in (None, "newest"):
        with pytest.raises(Killed):
            likely.curve(**settings, output=str(tmp_path / "c"), resume=resume)
    scores = tmp_path / "c" / "points" / "rows-000000004-seed-0" / "scores.json"
    scores.write_bytes(scores.read_bytes().replace(b"1", b"2", 1))
    again = likely.curve(**settings, output=str(tmp_path / "c"), resume="newest").result
    assert again == whole
    assert all(
        len(kept["seen"]["nll_nats"]) == min(p["examples"], 20) for kept, p in zip(*_kept(tmp_path, whole), strict=True)
    )
    assert len(calls) == 1 + 2 + 6  # the first was lost; one was done, then damaged; all six are trained in the end
    for name in ("curve.json", "curve.csv", "curve.svg", "curve.html"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    calls.clear()
    stop_after = set()
    more = likely.curve(**settings | {"seeds": 3}, output=str(tmp_path / "c"), resume="newest").result
    assert len(calls) == 3
    assert more["points"][:6] == whole["points"]


def _kept(tmp_path: Path, whole: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    folders = [tmp_path / "c" / point["folder"] for point in whole["points"]]
    return [json.loads((folder / "scores.json").read_bytes()) for folder in folders], whole["points"]


def test_a_point_of_an_older_version_is_made_again(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Without the rows that were trained on, sealed as it was."""
    settings |= {"seeds": 1, "epochs": 1.0}
    whole = likely.curve(**settings, output=str(tmp_path / "c")).result
    folder = tmp_path / "c" / whole["points"][1]["folder"]
    kept = json.loads((folder / "scores.json").read_bytes())
    del kept["seen"]
    text = json.dumps(kept).encode()
    (folder / "scores.json").write_bytes(text)
    sealed = manifest.read(folder)
    shutil.rmtree(folder)
    with manifest.put_in_place(folder) as (unfinished, seal):
        (unfinished / "scores.json").write_bytes(text)
        seal.close({key: sealed[key] for key in ("kind", "config", "fingerprints")})
    assert likely.curve(**settings, output=str(tmp_path / "c"), resume="newest").result == whole


def test_a_killed_process_is_gone_on_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = likely.curve(**settings, output=str(tmp_path / "whole")).result
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "likely", "curve", *flags, "--output", str(tmp_path / "c")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 120
        points = tmp_path / "c" / "points"
        while process.poll() is None and time.monotonic() < deadline:
            if points.is_dir() and sum(p.name.startswith("rows") for p in points.iterdir()) >= 2:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "c" / "curve.json").exists()
    assert likely.curve(**settings, output=str(tmp_path / "c"), resume="newest").result == whole


def test_other_settings_are_not_gone_on_with(tmp_path: Path, settings: dict[str, Any]) -> None:
    output = str(tmp_path / "c")
    likely.curve(**settings | {"seeds": 1, "epochs": 1.0}, output=output)
    with pytest.raises(likely.ConfigError, match=r"epochs 1\.0 -> 2\.0"):
        likely.curve(**settings | {"seeds": 1}, output=output, resume="newest")
    with pytest.raises(likely.ConfigError, match="is not empty"):
        likely.curve(**settings, output=output)
    write_rows(tmp_path / "d.jsonl", *rows(17))
    with pytest.raises(likely.ModelError, match="not what the run was started with"):
        likely.curve(**settings | {"seeds": 1, "epochs": 1.0}, output=output, resume="newest")


def test_a_curve_and_a_run_do_not_mix(tmp_path: Path, settings: dict[str, Any]) -> None:
    output = str(tmp_path / "c")
    likely.curve(**settings | {"seeds": 1, "epochs": 1.0}, output=output)
    shared = {k: v for k, v in settings.items() if k not in {"seeds", "shares"}}
    with pytest.raises(likely.LikelyError):
        likely.train(**shared, output=output, resume="newest")
    likely.train(**shared | {"epochs": 1.0}, output=str(tmp_path / "run"))
    with pytest.raises(likely.ConfigError):
        likely.curve(**settings | {"epochs": 1.0}, output=str(tmp_path / "run"), resume="newest")


def test_mistakes(likely_cli: Likely, tmp_path: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    write_rows(tmp_path / "d.jsonl", *rows(5))
    start = ("curve", "--model", tiny_model_dir, "--data", "d.jsonl", "--output", "c")
    for flags, code, words in (
        (("--shares", "1/8,two,1"), 2, "shares has 'two'"),
        (("--shares", "1/8,3,1"), 2, "above 0 and up to 1"),
        (("--shares", "1/2,1"), 2, "three"),
        ((), 2, "nothing is held out"),
        (("--eval-share", "0.2"), 3, "can't be parted"),
        (("--patience", 2), 2, "eval_every"),
    ):
        assert_refused(_last_line(likely_cli(*start, *flags)), code, words)
        assert not (tmp_path / "c").exists()


def _last_line(said: Any) -> Any:
    """The error, after what was said about the data."""
    return type(said)(said.code, said.out, said.err.splitlines()[-1] + "\n")


def test_seen_data_gives_no_answer(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"eval_data": settings["data"], "epochs": 1.0}
    assert "says nothing about new examples" in likely.curve(**settings, output=str(tmp_path / "c")).verdict


def test_held_out_rows_are_the_same_for_all_seeds(tmp_path: Path, settings: dict[str, Any]) -> None:
    del settings["eval_data"]
    asked = CurveSettings(**settings, eval_share=0.4, output=str(tmp_path / "c"))
    inputs = read_inputs(asked.training(), Display(quiet=True))
    found = likely.curve(**settings, eval_share=0.4, output=str(tmp_path / "c")).result
    assert found["held_out"]["num_examples"] == len(inputs.eval_data.examples)  # type: ignore[union-attr]
    assert max(p["rows"] for p in found["points"]) == len(inputs.data.conversations)
    shutil.rmtree(tmp_path / "c")
