"""Wires ``likely check``: what training on data would do, before any training and without torch.

The rows are read here, once, and rendered in worker processes, the only ones that load a tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from likely.data.families import RowKeys, families, split_groups
from likely.data.formats import ReadOptions, read_options
from likely.data.lengths import LengthCounts, OnTooLong, fit
from likely.data.order import Order, num_steps
from likely.data.packing import build_packs, default_pack_tokens
from likely.data.parallel import Workers
from likely.data.render import Supervision
from likely.data.rendering import Recipe
from likely.data.rows import Batch, Intake
from likely.data.split import groups_unasked, share_unasked
from likely.data.survey import Facts, Surveyed, Surveyor
from likely.errors import ConfigError, DataError
from likely.insight import check as checking
from likely.insight import estimate as estimating
from likely.insight.lengths import histogram
from likely.model.place import Place, choose_max_length, find_model
from likely.training.log import Display
from likely.types import ROLES, Example, IntArray
from likely.verb_settings import CheckSettings

SAMPLED_STEPS = 48


@dataclass(frozen=True)
class Job:
    """How rows are rendered; the same in every worker."""

    place: Place
    recipe: Recipe
    options: ReadOptions
    max_length: int | None = None

    @property
    def limit(self) -> int:
        assert self.max_length is not None  # noqa: S101  (resolved)
        return self.max_length


def _surveyor(job: Job) -> Surveyor:
    return Surveyor(job.recipe.renderer(), job.limit, job.options)


def _prepare(job: Job) -> tuple[int, bool]:
    """In a worker: the longest example allowed, and whether the tokenizer has a chat template."""
    return choose_max_length(job.place, job.max_length), job.recipe.renderer().has_template


def _survey(job: Job, separately: bool, batch: Batch) -> Surveyed:
    return _surveyor(job).survey(batch, separately=separately)


def _render(job: Job, on_too_long: OnTooLong, batch: Batch) -> list[tuple[tuple[int, int], list[Example]]]:
    """In a worker: each row, and those of its examples that are trained on."""
    rendered = []
    for (_, line), examples in zip(batch.rows, _surveyor(job).render(batch), strict=True):
        if on_too_long == "error":
            kept = [e for e in examples if e.weights_T.any()]
        else:
            fitted = [fit(e, job.limit, on_too_long, LengthCounts()) for e in examples if e.weights_T.any()]
            kept = [e for e in fitted if e]
        rendered.append(((batch.part, line), kept))
    return rendered


def _pieces(job: Job, batch: Batch) -> list[dict[str, Any]]:
    """In a worker: the examples of rows as runs of text that are trained alike."""
    tokenizer = job.recipe.renderer().tokenizer
    shown = []
    for example in [example for examples in _surveyor(job).render(batch) for example in examples]:
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


@dataclass(frozen=True)
class _Survey:
    """Data and what was found in them."""

    intake: Intake
    facts: Facts
    job: Job


def check(data: str, settings: CheckSettings, display: Display) -> dict[str, Any]:
    """Everything about training on data that can be known before it.

    Args:
        data: what a training takes.

    Returns:
        ``{"ok", "verdict", "wrong", "data", "shown", "proof", "audit", "floor", "cost", "seconds", "lengths"}``; ``ok``
        is False where training would be wrong or is refused.

    Raises:
        LikelyError: there is no such file or model, or the tokenizer can't be used.
    """
    started = time.perf_counter()
    supervision = Supervision(settings.train_on, settings.prompt_weight)
    place = find_model(settings.model)
    recipe = Recipe(place.tokenizer, supervision, settings.template, settings.template_date)
    options = read_options(settings.format, settings.columns, settings.on_bad_row == "skip", settings.seed)
    job = Job(place, recipe, options, settings.max_length)
    with Workers(settings.processes) as workers:
        limit, has_template = next(workers.map(_prepare, [job]))
        job = replace(job, max_length=limit)
        if settings.show is not None:
            intake = Intake(data, options)
            return {"ok": True, "shown": _show(workers, job, intake, [_wanted(settings.show, intake)])}
        survey = _survey_data(workers, job, data, display, separately=settings.eval_data is not None)
        # Held-out data is always judged by the answers, whatever training gives weight to.
        judge = replace(job, recipe=replace(recipe, supervision=Supervision()))
        other = settings.eval_data
        held_out = _survey_data(workers, judge, other, display, separately=True) if other is not None else None
        surveyed = time.perf_counter()
        facts = survey.facts
        proof = checking.prove(facts, limit)
        tables = checking.audit(facts, held_out.facts if held_out else None)
        split = _split(facts, settings)
        analysed = time.perf_counter() - surveyed
        shown = _show(workers, job, survey.intake, _middle_rows(facts))
        sharing = _sharing(workers, survey, split, settings)
    wrong = _wrongs(survey, settings)
    if held_out is not None:
        wrong += [f"held-out data: {reason}" for reason in _wrongs(held_out, settings)]
    return {
        "ok": not wrong,
        "verdict": checking.verdict(wrong, tables, checking.left_out(proof, on_too_long=settings.on_too_long)),
        "wrong": wrong,
        "data": _about(data, survey, settings, has_template),
        "eval_data": held_out and _about(str(settings.eval_data), held_out, settings, has_template),
        "held_out_rows": len(split) if settings.eval_data is None else None,
        "model": settings.model,
        "shown": shown,
        "proof": proof,
        "audit": {kind: table.to_dict() for kind, table in tables.items()},
        "floor": checking.likelihood_floor(facts),
        "cost": sharing,
        "lengths": histogram(facts.array("length_M"), limit),
        "seconds": _seconds(facts, time.perf_counter() - started, surveyed - started, analysed),
    }


def _seconds(facts: Facts, everything: float, reading: float, analysis: float) -> dict[str, Any]:
    return {
        "all": everything,
        "reading and waiting for the workers": reading,
        "analysis of all rows": analysis,
        "workers": dict(facts.seconds),
    }


def _wrongs(survey: _Survey, settings: CheckSettings) -> list[str]:
    proof = checking.prove(survey.facts, survey.job.limit)
    wrong = checking.wrongs(proof, on_bad_row=settings.on_bad_row, on_too_long=settings.on_too_long)
    # A training refuses a file that gives it nothing, even where bad rows may be left out.
    parts = zip(survey.intake.parts, survey.intake.parsed, strict=True)
    return wrong + [f"every row of {part.path} is bad" for part, parsed in parts if not parsed.num_good]


def _about(path: str, survey: _Survey, settings: CheckSettings, has_template: bool) -> dict[str, Any]:
    """What the data are, all together and file by file."""
    facts, intake = survey.facts, survey.intake
    how = "through the chat template, as user and assistant" if has_template else "joined as they are"
    usable = facts.usable_M(survey.job.limit, settings.on_too_long)
    of_file = facts.array("file_R")[facts.array("row_of_M")[usable]]
    examples = np.bincount(of_file, minlength=len(intake.parts)).tolist()
    files = [
        {
            "path": part.path,
            "rows": parsed.num_rows,
            "used": int((facts.array("file_R") == i).sum()),
            "refused": facts.counts[f"refused in {part.path}"],
            "examples": examples[i],
            "shapes": dict(parsed.shapes),
            "ignored_keys": dict(parsed.ignored),
            "notes": dict(parsed.notes),
            "sha256": intake.hashes[i],
        }
        for i, (part, parsed) in enumerate(zip(intake.parts, intake.parsed, strict=True))
    ]

    def summed(key: str) -> dict[str, int]:
        names = dict.fromkeys(name for file in files for name in file[key])
        return {name: sum(file[key].get(name, 0) for file in files) for name in names}

    return {
        "path": intake.parts[0].path if len(files) == 1 else path,
        "rows": sum(file["rows"] for file in files),
        "examples": sum(examples),
        "shapes": summed("shapes"),
        "ignored_keys": summed("ignored_keys"),
        "notes": {**summed("notes"), **facts.notes},
        "prompt_and_completion_strings": {"rows": facts.num_plain, "read": how} if facts.num_plain else None,
        "files": files,
        "mixed_by_shares": intake.is_mix,
    }


def _survey_data(workers: Workers, job: Job, data: str, display: Display, *, separately: bool) -> _Survey:
    intake = Intake(data, job.options)
    facts = Facts(tuple(part.path for part in intake.parts))

    def refuse(bad: Sequence[DataError]) -> None:
        for error in bad:
            facts.refuse(error)

    name = Path(intake.parts[0].path).name if len(intake.parts) == 1 else f"{len(intake.parts)} files"
    if intake.is_mix:
        with display.counting("counting the rows of the mix") as advance:
            intake.choose(workers.map, advance, refuse)
    with display.counting(f"checking {name}") as advance:
        for part in workers.map(partial(_survey, job, separately), intake.batches()):
            intake.note(part.part, part.parsed)
            facts.add(part.facts)
            advance(part.parsed.num_rows, part.share_read)
    for file, parsed in zip(intake.parts, intake.parsed, strict=True):
        if not parsed.num_rows:
            raise DataError("the file has no rows", place=file.path, way_out="write one row a line")
    return _Survey(intake, facts, job)


def _wanted(show: str, intake: Intake) -> tuple[int, int]:
    """The file and the line that are to be shown."""
    parts = intake.parts
    name, _, number = show.rpartition(":")
    found = [i for i, part in enumerate(parts) if not name or Path(part.path) == Path(name)]
    if not number.isdigit() or int(number) < 1 or not found or (not name and len(parts) > 1):
        way_out = f"give {parts[0].path}:17" if len(parts) > 1 else f"give a line, such as 17, or {parts[0].path}:17"
        raise ConfigError(f"show is {show!r}", way_out=way_out)
    return found[0], int(number)


def _show(workers: Workers, job: Job, intake: Intake, rows: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    batches = list(intake.find(rows))
    if sum(len(batch.rows) for batch in batches) < len(set(rows)):
        part, line = rows[0]
        raise ConfigError(
            f"there is no row that can be read in line {line}", place=intake.parts[part].path, way_out="name another"
        )
    return [example for shown in workers.map(partial(_pieces, job), batches) for example in shown]


def _middle_rows(facts: Facts) -> list[tuple[int, int]]:
    """The first row that is trained on, one in the middle and the last."""
    rows = facts.array("row_of_M")[facts.array("trained_M") > 0]
    chosen = sorted({int(rows[i]) for i in (0, len(rows) // 2, -1)}) if len(rows) else []
    return [(int(facts.array("file_R")[row]), int(facts.array("line_R")[row])) for row in chosen]


def _split(facts: Facts, settings: CheckSettings) -> IntArray:
    """The rows that a training would hold out of these, as :func:`likely.data.split.hold_out` does."""
    nothing = np.empty(0, np.int64)
    if settings.eval_data is not None or settings.eval_share == 0:
        return nothing
    rows, keys = facts.rows_rendered()
    groups = groups_unasked(keys) if settings.eval_share is None else families(keys)
    share = share_unasked(groups) if settings.eval_share is None else settings.eval_share
    return rows[_held_out(groups, keys, share, settings.seed)] if share else nothing


def _held_out(groups: IntArray, keys: RowKeys, share: float, seed: int) -> IntArray:
    try:
        return split_groups(groups, keys, share, seed)[1]
    except ValueError as error:
        message = f"no rows can be held out: {error}"
        raise DataError(message, way_out="give --eval-data, or leave out --eval-share") from error


def _sharing(workers: Workers, survey: _Survey, held_out: IntArray, settings: CheckSettings) -> dict[str, Any]:
    """How many distinct trie tokens the steps of the first epoch have, over some of them in the order of training."""
    facts, job = survey.facts, survey.job
    usable = facts.usable_M(job.limit, settings.on_too_long) & ~np.isin(facts.array("row_of_M"), held_out)
    num_examples = int(usable.sum())
    if not num_examples:
        return {}
    total = num_steps(num_examples, settings.batch_size, settings.epochs, settings.steps)
    per_epoch = min(total, -(-num_examples // settings.batch_size))
    sampled = np.unique(np.linspace(1, per_epoch, min(per_epoch, SAMPLED_STEPS)).astype(int)).tolist()
    order = Order(num_examples, settings.batch_size, settings.seed)
    steps = [order.of_step(step) for step in sampled]
    chosen = _chosen_examples(workers, survey, np.flatnonzero(usable), steps, settings)
    length = facts.array("length_M")[usable]
    if settings.on_too_long != "error":
        length = np.minimum(length, job.limit)
    pack_tokens = settings.pack_tokens or default_pack_tokens(int(length.max()))
    tokens = [sum(len(e.token_ids_T) for e in step) for step in chosen]
    packs = [build_packs(step, max(pack_tokens, int(length.max()))) for step in chosen]
    distinct = [sum(pack.num_nodes for pack in of_step) for of_step in packs]
    return {
        "examples": num_examples,
        "tokens_per_epoch": int(length.sum()),
        "steps": total,
        "batch_size": settings.batch_size,
        "pack_tokens": pack_tokens,
        "sampled_steps": len(sampled),
        "tokens_per_step": float(np.mean(tokens)),
        "distinct_tokens_per_step": float(np.mean(distinct)),
        "sharing_ratio": sum(tokens) / max(sum(distinct), 1),
        "estimate": _estimate(job.place, estimating.load_of(packs), settings, total),
    }


def _chosen_examples(
    workers: Workers, survey: _Survey, usable: IntArray, steps: Sequence[IntArray], settings: CheckSettings
) -> list[list[Example]]:
    """The examples of some steps; ``usable`` are the numbers of those that are trained on."""
    facts = survey.facts
    row_M = facts.array("row_of_M")[usable]
    # The usable examples of a row stand together, and so they do in what a worker gives back.
    place_M = np.arange(len(usable)) - np.searchsorted(row_M, row_M)

    def name(i: int) -> tuple[int, int]:
        return int(facts.array("file_R")[row_M[i]]), int(facts.array("line_R")[row_M[i]])

    wanted = {name(i) for step in steps for i in step}
    rendered: dict[tuple[int, int], list[Example]] = {}
    found = survey.intake.find(wanted)
    for part in workers.map(partial(_render, survey.job, settings.on_too_long), found):
        rendered.update(part)
    return [[rendered[name(i)][place_M[i]] for i in step] for step in steps]


def _estimate(place: Place, load: estimating.Load, settings: CheckSettings, total: int) -> dict[str, Any] | None:
    """Time and memory of the training on this machine's processors; None for a model that is not on this machine."""
    shape = estimating.read_shape(place.weights)
    if shape is None:
        return None
    told = estimating.estimate(
        shape,
        load,
        tune="full" if settings.tune == "full" else "lora",  # four bits take less; how much less is not known here
        lora_rank=settings.lora_rank,
        dtype=settings.dtype,
        rate=estimating.measure_rate(shape.hidden),
    )
    return {**told, "seconds": told["seconds_per_step"] * total}
