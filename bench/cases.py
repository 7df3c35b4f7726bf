"""The rows that contenders train on, made from bench/data, and the order in which all of them take the rows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from likely.data.dataset import load_dataset
from likely.data.order import Order, prefix_families
from likely.data.render import Renderer, load_tokenizer
from likely.types import Example

MATHS = Path(__file__).parent / "data" / "gsm8k_200.jsonl"
NUM_SHOTS = 8
NUM_TURNS = 4
Rows = list[list[dict[str, str]]]


def _maths() -> Rows:
    return [json.loads(line)["messages"] for line in MATHS.read_text(encoding="utf-8").splitlines()]


def _shared() -> Rows:
    """The same rows behind one system prompt that shows the first ones as examples."""
    rows = _maths()
    shots = "\n\n".join(f"Question: {q['content']}\nAnswer: {a['content']}" for q, a in rows[:NUM_SHOTS])
    return [[{"role": "system", "content": shots}, *row] for row in rows[NUM_SHOTS:]]


def _answers() -> Rows:
    """Four answers to each of the first 50 questions, neighbours in the file: the working with its calculator marks,
    without them, the result alone, and the result in a sentence."""
    rows: Rows = []
    for question, answer in _maths()[:50]:
        working, result = answer["content"].rsplit("#### ", 1)
        plain = re.sub(r"<<[^>]*>>", "", working)
        texts = [answer["content"], f"{plain}The answer is {result}.", result, f"It is {result}.\n\n{plain.strip()}"]
        rows += [[question, {"role": "assistant", "content": text}] for text in texts]
    return rows


def _turns() -> Rows:
    """Conversations of four questions and answers, all answers learnt; no two begin alike."""
    rows = _maths()
    return [list(itertools.chain(*rows[i : i + NUM_TURNS])) for i in range(len(rows) - NUM_TURNS + 1)]


CASES = {"maths": _maths, "shared": _shared, "answers": _answers, "turns": _turns}


def data_file(case: str, folder: Path) -> Path:
    """The rows of a case as a file that ``likely train --data`` takes."""
    path = folder / f"{case}.jsonl"
    lines = [json.dumps({"messages": row}) for row in CASES[case]()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def steps_in_order(
    data: Path, tokenizer: str, num_steps: int, batch_size: int, seed: int, *, families: bool = False
) -> list[list[Example]]:
    """The examples of each step, as ``likely train`` of this data, seed, batch size and order takes them."""
    examples = load_dataset(str(data), Renderer(load_tokenizer(tokenizer)), 1 << 20).examples
    order = Order(len(examples), batch_size, seed, prefix_families(examples) if families else None)
    steps = [[examples[i] for i in order.of_step(step)] for step in range(1, num_steps + 1)]
    if any(len(step) != batch_size for step in steps):
        raise SystemExit(f"error: {data}: {len(examples)} examples don't fill {num_steps} batches of {batch_size}")
    return steps


def micro_batch(steps: Sequence[Sequence[Example]], max_tokens: int) -> int:
    """The most rows that a peer can compute at once with no more than ``max_tokens`` padded tokens in any micro-batch;
    a whole share of the batch."""
    batch_size = len(steps[0])
    for rows in range(batch_size, 1, -1):
        if batch_size % rows:
            continue
        pieces = (step[i : i + rows] for step in steps for i in range(0, batch_size, rows))
        if max(len(piece) * max(len(e.token_ids_T) for e in piece) for piece in pieces) <= max_tokens:
            return rows
    return 1


def write_rows(steps: Sequence[Sequence[Example]], path: Path) -> None:
    """One line an example: ``input_ids`` and ``labels``, -100 where nothing is learnt.

    Raises:
        SystemExit: a weight other than 0 and 1, which labels can't say.
    """
    with path.open("w", encoding="utf-8") as file:
        for example in itertools.chain(*steps):
            if not ((example.weights_T == 0) | (example.weights_T == 1)).all():
                raise SystemExit(f"error: {example.source}: a weight other than 0 and 1, which the peers don't know")
            labels = [int(t) if w else -100 for t, w in zip(example.token_ids_T, example.weights_T, strict=True)]
            row: dict[str, Any] = {"input_ids": example.token_ids_T.tolist(), "labels": labels}
            file.write(json.dumps(row) + "\n")
