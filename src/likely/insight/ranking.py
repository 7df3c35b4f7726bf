"""Which rows to look at first, from their scores: surprising ones, ones that got worse, and suspect labels.

A label is suspect where a gold token still lies far below another one for a model that was tuned on the data: as in
confident learning (Northcutt, Jiang & Chuang 2021) the model's belief is held against the given label. Of these rows
those come first whose answer is explained least by its prompt (:mod:`likely.insight.elsewhere`), or, where that is not
known of any row, those with the highest NLL per token; docs/log.md has what else was tried.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

from likely.insight.pictures import visible

FAR_BELOW = 1.0  # nats: the other token is e times as likely
MEASURES = ("suspect", "worse", "surprising")
TITLES: dict[str, tuple[str, str]] = {
    "suspect": (
        "Suspect labels: other rows' prompts explain the answer nearly as well. First column: its NLL, over theirs.",
        "",
    ),
    "unlikely": (
        "Suspect labels: the model holds on to another answer. First column: NLL per token.",
        "none: no gold token lies far below the model's first choice",
    ),
    "worse": ("Rows that got worse. First column: rise of the NLL per token over the base.", "none got worse"),
    "surprising": ("Most surprising rows. First column: NLL of the whole answer, in nats.", "no row has a weight"),
}


@dataclass(frozen=True, order=True)
class Ranked:
    """A row with how far up it stands, in nats or as a ratio of nats. Of equal rows the earlier one comes first."""

    value: float
    number: int
    record: dict[str, Any] = field(compare=False)


@dataclass
class Ranking:
    """The ``num`` first rows by three measures; holds no more than these, however long the file is."""

    num: int
    num_rows: int = 0
    nats: float = 0.0
    weight: float = 0.0
    _has_base: bool = False
    _heaps: dict[str, list[Ranked]] = field(default_factory=lambda: {measure: [] for measure in TITLES})

    def add(self, record: dict[str, Any]) -> None:
        """Take in the next record of ``likely score``."""
        self.num_rows += 1
        self.nats += record["nll_nats"]
        self.weight += record["num_tokens"]
        if not record["num_tokens"]:
            return
        facts = {key: value for key, value in record.items() if key != "tokens"}
        per_token = record["nll_nats"] / record["num_tokens"]
        self._push("surprising", record["nll_nats"], facts)
        if record["base_nll_nats"] is not None:
            self._has_base = True
            change = per_token - record["base_nll_nats"] / record["num_tokens"]
            if change > 0:
                self._push("worse", change, facts)
        own = record["contradiction"]
        if own and own["rival_logprob"] - own["logprob"] >= FAR_BELOW:
            self._push("unlikely", per_token, facts)
            if record["prompt_explains"] is not None:
                self._push("suspect", 1 - record["prompt_explains"], facts)

    def _push(self, measure: str, value: float, facts: dict[str, Any]) -> None:
        heapq.heappush(self._heaps[measure], Ranked(value, -self.num_rows, facts))
        if len(self._heaps[measure]) > self.num:
            heapq.heappop(self._heaps[measure])

    def top(self, measure: str) -> list[Ranked]:
        """The rows of ``suspect``, ``worse`` or ``surprising``, the first one first."""
        return sorted(self._heaps[self._named(measure)], reverse=True)

    def _named(self, measure: str) -> str:
        return "unlikely" if measure == "suspect" and not self._heaps[measure] else measure

    @property
    def summary(self) -> str:
        mean = f"NLL {self.nats / self.weight:.6f} nats per token" if self.weight else "nothing has a weight"
        return f"{mean} over {self.weight:g} tokens"

    def to_text(self) -> str:
        """The three lists as tables for people."""
        parts = []
        for measure in MEASURES:
            rows = self.top(measure)
            title, empty = TITLES[self._named(measure)]
            unknown = measure == "worse" and not self._has_base
            instead = "no base was given (--base), so nothing can be said" if unknown else empty
            parts.append("\n".join([title, *(map(_line, rows) if rows else [f"  {instead}"])]))
        return "\n\n".join(parts)


def _line(row: Ranked) -> str:
    record = row.record
    line = f"  {row.value:8.4f}  {record['source']}"
    own = record["contradiction"]
    if own:
        line += (
            f"  gold {visible(own['text'])} has {math.exp(own['logprob']):.2%},"
            f" the model says {visible(own['rival'])} with {math.exp(own['rival_logprob']):.2%}"
        )
    if record["base_nll_nats"] is not None:
        base, tuned = (record[key] / record["num_tokens"] for key in ("base_nll_nats", "nll_nats"))
        line += f"  (NLL per token {base:.3f} -> {tuned:.3f})"
    return line
