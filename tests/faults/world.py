"""A tiny training whose every outcome is known: what the fault tests break, and the reference they compare with."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import likely
from likely.training.checkpoint import name_of, saved_steps

STEPS = 6


def write_data(folder: Path) -> None:
    for name, count in (("train", 10), ("held_out", 3)):
        rows = [
            {"messages": [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def settings(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Of a run of ``STEPS`` steps over the data in ``folder`` that saves and evaluates often."""
    return {
        "model": str(model),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "steps": STEPS,
        "batch_size": 3,
        "dtype": "float32",
        "learning_rate": 1e-2,
        "lora_rank": 2,
        "save_every": 2,
        "eval_every": 3,
        **more,
    }


def train(run: Path, chosen: dict[str, Any], resume: str | None = None) -> likely.run.Run:
    return likely.train(**chosen, output=str(run), resume=resume)


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run leaves behind and that time does not change."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run / "model").iterdir()
        if path.name != "MANIFEST.json"  # it holds the run's random name
    }
    last = run / "checkpoints" / name_of(STEPS)
    found["optimizer"] = hashlib.sha256((last / "optimizer.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    found["verdict"] = json.loads((run / "report.json").read_text(encoding="utf-8"))["verdict"]
    found["checkpoints"] = saved_steps(run / "checkpoints")
    found["left over"] = sorted(p.name for p in run.rglob(".*"))
    return found


def fresh(run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    return run
