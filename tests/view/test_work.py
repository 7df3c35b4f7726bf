"""What the pages are told of a run that was really trained: scores, states, the lens, answers and the check."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from client import HELD_OUT, Viewer

import likely
from likely.data.render import Supervision
from likely.errors import ConfigError
from likely.look import answer as look_answer
from likely.look import explain, score_held_out
from likely.training.log import Display
from likely.verb_settings import ExplainSettings, LookSettings


def result_of(viewer: Viewer, **ask: Any) -> dict[str, Any]:
    status, body = viewer.post("/api/jobs", ask)
    assert status == 202, body
    job = viewer.finished(body["job"])
    assert job["state"] == "done", job["error"]
    found: dict[str, Any] = job["result"]
    return found


@pytest.fixture(scope="module")
def records(run_folder: Path) -> list[dict[str, Any]]:
    lines = (run_folder.parent / "run-scores.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_finished_run(viewer: Viewer, run_id: str, run_folder: Path) -> None:
    run = viewer.json(f"/api/runs/{run_id}")
    report = json.loads((run_folder / "report.json").read_text())
    assert run["state"] == "finished"
    assert run["verdict"] == report["verdict"]
    assert run["report"] == report
    assert run["origins"] == json.loads((run_folder / "run.json").read_text())
    assert run["config"]["steps"] == 4
    assert [state["id"] for state in run["states"]] == ["base", "step-000002", "step-000004", "tuned"]
    assert run["can_score"] is True
    metrics = viewer.json(f"/api/runs/{run_id}/metrics")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics["steps"]["nll"] == [line["nll"] for line in lines if "nll" in line]
    assert metrics["steps"]["step"] == [1, 2, 3, 4]
    assert [e["nll"] for e in metrics["evaluations"]] == [e["evaluation"]["nll"] for e in lines if "evaluation" in e]


def test_the_table_and_one_example(viewer: Viewer, scores_id: str, records: list[dict[str, Any]]) -> None:
    rows = viewer.json(f"/api/scores/{scores_id}/rows?sort=change&order=desc&limit=2")
    assert len(rows["rows"]) == 2
    assert rows["previous"] is None
    rest = viewer.json(f"/api/scores/{scores_id}/rows?sort=change&order=desc&limit=2&cursor={rows['next']}")
    changes = [row["change"] for row in rows["rows"] + rest["rows"]]
    assert changes == sorted(changes, reverse=True)
    assert viewer.json(f"/api/scores/{scores_id}/count?text=ONERROR") == {"rows": 1, "of": 3}
    (hostile,) = viewer.json(f"/api/scores/{scores_id}/rows?text=onerror")["rows"]
    assert "<img src=x onerror=alert(1)></script>" in hostile["text"]
    example = viewer.json(f"/api/scores/{scores_id}/rows/{hostile['id']}")
    record = records[hostile["id"]]
    for name, key in (("token_text", "text"), ("logprob", "logprob"), ("base_logprob", "base_logprob")):
        assert example[name] == [token[key] for token in record["tokens"]]
    assert [example["roles"][role] for role in example["token_role"]] == [t["role"] for t in record["tokens"]]
    text = viewer.get(f"/api/scores/{scores_id}/rows.csv?sort=length")[2].decode()
    assert len(list(csv.DictReader(io.StringIO(text)))) == len(HELD_OUT)
    assert viewer.json(f"/api/scores/{scores_id}/scatter")["of"] == len(HELD_OUT)


def test_an_example_under_each_state(viewer: Viewer, scores_id: str, records: list[dict[str, Any]]) -> None:
    """The base's and the tuned model's numbers are those of likely score; a checkpoint's are its own."""
    found = {
        state: result_of(viewer, kind="example", set=scores_id, row=0, state=state)
        for state in ("base", "step-000002", "step-000004", "tuned")
    }
    tokens = records[0]["tokens"]
    assert found["tuned"]["logprob"] == pytest.approx([t["logprob"] for t in tokens], abs=1e-5)
    assert found["base"]["logprob"] == pytest.approx([t["base_logprob"] for t in tokens], abs=1e-5)
    assert found["tuned"]["rank"] == [t["rank"] for t in tokens]
    assert found["step-000004"]["logprob"] == pytest.approx(found["tuned"]["logprob"], abs=1e-6)
    assert found["step-000002"]["logprob"] != pytest.approx(found["tuned"]["logprob"], abs=1e-4)


def test_the_card_of_a_token(viewer: Viewer, scores_id: str, records: list[dict[str, Any]]) -> None:
    position = max(i for i, token in enumerate(records[0]["tokens"]) if token["weight"])
    token = records[0]["tokens"][position]
    card = result_of(viewer, kind="token", set=scores_id, row=0, position=position, rivals=4)
    gold, *_, rest = card["rows"]
    assert len(card["rows"]) == 6
    assert gold["gold"] is True
    assert math.log(gold["after"]) == pytest.approx(token["logprob"], abs=1e-5)
    assert math.log(gold["before"]) == pytest.approx(token["base_logprob"], abs=1e-5)
    assert gold["gradient_after"] == pytest.approx(gold["after"] - 1)
    assert card["rank_after"] == token["rank"]
    assert card["entropy_after"] == pytest.approx(token["entropy"], abs=1e-5)
    assert sum(row["after"] for row in card["rows"]) == pytest.approx(1)
    assert rest["text"] == "everything else"
    status, body = viewer.post("/api/jobs", {"kind": "token", "set": scores_id, "row": 0, "position": 999})
    assert status == 202
    assert "nothing predicts token 999" in viewer.finished(body["job"])["error"]


