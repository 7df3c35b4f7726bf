"""The truth, written from the definition: one conversation at a time, in float64, without padding, packing or sharing.

Nothing here comes from the package under test. A conversation is two plain lists, its token ids and their weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Truth:
    """``nll`` is sum_t w_t * -log P(token_t | token_<t) over all conversations, in nats; the lists hold one value per
    token, nan for the first; ``gradient`` is that of ``nll / denominator`` by parameter name (None: not trained)."""

    nll: float
    logprob: list[list[float]]
    rank: list[list[float]]
    entropy: list[list[float]]
    gradient: dict[str, torch.Tensor | None]


def truth(model: Any, rows: list[Row], denominator: float = 1.0) -> Truth:
    """What an ordinary transformers model says about the conversations, each forwarded alone."""
    model.zero_grad(set_to_none=True)
    result = Truth(0.0, [], [], [], {})
    nll = 0.0
    for token_ids, weights in rows:
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].double()
        loss = torch.zeros((), dtype=torch.float64)
        columns: tuple[list[float], list[float], list[float]] = ([math.nan], [math.nan], [math.nan])
        for t in range(1, len(token_ids)):
            logp = torch.log_softmax(logits[t - 1], dim=-1)
            gold = logp[token_ids[t]]
            loss = loss - weights[t] * gold
            columns[0].append(gold.item())
            columns[1].append(1.0 + sum(other > gold.item() for other in logp.tolist()))
            columns[2].append(-sum(math.exp(other) * other for other in logp.tolist()))
        if loss.requires_grad:
            (loss / denominator).backward()
        nll += loss.item()
        for kept, column in zip((result.logprob, result.rank, result.entropy), columns, strict=True):
            kept.append(column)
    for name, parameter in model.named_parameters():
        result.gradient[name] = None if parameter.grad is None else parameter.grad.clone()
    return Truth(nll, result.logprob, result.rank, result.entropy, result.gradient)


def entropy_of_next_tokens(rows: list[Row]) -> float:
    """The least that ``sum_t w_t * -log P(token_t | token_<t)`` can be over all conversations, in nats: the entropy of
    the empirical distribution of the next token, at every context by itself."""
    weight: dict[tuple[int, ...], dict[int, float]] = {}
    for token_ids, weights in rows:
        for t in range(1, len(token_ids)):
            if weights[t] > 0:
                after = weight.setdefault(tuple(token_ids[:t]), {})
                after[token_ids[t]] = after.get(token_ids[t], 0.0) + weights[t]
    return sum(w * math.log(sum(after.values()) / w) for after in weight.values() for w in after.values())


@st.composite
def families(draw: st.DrawFn, vocabulary: int, max_rows: int = 5, max_tail: int = 6) -> list[Row]:
    """Conversations that branch off one another anywhere, with duplicates, partial masks, rows that supervise nothing
    and answers of one token."""
    token = st.integers(0, vocabulary - 1)
    weight = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 2.0, 1 / 3])
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, max_rows))):
        stem: list[int] = []
        if rows and draw(st.integers(0, 3)):
            parent = draw(st.sampled_from(rows))[0]
            stem = parent[: draw(st.integers(0, len(parent)))]
        token_ids = stem + draw(st.lists(token, min_size=0 if stem else 1, max_size=max_tail))
        rest = len(token_ids) - 1
        supervision = draw(st.sampled_from(["some", "some", "all", "answer", "last", "none"]))
        weights = {
            "all": [1.0] * rest,
            "answer": [0.0] * (rest // 2) + [1.0] * (rest - rest // 2),
            "last": ([0.0] * rest + [1.0])[1:] if rest else [],
            "none": [0.0] * rest,
        }.get(supervision)
        if weights is None:
            weights = draw(st.lists(weight, min_size=rest, max_size=rest))
        rows += [(token_ids, [0.0, *weights])] * draw(st.sampled_from([1, 1, 1, 2, 3]))
    return rows
