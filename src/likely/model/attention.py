"""Attention over a trie, plugged into unmodified transformers models.

The nodes of a trie stand in preorder, so the nodes that a run of neighbours may see are the path from the root to the
first of them, and the neighbours themselves. Keys and values are gathered along that path, and plain masked attention
is computed block by block: short branches together, long chains in pieces, so that memory stays linear in the length.
Positions are depths, and therefore a model's sliding window, counted in depths, is the window of the conversation.

Shapes: T nodes, H query heads, K key-value heads, G = H / K queries per key-value head, C head size, n queries of a
block, m keys that some of them may see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likely.data.trie import runs
from likely.errors import ModelError
from likely.types import IntArray

NAME = "likely_trie"
# Branches are computed together up to so many queries: what is masked away costs less than many small products.
MERGED_QUERIES = 128
# Longer chains are cut: half of the last block's scores are masked away, and all of its scores are in memory.
BLOCK_QUERIES = 256


@dataclass(frozen=True)
class Block:
    """Queries ``start..end-1``; the keys are the nodes of ``path`` and then the queries' own. ``bias`` (n, m) is 0
    where a query may see a key and -inf where not."""

    start: int
    end: int
    path: Tensor
    bias: Tensor


@dataclass
class TriePlan:
    """Who attends to whom in one forward, and how often it was obeyed.

    ``calls`` counts the attention layers that used the plan and ``windowed_calls`` those among them that asked for a
    sliding window: a model that ignores the plan would silently attend across branches, so whoever runs the model
    compares the counts with the layers.
    """

    position_T: IntArray
    last_T: IntArray
    device: torch.device
    calls: int = 0
    windowed_calls: int = 0
    _blocks: dict[tuple[int | None, torch.dtype], list[Block]] = field(default_factory=dict)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[Block]:
        """The blocks of a layer with this window, made once for all layers alike; ``dtype`` of the bias."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = [
                self._block(start, end, path, window, dtype) for start, end, path in cut(self.position_T)
            ]
        return self._blocks[window, dtype]

    def _block(self, start: int, end: int, path: IntArray, window: int | None, dtype: torch.dtype) -> Block:
        if window is not None:  # path[d] is the node at depth d: the first ones are out of every query's sight
            path = path[max(0, int(self.position_T[start:end].min()) - window + 1) :]
        query, key = np.arange(start, end), np.concatenate([path, np.arange(start, end)])
        hidden = hidden_keys(query, key, self.position_T, self.last_T, window)
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -math.inf)
        return Block(start, end, torch.from_numpy(path).to(self.device), bias.to(self.device))


def hidden_keys(query: IntArray, key: IntArray, position_T: IntArray, last_T: IntArray, window: int | None) -> Any:
    """(n, m) bool: the key is neither an ancestor of the query nor the query itself, or ``window`` or more above it."""
    hidden = (key[None, :] > query[:, None]) | (query[:, None] >= last_T[key][None, :])
    if window is not None:
        hidden |= position_T[key][None, :] <= position_T[query][:, None] - window
    return hidden