def test_a_prompt_and_a_wanted_answer(viewer: Viewer, run_id: str, run_folder: Path, tiny_model_dir: Path) -> None:
    asked = {"run": run_id, "prompt": "What is 7 and 7?", "answer": "It is 14."}
    lens = result_of(viewer, kind="lens", **asked)
    assert "A" in lens["nll"]
    assert len(lens["tokens"]) > 3
    step = result_of(viewer, kind="step", learning_rate=1e-4, **asked)
    assert step["nll"] == pytest.approx(lens["nll"])
    for token in step["tokens"]:
        assert token["step"]["predicted"] == pytest.approx(token["step"]["measured"], rel=0.3, abs=1e-3)
    assert sum(token["step"]["measured"] for token in step["tokens"]) > 0
    # A step for looking leaves no trace in the model that stays loaded.
    again = result_of(viewer, kind="lens", **asked | {"answer": "It is 14. "})
    assert result_of(viewer, kind="lens", **asked | {"rivals": 2})["nll"] == lens["nll"] != again["nll"]
    made = result_of(viewer, kind="generate", run=run_id, prompt="What is 7 and 7?", max_tokens=8)
    for state, model in (("base", str(tiny_model_dir)), ("tuned", str(run_folder))):
        expected = look_answer(model, "What is 7 and 7?", 8)
        assert made[state]["text"] == expected["text"]
        assert [t["rank"] for t in made[state]["tokens"]] == [1] * len(expected["tokens"])
        assert [t["logprob"] for t in made[state]["tokens"]] == pytest.approx(
            [t["logprob"] for t in expected["tokens"]]
        )
    status, body = viewer.post("/api/jobs", {"kind": "generate", "run": run_id, "prompt": "a " * 600})
    assert status == 202
    assert "over the model's 512" in viewer.finished(body["job"])["error"]
    with pytest.raises(ConfigError, match="over the model's"):
        look_answer(str(run_folder), "a " * 600, 8)


def test_the_data_and_the_mask_of_a_row(viewer: Viewer, run_id: str, run_folder: Path, tiny_model_dir: Path) -> None:
    check = result_of(viewer, kind="check", run=run_id)
    own = likely.check(
        model=str(tiny_model_dir),
        data=str(run_folder.parent / "train.jsonl"),
        eval_data=str(run_folder.parent / "held-out.jsonl"),
        steps=4,
        batch_size=2,
        processes=1,
    )
    for key in ("ok", "verdict", "proof", "audit", "lengths", "floor"):
        assert check[key] == own[key], key
    mask = result_of(viewer, kind="mask", run=run_id, file=0, line=2)
    (shown,) = mask["shown"]
    assert shown["source"].endswith("train.jsonl:2")
    assert "It is 2." in "".join(piece["text"] for piece in shown["pieces"] if piece["weight"])


def test_held_out_rows_are_scored_into_the_viewers_own_folder(
    viewer: Viewer, run_id: str, run_folder: Path, records: list[dict[str, Any]]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    name = result_of(viewer, kind="score", run=run_id)["set"]
    told = viewer.ready(name)
    assert (told["state"], told["rows"], told["has_base"]) == ("ready", len(HELD_OUT), True)
    assert told["name"] == "held-out rows of run"
    assert name in [each["id"] for each in viewer.json(f"/api/runs/{run_id}")["scores"]]
    for i, record in enumerate(records):
        example = viewer.json(f"/api/scores/{name}/rows/{i}")
        assert example["logprob"] == pytest.approx([t["logprob"] for t in record["tokens"]], abs=1e-5)
    assert {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()} == before


def test_rows_that_a_training_held_out_itself_are_found_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    pairs = [(f"Say {word} {i}", f"{word} {i}") for i in range(30) for word in ("yes", "no", "so", "ah")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"steps": 1, "batch_size": 4, "eval_share": 0.2, "train_on": "all"}
    run = likely.train(model=str(tiny_model_dir), data=str(data), output=str(tmp_path / "run"), **settings)
    records = list(
        score_held_out(
            str(data),
            0.2,
            Supervision("all"),
            LookSettings(model=str(tmp_path / "run"), base=str(tiny_model_dir)),
            Display(quiet=True),
        )
    )
    assert len(records) == run.report["tuned"]["num_examples"]
    for key, state in (("nll_nats", "tuned"), ("base_nll_nats", "base")):
        nll = sum(record[key] for record in records) / sum(record["num_tokens"] for record in records)
        assert nll == pytest.approx(run.report[state]["nll"], rel=1e-6)


def test_a_step_is_taken_with_adapters_too(tiny_model_dir: Path, tmp_path: Path, run_folder: Path) -> None:
    run = str(tmp_path / "run")
    data = str(run_folder.parent / "train.jsonl")
    likely.train(model=str(tiny_model_dir), data=data, output=run, steps=1, batch_size=2, tune="lora")
    told = explain(ExplainSettings(model=run, prompt="What is 7?", response="7.", step=True, learning_rate=1e-3))
    assert all(token["step"]["measured"] != 0 for token in told["tokens"])
    assert sum(token["step"]["measured"] for token in told["tokens"]) > 0
