"""One prediction under the lens: what a model believes comes next, before and after, and where a step would push it.

The gradient of the NLL on the logits is ``p - onehot(gold)``: negative on the gold token, so a step raises its logit;
positive on each rival in proportion to its probability, so a step lowers it; the sum over the vocabulary is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from likely.data.packing import build_packs
from likely.model.forward import LanguageModel
from likely.types import Example, FloatArray, Source


@torch.no_grad()
def next_token_logprobs(model: LanguageModel, context: Sequence[int]) -> FloatArray:
    """``log P(v | context)`` for every token v of the vocabulary (V,), in nats, by the hidden states and head that
    train."""
    ids = np.array([*context, 0], np.int64)  # the last token is a target and never computed
    weights = np.zeros(len(ids))
    weights[-1] = 1.0
    example = Example(ids, weights, np.zeros(len(ids), np.int8), Source("lens", 0))
    (pack,) = build_packs([example], len(ids), share=model.shares)
    logits = model.gathered(lambda: model.head.logits(model.hidden_at(pack, pack.source_E)))
    result: FloatArray = torch.log_softmax(logits[0].double(), dim=-1).cpu().numpy()
    return result


@dataclass(frozen=True)
class TokenChange:
    """One row of the picture. Gradients are entries of ``p - onehot(gold)``."""

    text: str
    gold: bool
    before: float
    after: float
    gradient_before: float
    gradient_after: float


@dataclass(frozen=True)
class Lens:
    """The distribution after ``context``: the gold token first, then its top rivals, everything else last."""

    context: str
    gold: str
    rank_before: int
    rank_after: int
    nll_before: float
    nll_after: float
    rows: tuple[TokenChange, ...]


def compare_next_token(
    tokenizer: Any, context: Sequence[int], gold: int, before: FloatArray, after: FloatArray, num_rivals: int = 5
) -> Lens:
    """Where the probability went, from two results of :func:`next_token_logprobs` at the same context."""
    p, q = np.exp(before), np.exp(after)
    rivals = [int(v) for v in np.argsort(-np.maximum(p, q), kind="stable") if v != gold][:num_rivals]
    rows = [
        TokenChange(
            text=tokenizer.decode([v]),
            gold=v == gold,
            before=float(p[v]),
            after=float(q[v]),
            gradient_before=float(p[v] - (v == gold)),
            gradient_after=float(q[v] - (v == gold)),
        )
        for v in [gold, *rivals]
    ]
    rest = [float(max(0.0, 1 - x)) for x in (sum(r.before for r in rows), sum(r.after for r in rows))]
    rows.append(TokenChange("everything else", False, rest[0], rest[1], rest[0], rest[1]))
    return Lens(
        context=tokenizer.decode(list(context)),
        gold=tokenizer.decode([gold]),
        rank_before=1 + int((before > before[gold]).sum()),
        rank_after=1 + int((after > after[gold]).sum()),
        nll_before=float(-before[gold]),
        nll_after=float(-after[gold]),
        rows=tuple(rows),
    )
