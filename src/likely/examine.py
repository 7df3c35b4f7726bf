"""Wires ``likely check``: what training on data would do, before any training and without torch.

The rows are read here, once, and rendered in worker processes, the only ones that load a tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from likely.data.families import families, split_groups
from likely.data.formats import WRITE, read_options
from likely.data.order import Order, num_steps
from likely.data.packing import build_packs, choose_pack_tokens, default_pack_tokens
from likely.data.parallel import Workers
from likely.data.render import Supervision
from likely.data.rendering import Recipe
from likely.data.rows import Intake
from likely.data.split import groups_unasked, none_held_out, one_side_empty, share_unasked
from likely.data.survey import Facts
from likely.errors import ConfigError, DataError
from likely.examiners import Job, pieces_of, prepare, render_rows, survey_batch
from likely.insight import check as checking
from likely.insight import estimate as estimating
from likely.insight import plan as planning
from likely.insight.lengths import histogram
from likely.model.place import check_token_ids, find_model
from likely.training.log import Display
from likely.types import Example, IntArray, Source
from likely.verb_settings import CheckSettings

SAMPLED_STEPS, PLANNED_STEPS = 48, 8


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
        ``{"ok", "verdict", "wrong", "first_wrong", "data", "shown", "proof", "audit", "floor", "cost", "seconds",
        "lengths"}``; ``ok`` is False where training would be wrong or is refused, ``first_wrong`` a row that is why.

    Raises:
        LikelyError: there is no such file or model, or the tokenizer can't be used.
    """
    started = time.perf_counter()
    cluster = planning.read_cluster(settings.plan) if settings.plan is not None else None
    job, judge = _jobs(settings)
    with Workers(settings.processes) as workers:
        limit, has_template = next(workers.map(prepare, [job]))
        job, judge = replace(job, max_length=limit), replace(judge, max_length=limit)
        if settings.show is not None:
            return {"ok": True, "shown": _show_wanted(workers, settings, [(data, job), (settings.eval_data, judge)])}
        survey = _survey_data(workers, job, data, display, separately=settings.eval_data is not None)
        held_out = None
        if settings.eval_data is not None:
            held_out = _survey_data(workers, judge, settings.eval_data, display, separately=True)
        surveyed = time.perf_counter()
        facts = survey.facts
        wrong = _wrongs(survey, settings)
        if held_out is not None:
            wrong += [f"held-out data: {reason}" for reason in _wrongs(held_out, settings)]
        if not wrong:
            check_token_ids(job.place, max(facts.largest_token, held_out.facts.largest_token if held_out else 0))
        split = _split(workers, survey, judge, settings)
        wrong += split.wrong
        proof = checking.prove(facts, limit)
        tables = checking.audit(facts, held_out.facts if held_out else None)
        analysed = time.perf_counter() - surveyed
        shown = _show(workers, job, survey.intake, _middle_rows(facts))
        judged = [other for other in (split.judged, held_out and held_out.facts) if other]
        proofs = [proof, *(checking.prove(other, limit) for other in judged[:1])]
        pack_tokens = None if wrong else _pack_tokens(survey, split.rows, judged, settings)
        sharing = _sharing(workers, survey, split.rows, settings, pack_tokens, cluster)
    return {
        "ok": not wrong,
        "verdict": checking.verdict(wrong, tables, checking.left_out(proof, on_too_long=settings.on_too_long)),
        "wrong": wrong,
        "first_wrong": checking.first_refused(proofs, settings.on_bad_row, settings.on_too_long) if wrong else None,
        "data": _about(data, survey, settings, has_template),
        "eval_data": held_out and _about(str(settings.eval_data), held_out, settings, has_template),
        "held_out_rows": len(split.rows) if settings.eval_data is None else None,
        "model": settings.model,
        "shown": shown,
        "proof": proof,
        "eval_proof": proofs[1] if judged else None,
        "audit": {kind: table.to_dict() for kind, table in tables.items()},
        "floor": checking.likelihood_floor(facts),
        "cost": sharing,
        "lengths": histogram(facts.array("length_M"), limit),
        "seconds": _seconds(facts, time.perf_counter() - started, surveyed - started, analysed),
    }


