"""The table of a million scored rows: how long its index, pages, sorts, filters and counts take, and the memory of the
server. Run it on a quiet machine: ``python bench/viewer.py``; the rows are generated once into ``--folder``."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "view"))
from client import Viewer

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("r", "n", "st", "ve", "l", "t")]
QUERIES = {
    "first page, as the file": "",
    "sort by change": "sort=change&order=desc",
    "sort by surprise": "sort=surprise&order=desc",
    "sort by length": "sort=length",
    "got worse, by NLL": "worse=1&sort=nll_tuned&order=desc",
    "stop unlikely, by change": "stop_unlikely=1&sort=change",
    "role tool (1 in 1,000), by length": "role=tool&sort=length&order=desc",
    "a common word (1 in 18), by change": "text={common}&sort=change",
    "a rare text (3 rows), by change": "text=needle-{salt}&sort=change",
    "no such text, by length": "text=nothing-{salt}&sort=length",
    "a rare text, got worse": "text=needle-{salt}&worse=1&sort=surprise",
}


def record(number: int, rows: int, rng: random.Random) -> dict[str, Any]:
    """Twelve tokens, so that a million rows are about 1.7 GB."""
    words = rng.choices(WORDS, k=10)
    if number % (rows // 3) == 7:
        words[1] = "needle-0 needle-1 needle-2 needle-3 needle-4 needle-5 needle-6 needle-7 needle-8 needle-9"
    other = "tool" if number % 1000 == 5 else "user"
    roles = ["system", *["user"] * 4, other, *["assistant"] * 6]
    texts = ["<s>", *(f" {word}" for word in words), "</s>"]
    tokens, nll, base = [], 0.0, 0.0
    for i, (role, text) in enumerate(zip(roles, texts, strict=True)):
        weight = float(role == "assistant")
        own, before = -rng.expovariate(0.8), -rng.expovariate(0.5)
        nll, base = nll - weight * own, base - weight * before
        token = {"id": i, "text": text, "role": role, "weight": weight, "logprob": own if i else None, "rank": 3}
        tokens.append({**token, "entropy": 1.25, "base_logprob": before if i else None})
    source = f"/data/{'abcdefgh'[number * 8 // rows]}.jsonl:{number + 1}"
    totals = {"nll_nats": nll, "joint_nll_nats": nll, "num_tokens": 6.0, "base_nll_nats": base}
    more = {"base_joint_nll_nats": base, "shortfall_nats": 1.0, "contradiction": None}
    return {"source": source, **totals, **more, "tokens": tokens}


def generate(path: Path, rows: int) -> None:
    rng = random.Random(0)  # noqa: S311
    with path.with_suffix(".part").open("w") as file:
        file.writelines(json.dumps(record(i, rows, rng)) + "\n" for i in range(rows))
    path.with_suffix(".part").rename(path)


def resident(process: int) -> dict[str, float]:
    """Megabytes of a process: all that is mapped in, and what of it is its own."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon"))}
    return {name: int(value) / 1024 for name, value in found.items()}


def measure(viewer: Viewer, scores: str, rows: int, repeats: int) -> None:
    for name, query in QUERIES.items():
        seconds = []
        for i in range(repeats):
            asked = query.format(salt=i % 10, common=WORDS[i])
            started = time.perf_counter()
            page = viewer.json(f"/api/scores/{scores}/rows?{asked}")
            seconds.append(time.perf_counter() - started)
        deep = [""]
        if page["next"]:
            started = time.perf_counter()
            for _ in range(10):
                page = viewer.json(f"/api/scores/{scores}/rows?{asked}&cursor={page['next']}")
                if not page["next"]:
                    break
            deep = [f"; a page further on {(time.perf_counter() - started) / 10 * 1000:.0f} ms"]
        print(f"{name}: median {statistics.median(seconds) * 1000:.0f} ms, worst {max(seconds) * 1000:.0f} ms{deep[0]}")
    for name, path in (
        ("count, got worse", "count?worse=1"),
        ("count, a common word", "count?text=bar"),
        ("scatter of 2,000", "scatter?limit=2000"),
        ("scatter, got worse", "scatter?limit=2000&worse=1"),
        ("one example", f"rows/{rows * 2 // 3}"),
    ):
        started = time.perf_counter()
        viewer.json(f"/api/scores/{scores}/{path}")
        print(f"{name}: {(time.perf_counter() - started) * 1000:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "likely-bench-viewer")
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    asked.folder.mkdir(exist_ok=True)
    path = asked.folder / f"scores-{asked.rows}.jsonl"
    if not path.exists():
        generate(path, asked.rows)
    run = asked.folder / "run"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text("{}")
    viewer = Viewer(run, "--scores", path)
    try:
        viewer.json("/api/scores")
        started = time.perf_counter()
        (scores,) = [each["id"] for each in viewer.json("/api/scores")["sets"]]
        viewer.ready(scores, 3600.0)
        print(f"{asked.rows:,} rows, {path.stat().st_size / 1e9:.1f} GB; index {time.perf_counter() - started:.0f} s")
        measure(viewer, scores, asked.rows, asked.repeats)
        started = time.perf_counter()
        size = len(viewer.get(f"/api/scores/{scores}/rows.csv?worse=1")[2])
        print(f"CSV of the rows that got worse: {size / 1e6:.0f} MB in {time.perf_counter() - started:.0f} s")
        print("server, MB: " + ", ".join(f"{k} {v:.0f}" for k, v in resident(viewer.process.pid).items()))
    finally:
        viewer.close()


if __name__ == "__main__":
    main()
