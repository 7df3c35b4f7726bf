"""Generated answers beside the gold ones: exact match, last number, stopping, length; chrF, BLEU and ROUGE by the
libraries that define them, where they are installed (``pip install 'likely[metrics]'``)."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely.insight.evaluate import RESAMPLES, interval_of_ratio
from likely.types import Example, FloatArray

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Asked:
    """A prompt that is answered: its example, the ids before the last answer, and the gold answer as text."""

    example: int
    context: list[int]
    gold: str
    gold_tokens: int


def questions(examples: Sequence[Example], tokenizer: Any) -> list[Asked]:
    """The last answer of each example, after everything before it. Bare text asks nothing, and is left out."""
    found = []
    for i, example in enumerate(examples):
        supervised = np.flatnonzero(example.weights_T)
        if not len(supervised):
            continue
        gaps = np.flatnonzero(np.diff(supervised) > 1)
        first = int(supervised[gaps[-1] + 1] if len(gaps) else supervised[0])
        if first <= 1 and example.role_T[0] == example.role_T[-1]:
            continue
        gold = example.token_ids_T[supervised[supervised >= first]].tolist()
        text = tokenizer.decode(gold, skip_special_tokens=True)
        found.append(Asked(i, example.token_ids_T[:first].tolist(), text, len(gold)))
    return found


def last_number(text: str) -> str | None:
    """The last number in a text, without separators of thousands and idle zeros: how answers of maths are compared."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    plain: str = numbers[-1].replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def judge_answers(gold: Sequence[str], answers: Sequence[Any]) -> dict[str, Any]:
    """``{"num", "exact_match", "last_number", "stopped", "mean_tokens", "chrf", "bleu", "rouge1", "rouge2",
    "rougeL"}``: shares of all answers, but ``last_number`` of those whose gold answer has one, ``chrf`` and ``bleu``
    from 0 to 100 and ``rouge`` as mean F1 from 0 to 1; None where a library is missing or nothing can be said.

    Args:
        answers: of :func:`likely.model.generate.greedy_answers`.
    """
    own = _per_answer(gold, answers)
    found: dict[str, Any] = {"num": len(answers)}
    found |= {name: _mean(own[name]) for name in ("exact_match", "last_number", "stopped", "mean_tokens")}
    found |= dict.fromkeys(("chrf", "bleu", *ROUGE))
    found |= {name: value for name, (value, _) in _of_corpus(gold, answers, 0).items()}
    return found | {name: _mean(own[name]) for name in ROUGE if name in own}


def intervals_of_answers(
    gold: Sequence[str], tuned: Sequence[Any], base: Sequence[Any] | None
) -> dict[str, dict[str, Any] | None]:
    """95% intervals over answers (percentile bootstrap) of what :func:`judge_answers` gives; changes are paired by
    prompt.

    Returns:
        ``{"tuned": {measure: (low, high) or None}, "base": the same or None, "change": {measure: {"value", "ci95"}} or
        None}``.
    """
    own, corpus = _per_answer(gold, tuned), _of_corpus(gold, tuned)
    found: dict[str, dict[str, Any] | None] = {"tuned": _intervals(own, corpus), "base": None, "change": None}
    if base is not None:
        other, corpus_of_base = _per_answer(gold, base), _of_corpus(gold, base)
        found["base"] = _intervals(other, corpus_of_base)
        change = {name: own[name] - other[name] for name in own}
        apart = {
            name: (corpus[name][0] - was, corpus[name][1] - drawn) for name, (was, drawn) in corpus_of_base.items()
        }
        values = {name: _mean(values) for name, values in change.items()} | {name: a for name, (a, _) in apart.items()}
        intervals = _intervals(change, apart)
        found["change"] = {name: {"value": values[name], "ci95": intervals[name]} for name in values}
    return found


def _intervals(
    per_answer: dict[str, FloatArray], of_corpus: dict[str, tuple[float, FloatArray]]
) -> dict[str, tuple[float, float] | None]:
    found: dict[str, tuple[float, float] | None] = {name: _interval(values) for name, values in per_answer.items()}
    alone = len(per_answer["stopped"]) < 2
    for name, (_, drawn_B) in of_corpus.items():
        low, high = np.quantile(drawn_B, [0.025, 0.975])
        found[name] = None if alone else (float(low), float(high))
    return found


def _per_answer(gold: Sequence[str], answers: Sequence[Any]) -> dict[str, FloatArray]:
    """What each answer has by itself; nan where a measure says nothing of it."""
    texts = [answer.text for answer in answers]
    pairs = list(zip(gold, texts, strict=True))
    numbers = [(last_number(wanted), last_number(text)) for wanted, text in pairs]
    found: dict[str, list[float]] = {
        "exact_match": [text.strip() == wanted.strip() for wanted, text in pairs],
        "last_number": [math.nan if wanted is None else wanted == text for wanted, text in numbers],
        "stopped": [answer.stopped for answer in answers],
        "mean_tokens": [answer.num_tokens for answer in answers],
    }
    if gold and importlib.util.find_spec("rouge_score"):
        from rouge_score import rouge_scorer  # noqa: PLC0415  (an extra)

        scorer = rouge_scorer.RougeScorer(list(ROUGE))
        scores = [scorer.score(wanted, text) for wanted, text in pairs]
        found |= {name: [score[name].fmeasure for score in scores] for name in ROUGE}
    return {name: np.array(values, np.float64) for name, values in found.items()}


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _interval(values: FloatArray) -> tuple[float, float] | None:
    known = values[~np.isnan(values)]
    return interval_of_ratio(known, np.ones(len(known)))


def _of_corpus(
    gold: Sequence[str], answers: Sequence[Any], resamples: int = RESAMPLES
) -> dict[str, tuple[float, FloatArray]]:
    """chrF and BLEU of all answers together, each as it is and over resampled answers, alike for any two models. What
    they are made of is summed over answers, so that a draw needs no text."""
    if not gold or not importlib.util.find_spec("sacrebleu"):
        return {}
    from sacrebleu.metrics import BLEU, CHRF  # noqa: PLC0415  (an extra)

    texts = [answer.text for answer in answers]
    found = {}
    # "force" keeps BLEU from warning of text that was tokenised before.
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU(force=True))):
        # sacrebleu's own bootstrap fails where a draw has no match at all, as it adds floats of two kinds.
        sums_NK = np.array(metric._extract_corpus_statistics(texts, [list(gold)]), np.int64)
        rng, drawn_B = np.random.default_rng(0), []
        for _ in range(resamples):
            row = rng.multinomial(len(gold), np.full(len(gold), 1 / len(gold))) @ sums_NK
            drawn_B.append(float(metric._compute_score_from_stats(row.tolist()).score))
        found[name] = float(metric.corpus_score(texts, [list(gold)]).score), np.array(drawn_B)
    return found
