"""Wires ``likely check``: what training on a file would do, before any training and without torch.

The rows are read here, once, and rendered in worker processes, the only ones that load a tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from likely.config import CheckSettings
from likely.data.dataset import examples_of_step, num_steps
from likely.data.formats import Format, read_options
from likely.data.hub import rows_of
from likely.data.mixture import parse_parts
from likely.data.packing import build_packs
from likely.data.parallel import Workers, in_batches
from likely.data.render import Renderer, Supervision, TemplateUse, load_tokenizer
from likely.data.survey import Facts, Row, Surveyor
from likely.errors import ConfigError, DataError
from likely.insight import check as checking
from likely.insight import estimate as estimating
from likely.model.place import Place, choose_max_length, find_model
from likely.training.log import Display
from likely.types import ROLES, Example

BATCH_ROWS = 256
SAMPLED_STEPS = 48
NUM_SHOWN = 3


@dataclass(frozen=True)
class Writing:
    """How a conversation becomes text and what of it is learnt."""

    supervision: Supervision
    template: TemplateUse
    template_date: str


@dataclass(frozen=True)
class Job:
    """How rows are rendered; the same in every worker."""

    place: Place
    writing: Writing
    path: str
    format: Format = "auto"
    columns: str | None = None
    max_length: int | None = None


@cache
def _renderer(place: Place, writing: Writing) -> Renderer:
    return Renderer(load_tokenizer(place.tokenizer), writing.supervision, writing.template, writing.template_date)


def _surveyor(job: Job) -> Surveyor:
    assert job.max_length is not None  # noqa: S101  (resolved)
    return Surveyor(_renderer(job.place, job.writing), job.max_length, job.path, read_options(job.format, job.columns))


def _prepare(job: Job) -> tuple[int, bool]:
    """In a worker: the longest example allowed, and whether the tokenizer has a chat template."""
    return choose_max_length(job.place, job.max_length), _renderer(job.place, job.writing).has_template


def _survey(job: Job, separately: bool, rows: list[Row]) -> Facts:
    return _surveyor(job).survey(rows, separately=separately)


def _render(job: Job, rows: list[Row]) -> list[tuple[Example, ...]]:
    return _surveyor(job).render(rows)


def _pieces(job: Job, row: Row) -> list[dict[str, Any]]:
    """In a worker: the examples of one row as runs of text that are trained alike."""
    tokenizer = _renderer(job.place, job.writing).tokenizer
    shown = []
    for example in _surveyor(job).render([row])[0]:
        changes = np.flatnonzero(np.diff(example.weights_T)) + 1
        runs = np.split(np.arange(len(example.token_ids_T)), changes)
        pieces = [
            {
                "text": tokenizer.decode(example.token_ids_T[run].tolist()),
                "tokens": len(run),
                "weight": float(example.weights_T[run[0]]),
                "role": ROLES[example.role_T[run[0]]],
            }
            for run in runs
        ]
        shown.append({"source": str(example.source), "tokens": len(example.token_ids_T), "pieces": pieces})
    return shown


def check(data: str, settings: CheckSettings, display: Display) -> dict[str, Any]:
    """Everything about training on a file that can be known before it.

    Returns:
        ``{"ok", "verdict", "wrong", "data", "shown", "proof", "audit", "floor", "cost", "seconds", "lengths"}``; ``ok``
        is False where training would be wrong or is refused.

    Raises:
        LikelyError: there is no such file or model, or the tokenizer can't be used.
    """
    started = time.perf_counter()
    data = _one_file(data)
    eval_data = _one_file(settings.eval_data) if settings.eval_data is not None else None
    supervision = Supervision(settings.train_on, settings.prompt_weight)
    writing = Writing(supervision, settings.template, settings.template_date)
    place = find_model(settings.model)
    job = Job(place, writing, data, settings.format, settings.columns, settings.max_length)
    with Workers(settings.processes) as workers:
        limit, has_template = next(workers.map(_prepare, [job]))
        job = replace(job, max_length=limit)
        if settings.show is not None:
            shown = _show(workers, job, [_wanted_line(settings.show, data)])
            return {"ok": True, "shown": shown}
        facts = _survey_file(workers, job, display, separately=eval_data is not None)
        held_out = None
        if eval_data is not None:
            # Held-out data is always judged by the answers, whatever training gives weight to.
            judge = replace(job, writing=replace(writing, supervision=Supervision()), path=eval_data)
            held_out = _survey_file(workers, judge, display, separately=True)
        surveyed = time.perf_counter()
        proof = checking.prove(facts, limit)
        tables = checking.audit(facts, held_out)
        analysed = time.perf_counter()
        shown = _show(workers, job, _middle_lines(facts))
        sharing = _sharing(workers, job, facts, settings)
    chosen = {"on_bad_row": settings.on_bad_row, "on_too_long": settings.on_too_long}
    wrong = checking.wrongs(proof, **chosen)
    if held_out is not None:
        wrong += [f"held-out data: {reason}" for reason in checking.wrongs(checking.prove(held_out, limit), **chosen)]
    return {
        "ok": not wrong,
        "verdict": checking.verdict(wrong, tables, checking.left_out(proof, on_too_long=settings.on_too_long)),
        "wrong": wrong,
        "data": _file(data, facts, has_template),
        "eval_data": held_out and _file(str(eval_data), held_out, has_template),
        "model": settings.model,
        "shown": shown,
        "proof": proof,
        "audit": {kind: table.to_dict(_file_of(kind, data, eval_data)) for kind, table in tables.items()},
        "floor": checking.likelihood_floor(facts),
        "cost": sharing,
        "lengths": checking.histogram(facts, limit),
        "seconds": {
            "all": time.perf_counter() - started,
            "reading and waiting for the workers": surveyed - started,
            "analysis of all rows": analysed - surveyed,
            "workers": dict(facts.seconds),
        },
    }


def _one_file(data: str) -> str:
    parts = parse_parts(data)
    if len(parts) > 1:
        names = ", ".join(part.path for part in parts)
        raise ConfigError(f"data names {len(parts)} files ({names})", way_out="check them one by one")
    return parts[0].path


def _file_of(kind: str, data: str, eval_data: str | None) -> str:
    return eval_data if eval_data and kind.startswith("held-out") else data


def _file(path: str, facts: Facts, has_template: bool) -> dict[str, Any]:
    how = "through the chat template, as user and assistant" if has_template else "joined as they are"
    return {
        "path": path,
        "rows": facts.num_rows,
        "examples": facts.num_examples,
        "shapes": dict(facts.shapes),
        "ignored_keys": dict(facts.ignored),
        "notes": dict(facts.notes),
        "prompt_and_completion_strings": {"rows": facts.num_plain, "read": how} if facts.num_plain else None,
    }


def _survey_file(workers: Workers, job: Job, display: Display, *, separately: bool) -> Facts:
    facts, unread = Facts(), list[DataError]()
    rows = ((row, source.line) for row, source in rows_of(job.path, unread.append))
    with display.counting(f"checking {Path(job.path).name}", _count_lines(job.path), "rows") as advance:
        for part in workers.map(partial(_survey, job, separately), in_batches(rows, BATCH_ROWS)):
            facts.add(part)
            advance(part.num_rows)
    for error in unread:
        facts.num_rows += 1
        facts.refuse(int(error.place.rpartition(":")[2]), error)
    if not facts.num_rows:
        raise DataError("the file has no rows", place=job.path, way_out="write one row a line")
    return facts


def _count_lines(path: str) -> int | None:
    try:
        with Path(path).open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))
    except OSError:
        return None  # the reader says what is wrong


def _wanted_line(show: str, data: str) -> int:
    name, _, number = show.rpartition(":")
    if not number.isdigit() or int(number) < 1 or (name and Path(name) != Path(data)):
        raise ConfigError(f"show is {show!r}", way_out=f"give a line, such as 17, or {data}:17")
    return int(number)


def _rows(path: str, wanted: Iterable[int]) -> Iterator[Row]:
    """The rows of some lines, as far as they can be read."""
    left = set(wanted)
    for row, source in rows_of(path, lambda _: None):
        if source.line in left:
            yield row, source.line
            left.discard(source.line)
            if not left:
                return


def _show(workers: Workers, job: Job, numbers: Sequence[int]) -> list[dict[str, Any]]:
    rows = list(_rows(job.path, numbers))
    if len(rows) < len(numbers):
        raise ConfigError(
            f"there is no row that can be read in line {numbers[0]}", place=job.path, way_out="name another line"
        )
    return [example for examples in workers.map(partial(_pieces, job), rows) for example in examples]


def _middle_lines(facts: Facts) -> list[int]:
    """The first row that is trained on, one in the middle and the last."""
    lines = facts.array("line_R")[facts.array("row_of_M")[facts.array("trained_M") > 0]]
    return sorted({int(lines[i]) for i in (0, len(lines) // 2, -1)}) if len(lines) else []


def _sharing(workers: Workers, job: Job, facts: Facts, settings: CheckSettings) -> dict[str, Any]:
    """How many distinct trie tokens the steps of the first epoch have, over some of them in the order of training."""
    usable = (facts.array("trained_M") > 0) & (facts.array("length_M") <= (job.max_length or 0))
    num_examples = int(usable.sum())
    if not num_examples:
        return {}
    total = num_steps(num_examples, settings.batch_size, settings.epochs, settings.steps)
    per_epoch = min(total, -(-num_examples // settings.batch_size))
    sampled = np.unique(np.linspace(1, per_epoch, min(per_epoch, SAMPLED_STEPS)).astype(int)).tolist()
    steps = [examples_of_step(step, num_examples, settings.batch_size, settings.seed) for step in sampled]
    # The examples of a row stand together, those without weight left out.
    row_M = facts.array("row_of_M")[usable]
    place_M = np.arange(num_examples) - np.searchsorted(row_M, row_M)
    lines = facts.array("line_R")[row_M]
    wanted = {int(lines[i]) for step in steps for i in step}
    rendered: dict[int, list[Example]] = {}
    batches = in_batches(_rows(job.path, wanted), 32)
    for part in workers.map(partial(_render, job), batches):
        for examples in part:
            kept = [e for e in examples if e.weights_T.any() and len(e.token_ids_T) <= (job.max_length or 0)]
            rendered[examples[0].source.line] = kept
    chosen = [[rendered[int(lines[i])][place_M[i]] for i in step] for step in steps]
    pack_tokens = settings.pack_tokens or max(2048, int(facts.array("length_M")[usable].max()))
    tokens = [sum(len(e.token_ids_T) for e in step) for step in chosen]
    packs = [build_packs(step, pack_tokens) for step in chosen]
    distinct = [sum(pack.num_nodes for pack in of_step) for of_step in packs]
    load = estimating.Load(
        distinct_tokens=float(np.mean(distinct)),
        supervised_contexts=float(np.mean([sum(len(np.unique(p.source_E)) for p in of_step) for of_step in packs])),
        largest_pack=max(pack.num_nodes for of_step in packs for pack in of_step),
    )
    return {
        "examples": num_examples,
        "tokens_per_epoch": int(facts.array("length_M")[usable].sum()),
        "steps": total,
        "batch_size": settings.batch_size,
        "pack_tokens": pack_tokens,
        "sampled_steps": len(sampled),
        "tokens_per_step": float(np.mean(tokens)),
        "distinct_tokens_per_step": float(np.mean(distinct)),
        "sharing_ratio": sum(tokens) / max(sum(distinct), 1),
        "estimate": _estimate(job.place, load, settings, total),
    }


def _estimate(place: Place, load: estimating.Load, settings: CheckSettings, total: int) -> dict[str, Any] | None:
    """Time and memory of the training on this machine's processors; None for a model that is not on this machine."""
    shape = estimating.read_shape(place.weights)
    if shape is None:
        return None
    told = estimating.estimate(
        shape,
        load,
        tune=settings.tune,
        lora_rank=settings.lora_rank,
        dtype=settings.dtype,
        rate=estimating.measure_rate(shape.hidden),
    )
    return {**told, "seconds": told["seconds_per_step"] * total}
