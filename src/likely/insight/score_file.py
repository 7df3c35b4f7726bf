"""What ``likely score`` writes: one record an example, as JSONL or Parquet by the file's ending."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from likely.data.mixture import parse_parts
from likely.errors import ConfigError, ResourceError
from likely.types import ROLES, Example, ExampleScore

RECORDS_AT_ONCE = 256


class Recorder:
    """Makes records of examples and their scores; remembers the texts of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        @cache
        def text_of(token: int) -> str:
            return str(tokenizer.decode([token]))

        self._text_of = text_of

    def record(
        self, example: Example, own: ExampleScore, base: ExampleScore | None, prompt_explains: float = math.nan
    ) -> dict[str, Any]:
        """``{"source", "nll_nats", "joint_nll_nats", "num_tokens", "base_nll_nats", "base_joint_nll_nats",
        "shortfall_nats", "prompt_explains", "contradiction", "tokens"}``; null where nothing predicts a token, where
        there is no base, or where it is not known what the prompt explains (:mod:`likely.insight.elsewhere`).
        The shortfall is how far the gold tokens lie below the model's first choice at each, summed.
        """
        base_logprob_T = base.logprob_T if base else np.full(len(example.token_ids_T), np.nan)
        return {
            "source": str(example.source),
            "nll_nats": _conditional(example, own),
            "joint_nll_nats": _joint(own),
            "num_tokens": float(example.weights_T.sum()),
            "base_nll_nats": _conditional(example, base) if base else None,
            "base_joint_nll_nats": _joint(base) if base else None,
            "shortfall_nats": float(np.nansum(example.weights_T * (own.best_logprob_T - own.logprob_T))),
            "prompt_explains": _number(prompt_explains),
            "contradiction": self._contradiction(example, own),
            "tokens": [
                {
                    "id": int(token),
                    "text": self._text_of(int(token)),
                    "role": ROLES[role],
                    "weight": float(weight),
                    "logprob": _number(logprob),
                    "rank": None if math.isnan(rank) else int(rank),
                    "entropy": _number(entropy),
                    "base_logprob": _number(base_logprob),
                }
                for token, role, weight, logprob, rank, entropy, base_logprob in zip(
                    example.token_ids_T,
                    example.role_T,
                    example.weights_T,
                    own.logprob_T,
                    own.rank_T,
                    own.entropy_T,
                    base_logprob_T,
                    strict=True,
                )
            ],
        }

    def _contradiction(self, example: Example, own: ExampleScore) -> dict[str, Any] | None:
        """The supervised token that the model puts farthest below its first choice, in nats; None where every one of
        them is its first choice."""
        margin_T = np.where(example.weights_T > 0, own.best_logprob_T - own.logprob_T, 0.0)
        t = int(margin_T.argmax())
        if margin_T[t] <= 0:
            return None
        return {
            "position": t,
            "text": self._text_of(int(example.token_ids_T[t])),
            "logprob": float(own.logprob_T[t]),
            "rival": self._text_of(int(own.best_T[t])),
            "rival_logprob": float(own.best_logprob_T[t]),
        }


def _conditional(example: Example, score: ExampleScore) -> float:
    return float(-np.nansum(example.weights_T * score.logprob_T))


def _joint(score: ExampleScore) -> float:
    return float(-np.nansum(score.logprob_T))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def check_output(output: Path, data: str) -> None:
    """What is written goes to an ordinary file that is not the data, in a folder that is there.

    Raises:
        ConfigError: they can't.
    """
    try:
        if "\0" in str(output) or (output.exists() and (not output.is_file() or _is_same_file(output, data))):
            raise ConfigError(
                "this is the data itself or no ordinary file", place=str(output), way_out="name another --output"
            )
        if not output.parent.is_dir():
            raise ConfigError(f"there is no folder {output.parent}", place=str(output), way_out="make it first")
    except OSError as error:
        raise ConfigError(error.strerror or str(error), place="--output", way_out="name another file") from error


def _is_same_file(output: Path, data: str) -> bool:
    for part in parse_parts(data):
        with suppress(OSError, ValueError):  # the data is not there, which its reader will say
            if output.samefile(part.path):
                return True
    return False


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write to, which takes its name once it is whole.

    Raises:
        ResourceError: the disk refuses.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    # A name that is no UTF-8 becomes an escape.
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with unfinished.open(mode, **text) as file:
            yield file
        unfinished.replace(path)
    except OSError as error:
        raise ResourceError(f"can't be written: {error.strerror or error}", place=str(path)) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def record_writer(output: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Call the result with each record. The file takes its name once it is whole."""
    if output.suffix.lower() != ".parquet":
        with replacing(output) as file:
            yield lambda record: file.writelines([json.dumps(record, ensure_ascii=False), "\n"])
        return
    import pyarrow  # noqa: PLC0415  (only where it is asked for)
    from pyarrow import parquet  # noqa: PLC0415

    schema = _schema(pyarrow)
    with replacing(output, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        waiting: list[dict[str, Any]] = []

        def flush() -> None:
            if waiting:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(waiting, schema=schema))
                waiting.clear()

        def write(record: dict[str, Any]) -> None:
            # Parquet holds UTF-8 and nothing else.
            source = record["source"].encode(errors="backslashreplace").decode()
            waiting.append({**record, "source": source})
            if len(waiting) >= RECORDS_AT_ONCE:
                flush()

        yield write
        flush()


def _schema(pa: Any) -> Any:
    nats, text, count = pa.float64(), pa.string(), pa.int64()
    token = {"id": count, "text": text, "role": text, "weight": nats, "logprob": nats, "rank": count}
    token |= {"entropy": nats, "base_logprob": nats}
    contradiction = {"position": count, "text": text, "logprob": nats, "rival": text, "rival_logprob": nats}
    row = {"source": text, "nll_nats": nats, "joint_nll_nats": nats, "num_tokens": nats, "base_nll_nats": nats}
    row |= {
        "base_joint_nll_nats": nats,
        "shortfall_nats": nats,
        "prompt_explains": nats,
        "contradiction": pa.struct(list(contradiction.items())),
    }
    return pa.schema(list((row | {"tokens": pa.list_(pa.struct(list(token.items())))}).items()))
