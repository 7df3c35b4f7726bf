"""Wires ``likely curve``: trainings on nested shares of the data, with several seeds, judged on the same held-out rows.

    DIR/config.yaml, origins.json   the settings of all trainings, and the hashes of what they start from
    DIR/metrics.jsonl               of the training under way
    DIR/points/base/                held-out NLL of each example under the base model
    DIR/points/rows-N-seed-S/       the same after training on N rows with seed S, and of as many rows that were trained
                                    on; and the training's metrics.jsonl
    DIR/curve.json, .csv, .svg, .html   all points and what they say

No weights are kept. A point is there once its folder is, synced and sealed by a manifest; what is not there is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from likely import launched, manifest, provenance, run_folder, stops, storage
from likely.config import to_yaml
from likely.data.dataset import Dataset
from likely.data.families import families, nested_rows
from likely.data.order import num_steps
from likely.data.table import Table
from likely.data.trie import entropy_floor
from likely.errors import ConfigError, DataError, ModelError
from likely.inputs import Inputs, load_model, plan_of, read_inputs, tuning_of
from likely.insight import curve_page
from likely.insight import evaluate as evaluation
from likely.insight.curve_answer import judge
from likely.insight.curve_point import Judge, Judged, some_of
from likely.insight.power_law import Scores
from likely.insight.room import Seen, room_for_more
from likely.journal import Journal
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.fuse import fusing
from likely.training import engine
from likely.training.log import Display, MetricsFile, UnwrittenMetrics
from likely.training.optim import build_optimizer
from likely.training.parallel import Ranks, joined
from likely.types import Example, FloatArray, StepMetrics
from likely.verb_settings import CurveSettings

BASE = "base"
SEEN = "the held-out data is the training data, and says nothing about new examples"


@dataclass(frozen=True)
class Curve:
    """A finished learning curve: its folder, and the content of its curve.json."""

    folder: Path
    result: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.result["verdict"])


@dataclass(frozen=True)
class _Point:
    """One training: a share of the rows and a seed."""

    share: Fraction
    seed: int
    table: Table
    steps: int

    @property
    def name(self) -> str:
        return f"rows-{len(self.table.conversations):09d}-seed-{self.seed}"


@dataclass(frozen=True)
class _Job:
    """A curve under way. ``about`` goes into the manifest of each point."""

    settings: CurveSettings
    inputs: Inputs
    held_out: Dataset
    claim: run_folder.Claim
    display: Display
    about: dict[str, Any]
    ranks: Ranks

    @property
    def points(self) -> Path:
        return self.claim.folder / "points"


def curve(settings: CurveSettings, display: Display) -> Curve:
    """Train on every share with every seed, judge each on the held-out rows, and say what doubling the data brings.

    Raises:
        LikelyError: of the kind that fits; points that are done stay.
        Stopped: by a signal.
    """
    with stops.listening(), joined() as ranks:
        launched.require(settings.nproc)
        resume = settings.resume is not None or ranks.restarted
        claiming = run_folder.claimed(settings.output, resume=resume, layout=run_folder.CURVE, first=ranks.first)
        with claiming as claim, claim.explaining():
            return _curve(_begin(settings, claim, display, ranks))


def _curve(job: _Job) -> Curve:
    claim, display = job.claim, job.display
    points = _points_of(job)
    done = _find_done(job, [BASE, *(point.name for point in points)])
    missing = [point for point in points if point.name not in done]
    if missing or BASE not in done:
        _train(job, missing, done)
    result = _compose(job, points, done)
    if job.ranks.first:
        _write(job, result)
    display.say(result["verdict"])
    return Curve(claim.folder, result)


def _begin(settings: CurveSettings, claim: run_folder.Claim, display: Display, ranks: Ranks) -> _Job:
    ranks.agree()  # that the folder is ours
    inputs = ranks.one_host_one_maker(lambda: read_inputs(settings.training(), display))
    if inputs.eval_data is None:
        raise ConfigError("nothing is held out to judge the trainings by", way_out="give --eval-data or --eval-share")
    sources = provenance.sources(inputs.place, inputs.tokenizer, inputs.data, inputs.eval_data)
    sources |= {"versions": provenance.versions(), "device": provenance.device_name(models.best_device())}
    about = {"config": inputs.config.model_dump(), "fingerprints": provenance.fingerprints(sources)}
    shared = [key for key in type(settings).model_fields if key in type(inputs.config).model_fields]
    chosen = {**{key: getattr(inputs.config, key) for key in shared}, "resume": None, "nproc": None}
    job = _Job(settings, inputs, inputs.eval_data, claim, display, about, ranks)
    ranks.require_same("the settings or the data", inputs.identity())
    if not ranks.first:
        return job
    for folder in sorted(job.points.iterdir()) if job.points.is_dir() else []:
        try:
            begun = manifest.read(folder)
        except ModelError:  # told where the point is looked for
            continue
        run_folder.refuse_changes(begun, about, claim.folder)
    with storage.disk_errors(claim.folder, "the settings"):
        # origins.json comes first: it says that what else is there is a curve's.
        storage.replace_file(claim.folder / "origins.json", (json.dumps(sources, indent=2) + "\n").encode())
        storage.replace_file(claim.folder / "config.yaml", to_yaml(settings.model_copy(update=chosen)).encode())
        storage.make_folder(job.points)
    return job


def _points_of(job: _Job) -> list[_Point]:
    """All trainings, seed by seed, the smallest first.

    Raises:
        DataError: the rows are too few, or in too few families, to be parted so.
    """
    config, data, shares = job.inputs.config, job.inputs.data, job.settings.sizes
    keys = data.table.keys
    groups = families(keys)
    points = []
    for seed in range(config.seed, config.seed + job.settings.seeds):
        subsets = nested_rows(groups, keys, [float(share) for share in shares], seed)
        for share, rows, smaller in zip(shares, subsets, [0, *map(len, subsets)], strict=False):
            table = data.table.select(rows)
            if len(rows) == smaller or not len(table.examples):
                raise DataError(
                    f"{len(groups)} rows in {groups.max() + 1} families can't be parted into shares of"
                    f" {', '.join(map(str, shares))}: at {share} nothing is added",
                    place=data.path,
                    way_out="give more data, or larger --shares",
                )
            steps = num_steps(len(table.examples), config.batch_size, config.epochs, config.steps)
            points.append(_Point(share, seed, table, steps))
    return points


def _find_done(job: _Job, names: Sequence[str]) -> dict[str, Judged]:
    """The points that an earlier process has finished; one that can't be trusted is told, and made again."""
    found: dict[str, Judged] = {}
    for name in names:
        folder = job.points / name
        if not folder.exists() or not job.ranks.first:
            continue
        try:
            manifest.verify(folder)
            scores = folder / "scores.json"
            judged = Judged.from_json(json.loads(scores.read_bytes()), str(scores))
            if judged.nll_N.shape != (len(job.held_out.examples),):
                raise ModelError("is of other held-out rows", place=str(scores))
            found[name] = judged
        except (ModelError, OSError, ValueError) as error:
            job.display.say(f"passed over: {error}")
    told = job.ranks.first_says([[name, judged.to_json()] for name, judged in found.items()])
    return {name: Judged.from_json(content) for name, content in told}


