"""What models make of held-out, retained and guarded text, and what a training changed: looks before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from likely.data.cache import load_kept
from likely.data.dataset import Dataset, Request
from likely.data.packing import default_pack_tokens, normalize_per_example
from likely.data.render import Renderer
from likely.data.trie import entropy_floor
from likely.insight import evaluate as evaluation
from likely.insight import guard as guarding
from likely.insight import measures
from likely.insight.generation import Asked, intervals_of_answers, judge_answers, questions
from likely.insight.lens import compare_next_token, next_token_logprobs
from likely.insight.movement import ends_of_answers, moved_rows
from likely.insight.report import Answer
from likely.model.forward import LanguageModel
from likely.model.generate import Generated, greedy_answers
from likely.training.log import Display
from likely.training.parallel import ALONE, Ranks
from likely.types import Example, ExampleScore

MAX_FLOOR_TOKENS = 20_000_000  # about 2 GB of trie
BUNDLED = "bundled"


@dataclass(frozen=True)
class Yardsticks:
    """What models are judged by. ``num_answers`` examples are answered greedily, with ``max_new_tokens`` at most."""

    tokenizer: Any
    renderer: Renderer
    held_out: Dataset | None
    retain: Dataset | None = None
    guard: guarding.Guard | None = None
    pack_tokens: int | None = None
    num_answers: int | None = 0
    max_new_tokens: int | None = None

    @property
    def asked(self) -> list[Asked]:
        if self.held_out is None or self.num_answers == 0:
            return []
        return questions(self.held_out.examples[: self.num_answers], self.tokenizer)


def read_retain(path: str | None, renderer: Renderer, max_length: int, display: Display) -> Dataset | None:
    """The text that should not be forgotten; of rows that are too long, the end is cut."""
    if path is None:
        return None
    if path == BUNDLED:
        path = str(Path(__file__).parent / "demo" / "retain.jsonl")
    return load_kept(Request(path, renderer, max_length, on_too_long="truncate_right"), display.counting)


def read_guard(path: str | None, renderer: Renderer, max_length: int) -> guarding.Guard | None:
    return None if path is None else guarding.read_guard(path, renderer, max_length)


@dataclass(frozen=True)
class Look:
    """What one state of a model makes of all that. ``next_token`` is its distribution at the first prediction of the
    first held-out example; ``guard`` the log-likelihood of each response of the guard, in nats."""

    scores: list[ExampleScore] | None
    summary: evaluation.Evaluation | None
    next_token: Any
    answers: list[Generated]
    retain: list[ExampleScore] | None
    guard: list[float] | None


def first_prediction(example: Example) -> tuple[list[int], int]:
    """Context and gold token of the first supervised token."""
    first = int((example.weights_T > 0).argmax())
    return example.token_ids_T[:first].tolist(), int(example.token_ids_T[first])


def look(model: LanguageModel, yardsticks: Yardsticks, display: Display, state: str, ranks: Ranks = ALONE) -> Look:
    """Score everything under the model: some of it on each rank, and all that was found is known to all."""

    def score(examples: Sequence[Example]) -> list[ExampleScore]:
        tokens = yardsticks.pack_tokens or 0
        longest = default_pack_tokens(max(len(e.token_ids_T) for e in examples))
        return evaluation.score_examples(
            model, examples, max(tokens, longest) if tokens else longest, display.track, ranks
        )

    scores = summary = next_token = None
    if yardsticks.held_out is not None:
        examples = yardsticks.held_out.examples
        scores = score(examples)
        summary = evaluation.summarize(examples, scores, yardsticks.tokenizer)
        interval = ", 95% interval [{:.4f}, {:.4f}]".format(*summary.ci95) if summary.ci95 else ", of one example"
        display.say(f"{state}: held-out NLL {summary.nll:.4f} nats per token{interval}")
        next_token = next_token_logprobs(model, first_prediction(examples[0])[0])
    retain = score(yardsticks.retain.examples) if yardsticks.retain else None
    guard = yardsticks.guard
    guarded = guarding.log_likelihoods(guard, score(guard.examples)) if guard else None
    return Look(scores, summary, next_token, _answers(model, yardsticks, display, ranks), retain, guarded)


def _answers(model: LanguageModel, yardsticks: Yardsticks, display: Display, ranks: Ranks) -> list[Generated]:
    asked = yardsticks.asked
    if not asked:
        return []
    longest = 2 * max(question.gold_tokens for question in asked) + 16

    def track(batches: Any, title: str, _: int) -> Iterable[Any]:
        # All ranks of a sharded model go through the same forwards.
        own = list(batches)[:] if model.sharded else list(batches)[ranks.rank :: ranks.world_size]
        return display.track(own, title, len(own))

    answers = greedy_answers(
        model,
        yardsticks.tokenizer,
        [question.context for question in asked],
        stop_id=yardsticks.renderer.end_of_turn.token_id,
        max_new_tokens=yardsticks.max_new_tokens or longest,
        track=track,
    )
    # Every answer has a token, on the rank that gave it.
    of_ranks = ranks.gather_json([asdict(answer) for answer in answers])
    return [Generated(**next(a for a in given if a["num_tokens"])) for given in zip(*of_ranks, strict=True)]


def held_out_figures(yardsticks: Yardsticks, tuned: Look, base: Look | None) -> dict[str, Any]:
    """``{"measures", "calibration", "slices", "gap_closed"}`` of the held-out examples."""
    assert yardsticks.held_out is not None  # noqa: S101
    assert tuned.scores is not None  # noqa: S101
    examples, tokenizer = yardsticks.held_out.examples, yardsticks.tokenizer
    tables = [
        measures.sums_per_example(examples, each.scores, tokenizer) if each and each.scores is not None else None
        for each in (tuned, base)
    ]
    assert tables[0] is not None  # noqa: S101
    gap = None
    if base and base.summary and tuned.summary and _fits(yardsticks.held_out):
        gap = measures.gap_closed(examples, base.summary.nll, tuned.summary.nll)
    return {
        "measures": measures.compare_measures(tables[0], tables[1]),
        "calibration": {
            state: measures.calibration_bins(table) if table is not None else None
            for state, table in zip(("tuned", "base"), tables, strict=True)
        },
        "slices": measures.slices(examples, tuned.scores, base.scores if base else None, _stops(yardsticks)),
        "gap_closed": gap,
    }


def _stops(yardsticks: Yardsticks) -> set[int]:
    """Ids of the tokens that end a turn."""
    return {yardsticks.renderer.end_of_turn.token_id, yardsticks.tokenizer.eos_token_id} - {None}


def retain_figures(yardsticks: Yardsticks, tuned: Look, base: Look | None) -> dict[str, Any] | None:
    """``{"path", "sha256", "num_examples", "num_tokens", "nll", "ci95", "base_nll", "change", "change_ci95"}``: a rise
    is what was forgotten."""
    if yardsticks.retain is None or tuned.retain is None:
        return None
    data = yardsticks.retain
    summary = evaluation.summarize(data.examples, tuned.retain, yardsticks.tokenizer)
    found = {"path": data.path, "sha256": data.sha256, "num_examples": summary.num_examples}
    found |= {"num_tokens": summary.num_tokens, "nll": summary.nll, "ci95": summary.ci95}
    found |= {"base_nll": None, "change": None, "change_ci95": None}
    if base and base.retain is not None:
        delta = evaluation.compare(data.examples, base.retain, tuned.retain)
        found |= {"base_nll": summary.nll - delta.nll, "change": delta.nll, "change_ci95": delta.ci95}
    return found


def guard_figures(
    yardsticks: Yardsticks, tuned: Look, base: Look | None, max_gain: float | None
) -> dict[str, Any] | None:
    """See :func:`likely.insight.guard.judge`."""
    if yardsticks.guard is None or tuned.guard is None:
        return None
    return guarding.judge(yardsticks.guard, tuned.guard, base.guard if base else None, max_gain)


def generation_figures(yardsticks: Yardsticks, tuned: Look | None, base: Look | None) -> dict[str, Any]:
    """``{"tuned", "base", "ci95"}``: see :func:`likely.insight.generation.judge_answers` and
    :func:`likely.insight.generation.intervals_of_answers`; None where nothing was answered."""
    gold = [question.gold for question in yardsticks.asked]
    looks = {"tuned": tuned, "base": base}
    answers = {state: each.answers if each and each.answers else None for state, each in looks.items()}
    found: dict[str, Any] = {state: own and judge_answers(gold, own) for state, own in answers.items()}
    own = answers["tuned"]
    return found | {"ci95": own and intervals_of_answers(gold, own, answers["base"])}


def changes(yardsticks: Yardsticks, before: Look, after: Look) -> dict[str, Any]:
    """The fields of a report that speak of held-out data; none where there is none."""
    data = yardsticks.held_out
    if data is None or before.scores is None or after.scores is None:
        return {}
    examples = data.examples
    base_N, weight_N = evaluation.nll_per_example(examples, before.scores)
    tuned_N, _ = evaluation.nll_per_example(examples, after.scores)
    context, gold = first_prediction(examples[0])
    answers = []
    for question, was, now in zip(yardsticks.asked, before.answers, after.answers, strict=True):
        conversation = data.conversations[data.row_N[question.example]]
        prompt = next((m.content or "" for m in reversed(conversation.messages) if m.role == "user"), "")
        answers.append(Answer(prompt, question.gold, was.text, now.text))
    return {
        "base": before.summary,
        "tuned": after.summary,
        "delta": evaluation.compare(examples, before.scores, after.scores),
        "sources": [str(example.source) for example in examples],
        "weights": weight_N.tolist(),
        "nll_before": (base_N / weight_N).tolist(),
        "nll_after": (tuned_N / weight_N).tolist(),
        "lens": compare_next_token(yardsticks.tokenizer, context, gold, before.next_token, after.next_token),
        "moved": moved_rows(examples, before.scores, after.scores, yardsticks.tokenizer),
        "ends": ends_of_answers(examples, before.scores, after.scores, _stops(yardsticks)),
        "answers": answers,
        "held_out": held_out_figures(yardsticks, after, before),
        "generation": generation_figures(yardsticks, after, before),
    }


def training_floor(data: Dataset, normalize: str) -> float | None:
    """The least training NLL that any model can reach, with every example or every token counting alike; None where
    the trie of all the data would not fit in memory."""
    if not _fits(data):
        return None
    examples = data.examples
    return entropy_floor([normalize_per_example(e) for e in examples] if normalize == "example" else examples)


def _fits(data: Dataset) -> bool:
    return int(data.table.length_N.sum()) <= MAX_FLOOR_TOKENS


def evaluation_figures(
    yardsticks: Yardsticks, tuned: Look, base: Look | None, max_gain: float | None
) -> dict[str, Any]:
    """The whole answer of ``likely evaluate``."""
    assert yardsticks.held_out is not None  # noqa: S101
    assert tuned.summary is not None  # noqa: S101
    assert tuned.scores is not None  # noqa: S101
    result: dict[str, Any] = {**asdict(tuned.summary), "base": None, "delta": None}
    if base is not None and base.summary is not None and base.scores is not None:
        result["base"] = asdict(base.summary)
        result["delta"] = asdict(evaluation.compare(yardsticks.held_out.examples, base.scores, tuned.scores))
    return {
        **result,
        **held_out_figures(yardsticks, tuned, base),
        "data": {"path": yardsticks.held_out.path, "sha256": yardsticks.held_out.sha256},
        "retain": retain_figures(yardsticks, tuned, base),
        "guard": guard_figures(yardsticks, tuned, base, max_gain),
        "generation": generation_figures(yardsticks, tuned, base),
    }
