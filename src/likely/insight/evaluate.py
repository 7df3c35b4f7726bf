"""Exact likelihood of held-out examples, and what can be said of a difference between two models.

Each example's NLL is computed once in its own context, whatever else is in the batch; the reported number is the sum of
the weighted NLL over the sum of the weights, so it depends on neither batch size nor packing. Intervals resample
examples, not tokens: tokens of one answer are not independent (paired percentile bootstrap, Efron & Tibshirani 1993).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from likely.data.packing import idle_pack, plan_packs, supervise_everything
from likely.data.table import OnDemand
from likely.data.trie import build_pack
from likely.model.forward import LanguageModel
from likely.training.objective import score_edges
from likely.training.parallel import ALONE, Ranks
from likely.types import Example, ExampleScore, FloatArray

RESAMPLES = 2000
NUM_COLUMNS = 5  # of an ExampleScore
MOST_IN_MEMORY = 2_000_000  # tokens whose scores are kept there: 80 MB
Track = Callable[[Iterable[list[int]], str, int], Iterable[list[int]]]


def score_examples(
    model: LanguageModel,
    examples: Sequence[Example],
    pack_tokens: int,
    track: Track | None = None,
    ranks: Ranks = ALONE,
) -> list[ExampleScore]:
    """Log-probability, rank and entropy at every token that something predicts, weighted or not (so that both the
    conditional and the joint likelihood can be read off); nan elsewhere. Common prefixes are computed once over all
    examples. Of several ranks each scores some packs, the same ones that one process would, and all get all scores."""
    columns_N = _room_for([len(e.token_ids_T) for e in examples])
    plan = plan_scoring(model, examples, pack_tokens)
    dealt = deal_plan(examples, plan, ranks.world_size)
    own = [plan[entry] for entry in dealt[ranks.rank]]
    scored = [
        column.ravel()
        for chosen in (track(own, "scoring", len(own)) if track else own)
        for column in score_together(model, examples, chosen)
    ]
    for _ in range(max(map(len, dealt)) - len(own) if model.sharded else 0):
        score_edges(model, idle_pack())
    for entries, values in zip(dealt, ranks.gather(np.concatenate([*scored, np.empty(0)])), strict=True):
        start = 0
        for i in (i for entry in entries for i in plan[entry]):
            columns = columns_N[i][:, 1:]
            columns[:] = values[start : start + columns.size].reshape(columns.shape)
            start += columns.size
    return [ExampleScore(*columns) for columns in columns_N]


def _room_for(lengths: Sequence[int]) -> list[FloatArray]:
    """Columns of each example, nan; those of many tokens in a file without a name, whose pages the system may put
    away, so that memory does not grow with the data."""
    ends = NUM_COLUMNS * np.cumsum(lengths)
    if not len(ends):
        return []
    everything = _numbers(int(ends[-1]))
    everything[:] = np.nan
    return [part.reshape(NUM_COLUMNS, -1) for part in np.split(everything, ends[:-1])]


def _numbers(size: int) -> FloatArray:
    if size > NUM_COLUMNS * MOST_IN_MEMORY:
        with suppress(AttributeError, OSError), TemporaryFile(prefix="likely-") as file:
            os.posix_fallocate(file.fileno(), 0, 8 * size)  # a full disk says so now, and not by a signal later
            return np.memmap(file, np.float64, "w+", shape=(size,))
    return np.empty(size)


def deal_plan(examples: Sequence[Example], plan: Sequence[list[int]], num_ranks: int) -> list[list[int]]:
    """Which entries of a plan each rank scores: the longest first, each to the rank with the fewest tokens."""
    if num_ranks == 1:
        return [list(range(len(plan)))]
    tokens_P = [sum(len(examples[i].token_ids_T) for i in chosen) for chosen in plan]
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for entry in sorted(range(len(plan)), key=lambda entry: (-tokens_P[entry], entry)):
        rank = loads.index(min(loads))
        dealt[rank].append(entry)
        loads[rank] += tokens_P[entry]
    return dealt


def plan_scoring(model: LanguageModel, examples: Sequence[Example], pack_tokens: int) -> list[list[int]]:
    """Which examples are computed together: those with the longest common prefixes, in packs of ``pack_tokens``. A
    function of the examples alone, so that scoring can go on where it was stopped."""
    everything = OnDemand(len(examples), lambda i: supervise_everything(examples[i]))
    return plan_packs(everything, pack_tokens, share=model.shares)


def score_together(model: LanguageModel, examples: Sequence[Example], chosen: Sequence[int]) -> list[FloatArray]:
    """One entry of the plan: for each chosen example the columns of an :class:`ExampleScore` after its first token,
    (NUM_COLUMNS, T - 1)."""
    everything = [supervise_everything(examples[i]) for i in chosen]
    pack = build_pack(everything, range(len(chosen)))
    scores = score_edges(model, pack)
    columns = (scores.logprob_E, scores.rank_E, scores.entropy_E, scores.best_E, scores.best_logprob_E)
    columns_E = np.stack(columns)
    return [columns_E[:, edges] for edges in pack.edge_of_N]


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


def bytes_of_answer(example: Example, tokenizer: Any) -> float:
    """UTF-8 bytes of the supervised text; nan where a token counts in part, since it has no bytes of its own."""
    if not set(np.unique(example.weights_T)) <= {0.0, 1.0}:
        return math.nan
    ids = example.token_ids_T[example.weights_T > 0].tolist()
    return float(len(tokenizer.decode(ids, skip_special_tokens=True).encode()))


def summarize(examples: Sequence[Example], scores: Sequence[ExampleScore], tokenizer: Any) -> Evaluation:
    """The figures of one model on some examples."""
    nll_N, weight_N = nll_per_example(examples, scores)
    num_tokens = float(weight_N.sum())
    nll = float(nll_N.sum()) / num_tokens
    num_bytes = sum(bytes_of_answer(e, tokenizer) for e in examples)
    correct = sum(float(e.weights_T[s.rank_T == 1].sum()) for e, s in zip(examples, scores, strict=True))
    return Evaluation(
        nll=nll,
        ci95=interval_of_ratio(nll_N, weight_N),
        perplexity=math.exp(min(nll, 700.0)),
        bits_per_byte=float(nll_N.sum()) / math.log(2) / num_bytes if num_bytes > 0 else None,
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
        ci95=interval_of_ratio(change_N, weight_N),
        share_better=float((change_N < 0).mean()),
    )


def interval_of_ratio(total_N: FloatArray, weight_N: FloatArray) -> tuple[float, float] | None:
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
