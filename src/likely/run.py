"""Wires a training from its config: puts data, model, training and insight together."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from likely import manifest, outcome, provenance, run_folder, stops, storage
from likely.config import Config, Launch, to_yaml
from likely.data.cache import load_kept
from likely.data.dataset import Dataset, Request
from likely.data.formats import read_options
from likely.data.mixture import absolute_parts
from likely.data.order import num_steps, prefix_families
from likely.data.packing import choose_pack_tokens
from likely.data.render import Renderer, Supervision, load_tokenizer
from likely.data.split import hold_out, told_of_split
from likely.errors import ConfigError, LikelyError, ResourceError, is_out_of_memory
from likely.insight import evaluate as evaluation
from likely.insight.lengths import histogram
from likely.insight.report import Report
from likely.insight.report_files import write_report
from likely.journal import Journal
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.fuse import fusing
from likely.model.place import Place, check_token_ids, choose_max_length, find_model
from likely.training import engine, memory
from likely.training.checkpoint import State, name_of, require_disk, restore, rotate, save_checkpoint
from likely.training.log import Display, MetricsFile
from likely.training.optim import build_optimizer
from likely.training.tracking import About, Tracking, tracked
from likely.types import Example


@dataclass(frozen=True)
class Run:
    """A finished training: its folder and its report (also in ``report.json``)."""

    folder: Path
    report: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.report["verdict"])


@dataclass(frozen=True)
class _Inputs:
    """What a training needs before any weight is loaded; complete and checked, or an error was raised."""

    place: Place
    tokenizer: Any
    renderer: Renderer
    data: Dataset
    eval_data: Dataset | None
    yardsticks: outcome.Yardsticks
    config: Config  # resolved: no None where a number is meant


def train(config: Config, display: Display, launch: Launch | None = None) -> Run:
    """Score the base model, train, score again, save, report; or go on with a run where an earlier process stopped.

    Raises:
        LikelyError: of the kind that fits; the folder is left as it was if the input is at fault.
        Stopped: by a signal, after saving what is done.
    """
    launch = launch or Launch()
    with (
        stops.listening(),
        run_folder.claimed(config.output, resume=launch.resume is not None) as claim,
        tracked(launch.trackers, display.say) as tracking,
    ):
        try:
            return _train(config, launch, claim, tracking, display)
        except stops.Stopped as stopped:
            raise stops.Stopped(stopped.signum, f"{stopped}; {claim.how_to_go_on()}") from None
        except Exception as error:
            if isinstance(error, ResourceError) and is_out_of_memory(error):
                raise ResourceError(
                    error.message, place=error.place, way_out=f"{error.way_out}; {claim.how_to_go_on()}"
                ) from error
            if not isinstance(error, LikelyError) and is_out_of_memory(error):
                way_out = f"lower --pack-tokens or use --tune lora; {claim.how_to_go_on()}"
                raise ResourceError("out of memory", place=config.output, way_out=way_out) from error
            raise


def _train(config: Config, launch: Launch, claim: run_folder.Claim, tracking: Tracking, display: Display) -> Run:
    folder = claim.folder
    start = run_folder.find_start(folder, launch.resume, display.say)
    if start.finished:
        display.say(f"{folder}: this run is finished, so there is nothing to resume")
        return Run(folder, run_folder.read_report(folder) or {})
    inputs = _read_inputs(config, display)
    model = _load(inputs)
    for note in model.kernels.notes:
        display.say(note)
    if not model.shares:
        display.say("this model's layers can't follow a branching prefix: each example is computed on its own")
    session = _begin(inputs, model, start, claim, tracking, display)
    before = outcome.look(model, inputs.yardsticks, display, "base")
    if before.summary:
        session.journal.record(0, before.summary)
    if start.manifest is not None:
        del model  # before the next is loaded: two may not fit
        model = _load(inputs, start.checkpoint.folder / "model" if start.checkpoint else folder / "model")
    if not start.trained:
        _run_steps(model, session, start)
        best = session.best_step
        if best is not None and best != session.journal.step:
            del model
            model = _load(inputs, folder / "checkpoints" / name_of(best) / "model")
        _save_tuned(model, session)
    after = outcome.look(model, inputs.yardsticks, display, "tuned")
    if after.summary and session.best_step is None:
        session.journal.record(session.total, after.summary)
    report = _compose_report(session, before, after)
    with storage.disk_errors(folder, "the report"):
        write_report(report, provenance.published(inputs.config.model_dump(), session.origins, inputs.place), folder)
    display.say(report.verdict)
    return Run(folder, report.to_dict())


def _load(inputs: _Inputs, saved: Path | None = None) -> LanguageModel:
    config, dtype = inputs.config, models.choose_compute_dtype(inputs.config.dtype, models.best_device())
    if saved is not None:
        model = models.load_for_resuming(config.model, saved, compute_dtype=dtype)
    else:
        rank = None if config.tune == "full" else config.lora_rank
        tuning = models.Tuning(rank, config.lora_alpha, config.seed, quantized=config.tune == "qlora")
        model = models.load_for_training(config.model, tuning, compute_dtype=dtype)
    memory.set_limits(model, config.activation_checkpointing)
    if model.activation_room != 0:
        memory.keep_freed_memory()
    return model


def _read_inputs(config: Config, display: Display) -> _Inputs:
    place = find_model(config.model)
    tokenizer = load_tokenizer(place.tokenizer)
    supervision = Supervision(config.train_on, config.prompt_weight)
    renderer = Renderer(tokenizer, supervision, config.template, config.template_date)
    limit = choose_max_length(place, config.max_length)
    options = read_options(config.format, config.columns, config.on_bad_row == "skip", config.seed)

    # Held-out data is always judged by the answers, whatever training gives weight to.
    judge = Renderer(tokenizer, template=config.template, template_date=config.template_date)
    judging = Request(config.eval_data or config.data, judge, limit, options, config.on_too_long)
    data = load_kept(Request(config.data, renderer, limit, options, config.on_too_long), display.counting)
    eval_data = load_kept(judging, display.counting) if config.eval_data else None
    for dataset in filter(None, (data, eval_data)):
        check_token_ids(place, dataset.largest_token)
        for line in dataset.told:
            display.say(line)
        if dataset.num_unweighted:
            display.say(f"{dataset.path}: {dataset.num_unweighted} examples have weight 0 throughout and are left out")
    if eval_data and eval_data.sha256 == data.sha256:
        display.say(f"{eval_data.path} is the training data itself: its figures say nothing about new examples")
    share = config.eval_share
    if eval_data is None and share != 0:
        data, eval_data, share = hold_out(data, share, config.seed, judging)
        display.say(told_of_split(data, eval_data, asked=config.eval_share is not None))
    if config.eval_every is not None and eval_data is None:
        raise ConfigError("eval_every has nothing to score: no rows are held out", way_out="give --eval-data")
    pack_tokens = _pack_tokens(config.pack_tokens, [data, eval_data])
    resolved = _resolve(config, max_length=limit, pack_tokens=pack_tokens, eval_share=share or 0.0)
    retain = outcome.read_retain(config.retain, judge, limit, display)
    guard = outcome.read_guard(config.guard, judge, limit)
    check_token_ids(place, max(retain.largest_token if retain else 0, guard.largest_token if guard else 0))
    yardsticks = outcome.Yardsticks(tokenizer, judge, eval_data, retain, guard, pack_tokens, config.num_answers)
    return _Inputs(place, tokenizer, renderer, data, eval_data, yardsticks, resolved)


def _pack_tokens(wanted: int | None, datasets: Sequence[Dataset | None]) -> int:
    """Trie tokens of a forward, with room for every example."""
    longest = max((d for d in datasets if d), key=lambda d: int(d.table.length_N.max()))
    length_N = longest.table.length_N
    return choose_pack_tokens(wanted, int(length_N.max()), longest.examples[int(length_N.argmax())].source)


def _resolve(config: Config, **chosen: float) -> Config:
    """The config with nothing left to a default that another machine, folder or version might choose otherwise."""
    dtype = models.choose_compute_dtype(config.dtype, models.best_device())
    alpha = config.lora_alpha if config.lora_alpha is not None or config.tune == "full" else 2.0 * config.lora_rank
    places = {key: getattr(config, key) for key in ("model", "output")}
    return config.model_copy(
        update={
            **{key: str(Path(place).absolute()) for key, place in places.items() if Path(place).exists()},
            "data": absolute_parts(config.data),
            "eval_data": absolute_parts(config.eval_data) if config.eval_data else None,
            "retain": absolute_parts(config.retain) if config.retain not in (None, outcome.BUNDLED) else config.retain,
            "guard": str(Path(config.guard).absolute()) if config.guard else None,
            "learning_rate": config.peak_learning_rate,
            **chosen,
            "dtype": str(dtype).removeprefix("torch."),
            "lora_alpha": alpha,
        }
    )


@dataclass(frozen=True)
class _Session:
    """A training under way. ``about`` goes into the manifest of all that is saved."""

    inputs: _Inputs
    claim: run_folder.Claim
    display: Display
    total: int
    origins: dict[str, Any]
    about: dict[str, Any]
    journal: Journal

    @property
    def best_step(self) -> int | None:
        """The step whose weights are kept, where the best are wanted and not the last."""
        best = self.journal.best
        return best[0] if self.inputs.config.patience and best else None


def _begin(
    inputs: _Inputs,
    model: LanguageModel,
    start: run_folder.Start,
    claim: run_folder.Claim,
    tracking: Tracking,
    display: Display,
) -> _Session:
    """Write down what is about to be done, after comparing it with what was begun."""
    config, folder = inputs.config, claim.folder
    total = num_steps(len(inputs.data.examples), config.batch_size, config.epochs, config.steps)
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
    tracking.start(About(str(origins["run_id"]), folder.name, folder, config.model_dump()))
    journal = Journal(
        MetricsFile(folder / "metrics.jsonl", tracking.tell),
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
    return _Session(inputs, claim, display, total, origins, about, journal)


def _run_steps(model: LanguageModel, session: _Session, start: run_folder.Start) -> None:
    config, journal, inputs, display = session.inputs.config, session.journal, session.inputs, session.display
    optimizer = build_optimizer(model.network.parameters(), config.weight_decay)
    if start.checkpoint is not None:
        restore(start.checkpoint, model.network, optimizer)
        session.claim.saved.append(name_of(journal.step))
        display.say(f"going on after step {journal.step} of {session.total}")
    checkpoints = session.claim.folder / "checkpoints"

    def save_model(path: Path) -> None:
        models.save_model(model, inputs.tokenizer, path)

    def save(state: State) -> None:
        saved = save_checkpoint(checkpoints, state, model.network, optimizer, save_model, session.about)
        session.claim.saved.append(saved.name)
        display.say(f"saved {saved}")
        rotate(checkpoints, state.step, config.keep_checkpoints, [journal.best[0]] if journal.best else [])

    def evaluate() -> evaluation.Evaluation:
        assert inputs.eval_data is not None  # noqa: S101
        examples = inputs.eval_data.examples
        scores = evaluation.score_examples(model, examples, config.pack_tokens or 0)
        return evaluation.summarize(examples, scores, inputs.tokenizer)

    journal.save, journal.evaluate = save, evaluate if inputs.eval_data else None
    fused = fusing(model.device, display.say)
    with display.training(session.total, journal.step) as show, journal.guarding(), fused:
        journal.show = show
        if journal.catch_up():
            return
        examples = inputs.data.examples
        plan = _plan(config, session.total, examples)
        engine.train(model, examples, optimizer, plan, journal, steps_done=journal.step)


def _plan(config: Config, total: int, examples: Sequence[Example]) -> engine.TrainingPlan:
    assert config.pack_tokens is not None  # noqa: S101  (resolved)
    return engine.TrainingPlan(
        num_steps=total,
        batch_size=config.batch_size,
        pack_tokens=config.pack_tokens,
        peak_learning_rate=config.peak_learning_rate,
        warmup=config.warmup,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        normalize=config.normalize,
        seed=config.seed,
        family_N=prefix_families(examples) if config.order == "families" else None,
    )


def _save_tuned(model: LanguageModel, session: _Session) -> None:
    """RUN/model, at once after the last step: from then on only the looks and the report are left to do."""
    final = session.claim.folder / "model"
    session.claim.require()
    with stops.shield(), storage.disk_errors(final, "the tuned model"):
        with manifest.put_in_place(final) as (unfinished, seal):
            models.save_model(model, session.inputs.tokenizer, unfinished)
            seal.close({"kind": "model", **session.about, "state": asdict(session.journal.state)})
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


def demo_config(output: str | None = None, *, steps: int | None = None) -> Config:
    """The demo's training: the embedded model learns to answer a capital's name first. Without an ``output``, the first
    of runs/demo, runs/demo-2, ... that is free."""
    if output is None:
        names = itertools.chain(["runs/demo"], (f"runs/demo-{i}" for i in itertools.count(2)))
        output = next(name for name in names if not Path(name).exists())
    data = Path(__file__).parent / "demo"
    return Config(
        model="smollm2-135m",
        data=str(data / "train.jsonl"),
        eval_data=str(data / "eval.jsonl"),
        output=output,
        learning_rate=3e-4,
        **({"epochs": 2.0} if steps is None else {"steps": steps}),
        num_answers=40,
    )