def _jobs(settings: CheckSettings) -> tuple[Job, Job]:
    """How the data are rendered, and how held-out data are: these are always judged by the answers, whatever training
    gives weight to."""
    supervision = Supervision(settings.train_on, settings.prompt_weight)
    place = find_model(settings.model)
    recipe = Recipe(place.tokenizer, supervision, settings.template, settings.template_date)
    options = read_options(settings.format, settings.columns, settings.on_bad_row == "skip", settings.seed)
    job = Job(place, recipe, options, settings.max_length, settings.on_too_long)
    return job, replace(job, recipe=replace(recipe, supervision=Supervision()))


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
    if not survey.facts.usable_M(survey.job.limit, settings.on_too_long).any():
        if proof["refused"]["rows"] and not any(reason.endswith("are refused") for reason in wrong):
            wrong = ["every row is bad"]
        elif proof["over_length"]["examples"] and settings.on_too_long != "error":
            wrong = [f"nothing is left to train on: {proof['over_length']['examples']} examples are too long"]
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
        # What is said of every row needs no list of rows.
        "noted": {
            note: list(rows) for note, rows in facts.noted.items() if facts.notes[note] < len(facts.array("line_R"))
        },
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
        for part in workers.map(partial(survey_batch, job, separately), intake.batches()):
            intake.note(part.part, part.parsed)
            facts.add(part.facts)
            advance(part.parsed.num_rows, part.share_read)
    for file, parsed in zip(intake.parts, intake.parsed, strict=True):
        if not parsed.num_rows:
            raise DataError("the file has no rows", place=file.path, way_out=f"write {WRITE}, one a line")
    return _Survey(intake, facts, job)


def _show_wanted(
    workers: Workers, settings: CheckSettings, sides: Sequence[tuple[str | None, Job]]
) -> list[dict[str, Any]]:
    """One row of the data, or of the held-out data as it is judged."""
    show = str(settings.show)
    intakes = [(Intake(data, job.options), job) for data, job in sides if data is not None]
    parts = [(intake, job, number) for intake, job in intakes for number in range(len(intake.parts))]
    name, _, line = show.rpartition(":")
    # A line alone is of the data, if they are one file.
    some = parts if name else parts[:1] if len(intakes[0][0].parts) == 1 else []
    found = [(i, job, n) for i, job, n in some if not name or Path(i.parts[n].path) == Path(name)]
    if not line.isdigit() or int(line) < 1 or not found:
        first = parts[0][0].parts[0].path
        way_out = f"give {first}:17" if len(parts) > 1 else f"give a line, such as 17, or {first}:17"
        raise ConfigError(f"show is {show!r}", way_out=way_out)
    intake, job, number = found[0]
    return _show(workers, job, intake, [(number, int(line))])


