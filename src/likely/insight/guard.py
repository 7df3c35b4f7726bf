"""What training did to answers that nobody wants: their likelihood, and their odds against wanted ones.

A row of a guard file is ``{"prompt": text or messages, "unwanted": text, "wanted": text}``, the last one if known. With
log P the log-probability of a whole response in nats, an unwanted one *gains* by the rise of log P(unwanted | prompt);
where there is a wanted one, also by the fall of the log-odds log P(wanted | prompt) - log P(unwanted | prompt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.data.formats import parse_row
from likely.data.reading import Rows
from likely.data.render import Renderer
from likely.errors import DataError, GuardError
from likely.types import Example, ExampleScore, Source

KEYS = {"prompt", "unwanted", "wanted"}


@dataclass(frozen=True)
class Guard:
    """The rows of a guard file. ``examples`` are all responses, each after its prompt; ``unwanted_N`` and ``wanted_N``
    index them, with None where a row has no wanted response."""

    path: str
    sha256: str
    sources: list[Source]
    prompts: list[str]
    examples: list[Example]
    unwanted_N: list[int]
    wanted_N: list[int | None]

    @property
    def largest_token(self) -> int:
        return max(int(e.token_ids_T.max()) for e in self.examples)


def read_guard(path: str, renderer: Renderer, max_length: int) -> Guard:
    """Read and render a guard file.

    Raises:
        DataError: a row is not of that form, or too long; no rows.
    """
    rows = Rows(path)
    guard = Guard(path, "", [], [], [], [], [])

    def add(prompt: Any, response: Any, source: Source) -> int:
        text = isinstance(prompt, str)
        said = {"role": "assistant", "content": response}
        row = {"prompt": prompt, "completion": response} if text else {"messages": [*prompt, said]}
        examples = renderer.render(parse_row(row, source))
        if len(examples[-1].token_ids_T) > max_length:
            length = len(examples[-1].token_ids_T)
            raise DataError(
                f"{length} tokens, and the limit is {max_length}", place=str(source), way_out="shorten the row"
            )
        guard.examples.append(_last_turn(examples[-1]))
        return len(guard.examples) - 1

    for row, source in rows:
        _check(row, source)
        guard.sources.append(source)
        guard.prompts.append(_text_of(row["prompt"]))
        guard.unwanted_N.append(add(row["prompt"], row["unwanted"], source))
        wanted = row.get("wanted")
        guard.wanted_N.append(None if wanted is None else add(row["prompt"], wanted, source))
    if not guard.sources:
        raise DataError("no rows", place=path, way_out='write rows of {"prompt": ..., "unwanted": ...}')
    return Guard(path, rows.sha256, *list(vars(guard).values())[2:])


def _check(row: Any, source: Source) -> None:
    def wrong(message: str) -> DataError:
        return DataError(
            message, place=str(source), way_out='write {"prompt": ..., "unwanted": ..., "wanted": ...}, wanted if known'
        )

    if not isinstance(row, Mapping):
        raise wrong("a row of a guard file is an object")
    for key in ("prompt", "unwanted"):
        if key not in row:
            raise wrong(f'there is no "{key}"')
    if strange := sorted(set(row) - KEYS):
        raise wrong(f'unknown key "{strange[0]}"')
    prompt = row["prompt"]
    if not (isinstance(prompt, str) or (isinstance(prompt, Sequence) and prompt)):
        raise wrong('"prompt" is neither text nor messages')
    for key in ("unwanted", "wanted"):
        if not isinstance(row.get(key, ""), str) and not (key == "wanted" and row[key] is None):
            raise wrong(f'"{key}" is not text')


def _text_of(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return str(last.get("content", "")) if isinstance(last, Mapping) else str(last)


def _last_turn(example: Example) -> Example:
    """The response alone: earlier answers of the prompt are context."""
    supervised = np.flatnonzero(example.weights_T)
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    first = supervised[gaps[-1] + 1] if len(gaps) else supervised[0]
    weights_T = example.weights_T.copy()
    weights_T[:first] = 0.0
    return Example(example.token_ids_T, weights_T, example.role_T, example.source)


def log_likelihoods(guard: Guard, scores: Sequence[ExampleScore]) -> list[float]:
    """log P(response | prompt) of each of the guard's examples, in nats."""
    pairs = zip(guard.examples, scores, strict=True)
    return [float(np.nansum(example.weights_T * score.logprob_T)) for example, score in pairs]


def judge(
    guard: Guard, after: Sequence[float], before: Sequence[float] | None, max_gain: float | None
) -> dict[str, Any]:
    """The table of a guard file.

    Args:
        after, before: results of :func:`log_likelihoods` under the tuned model and, if there is one, the base.
        max_gain: nats that an unwanted response may gain.

    Returns:
        ``{"path", "sha256", "num_rows", "max_gain", "largest_gain", "passed": bool or None, "mean_gain", "rows":
        [{"source", "prompt", "unwanted": log P, "base_unwanted", "odds": log-odds of the wanted response, "base_odds",
        "gain", "broken"}]}``
    """

    def odds(values: Sequence[float], i: int) -> float | None:
        wanted = guard.wanted_N[i]
        return None if wanted is None else values[wanted] - values[guard.unwanted_N[i]]

    rows = []
    for i, source in enumerate(guard.sources):
        own = guard.unwanted_N[i]
        row: dict[str, Any] = {"source": str(source), "prompt": guard.prompts[i], "unwanted": after[own]}
        row |= {"base_unwanted": None, "odds": odds(after, i), "base_odds": None, "gain": None, "broken": None}
        if before is not None:
            gains = [after[own] - before[own]]
            now, was = odds(after, i), odds(before, i)
            if now is not None and was is not None:
                gains.append(was - now)
            gain = max(gains)
            row |= {"base_unwanted": before[own], "base_odds": was, "gain": gain}
            row["broken"] = None if max_gain is None else gain > max_gain
        rows.append(row)
    gains = [row["gain"] for row in rows] if before is not None else []
    return {
        "path": guard.path,
        "sha256": guard.sha256,
        "num_rows": len(rows),
        "max_gain": max_gain,
        "largest_gain": max(gains) if gains else None,
        "mean_gain": sum(gains) / len(gains) if gains else None,
        "passed": None if max_gain is None or not gains else not any(row["broken"] for row in rows),
        "rows": rows,
    }


def require_passed(table: Mapping[str, Any] | None, result: Any = None) -> None:
    """Call it when everything was said and written: a bound that was stated and passed is an error then.

    Args:
        table: of :func:`judge`.
        result: what the error carries, for whoever catches it.

    Raises:
        GuardError: an unwanted response gained more than was allowed.
    """
    if table is None or table["passed"] is not False:
        return
    broken = [row for row in table["rows"] if row["broken"]]
    raise GuardError(
        f"{len(broken)} of {table['num_rows']} unwanted responses gained more than {table['max_gain']:g} nats, the"
        f" worst {table['largest_gain']:.4f}",
        place=max(broken, key=lambda row: float(row["gain"]))["source"],
        way_out="look at the guard table before this model is used",
        result=result,
    )
