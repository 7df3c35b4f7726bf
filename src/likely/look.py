"""The verbs that look at a model and change nothing: score, evaluate, explain."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from likely import launched, outcome
from likely.data.cache import load_kept
from likely.data.dataset import Dataset, Request
from likely.data.formats import read_options
from likely.data.packing import default_pack_tokens
from likely.data.render import Renderer, Supervision, load_tokenizer
from likely.data.split import hold_out
from likely.errors import ConfigError, DataError
from likely.insight import explain as explanation
from likely.insight.elsewhere import explained_by_prompts
from likely.insight.evaluate import score_examples
from likely.insight.lens import compare_next_token
from likely.insight.score_file import Recorder
from likely.insight.score_log import logged_scores
from likely.model import load as models
from likely.model.forward import LanguageModel
from likely.model.generate import greedy_answers
from likely.model.place import Place, check_same_tokens, check_token_ids, choose_max_length, find_model, local_folder
from likely.provenance import device_name, versions, weights_hash
from likely.training.log import Display
from likely.training.parallel import ALONE, Ranks, joined
from likely.types import Conversation, Example, ExampleScore, FloatArray, Message, Source
from likely.verb_settings import EvaluateSettings, ExplainSettings, LookSettings

COMMAND_LINE = Source("the command line", 0)
Load = Callable[[str], LanguageModel]


@dataclass(frozen=True)
class _Reading:
    """A model and the data as it reads them."""

    place: Place
    tokenizer: Any
    renderer: Renderer
    dataset: Dataset
    pack_tokens: int


def score(
    data: str, asked: LookSettings, display: Display, *, beside: Path | None = None, with_prompts: bool = False
) -> Iterator[dict[str, Any]]:
    """One record per example, in the file's order, also of those without any weight: its NLL under the model and the
    log-probability of every token, and beside it under the base.

    Args:
        beside: the output; what is scored is kept in files beside it, so that a killed score goes on.
        with_prompts: look also at what each row's prompt does for its answer (:mod:`likely.insight.elsewhere`).

    Yields:
        ``{"source", "nll_nats", "joint_nll_nats", "num_tokens", "base_nll_nats", "base_joint_nll_nats",
        "shortfall_nats", "prompt_explains", "contradiction",
        "tokens": [{"id", "text", "role", "weight", "logprob", "rank", "entropy", "base_logprob"}]}``;
        null where nothing predicts the token, and where there is no base.
    """
    with joined() as ranks:
        launched.require(asked.nproc)
        reading = _read(data, asked, display, ranks, keep_unweighted=True)
        yield from _records(reading, asked, display, beside, ranks, with_prompts=with_prompts)


def score_held_out(
    data: str, share: float, supervision: Supervision, asked: LookSettings, display: Display
) -> Iterator[dict[str, Any]]:
    """Records as :func:`score` gives them, of the rows that a training on ``data`` held out.

    Args:
        share: of the families of rows that were held out.
        supervision: that of the training: a row that has nothing to train is never held out.

    Raises:
        DataError: nothing can be held out.
    """
    place = find_model(asked.model)
    tokenizer = load_tokenizer(place.tokenizer)
    own, judge = (
        Renderer(tokenizer, each, asked.template, asked.template_date) for each in (supervision, Supervision())
    )
    options = read_options(asked.format, asked.columns, asked.on_bad_row == "skip", asked.seed)
    length = choose_max_length(place, asked.max_length)
    training, judging = (Request(data, each, length, options, asked.on_too_long) for each in (own, judge))
    _, held_out, _ = hold_out(load_kept(training, display.counting), share, asked.seed, judging)
    if held_out is None:
        raise DataError("no rows are held out", place=data, way_out="score a file with likely score")
    pack_tokens = default_pack_tokens(int(held_out.table.length_N.max()))
    yield from _records(_Reading(place, tokenizer, judge, held_out, pack_tokens), asked, display, None, ALONE)


def _records(
    reading: _Reading,
    asked: LookSettings,
    display: Display,
    beside: Path | None,
    ranks: Ranks,
    *,
    with_prompts: bool = False,
) -> Iterator[dict[str, Any]]:
    recorder = Recorder(reading.tokenizer)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="likely-"))) if beside is None else beside.parent
        name = beside.name if beside else "scores"
        logs, scores = [], []
        share_N = np.full(len(reading.dataset.examples), np.nan)
        for state, model in (("model", asked.model), ("base", asked.base)):
            if model is not None:
                logs.append(folder / f".{name}.{state}-scores")
                loaded, own = stack.enter_context(_logged(logs[-1], model, reading, display, ranks))
                scores.append(own)
                if with_prompts and state == "model":
                    share_N = _explained(loaded, own, reading, display, ranks)
        if not ranks.first:
            return
        for i, example in enumerate(reading.dataset.examples):
            yield recorder.record(example, scores[0][i], scores[1][i] if len(scores) > 1 else None, float(share_N[i]))
        for log in logs:
            log.unlink()


@contextmanager
def _logged(
    log: Path, model: str, reading: _Reading, display: Display, ranks: Ranks
) -> Iterator[tuple[LanguageModel, Sequence[ExampleScore]]]:
    loaded = models.load_model(model)
    place = find_model(model)
    about = {
        "weights": weights_hash(replace(place, weights=str(local_folder(place.weights)))),
        "data": reading.dataset.sha256,
        "examples": len(reading.dataset.examples),
        "tokens": sum(len(e.token_ids_T) for e in reading.dataset.examples),
        "renderer": reading.renderer.identity(),
        "pack_tokens": reading.pack_tokens,
        "device": device_name(loaded.device),
        "versions": versions(),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode()).digest()
    tools: dict[str, Any] = {"display": display, "ranks": ranks}
    with logged_scores(log, key, loaded, reading.dataset.examples, reading.pack_tokens, **tools) as scores:
        yield loaded, scores


def _explained(
    model: LanguageModel, own: Sequence[ExampleScore], reading: _Reading, display: Display, ranks: Ranks
) -> FloatArray:
    dataset = reading.dataset
    known, longest = own if ranks.first else None, int(dataset.table.length_N.max())
    return explained_by_prompts(model, dataset.examples, known, reading.pack_tokens, longest, display.track, ranks)


def evaluate(data: str, asked: EvaluateSettings, display: Display) -> dict[str, Any]:
    """Held-out figures of a model, of its base on the same examples, and their difference with paired intervals."""
    with joined() as ranks:
        launched.require(asked.nproc)
        return _evaluate(data, asked, display, ranks)


def _evaluate(data: str, asked: EvaluateSettings, display: Display, ranks: Ranks) -> dict[str, Any]:
    reading = _read(data, asked, display, ranks)
    length = choose_max_length(reading.place, asked.max_length)
    yardsticks = outcome.Yardsticks(
        reading.tokenizer,
        reading.renderer,
        reading.dataset,
        outcome.read_retain(asked.retain, reading.renderer, length, display),
        outcome.read_guard(asked.guard, reading.renderer, length),
        reading.pack_tokens,
        num_answers=None if asked.generate else 0,
        max_new_tokens=asked.generate_tokens,
    )
    looks = [
        outcome.look(models.load_model(model), yardsticks, display, state, ranks) if model is not None else None
        for state, model in (("model", asked.model), ("base", asked.base))
    ]
    assert looks[0] is not None  # noqa: S101
    return outcome.evaluation_figures(yardsticks, looks[0], looks[1], asked.guard_max_gain)


def _read(data: str, asked: LookSettings, display: Display, ranks: Ranks, *, keep_unweighted: bool = False) -> _Reading:
    """The examples as the model reads them; a base must read them in the same tokens."""
    place = find_model(asked.model)
    tokenizer = load_tokenizer(place.tokenizer)
    renderer = Renderer(tokenizer, template=asked.template, template_date=asked.template_date)
    options = read_options(asked.format, asked.columns, asked.on_bad_row == "skip", asked.seed)
    length = choose_max_length(place, asked.max_length)
    request = Request(data, renderer, length, options, asked.on_too_long, keep_unweighted=keep_unweighted)
    dataset = ranks.one_host_one_maker(lambda: load_kept(request, display.counting))
    ranks.require_same("the data", [dataset.sha256, renderer.identity()])
    if asked.on_bad_row != "error" or asked.on_too_long != "error":  # then not every row may be among the figures
        for line in dataset.told:
            display.say(line)
    check_token_ids(place, dataset.largest_token)
    if asked.base is not None:
        other = load_tokenizer(find_model(asked.base).tokenizer)
        check_same_tokens(asked.model, tokenizer, asked.base, other, dataset.examples)
    return _Reading(place, tokenizer, renderer, dataset, default_pack_tokens(int(dataset.table.length_N.max())))


def explain(asked: ExplainSettings, *, load: Load | None = None) -> dict[str, Any]:
    """One answer token by token: what ``model`` (B) and ``base`` (A) believe, and what one step on it does to B.

    Args:
        load: gives the model of a name, for whoever keeps some; for a step it must be trainable.

    Returns:
        ``{"context", "tokens": [{"position", "text", "B": belief, "A": belief or null, "step": {...} or null}], "nll":
        {"B", "A"}, "verdict", "first_token": the lens of the first answer token}``; log-probabilities in nats.
    """
    model, prompt, response = (str(text) for text in (asked.model, asked.prompt, asked.response))
    place = find_model(model)
    tokenizer = load_tokenizer(place.tokenizer)
    row = Conversation((Message("user", prompt), Message("assistant", response)), COMMAND_LINE, plain=True)
    (example,) = Renderer(tokenizer).render(row)
    check_token_ids(place, int(example.token_ids_T.max(initial=0)))
    if asked.base is not None:
        check_same_tokens(model, tokenizer, asked.base, load_tokenizer(find_model(asked.base).tokenizer), [example])
    states = {"B": model, "A": asked.base}
    found: dict[str, Any] = {}
    step = None
    for state, name in states.items():
        if name is None:
            continue
        loaded = load(name) if load else models.load_model(name, trainable=asked.step and state == "B")
        positions, logp_SV = explanation.logprobs_at(loaded, example)
        found[state] = (positions, logp_SV, explanation.beliefs(tokenizer, example, positions, logp_SV, asked.rivals))
        if state == "B" and asked.step:
            step = explanation.effect_of_a_step(
                loaded, [example], example, learning_rate=asked.learning_rate, max_grad_norm=1.0
            )
        del loaded
    positions, logp_SV, own = found["B"]
    other = found.get("A")
    nll = {state: sum(belief.nll for belief in entry[2]) for state, entry in found.items()}
    first = int(example.token_ids_T[positions[0]])
    context = example.token_ids_T[: positions[0]].tolist()
    before = (other or found["B"])[1][0]
    return {
        "context": tokenizer.decode(context),
        "tokens": [
            {
                "position": t,
                "text": tokenizer.decode([int(example.token_ids_T[t])]),
                "B": asdict(own[i]),
                "A": asdict(other[2][i]) if other else None,
                "step": step and {k: float(v[i]) for k, v in vars(step).items()},
            }
            for i, t in enumerate(positions)
        ],
        "nll": nll,
        "verdict": _verdict(response, nll),
        "first_token": asdict(compare_next_token(tokenizer, context, first, before, logp_SV[0], asked.rivals)),
    }


def answer(name: str, prompt: str, max_tokens: int, *, load: Load = models.load_model) -> dict[str, Any]:
    """The greedy answer of a model to a prompt, with the likelihood of each of its tokens.

    Returns:
        ``{"text", "stopped", "tokens": [{"text", "logprob", "rank"}]}``; log-probabilities in nats.

    Raises:
        ConfigError: prompt and answer don't fit in the model's context.
    """
    place = find_model(name)
    tokenizer = load_tokenizer(place.tokenizer)
    renderer = Renderer(tokenizer)
    context = renderer.prompt_ids([Message("user", prompt)])
    limit = choose_max_length(place, None)
    if len(context) + max_tokens > limit:
        raise ConfigError(
            f"a prompt of {len(context)} tokens and an answer of {max_tokens} are over the model's {limit}",
            way_out="shorten one of them",
        )
    model = load(name)
    stop = renderer.end_of_turn.token_id
    (made,) = greedy_answers(model, tokenizer, [context], stop_id=stop, max_new_tokens=max_tokens)
    ids = np.array([*context, *made.token_ids], np.int64)
    example = Example(ids, np.zeros(len(ids)), np.zeros(len(ids), np.int8), COMMAND_LINE)
    (scores,) = score_examples(model, [example], default_pack_tokens(len(ids)))
    return {
        "text": made.text,
        "stopped": made.stopped,
        "tokens": [
            {
                "text": tokenizer.decode([token]),
                "logprob": float(scores.logprob_T[t]),
                "rank": int(scores.rank_T[t]),
            }
            for t, token in enumerate(made.token_ids, len(context))
        ],
    }


def _verdict(response: str, nll: dict[str, float]) -> str:
    if "A" not in nll:
        return f"The answer has probability exp(-{nll['B']:.4f}) = {math.exp(-nll['B']):.4g}."
    better, gap = ("B", nll["A"] - nll["B"]) if nll["B"] <= nll["A"] else ("A", nll["B"] - nll["A"])
    return (
        f"By the objective {better} is better, by {gap:.4f} nats over the whole answer {response!r}:"
        f" NLL {nll['A']:.4f} under A, {nll['B']:.4f} under B."
    )
