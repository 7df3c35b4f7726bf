"""What a prompt does for its answer: against independent code, and where nothing can be said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import likely
from likely.insight import elsewhere
from likely.insight.ranking import Ranking

QUESTIONS = ["What is 2 and 2?", "Where is it?", "Who?", "Why is the sky blue on most days of the year?"]
ANSWERS = [
    "It is 4.",
    "In Paris, London or elsewhere, as everybody said who was asked.",
    "Nobody. Nobody!",
    "Hm",
    "Yes",
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*texts: str, weight: float = 1.0) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages[-1]["weight"] = weight
    return {"messages": messages}


@pytest.mark.parametrize("at_once", [1, 2, 4096])
def test_shares_are_those_of_independent_code(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Four prompts in all, so each row's answer is looked at behind the three that are not its own."""
    monkeypatch.setattr(elsewhere, "ROWS_AT_ONCE", at_once)
    rows = [turns(QUESTIONS[i % 3], answer, weight=0.5 if i == 1 else 1.0) for i, answer in enumerate(ANSWERS)]
    rows.append(turns(QUESTIONS[3], "No.", "And?", "Still not, as was said before."))
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts, answers = [], []
    for row in rows:
        *asked, said = row["messages"]
        plain = [{"role": m["role"], "content": m["content"]} for m in asked]
        prompts.append(tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))
        answers.append(tokenizer(said["content"] + "<|im_end|>").input_ids)
    records = list(likely.score(model=str(tiny_model_dir), data=write(tmp_path / "d.jsonl", rows), with_prompts=True))
    longest = max(len(record["tokens"]) for record in records)

    def nll(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
        return -float(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).mean())

    distinct = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    assert len(distinct) == elsewhere.NUM_PROMPTS
    skipped = 0
    for record, prompt, answer in zip(records, prompts, answers, strict=True):
        others = [other for other in distinct if other != prompt and len(other) + len(answer) <= longest]
        skipped += len(distinct) - 1 - len(others)
        expected = 1 - nll(prompt, answer) / np.mean([nll(other, answer) for other in others])
        assert record["prompt_explains"] == pytest.approx(expected, abs=1e-5)
    assert skipped


def test_where_no_prompt_can_be_compared(tmp_path: Path, tiny_model_dir: Path) -> None:
    for rows in (
        [{"text": "Two and two are four."}, {"text": "Paris."}],
        [turns("What?", "This."), turns("What?", "That.")],
        [turns("What?", "This.", weight=0.0), turns("Which?", "That.", weight=0.0)],
    ):
        data = write(tmp_path / "d.jsonl", rows)
        records = list(likely.score(model=str(tiny_model_dir), data=data, with_prompts=True))
        assert [record["prompt_explains"] for record in records] == [None, None]
    plain = list(likely.score(model=str(tiny_model_dir), data=write(tmp_path / "d.jsonl", [turns("a", "b")])))
    assert plain[0]["prompt_explains"] is None


def test_suspects_are_ranked_by_it_where_it_is_known() -> None:
    own = {"position": 1, "text": "a", "logprob": -3.0, "rival": "b", "rival_logprob": -0.1}

    def record(source: str, nll: float, gain: float | None, contradiction: Any = own) -> dict[str, Any]:
        return {
            "source": source, "nll_nats": nll, "num_tokens": 1.0, "base_nll_nats": None, "prompt_explains": gain,
            "contradiction": contradiction, "tokens": [],
        }  # fmt: skip

    known, unknown = Ranking(3), Ranking(3)
    for made in (
        record("d:1", 5.0, 0.5), record("d:2", 3.0, -0.5), record("d:3", 9.0, None), record("d:4", 4.0, 0.25),
        record("d:5", 1.0, -9.0, contradiction=None),
    ):  # fmt: skip
        known.add(made)
        unknown.add({**made, "prompt_explains": None})
    assert [(row.record["source"], row.value) for row in known.top("suspect")] == [
        ("d:2", 1.5), ("d:4", 0.75), ("d:1", 0.5)
    ]  # fmt: skip
    assert "other rows' prompts explain" in known.to_text()
    assert [row.record["source"] for row in unknown.top("suspect")] == ["d:3", "d:1", "d:4"]
    assert "other rows' prompts" not in unknown.to_text()
    assert math.isclose(known.nats, 22.0)
