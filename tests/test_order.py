"""Whole families of common prompts in the order of a real training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import likely


def test_a_step_of_families_computes_their_prompt_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"how many legs have {n} of the {animal}?", "completion": f"{n * legs} {ending}"}
        for n in range(3)
        for animal, legs in (("cats", 4), ("birds", 2), ("ants", 6))
        for ending in ("legs", "of them", "", "!")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def metrics(order: str) -> list[dict[str, Any]]:
        run = likely.train(
            model=str(tiny_model_dir), data=str(data), output=str(tmp_path / order), order=order, epochs=1, batch_size=4
        )
        assert ("families of a common prompt together" in str(run.report["facts"])) == (order == "families")
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "tokens" in line and "grad_norm" in line]

    single, whole = metrics("examples"), metrics("families")
    assert sum(m["tokens"] for m in single) == sum(m["tokens"] for m in whole)
    assert len(single) == len(whole) == len(rows) // 4
    assert sum(m["distinct_tokens"] for m in whole) < 0.6 * sum(m["distinct_tokens"] for m in single)
