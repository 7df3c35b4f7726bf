"""Lines of bench/results.jsonl as text for a terminal and as the table of docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
PAGE = HERE.parent / "docs" / "performance.md"
MARKS = ("<!-- table: python bench/speed.py --table -->", "<!-- end of table -->")
NAMES = {"likely": "likely", "plain": "plain loop", "trl": "TRL"}


def ratios(contenders: dict[str, Any], peer: str) -> list[float]:
    """likely's speed over a peer's, turn by turn: the same steps, so the ratio of their seconds."""
    own, other = (contenders[name]["seconds_per_step"] for name in ("likely", peer))
    return [sum(b) / sum(a) for a, b in zip(own, other, strict=True)]


def name_of(contender: str, micro_batch: int) -> str:
    """A contender's name for people, with how many rows a peer computes at once."""
    name, _, rows = contender.partition(":")
    return NAMES[name] if name == "likely" else f"{NAMES[name]}, at once: {rows or micro_batch}"


def title(result: dict[str, Any]) -> str:
    setting = result["setting"]
    return f"{Path(result['case']).name}, {setting['tune']}, {setting['dtype']}, batch {setting['batch_size']}"


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """One row of cells for each contender."""
    rates, contenders = result["matrix_gflops"], result["contenders"]
    rows = []
    for name, found in contenders.items():
        low, middle, high = found["tokens_per_s"]
        needed = found["needed_gflops"][1]
        against = ratios(contenders, name) if name != "likely" and "likely" in contenders else []
        rows.append(
            [
                name_of(name, result["training"]["micro_batch"]),
                f"{middle:.0f} ({low:.0f}-{high:.0f})",
                f"{found['distinct_tokens_per_s'][1]:.0f}",
                f"{needed / rates['own']:.0%} / {needed / rates['square']:.0%}",
                f"{found['peak_gb']:.1f}",
                f"{found['startup_s']:.1f}",
                f"{median(against):.2f} ({min(against):.2f}-{max(against):.2f})" if against else "",
            ]
        )
    return rows


HEADERS = [
    "",
    "tokens/s: median (quartiles)",
    "distinct tokens/s",
    "share of the limit: own / square",
    "peak GB",
    "to first step, s",
    "likely is so many times faster: median (each round)",
]


def told(result: dict[str, Any]) -> list[str]:
    """For a terminal."""
    rows = [HEADERS, *rows_of(result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [_facts(result), *table]


def _facts(result: dict[str, Any]) -> str:
    rates, starts = result["matrix_gflops"], result["starts"]
    measured = min(sum(map(len, found["seconds_per_step"])) for found in result["contenders"].values())
    return (
        f"{title(result)}: {result['tokens_per_step']:.0f} tokens a step, {result['distinct_tokens_per_step']} of them"
        f" distinct; matrix rate {rates['own']:.0f} GFLOP/s (own products), {rates['square']:.0f} (square); losses"
        f" agree to {result['losses_apart']:.1g} over {result['compared_steps']} steps; {measured} measured steps in"
        f" {len(rates['all']) - 1} rounds; "
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in starts.items())
        + f"; commit {result['commit']}{' with changes' if result['dirty'] else ''}, {result['date'][:10]},"
        f" load {result['load'][0]}, {result['threads']} threads, {result['hardware']['cpu']}"
    )


def newest() -> list[dict[str, Any]]:
    """The newest result of each case, tune, dtype, batch size, model and processor."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = {
        (line["case"], *line["setting"].values(), line["hardware"]["cpu"]): line
        for line in lines
        if line.get("bench") == "speed"
    }
    return [found[key] for key in sorted(found, key=str)]


def write_table() -> None:
    """Put the newest results between the marks of docs/performance.md."""
    parts = []
    for result in newest():
        rows = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
        rows += ["| " + " | ".join(row) + " |" for row in rows_of(result)]
        parts.append(
            f"**{title(result)}, {result['hardware']['cpu']}**\n\n" + "\n".join(rows) + f"\n\n{_facts(result)}.\n"
        )
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + "\n\n" + "\n".join(parts) + "\n" + MARKS[1] + after, encoding="utf-8")
    print(f"{len(parts)} cases in {PAGE}")