def cut(position_T: IntArray) -> Iterator[tuple[int, int, IntArray]]:
    """Blocks ``(start, end, path to the first node)`` that cover a preorder trie: neighbouring chains together while
    they are short, long ones in equal pieces."""
    start, end, path = 0, 0, np.empty(0, np.int64)
    for run_start, run_end, run_path in runs(position_T):
        if run_end - start <= MERGED_QUERIES:
            if start == end:
                start, path = run_start, run_path
            end = run_end
            continue
        if start < end:
            yield start, end, path
        pieces = -(-(run_end - run_start) // BLOCK_QUERIES)
        edges = np.linspace(run_start, run_end, pieces + 1).astype(int).tolist()
        for first, last in itertools.pairwise(edges[:-1]):
            yield first, last, np.concatenate([run_path, np.arange(run_start, first)])
        # The last piece may be short enough to take in what follows.
        start, end, path = edges[-2], run_end, np.concatenate([run_path, np.arange(run_start, edges[-2])])
    if start < end:
        yield start, end, path


def _gather(x_KTC: Tensor, block: Block) -> Tensor:
    own = x_KTC[:, block.start : block.end]
    return own if len(block.path) == 0 else torch.cat([x_KTC.index_select(1, block.path), own], dim=1)


def _probabilities(
    query: Tensor, key: Tensor, bias: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores and, with a soft cap, the cap's derivative. ``query`` (K, G*n, C), ``key`` (K, m, C)."""
    scores = torch.bmm(query, key.transpose(1, 2)).to(bias.dtype).mul_(scale)
    slope = None
    if softcap is not None:
        squashed = torch.tanh(scores / softcap)
        scores, slope = squashed * softcap, 1 - squashed.square()
    n, m = bias.shape
    scores.view(scores.shape[0], -1, n, m).add_(bias)
    return torch.softmax(scores, dim=-1), slope


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Softmax and gradient sums are kept in at least float32."""
    return torch.promote_types(dtype, torch.float32)


class _TrieAttention(torch.autograd.Function):
    """Causal attention along the trie's paths; the backward computes the probabilities anew, block by block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float, softcap: float | None
    ) -> Tensor:
        """``q`` (K, G, T, C), ``k`` and ``v`` (K, T, C) -> (T, K, G, C)."""
        K, G, T, C = q.shape
        out = q.new_empty(T, K, G, v.shape[-1])
        for block in blocks:
            n = block.end - block.start
            query = q[:, :, block.start : block.end].reshape(K, G * n, C)
            p, _ = _probabilities(query, _gather(k, block), block.bias, scale, softcap)
            o = torch.bmm(p.to(v.dtype), _gather(v, block))
            out[block.start : block.end] = o.view(K, G, n, -1).permute(2, 0, 1, 3)
        ctx.save_for_backward(q, k, v, out)
        ctx.blocks, ctx.scale, ctx.softcap = blocks, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad = grads[0].to(v.dtype)
        K, G, _, C = q.shape
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=_wide(k.dtype), device=k.device)
        dv = torch.zeros(v.shape, dtype=_wide(v.dtype), device=v.device)
        for block in ctx.blocks:
            n = block.end - block.start
            rows = slice(block.start, block.end)
            key, value = _gather(k, block), _gather(v, block)
            query = q[:, :, rows].reshape(K, G * n, C)
            o, do = (x[rows].permute(1, 2, 0, 3).reshape(K, G * n, -1) for x in (out, grad))
            p, slope = _probabilities(query, key, block.bias, ctx.scale, ctx.softcap)
            dvalue = torch.bmm(p.to(v.dtype).transpose(1, 2), do)
            dp = torch.bmm(do, value.transpose(1, 2)).to(p.dtype)
            ds = dp.sub_((do * o).sum(-1, keepdim=True, dtype=p.dtype)).mul_(p).mul_(ctx.scale)
            if slope is not None:
                ds = ds * slope
            ds = ds.to(q.dtype)
            dq[:, :, rows] = torch.bmm(ds, key).view(K, G, n, C)
            dkey = torch.bmm(ds.transpose(1, 2), query)
            for total, part in ((dk, dkey), (dv, dvalue)):
                depth = len(block.path)
                total[:, rows] += part[:, depth:]
                if depth:
                    total.index_add_(1, block.path, part[:, :depth].to(total.dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def trie_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each attention layer: ``query`` (1, H, T, C) -> (1, T, H, C).

    Raises:
        ModelError: called without a plan (a trie's positions without the trie's mask would be silently wrong), or by a
            layer that asks for something this attention does not compute.
    """
    plan = options.get("trie_plan")
    if plan is None:
        raise ModelError("the trie attention was called without a trie", way_out="run the model through forward_hidden")
    unknown = [name for name in ("s_aux", "position_bias", "cu_seq_lens_q") if options.get(name) is not None]
    if unknown or query.shape[0] != 1 or attention_mask is not None or options.get("dropout"):
        raise ModelError(
            f"{type(module).__name__} asks for attention that can't be shared over a trie"
            f" ({', '.join(unknown) or 'a mask, dropout or several rows'})"
        )
    window = options.get("sliding_window")
    plan.calls += 1
    plan.windowed_calls += window is not None
    H, K = query.shape[1], key.shape[1]
    dtype = value.dtype
    q = query[0].to(dtype).reshape(K, H // K, *query.shape[2:])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks = plan.blocks(window, _wide(dtype))
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _TrieAttention.apply(  # type: ignore[no-untyped-call]
            q, key[0].to(dtype), value[0], blocks, scale, options.get("softcap")
        )
    return out.flatten(1, 2)[None], None
