"""Exact likelihood of held-out examples, and what can be said of a difference between two models.

Each example's NLL is computed once in its own context, whatever else is in the batch; the reported number is the sum of
the weighted NLL over the sum of the weights, so it depends on neither batch size nor packing. Intervals resample
examples, not tokens: tokens of one answer are not independent (paired percentile bootstrap, Efron & Tibshirani 1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from likely.data.packing import build_packs, supervise_everything
from likely.model.forward import LanguageModel
from likely.training.objective import score_edges
from likely.types import Example, ExampleScore, FloatArray, Pack

RESAMPLES = 2000
Track = Callable[[Iterable[Pack], str, int], Iterable[Pack]]


def score_examples(
    model: LanguageModel, examples: Sequence[Example], pack_tokens: int, track: Track | None = None
) -> list[ExampleScore]:
    """Log-probability, rank and entropy at every token that something predicts, weighted or not (so that both the
    conditional and the joint likelihood can be read off); nan elsewhere. Common prefixes are computed once over all
    examples."""
    scores = [ExampleScore(*np.full((3, len(e.token_ids_T)), np.nan)) for e in examples]
    everything = [supervise_everything(e) for e in examples]
    packs = build_packs(everything, pack_tokens, share=model.shares)
    for pack in track(packs, "scoring", len(packs)) if track else packs:
        edges = score_edges(model, pack)
        for i, edge in zip(pack.example_N.tolist(), pack.edge_of_N, strict=True):
            scores[i].logprob_T[1:] = edges.logprob_E[edge]
            scores[i].rank_T[1:] = edges.rank_E[edge]
            scores[i].entropy_T[1:] = edges.entropy_E[edge]
    return scores


@dataclass(frozen=True)
class Evaluation:
    """``nll`` nats per token; ``ci95`` its interval, None where one example leaves nothing to resample; ``num_tokens``
    the summed weight; ``bits_per_byte`` the NLL of the answers in bits over their UTF-8 bytes, which survives a change
    of tokenizer; ``token_accuracy`` the weighted share of tokens that are the model's first choice; ``joint_nll`` nats
    per token of prompt and answer together, -log P(x, y)."""

    nll: float
    ci95: tuple[float, float] | None
    perplexity: float
    bits_per_byte: float | None
    num_examples: int
    num_tokens: float
    token_accuracy: float
    joint_nll: float


@dataclass(frozen=True)
class Delta:
    """Tuned minus base, nats per token, with its paired interval; ``share_better`` of the examples got more likely."""

    nll: float
    ci95: tuple[float, float] | None
    share_better: float


def nll_per_example(examples: Sequence[Example], scores: Sequence[ExampleScore]) -> tuple[FloatArray, FloatArray]:
    """Weighted NLL (nats) and weight of each example."""
    nll_N = np.array([-np.nansum(e.weights_T * s.logprob_T) for e, s in zip(examples, scores, strict=True)])
    weight_N = np.array([e.weights_T.sum() for e in examples])
    return nll_N, weight_N


def summarize(examples: Sequence[Example], scores: Sequence[ExampleScore], tokenizer: Any) -> Evaluation:
    """The figures of one model on some examples."""
    nll_N, weight_N = nll_per_example(examples, scores)
    num_tokens = float(weight_N.sum())
    nll = float(nll_N.sum()) / num_tokens
    num_bytes = sum(
        len(tokenizer.decode(e.token_ids_T[e.weights_T > 0].tolist(), skip_special_tokens=True).encode())
        for e in examples
    )
    correct = sum(float(e.weights_T[s.rank_T == 1].sum()) for e, s in zip(examples, scores, strict=True))
    uniform = all(set(np.unique(e.weights_T)) <= {0.0, 1.0} for e in examples)
    return Evaluation(
        nll=nll,
        ci95=_interval(nll_N, weight_N),
        perplexity=math.exp(min(nll, 700.0)),
        bits_per_byte=float(nll_N.sum()) / math.log(2) / num_bytes if uniform and num_bytes else None,
        num_examples=len(examples),
        num_tokens=num_tokens,
        token_accuracy=correct / num_tokens,
        joint_nll=-sum(float(s.logprob_T[1:].sum()) for s in scores) / sum(len(s.logprob_T) - 1 for s in scores),
    )


def compare(examples: Sequence[Example], base: Sequence[ExampleScore], tuned: Sequence[ExampleScore]) -> Delta:
    """The change from base to tuned on the same examples."""
    base_N, weight_N = nll_per_example(examples, base)
    tuned_N, _ = nll_per_example(examples, tuned)
    change_N = tuned_N - base_N
    return Delta(
        nll=float(change_N.sum() / weight_N.sum()),
        ci95=_interval(change_N, weight_N),
        share_better=float((change_N < 0).mean()),
    )


def _interval(total_N: FloatArray, weight_N: FloatArray) -> tuple[float, float] | None:
    """95% interval of ``sum(total) / sum(weight)`` over resampled examples."""
    if len(total_N) < 2:
        return None

    def ratio(total: FloatArray, weight: FloatArray, axis: int) -> Any:
        return total.sum(axis) / weight.sum(axis)

    result = bootstrap(
        (total_N, weight_N),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // len(total_N)),
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