def _show(workers: Workers, job: Job, intake: Intake, rows: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    batches = list(intake.find(rows))
    if sum(len(batch.rows) for batch in batches) < len(set(rows)):
        part, line = rows[0]
        raise ConfigError(
            f"there is no row that can be read in line {line}", place=intake.parts[part].path, way_out="name another"
        )
    return [example for shown in workers.map(partial(pieces_of, job), batches) for example in shown]


def _middle_rows(facts: Facts) -> list[tuple[int, int]]:
    """The first row that is trained on, one in the middle and the last."""
    rows = facts.array("row_of_M")[facts.array("trained_M") > 0]
    chosen = sorted({int(rows[i]) for i in (0, len(rows) // 2, -1)}) if len(rows) else []
    return [(int(facts.array("file_R")[row]), int(facts.array("line_R")[row])) for row in chosen]


@dataclass(frozen=True)
class _Split:
    """The rows that a training would hold out, why it would refuse to, and the facts of these rows as they would be
    judged; None where that is as they are trained on."""

    rows: IntArray
    wrong: list[str] = field(default_factory=list)
    judged: Facts | None = None


def _split(workers: Workers, survey: _Survey, judge: Job, settings: CheckSettings) -> _Split:
    """As :func:`likely.data.split.hold_out` does."""
    facts, nothing = survey.facts, _Split(np.empty(0, np.int64))
    if settings.eval_data is not None or settings.eval_share == 0:
        return nothing
    rows, keys = facts.rows_rendered()
    groups = groups_unasked(keys) if settings.eval_share is None else families(keys)
    share = share_unasked(groups) if settings.eval_share is None else settings.eval_share
    if not share or not len(rows):
        return nothing
    try:
        train, held_out = (rows[part] for part in split_groups(groups, keys, share, settings.seed))
    except ValueError as error:
        return replace(nothing, wrong=[none_held_out(error)])
    judged = facts if judge.recipe == survey.job.recipe else _judged(workers, survey, judge, held_out)
    wrong = checking.refusals(checking.prove(judged, judge.limit), settings.on_bad_row, settings.on_too_long)
    if judged is not facts and wrong:
        return _Split(held_out, [f"held-out rows: {reason}" for reason in wrong], judged)
    ours = facts.usable_M(judge.limit, settings.on_too_long)
    theirs = judged.usable_M(judge.limit, settings.on_too_long)
    is_held_out = np.isin(facts.array("row_of_M"), held_out)
    if not (ours & ~is_held_out).any() or not (theirs & is_held_out if judged is facts else theirs).any():
        return (
            nothing
            if settings.eval_share is None
            else replace(nothing, wrong=[one_side_empty(len(train), len(held_out))])
        )
    return _Split(held_out, judged=None if judged is facts else judged)


def _judged(workers: Workers, survey: _Survey, judge: Job, rows: IntArray) -> Facts:
    """The facts of some rows as they are judged."""
    facts = survey.facts
    wanted = zip(facts.array("file_R")[rows].tolist(), facts.array("line_R")[rows].tolist(), strict=True)
    judged = Facts(facts.paths)
    for part in workers.map(partial(survey_batch, judge, False), survey.intake.find(wanted)):
        judged.add(part.facts)
    return judged


def _pack_tokens(survey: _Survey, held_out: IntArray, judged: Sequence[Facts], settings: CheckSettings) -> int:
    """As a training chooses them, with room for what it trains on and what it judges."""
    limit, longest = survey.job.limit, list[tuple[int, Source]]()
    for facts in (survey.facts, *judged):
        taken = facts.usable_M(limit, settings.on_too_long)
        if facts is survey.facts and judged:
            taken &= ~np.isin(facts.array("row_of_M"), held_out)
        length = np.where(taken, np.minimum(facts.array("length_M"), limit), 0)
        row = int(facts.array("row_of_M")[length.argmax()])
        longest.append(
            (int(length.max()), Source(facts.paths[facts.array("file_R")[row]], int(facts.array("line_R")[row])))
        )
    return choose_pack_tokens(settings.pack_tokens, *max(longest, key=lambda found: found[0]))


def _sharing(
    workers: Workers,
    survey: _Survey,
    held_out: IntArray,
    settings: CheckSettings,
    pack_tokens: int | None,
    cluster: planning.Cluster | None,
) -> dict[str, Any]:
    """How many distinct trie tokens the steps of the first epoch have, over some of them in the order of training; and
    what they cost here, and in a cluster."""
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
    chosen = _chosen_examples(workers, survey, np.flatnonzero(usable), steps)
    length = facts.array("length_M")[usable]
    if settings.on_too_long != "error":
        length = np.minimum(length, job.limit)
    pack_tokens = pack_tokens or settings.pack_tokens or default_pack_tokens(int(length.max()))
    room = max(pack_tokens, int(length.max()))  # which is more only where a training would refuse
    tokens = [sum(len(e.token_ids_T) for e in step) for step in chosen]
    packs = [build_packs(step, room) for step in chosen]
    distinct = [sum(pack.num_nodes for pack in of_step) for of_step in packs]
    shape, load = estimating.read_shape(job.place.weights), estimating.load_of(packs)
    plan = None
    if shape is not None and cluster is not None:
        slowest = planning.imbalance(shape, chosen[:PLANNED_STEPS], cluster.gpus)
        work = planning.Work(settings.tune, settings.lora_rank, settings.batch_size, pack_tokens, slowest)
        plan = {"cluster": asdict(cluster), "imbalance": slowest, **planning.plan(shape, load, work, cluster)}
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
        "estimate": _estimate(shape, load, settings, total) if shape is not None else None,
        "plan": plan,
    }


def _chosen_examples(
    workers: Workers, survey: _Survey, usable: IntArray, steps: Sequence[IntArray]
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
    for part in workers.map(partial(render_rows, survey.job), found):
        rendered.update(part)
    return [[rendered[name(i)][place_M[i]] for i in step] for step in steps]


def _estimate(shape: estimating.Shape, load: estimating.Load, settings: CheckSettings, total: int) -> dict[str, Any]:
    """Time and memory of the training on this machine's processors."""
    told = estimating.estimate(
        shape,
        load,
        tune=settings.tune,
        lora_rank=settings.lora_rank,
        dtype=settings.dtype,
        rate=estimating.measure_rate(shape.hidden),
    )
    return {**told, "seconds": told["seconds_per_step"] * total}