def _train(job: _Job, missing: Sequence[_Point], done: dict[str, Judged]) -> None:
    """The points that are not done, from one model in memory; each is in ``done`` and on the disk before the next."""
    display, model = job.display, load_model(job.inputs, ranks=job.ranks)
    for note in model.kernels.notes:
        display.say(note)
    restart = models.Restart(model, tuning_of(job.inputs.config))
    if BASE not in done:
        done[BASE] = _judge_of(job, model, []).judge(0)
        _save(job, BASE, done[BASE])
    steps_before = 0
    total = sum(point.steps for point in missing)
    with display.training(total) as show, fusing(model.device, display.say):
        for number, point in enumerate(missing, 1):
            rows = len(point.table.conversations)
            display.say(f"training {number} of {len(missing)}: {rows:,} rows, seed {point.seed}, {point.steps} steps")

            def show_all(metrics: StepMetrics, before: int = steps_before) -> None:
                show(replace(metrics, step=before + metrics.step))

            restart.begin(point.seed)
            done[point.name] = _train_point(job, model, point, show_all)
            _save(job, point.name, done[point.name])
            nll = done[point.name].nll_N.sum() / _weights(job.held_out).sum()
            display.say(f"{rows:,} rows, seed {point.seed}: held-out NLL {nll:.4f} nats per token")
            steps_before += point.steps


def _judge_of(job: _Job, model: LanguageModel, trained_on: Sequence[Example]) -> Judge:
    inputs = job.inputs
    return Judge(model, inputs.tokenizer, job.held_out.examples, trained_on, inputs.config.pack_tokens or 0, job.ranks)


def _train_point(job: _Job, model: LanguageModel, point: _Point, show: Callable[[StepMetrics], None]) -> Judged:
    config = job.inputs.config.model_copy(update={"seed": point.seed})
    metrics = (MetricsFile if job.ranks.first else UnwrittenMetrics)(job.claim.folder / "metrics.jsonl")
    metrics.rewind(0)
    judge = _judge_of(job, model, some_of(point.table.examples, len(job.held_out.examples), point.seed))
    journal = Journal(
        metrics,
        point.steps,
        save=judge.keep,
        evaluate=judge.evaluate,
        show=show,
        say=job.display.say,
        require=job.claim.require,
        eval_every=config.eval_every,
        patience=config.patience,
    )
    optimizer = build_optimizer(model.network.parameters(), config.weight_decay)
    examples = point.table.examples
    engine.train(model, examples, optimizer, plan_of(config, point.steps, examples), journal, ranks=job.ranks)
    if config.patience and judge.best:
        return judge.best
    return judge.judge(journal.step)


