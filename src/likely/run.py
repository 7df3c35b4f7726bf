"""Wires a training from its config: puts data, model, training and insight together."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from likely import launched, manifest, outcome, provenance, run_folder, stops, storage
from likely.config import Config, Launch, to_yaml
from likely.data.order import num_steps
from likely.inputs import Inputs, load_model, plan_of, read_inputs, shards
from likely.insight import evaluate as evaluation
from likely.insight.lengths import histogram
from likely.insight.report import Report
from likely.insight.report_files import write_report
from likely.journal import Journal
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.fuse import fusing
from likely.training import engine, sharded_files
from likely.training.checkpoint import State, name_of, require_disk, restore, rotate, save_checkpoint
from likely.training.log import Display, MetricsFile, UnwrittenMetrics
from likely.training.optim import build_optimizer
from likely.training.parallel import Ranks, joined
from likely.training.tracking import About, Tracking, tracked


@dataclass(frozen=True)
class Run:
    """A finished training: its folder and its report (also in ``report.json``)."""

    folder: Path
    report: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.report["verdict"])


def train(config: Config, display: Display, launch: Launch | None = None) -> Run:
    """Score the base model, train, score again, save, report; or go on with a run where an earlier process stopped.

    Raises:
        LikelyError: of the kind that fits; the folder is left as it was if the input is at fault.
        Stopped: by a signal, after saving what is done.
    """
    launch = launch or Launch()
    with stops.listening(), joined() as ranks:
        launched.require(launch.nproc)
        resume = launch.resume or ("newest" if ranks.restarted else None)  # what is started again goes on by itself
        with (
            run_folder.claimed(config.output, resume=resume is not None, first=ranks.first) as claim,
            tracked(launch.trackers if ranks.first else [], display.say) as tracking,
            claim.explaining(),
        ):
            return _train(config, launch.model_copy(update={"resume": resume}), claim, tracking, display, ranks)


def _train(
    config: Config, launch: Launch, claim: run_folder.Claim, tracking: Tracking, display: Display, ranks: Ranks
) -> Run:
    folder = claim.folder
    start = run_folder.find_start(folder, launch.resume, display.say) if ranks.first else run_folder.Start()
    start = run_folder.Start.of(ranks.first_says(start.told()))
    if start.finished:
        display.say(f"{folder}: this run is finished, so there is nothing to resume")
        return Run(folder, run_folder.read_report(folder) or {})
    inputs = ranks.one_host_one_maker(lambda: read_inputs(config, display))
    load = partial(load_model, inputs, ranks=ranks, sharded=shards(inputs, launch.shard, ranks))
    model = load()
    _compare(inputs, model, ranks)
    _tell_of(model, ranks, display)
    session = _begin(inputs, model, start, claim, tracking, display, ranks)
    before = outcome.look(model, inputs.yardsticks, display, "base", ranks)
    if before.summary:
        session.journal.record(0, before.summary)
    if start.manifest is not None:
        del model  # before the next is loaded: two may not fit
        saved = start.checkpoint.folder / "model" if start.checkpoint else folder / "model"
        model = load(saved)
    if not start.trained:
        _run_steps(model, session, start)
        best = session.best_step
        if best is not None and best != session.journal.step:
            del model
            ranks.agree()  # that it is saved
            model = load(folder / "checkpoints" / name_of(best) / "model")
        if ranks.first or model.sharded:
            _save_tuned(model, session)
    after = outcome.look(model, inputs.yardsticks, display, "tuned", ranks)
    if after.summary and session.best_step is None:
        session.journal.record(session.total, after.summary)
    if not ranks.first:
        return Run(folder, {})
    report = _compose_report(session, before, after)
    with storage.disk_errors(folder, "the report"):
        write_report(report, provenance.published(inputs.config.model_dump(), session.origins, inputs.place), folder)
    display.say(report.verdict)
    return Run(folder, report.to_dict())


def _compare(inputs: Inputs, model: LanguageModel, ranks: Ranks) -> None:
    """All ranks are to start from the same; of sharded weights, each has others."""
    if not ranks.alone:
        weights = None if model.sharded else models.checksum(model)
        ranks.require_same("the settings, the data or the weights", [inputs.identity(), weights])


def _tell_of(model: LanguageModel, ranks: Ranks, display: Display) -> None:
    for note in model.kernels.notes:
        display.say(note)
    if model.sharded:
        where = "" if ranks.shards == ranks.world_size else " of a host"
        display.say(f"the model is sharded: each of {ranks.shards} processes{where} holds some rows of every weight")
    if not model.shares:
        display.say("this model's layers can't follow a branching prefix: each example is computed on its own")


@dataclass(frozen=True)
class _Session:
    """A training under way. ``about`` goes into the manifest of all that is saved."""

    inputs: Inputs
    claim: run_folder.Claim
    display: Display
    total: int
    origins: dict[str, Any]
    about: dict[str, Any]
    journal: Journal
    ranks: Ranks

    @property
    def best_step(self) -> int | None:
        """The step whose weights are kept, where the best are wanted and not the last."""
        best = self.journal.best
        return best[0] if self.inputs.config.patience and best else None


def _begin(
    inputs: Inputs,
    model: LanguageModel,
    start: run_folder.Start,
    claim: run_folder.Claim,
    tracking: Tracking,
    display: Display,
    ranks: Ranks,
) -> _Session:
    """Write down what is about to be done, after comparing it with what was begun."""
    config, folder = inputs.config, claim.folder
    total = num_steps(len(inputs.data.examples), config.batch_size, config.epochs, config.steps)
    origins, about = dict[str, Any](), dict[str, Any]()
    metrics: MetricsFile = UnwrittenMetrics(folder / "metrics.jsonl")
    if ranks.first:
        origins, about = _write_beginning(inputs, model, start, folder, total)
        tracking.start(About(str(origins["run_id"]), folder.name, folder, config.model_dump()))
        metrics = MetricsFile(folder / "metrics.jsonl", tracking.tell)
    journal = Journal(
        metrics,
        total,
        eval_every=config.eval_every,
        save_every=config.save_every,
        skip_nonfinite=config.skip_nonfinite,
        patience=config.patience,
        say=display.say,
        require=claim.require,
    )
    if start.state is not None:
        journal.remember(start.state)
        journal.evaluated = dict(ranks.first_says(list(journal.evaluated.items())))
    return _Session(inputs, claim, display, total, origins, about, journal, ranks)


def _write_beginning(
    inputs: Inputs, model: LanguageModel, start: run_folder.Start, folder: Path, total: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of run.json, and what goes into the manifest of all that is saved."""
    config = inputs.config
    origins = provenance.describe(
        model, inputs.place, inputs.tokenizer, inputs.data, inputs.eval_data, seed=config.seed, num_steps=total
    )
    origins = {"run_id": start.run_id or secrets.token_hex(16), **origins}
    about = {
        "run_id": origins["run_id"],
        "config": config.model_dump(),
        "fingerprints": provenance.fingerprints(origins),
        "versions": origins["versions"],
    }
    if start.manifest is not None:
        run_folder.refuse_changes(start.manifest, about, folder)
    require_disk(folder, models.bytes_to_save(model))
    with storage.disk_errors(folder, "the run's settings"):
        # run.json comes first: it says that what else is there is a run's.
        storage.replace_file(folder / "run.json", (json.dumps(origins, indent=2) + "\n").encode())
        storage.replace_file(folder / "config.yaml", to_yaml(config).encode())
        for name, dataset in (("rejected.jsonl", inputs.data), ("rejected-eval.jsonl", inputs.eval_data)):
            if dataset and dataset.rejected:
                storage.replace_file(folder / name, dataset.rejected_lines().encode())
    return origins, about


