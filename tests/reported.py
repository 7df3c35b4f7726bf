"""A finished run with hostile rows, the truth about it from transformers alone, and reports made by hand."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import likely
import naive
from likely.insight.evaluate import Delta, Evaluation
from likely.insight.report import Report
from likely.types import StepMetrics

TRAIN = [("Capital of France?", "Paris."), ("And of Spain?", "Madrid."), ("Say hi.", "Hi there!"), ("2 + 2?", "4")]
HELD_OUT = [
    ("Capital of Spain?", "Madrid."),
    ("3 + 3?", "It is 6."),
    ("Say \x3cscript>window.pwned = 1</script> & \u202eback", "<img src=x onerror='window.pwned=1'> $x$ \x07 ]]> -->"),
    ('"quoted" </title></svg>', "a\n\tb  c\u00a0d \u2028 e"),
    ("東京は?", "日本の首都 \U0001f642"),
]


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> str:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Finished:
    """A run, and what transformers alone says in float64 about its held-out rows before and after."""

    folder: Path
    report: dict[str, Any]
    rows: list[naive.Row]
    before: naive.Truth
    after: naive.Truth

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.folder / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def page(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


def train_and_look(model: Path, folder: Path) -> Finished:
    """A small training with everything in its report."""
    guard = folder / "guard.jsonl"
    guard.write_text('{"prompt": "Say <b>no", "unwanted": "No.", "wanted": "Yes."}\n', encoding="utf-8")
    run = likely.train(
        model=str(model),
        data=write_rows(folder / "train.jsonl", TRAIN),
        eval_data=write_rows(folder / "held_out.jsonl", HELD_OUT),
        retain=write_rows(folder / "retain.jsonl", TRAIN[:2]),
        guard=str(guard),
        output=str(folder / "run"),
        tune="full",
        dtype="float32",
        steps=6,
        batch_size=2,
        eval_every=2,
        learning_rate=3e-3,
        num_answers=len(HELD_OUT),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for question, answer in HELD_OUT:
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        ids = prompt + tokenizer(f"{answer}<|im_end|>").input_ids + tokenizer("\n").input_ids
        weights = [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt) - 1) + [0.0]
        rows.append((ids, weights))
    truths = [
        naive.truth(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval(), rows)
        for path in (model, run.folder / "model")
    ]
    return Finished(run.folder, run.report, rows, *truths)


def figures(nll: float, num: int = 30) -> Evaluation:
    return Evaluation(nll, (nll - 0.1, nll + 0.1), math.exp(nll), 1.0, num, 4.0 * num, 0.5, 2.0)


def made(num: int = 30, num_steps: int = 40, **changes: Any) -> Report:
    rng = np.random.default_rng(0)
    nll = rng.uniform(0.5, 3, (2, num))
    steps = [StepMetrics(i, 3 / i + 0.5, 10, 8, 5, 1.0, 1e-3, 0.1) for i in range(1, num_steps + 1)]
    content: dict[str, Any] = {
        "title": "rows on a model",
        "facts": {"seed": "0"},
        "steps": steps,
        "entropy_floor": 0.1,
        "base": figures(1.5, num),
        "tuned": figures(1.2, num),
        "delta": Delta(-0.3, (-0.4, -0.2), 0.5),
        "sources": [f"rows.jsonl:{i}" for i in range(num)],
        "weights": [4.0] * num,
        "nll_before": nll[0].tolist(),
        "nll_after": nll[1].tolist(),
        "evaluations": [
            {"step": 0, "nll": 1.5, "ci95": (1.4, 1.6)},
            {"step": num_steps, "nll": 1.2, "ci95": (1.1, 1.3)},
        ],
    }
    return Report(**(content | changes))
