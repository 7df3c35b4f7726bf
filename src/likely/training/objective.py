"""The objective: the weighted sum of -log P(target | context) over a pack's edges, in nats.

The gradient on the logits of a context is ``W p - sum_e w_e onehot(target_e)``, with p the model's distribution, w_e
the weights of the context's edges and W their sum. It needs nothing but the logits, so it is computed in the forward,
chunk by chunk over the S distinct supervised contexts: three matrix products and no tensor of T x V or S x V.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likely.errors import NonFiniteError
from likely.model.forward import Head, LanguageModel
from likely.model.linear import Casts
from likely.model.transfer import to_device
from likely.types import FloatArray, IntArray, Pack

CHUNK_LOGITS = 3 << 24  # logits held at once: 192 MiB in float32


def nll_sum(model: LanguageModel, pack: Pack) -> Tensor:
    """``sum_e weight_e * -log P(target_e | context of source_e)`` in nats, a float64 scalar with its gradient.

    A pack without edges gives a zero that stays in the graph.
    """
    return model.gathered(partial(_nll_sum, model, pack))


def _nll_sum(model: LanguageModel, pack: Pack) -> Tensor:
    edges = _Edges.of(pack, model.device, model.chunk_logits)
    head = model.head
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        model.hidden_at(pack, edges.source_S), head.weight, head.bias, head, edges, model.casts
    )
    return loss


@dataclass(frozen=True)
class EdgeScores:
    """Aligned with a pack's edges: log-probability of the target (nats); its rank, 1 for the most likely token; the
    entropy of the model's distribution at the edge's context (nats); the most likely token there and its
    log-probability (nats)."""

    logprob_E: FloatArray
    rank_E: FloatArray
    entropy_E: FloatArray
    best_E: FloatArray
    best_logprob_E: FloatArray


@torch.no_grad()
def score_edges(model: LanguageModel, pack: Pack) -> EdgeScores:
    """Log-probability, rank and entropy of each edge under the model, by the same hidden states and head as training,
    in the dtype of the weights.

    Raises:
        NonFiniteError: some log-probability is NaN or infinite, which no sum over examples would show.
    """
    edges = _Edges.of(pack, model.device)
    result = model.gathered(partial(_scored, model, pack, edges)).cpu().numpy()
    if not np.isfinite(result[0]).all():
        raise NonFiniteError(f"{model.name} gives log-probabilities that are not finite", way_out="look at its weights")
    restored = np.empty_like(result)
    restored[:, edges.order_E] = result
    return EdgeScores(*restored)


def _scored(model: LanguageModel, pack: Pack, edges: _Edges) -> Tensor:
    """The columns of an EdgeScores (5, E), in the order of the sorted edges."""
    hidden_SD = model.hidden_at(pack, edges.source_S)
    columns: list[Tensor] = []
    # Log-probabilities, probabilities, their product and the comparison for the rank are there at once.
    for rows, some in edges.chunks(6 * model.head.weight.shape[0]):
        logp = torch.log_softmax(model.head.logits(hidden_SD[rows]), dim=-1)
        gold = logp[some.row_E, some.target_E]
        rank_E = 1 + (logp[some.row_E] > gold[:, None]).sum(-1)
        entropy = -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)[some.row_E]
        best_logp, best = (values[some.row_E].double() for values in logp.max(-1))
        columns.append(torch.stack([gold.double(), rank_E.double(), entropy.double(), best, best_logp]))
    return torch.cat(columns, dim=1) if columns else torch.empty((5, 0), dtype=torch.float64)


@dataclass(frozen=True)
class _Edges:
    """Edges sorted by context. ``row_E`` is the context's row among the S distinct ones; edges of row s are
    ``first_S[s] .. first_S[s + 1] - 1``; ``order_E`` is where each sorted edge stood in the pack."""

    source_S: IntArray
    row_E: Tensor
    target_E: Tensor
    weight_E: Tensor
    first_S: list[int]
    order_E: IntArray
    num_logits: int | None = None

    @classmethod
    def of(cls, pack: Pack, device: torch.device, num_logits: int | None = None) -> _Edges:
        source_S, row_E = np.unique(pack.source_E, return_inverse=True)
        order_E = np.argsort(row_E, kind="stable")
        row_E = row_E[order_E]
        first_S = np.searchsorted(row_E, np.arange(len(source_S) + 1)).tolist()
        rows = [to_device(a, device) for a in (row_E, pack.target_E[order_E], pack.weight_E[order_E])]
        return cls(source_S, rows[0], rows[1], rows[2], first_S, order_E, num_logits)

    def chunks(self, row_size: int) -> Iterator[tuple[slice, _Edges]]:
        """Rows in few pieces, alike in size, of at most ``num_logits`` numbers (None: CHUNK_LOGITS), each with its
        edges, and rows counted from the piece's first."""
        at_most = max(1, (self.num_logits or CHUNK_LOGITS) // row_size)
        num_rows = len(self.source_S)
        edges = np.linspace(0, num_rows, -(-num_rows // at_most) + 1).astype(int).tolist()
        for start, stop in itertools.pairwise(edges):
            some = slice(self.first_S[start], self.first_S[stop])
            yield (
                slice(start, stop),
                _Edges(
                    self.source_S[start:stop],
                    self.row_E[some] - start,
                    self.target_E[some],
                    self.weight_E[some],
                    [first - self.first_S[start] for first in self.first_S[start : stop + 1]],
                    self.order_E[some],
                ),
            )


def _loss_and_gradient(head: Head, hidden_SD: Tensor, edges: _Edges, narrow_VD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed loss of some rows and its gradient on their ``W h + b``."""
    logits = head.logits(hidden_SD, narrow_VD)
    kept = logits.clone() if head.softcap is not None else logits
    weight_E = edges.weight_E.to(logits.dtype)
    weight_S = torch.zeros(len(logits), dtype=logits.dtype, device=logits.device).index_add_(0, edges.row_E, weight_E)
    gold_E = logits[edges.row_E, edges.target_E]
    top_S = logits.amax(-1)
    p = logits.sub_(top_S[:, None]).exp_()
    sum_S = p.sum(-1)
    nll_E = (top_S + sum_S.log())[edges.row_E] - gold_E
    p.mul_((weight_S / sum_S)[:, None])
    p[edges.row_E, edges.target_E] -= weight_E
    return (edges.weight_E * nll_E.double()).sum(), head.through(kept, p)


class _HeadLoss(torch.autograd.Function):
    """Hidden states at the supervised contexts -> loss; the gradients are ready when the forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        edges: _Edges,
        narrow: Casts,
    ) -> Tensor:
        dhidden_SD = torch.empty_like(hidden_SD)
        dweight_VD = None
        dbias_V = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        narrow_VD = narrow(weight_VD)
        # A product of narrow numbers with a wide result is at full speed on a GPU; a CPU has none.
        factor_VD = narrow_VD if hidden_SD.is_cuda and narrow_VD.dtype in {torch.bfloat16, torch.float16} else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_SD.device)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            for rows, some in edges.chunks(len(weight_VD)):
                loss, dlogits = _loss_and_gradient(head, hidden_SD[rows], some, factor_VD)
                total += loss
                if dbias_V is not None:
                    dbias_V += dlogits.sum(0)
                dlogits = dlogits.to(narrow.dtype)
                dhidden_SD[rows] = (dlogits @ narrow_VD).to(hidden_SD.dtype)
                if ctx.needs_input_grad[1]:
                    dweight_VD = _added(dweight_VD, dlogits.T @ hidden_SD[rows].to(narrow.dtype), weight_VD.dtype)
        if dweight_VD is None and ctx.needs_input_grad[1]:
            dweight_VD = torch.zeros_like(weight_VD)
        ctx.save_for_backward(dhidden_SD, dweight_VD, dbias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        dhidden, dweight, dbias = (None if d is None else d.mul_(scale.to(d.dtype)) for d in ctx.saved_tensors)
        return dhidden, dweight, dbias, None, None, None


def _added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if total is None else total.add_(part)