def _run_steps(model: LanguageModel, session: _Session, start: run_folder.Start) -> None:
    config, journal, inputs, display = session.inputs.config, session.journal, session.inputs, session.display
    ranks = session.ranks
    optimizer = build_optimizer(model.network.parameters(), config.weight_decay)
    if start.checkpoint is not None:
        if model.sharded:
            sharded_files.restore(start.checkpoint, model, optimizer, ranks)
        else:
            restore(start.checkpoint, model.network, optimizer)
        session.claim.saved.append(name_of(journal.step))
        display.say(f"going on after step {journal.step} of {session.total}")
    checkpoints = session.claim.folder / "checkpoints"

    def save_model(path: Path) -> None:
        models.save_model(model, inputs.tokenizer, path)

    def save(state: State) -> None:
        saved = checkpoints / name_of(state.step)
        if model.sharded:
            sharded_files.save_checkpoint(saved, state, model, optimizer, inputs.tokenizer, session.about, ranks)
        else:
            save_checkpoint(checkpoints, state, model.network, optimizer, save_model, session.about)
        if not ranks.first:
            return
        session.claim.saved.append(saved.name)
        display.say(f"saved {saved}")
        rotate(checkpoints, state.step, config.keep_checkpoints, [journal.best[0]] if journal.best else [])

    def evaluate() -> evaluation.Evaluation:
        assert inputs.eval_data is not None  # noqa: S101
        examples = inputs.eval_data.examples
        scores = evaluation.score_examples(model, examples, config.pack_tokens or 0, ranks=ranks)
        return evaluation.summarize(examples, scores, inputs.tokenizer)

    journal.evaluate = evaluate if inputs.eval_data else None
    if ranks.first or model.sharded:
        journal.save = save
    if model.sharded:
        journal.all_of = ranks.all_of
    fused = fusing(model.device, display.say)
    with display.training(session.total, journal.step) as show, journal.guarding(), ranks.together(), fused:
        journal.show = show
        if journal.catch_up():
            return
        examples = inputs.data.examples
        plan = plan_of(config, session.total, examples)
        engine.train(model, examples, optimizer, plan, journal, steps_done=journal.step, ranks=ranks)


