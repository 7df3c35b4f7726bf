"""How many of 5% planted wrong answers the top of ``likely score --rank`` finds, on the demo's capitals or other rows.

    python bench/planted.py [--draws 3] [--epochs 2] [--data recipes/translation/train.jsonl]

Each draw swaps 5% of the answers, tunes the embedded model on that as the demo does, scores the same rows with it, and
looks at as many of the first suspect rows as were planted. Of the demo's answers the city is swapped for another one;
of rows of messages in another file the whole last answer, for that of another row. Some minutes a draw.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import likely
from likely.insight.ranking import Ranking

DEMO = Path(likely.__file__).parent / "demo" / "train.jsonl"
SHARE = 0.05
ANSWER = re.compile(r"(.+)( is the capital of .+\.)")


Rows = list[dict[str, list[dict[str, str]]]]


def plant(seed: int, data: Path = DEMO) -> tuple[Rows, set[int]]:
    """The rows with some answers swapped, and which."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    # What is swapped of each answer, and what stays.
    found = [ANSWER.fullmatch(answer) for answer in answers] if data == DEMO else []
    parts = [match.groups() for match in found if match] if data == DEMO else [(answer, "") for answer in answers]
    assert len(parts) == len(rows), "an answer of the demo is not of the form that is expected"  # noqa: S101
    rng = np.random.default_rng(seed)
    chosen = set(map(int, rng.choice(len(rows), round(SHARE * len(rows)), replace=False)))
    for i in sorted(chosen):
        others = sorted({own for own, _ in parts} - {parts[i][0]})
        rows[i]["messages"][-1]["content"] = str(rng.choice(others)) + parts[i][1]
    return rows, chosen


def precision(seed: int, epochs: float, folder: Path, data_file: Path = DEMO) -> tuple[int, int]:
    """Planted rows among as many suspects as there are, and how many there are."""
    rows, planted = plant(seed, data_file)
    data = folder / "planted.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = likely.train(
        model="smollm2-135m",
        data=str(data),
        output=str(folder / f"run-{seed}"),
        eval_share=0.0,
        epochs=epochs,
        learning_rate=3e-4,
        seed=seed,
    )
    ranking = Ranking(len(planted))
    for record in likely.score(model=str(run.folder), data=str(data), with_prompts=True):
        ranking.add(record)
    top = {int(row.record["source"].rpartition(":")[2]) - 1 for row in ranking.top("suspect")}
    return len(top & planted), len(planted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--data", type=Path, default=DEMO, help="rows of messages, as JSONL")
    asked = parser.parse_args()
    found = of = 0
    with TemporaryDirectory(prefix="planted-") as folder:
        for seed in range(asked.draws):
            own, all_of_them = precision(seed, asked.epochs, Path(folder), asked.data)
            print(f"draw {seed}: {own} of the first {all_of_them} suspects are planted", flush=True)
            found, of = found + own, of + all_of_them
    print(f"together {found} of {of}: {found / of:.0%} (at least 80% is asked of the capitals)")


if __name__ == "__main__":
    main()
