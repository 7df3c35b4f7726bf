"""Wires a training from its config: puts data, model, training and insight together."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from likely import provenance
from likely.config import Config, to_yaml
from likely.data.dataset import Dataset, load_dataset, num_steps
from likely.data.packing import default_pack_tokens
from likely.data.render import Renderer, Supervision, load_tokenizer
from likely.data.trie import entropy_floor
from likely.errors import ConfigError, ResourceError
from likely.insight import evaluate as evaluation
from likely.insight.lens import compare_next_token, next_token_logprobs
from likely.insight.report import Answer, Report, write_report
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.generate import greedy_answers
from likely.training import engine
from likely.training.checkpoint import save_checkpoint
from likely.training.log import Display, MetricsFile
from likely.training.optim import build_optimizer
from likely.types import Example, ExampleScore, StepMetrics

MAX_FLOOR_TOKENS = 20_000_000  # about 2 GB of trie


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

    place: models.Place
    tokenizer: Any
    renderer: Renderer
    data: Dataset
    eval_data: Dataset | None
    config: Config  # resolved: no None where a number is meant


def train(config: Config, display: Display, *, num_answers: int = 0) -> Run:
    """Score the base model, train, score again, save, report.

    Args:
        num_answers: ask both models for greedy answers to so many held-out prompts.

    Raises:
        LikelyError: of the kind that fits; before any file is written if the input is at fault.
    """
    folder = _free_folder(config.output)
    inputs = _read_inputs(config, display)
    config = inputs.config
    model = models.load_for_training(
        config.model,
        models.Tuning(config.lora_rank if config.tune == "lora" else None, config.lora_alpha, config.seed),
        compute_dtype=models.choose_compute_dtype(config.dtype, models.best_device()),
    )
    if not model.shares:
        display.say("this model's layers can't follow a branching prefix: each example is computed on its own")
    total = num_steps(len(inputs.data.examples), config.batch_size, config.epochs, config.steps)
    _make_folder(folder)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    origins = provenance.describe(
        model, inputs.place, inputs.tokenizer, inputs.data, inputs.eval_data, seed=config.seed, num_steps=total
    )
    (folder / "run.json").write_text(json.dumps(origins, indent=2) + "\n", encoding="utf-8")
    before = _look(model, inputs, num_answers, display, "base")
    steps = _run_steps(model, inputs, total, folder, display)
    after = _look(model, inputs, num_answers, display, "tuned")
    models.save_model(model, inputs.tokenizer, folder / "model")
    report = _compose_report(inputs, origins, steps, before, after)
    write_report(report, folder)
    (folder / "README.md").write_text(
        provenance.model_card(report.title, report.verdict, report.facts), encoding="utf-8"
    )
    display.say(report.verdict)
    return Run(folder, report.to_dict())


def _free_folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the run folder is not empty", place=output, way_out="name another --output or remove it")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{parent} can't be written to", place=output, way_out="name another --output")
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"the folder can't be made: {error.strerror or error}", place=str(folder), way_out="name another --output"
        ) from error


def _read_inputs(config: Config, display: Display) -> _Inputs:
    place = models.find_model(config.model)
    tokenizer = load_tokenizer(place.tokenizer)
    renderer = Renderer(tokenizer, Supervision(config.train_on, config.prompt_weight))
    context = models.read_context_length(place)
    limit = config.max_length or context
    if limit > context:
        raise ConfigError(
            f"max_length {limit} is over the model's context of {context} tokens", way_out=f"use at most {context}"
        )
    data = load_dataset(config.data, renderer, limit, display.track)
    # Held-out data is always judged by the answers, whatever training gives weight to.
    judge = Renderer(tokenizer)
    eval_data = load_dataset(config.eval_data, judge, limit, display.track) if config.eval_data else None
    for dataset in filter(None, (data, eval_data)):
        if dataset.num_unweighted:
            display.say(f"{dataset.path}: {dataset.num_unweighted} examples have weight 0 throughout and are left out")
    if renderer.has_template and data.conversations[0].plain:
        display.say("prompt and completion strings go through the model's chat template, as user and assistant")
    longest = max((e for d in (data, eval_data) if d for e in d.examples), key=lambda e: len(e.token_ids_T))
    num_longest = len(longest.token_ids_T)
    if config.pack_tokens is not None and config.pack_tokens < num_longest:
        raise ConfigError(
            f"pack_tokens {config.pack_tokens} can't hold the longest example, {num_longest} tokens",
            place=str(longest.source),
            way_out=f"use at least {num_longest}",
        )
    resolved = config.model_copy(
        update={
            "learning_rate": config.peak_learning_rate,
            "max_length": limit,
            "pack_tokens": config.pack_tokens or default_pack_tokens([longest]),
        }
    )
    return _Inputs(place, tokenizer, renderer, data, eval_data, resolved)


@dataclass(frozen=True)
class _Look:
    """What one state of the model makes of the held-out data."""

    scores: list[ExampleScore]
    summary: evaluation.Evaluation
    next_token: Any
    answers: list[str]


def _first_prediction(example: Example) -> tuple[list[int], int]:
    """Context and gold token of the first supervised token."""
    first = int((example.weights_T > 0).argmax())
    return example.token_ids_T[:first].tolist(), int(example.token_ids_T[first])


def _look(model: LanguageModel, inputs: _Inputs, num_answers: int, display: Display, state: str) -> _Look | None:
    if inputs.eval_data is None:
        return None
    examples = inputs.eval_data.examples
    assert inputs.config.pack_tokens is not None  # noqa: S101  (resolved)
    scores = evaluation.score_examples(model, examples, inputs.config.pack_tokens, display.track)
    summary = evaluation.summarize(examples, scores, inputs.tokenizer)
    low, high = summary.ci95 or (math.nan, math.nan)
    display.say(f"{state}: held-out NLL {summary.nll:.4f} nats per token, 95% interval [{low:.4f}, {high:.4f}]")
    asked = examples[:num_answers]
    answers = greedy_answers(
        model,
        inputs.tokenizer,
        [_first_prediction(e)[0] for e in asked],
        stop_id=inputs.renderer.end_of_turn.token_id,
        max_new_tokens=2 * max((int((e.weights_T > 0).sum()) for e in asked), default=0) + 1,
        track=display.track,
    )
    return _Look(scores, summary, next_token_logprobs(model, _first_prediction(examples[0])[0]), answers)


def _run_steps(model: LanguageModel, inputs: _Inputs, total: int, folder: Path, display: Display) -> list[StepMetrics]:
    config, steps = inputs.config, list[StepMetrics]()
    assert config.pack_tokens is not None  # noqa: S101  (resolved)
    optimizer = build_optimizer(model.network.parameters(), config.weight_decay)
    metrics_file = MetricsFile(folder / "metrics.jsonl")
    plan = engine.TrainingPlan(
        num_steps=total,
        batch_size=config.batch_size,
        pack_tokens=config.pack_tokens,
        peak_learning_rate=config.peak_learning_rate,
        warmup=config.warmup,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        normalize=config.normalize,
        seed=config.seed,
    )
    with display.training(total) as show:

        def after_step(metrics: StepMetrics) -> None:
            steps.append(metrics)
            metrics_file.write_step(metrics)
            show(metrics)
            last = metrics.step == total
            if inputs.eval_data and config.eval_every and metrics.step % config.eval_every == 0 and not last:
                scores = evaluation.score_examples(model, inputs.eval_data.examples, plan.pack_tokens)
                summary = evaluation.summarize(inputs.eval_data.examples, scores, inputs.tokenizer)
                metrics_file.write({"step": metrics.step, "evaluation": asdict(summary)})
            if config.save_every and (last or metrics.step % config.save_every == 0):
                save_checkpoint(
                    folder / "checkpoints",
                    metrics.step,
                    model.network,
                    optimizer,
                    lambda path: models.save_model(model, inputs.tokenizer, path),
                )

        engine.train(model, inputs.data.examples, optimizer, plan, after_step)
    return steps


def _compose_report(
    inputs: _Inputs, origins: dict[str, Any], steps: list[StepMetrics], before: _Look | None, after: _Look | None
) -> Report:
    report = Report(
        title=f"{Path(inputs.config.data).name} on {inputs.config.model}",
        facts=provenance.facts(inputs.config.model_dump(), origins, steps),
        steps=steps,
        entropy_floor=_entropy_floor(inputs.data.examples),
    )
    if inputs.eval_data is None or before is None or after is None:
        return report
    examples = inputs.eval_data.examples
    base_N, weight_N = evaluation.nll_per_example(examples, before.scores)
    tuned_N, _ = evaluation.nll_per_example(examples, after.scores)
    context, gold = _first_prediction(examples[0])
    answers = []
    for i, (was, now) in enumerate(zip(before.answers, after.answers, strict=True)):
        supervised = examples[i].token_ids_T[examples[i].weights_T > 0].tolist()
        conversation = inputs.eval_data.conversations[inputs.eval_data.row_N[i]]
        prompt = next((m.content or "" for m in reversed(conversation.messages) if m.role == "user"), "")
        answers.append(Answer(prompt, inputs.tokenizer.decode(supervised, skip_special_tokens=True), was, now))
    return replace(
        report,
        base=before.summary,
        tuned=after.summary,
        delta=evaluation.compare(examples, before.scores, after.scores),
        nll_before=(base_N / weight_N).tolist(),
        nll_after=(tuned_N / weight_N).tolist(),
        lens=compare_next_token(inputs.tokenizer, context, gold, before.next_token, after.next_token),
        answers=answers,
    )


def _entropy_floor(examples: Sequence[Example]) -> float | None:
    """One trie over all the data, where it fits in memory beside a model."""
    num_tokens = sum(len(e.token_ids_T) for e in examples)
    return entropy_floor(examples) if num_tokens <= MAX_FLOOR_TOKENS else None


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
        epochs=2.0,
        steps=steps,
    )