def _save_tuned(model: LanguageModel, session: _Session) -> None:
    """RUN/model, at once after the last step: from then on only the looks and the report are left to do."""
    final = session.claim.folder / "model"
    session.claim.require()
    about = {"kind": "model", **session.about, "state": asdict(session.journal.state)}
    if model.sharded:
        with sharded_files.put_in_place(final, session.ranks) as (unfinished, seal):
            sharded_files.save_model(model, session.inputs.tokenizer, unfinished, session.ranks)
            session.ranks.agree()
            if seal is not None:
                seal.close(about)
        session.claim.saved.append("the tuned model")
        return
    with stops.shield(), storage.disk_errors(final, "the tuned model"):
        with manifest.put_in_place(final) as (unfinished, seal):
            models.save_model(model, session.inputs.tokenizer, unfinished)
            seal.close(about)
        session.claim.saved.append("the tuned model")


def _compose_report(session: _Session, before: outcome.Look, after: outcome.Look) -> Report:
    inputs, journal = session.inputs, session.journal
    config, yardsticks = inputs.config, inputs.yardsticks
    facts = provenance.facts(config.model_dump(), session.origins, journal.steps)
    kept = session.best_step
    if kept is not None:
        facts["kept"] = f"the model after step {kept}, the best of {session.total} by held-out NLL"
    counted = provenance.counted(
        training_data=inputs.data, held_out_data=inputs.eval_data, retained_text=yardsticks.retain
    )
    return Report(
        title=f"{Path(config.data).name} on {config.model}",
        facts=facts,
        counted=counted,
        hashes=provenance.hashes(session.origins),
        notes=[line for data in (inputs.data, inputs.eval_data) if data for line in data.told],
        lengths=histogram(inputs.data.table.length_N, config.max_length or 0),
        evaluations=journal.course(before.summary, after.summary, journal.step if kept is None else kept),
        steps=journal.steps,
        entropy_floor=outcome.training_floor(inputs.data, config.normalize),
        eval_is_data=bool(config.eval_data and inputs.eval_data and inputs.eval_data.sha256 == inputs.data.sha256),
        retain=outcome.retain_figures(yardsticks, after, before),
        guard=outcome.guard_figures(yardsticks, after, before, config.guard_max_gain),
        **outcome.changes(yardsticks, before, after),
    )