def _save(job: _Job, name: str, judged: Judged) -> None:
    """Put a point in place, by the first rank; when this returns there, no crash can take it away."""
    if not job.ranks.first:
        return
    final, metrics = job.points / name, job.claim.folder / "metrics.jsonl"
    job.claim.require()
    with stops.shield(), storage.disk_errors(final, "the point"):
        with manifest.put_in_place(final) as (unfinished, seal):
            if name != BASE:
                storage.system.rename(metrics, unfinished / "metrics.jsonl")
            storage.create_file(unfinished / "scores.json", json.dumps(judged.to_json()).encode())
            seal.close({"kind": "point", **job.about})
        job.claim.saved.append(f"the point {name}")


def _weights(data: Dataset) -> FloatArray:
    return np.array([example.weights_T.sum() for example in data.examples])


def _compose(job: _Job, points: Sequence[_Point], done: dict[str, Judged]) -> dict[str, Any]:
    """The content of curve.json: a function of the points alone, whichever processes made them."""
    config, held_out, shares = job.inputs.config, job.held_out, job.settings.sizes
    weight_N = _weights(held_out)
    of_share = [[point for point in points if point.share == share] for share in shares]
    size_K = np.array([np.mean([len(p.table.conversations) for p in own]) for own in of_share])
    nll_KSN = np.array([[done[p.name].nll_N for p in own] for own in of_share])
    scores, base_N = Scores(size_K, nll_KSN, weight_N), done[BASE].nll_N
    base = float(base_N.sum() / weight_N.sum())
    seen = config.eval_data is not None and held_out.sha256 == job.inputs.data.sha256
    seen_rows = Seen.of([[(done[p.name].seen_nll_M, done[p.name].seen_weight_M) for p in own] for own in of_share])
    room_B = room_for_more(scores, seen_rows, entropy_floor(held_out.examples))
    answer = judge(scores, base, [SEEN] if seen else [], room_B)
    last = "best evaluation" if config.patience else "last weights"
    passes = f"{config.steps} optimizer steps" if config.steps else f"{config.epochs:g} passes over its rows"
    return {
        "verdict": answer.pop("verdict"),
        **{key: answer[key] for key in answer if key != "size_ci95"},
        "held_fixed": f"each training has {passes}, batches of {config.batch_size} and a peak learning rate of"
        f" {config.peak_learning_rate:g}, and is judged by its {last}",
        "base": {"nll": base, "ci95": evaluation.interval_of_ratio(base_N, weight_N)},
        "sizes": [
            {
                "share": str(share),
                "rows": float(size_K[k]),
                "nll": float(scores.mean_K[k]),
                "ci95": answer["size_ci95"][k],
                "nll_of_seeds": scores.mean_KS[k].tolist(),
                "seen_nll": float(seen_rows.nll_KS[k].mean()),
            }
            for k, share in enumerate(shares)
        ],
        "points": [
            {
                "share": str(point.share),
                "rows": len(point.table.conversations),
                "examples": len(point.table.examples),
                "tokens": int(point.table.length_N.sum()),
                "seed": point.seed,
                "steps": point.steps,
                "judged_after": done[point.name].step,
                "nll": float(done[point.name].nll_N.sum() / weight_N.sum()),
                "seen_nll": done[point.name].seen_nll,
                "folder": f"points/{point.name}",
            }
            for point in points
        ],
        "held_out": {
            "path": held_out.path,
            "sha256": held_out.sha256,
            "num_examples": len(held_out.examples),
            "num_tokens": float(weight_N.sum()),
        },
        "data": {"path": job.inputs.data.path, "sha256": job.inputs.data.sha256},
        "model": config.model,
    }


def _write(job: _Job, result: dict[str, Any]) -> None:
    """The results; curve.json last, which says that they are complete."""
    job.claim.require()
    files = {
        "curve.csv": curve_page.to_csv(result),
        "curve.svg": curve_page.to_svg(result),
        "curve.html": curve_page.to_html(result),
        "curve.json": json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    with storage.disk_errors(job.claim.folder, "the results"):
        for name, text in files.items():
            # A file name that is no UTF-8 is written as its escape, which JSON knows too.
            storage.replace_file(job.claim.folder / name, text.encode(errors="backslashreplace"))
