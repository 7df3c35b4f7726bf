"""Attention over a trie, plugged into unmodified transformers models.

A trie in preorder is a row of chains. The queries of one chain may see the nodes on the path from the root to it and
the chain itself, causally: so keys and values are gathered along that path and plain causal attention is computed for
each chain, in blocks of queries so that memory stays linear in the length. Depths are positions, and therefore a
model's sliding window, counted along the path, is the window of the conversation.

Shapes: T nodes, H query heads, K key-value heads, G = H / K queries per key-value head, C head size, n queries of a
block, m keys it may see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from likely.data.trie import runs
from likely.errors import ModelError
from likely.types import IntArray

NAME = "likely_trie"
QUERY_BLOCK = 512


@dataclass
class TriePlan:
    """Who attends to whom in one forward, and how often it was obeyed.

    ``calls`` counts the attention layers that used the plan: a model that ignores it would silently attend across
    branches, so whoever runs the model compares the count with the number of layers.
    """

    chains: list[tuple[int, int, Tensor]]
    calls: int = field(default=0)

    @classmethod
    def of(cls, position_T: IntArray, device: torch.device) -> TriePlan:
        return cls([(s, e, torch.from_numpy(path).to(device)) for s, e, path in runs(position_T)])


@dataclass(frozen=True)
class _Block:
    """Queries ``start..end-1`` of a chain and the keys ``low..`` of its path that the first of them may see."""

    start: int
    end: int
    low: int
    high: int
    mask: Tensor  # (n, m) bool, True where the key is hidden


def _blocks(start: int, end: int, depth: int, window: int | None, device: torch.device) -> Iterator[_Block]:
    for first in range(start, end, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, end)
        query = torch.arange(first - start + depth, last - start + depth, device=device)
        low = 0 if window is None else max(0, int(first - start + depth) - window + 1)
        high = last - start + depth
        key = torch.arange(low, high, device=device)
        mask = key[None, :] > query[:, None]
        if window is not None:
            mask = mask | (key[None, :] <= query[:, None] - window)
        yield _Block(first, last, low, high, mask)


def _on_path(x_KTC: Tensor, path: Tensor, start: int, end: int) -> Tensor:
    own = x_KTC[:, start:end]
    return own if len(path) == 0 else torch.cat([x_KTC.index_select(1, path), own], dim=1)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
    """Softmax of the scores and, with a soft cap, the cap's derivative. ``query`` (K, G*n, C), ``key`` (K, m, C)."""
    scores = torch.bmm(query, key.transpose(1, 2)).to(_wide(query.dtype)) * scale
    slope = None
    if softcap is not None:
        squashed = torch.tanh(scores / softcap)
        scores, slope = squashed * softcap, 1 - squashed.square()
    K, n = scores.shape[0], mask.shape[0]
    scores.view(K, -1, n, mask.shape[1]).masked_fill_(mask, -math.inf)
    return torch.softmax(scores, dim=-1), slope if slope is not None else torch.empty(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Softmax and gradient sums are kept in at least float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class _TrieAttention(torch.autograd.Function):
    """Causal attention along the trie's paths; the backward computes the probabilities anew, block by block."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TriePlan, options: tuple[float, int | None, float | None]
    ) -> Tensor:
        """``q`` (K, G, T, C), ``k`` and ``v`` (K, T, C) -> (T, K, G, C)."""
        scale, window, softcap = options
        K, G, T, C = q.shape
        out = q.new_empty(T, K, G, v.shape[-1])
        for start, end, path in plan.chains:
            key, value = _on_path(k, path, start, end), _on_path(v, path, start, end)
            for block in _blocks(start, end, len(path), window, q.device):
                n = block.end - block.start
                query = q[:, :, block.start : block.end].reshape(K, G * n, C)
                p, _ = _probabilities(query, key[:, block.low : block.high], block.mask, scale, softcap)
                o = torch.bmm(p.to(v.dtype), value[:, block.low : block.high])
                out[block.start : block.end] = o.view(K, G, n, -1).permute(2, 0, 1, 3)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan, ctx.options = plan, options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out = ctx.saved_tensors
        grad = grads[0].to(v.dtype)
        scale, window, softcap = ctx.options
        K, G, _, C = q.shape
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=_wide(k.dtype), device=k.device)
        dv = torch.zeros(v.shape, dtype=_wide(v.dtype), device=v.device)
        for start, end, path in ctx.plan.chains:
            key, value = _on_path(k, path, start, end), _on_path(v, path, start, end)
            dkey, dvalue = torch.zeros_like(key, dtype=dk.dtype), torch.zeros_like(value, dtype=dv.dtype)
            for block in _blocks(start, end, len(path), window, q.device):
                n, seen = block.end - block.start, slice(block.low, block.high)
                query = q[:, :, block.start : block.end].reshape(K, G * n, C)
                o, do = (x[block.start : block.end].permute(1, 2, 0, 3).reshape(K, G * n, -1) for x in (out, grad))
                p, slope = _probabilities(query, key[:, seen], block.mask, scale, softcap)
                dvalue[:, seen] += torch.bmm(p.to(v.dtype).transpose(1, 2), do)
                dp = torch.bmm(do, value[:, seen].transpose(1, 2)).to(p.dtype)
                ds = p * (dp - (do.to(p.dtype) * o.to(p.dtype)).sum(-1, keepdim=True)) * scale
                if softcap is not None:
                    ds = ds * slope
                ds = ds.to(q.dtype)
                dq[:, :, block.start : block.end] = torch.bmm(ds, key[:, seen]).view(K, G, n, C)
                dkey[:, seen] += torch.bmm(ds.transpose(1, 2), query)
            depth = len(path)
            dk[:, start:end] += dkey[:, depth:]
            dv[:, start:end] += dvalue[:, depth:]
            if depth:
                dk.index_add_(1, path, dkey[:, :depth])
                dv.index_add_(1, path, dvalue[:, :depth])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


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
    plan.calls += 1
    H, K = query.shape[1], key.shape[1]
    dtype = value.dtype
    q = query[0].to(dtype).reshape(K, H // K, *query.shape[2:])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _TrieAttention.apply(  # type: ignore[no-untyped-call]
            q, key[0].to(dtype), value[0], plan, (scale, options.get("sliding_window"), options.get("softcap"))
        )
    return out.flatten(1, 2)[None], None
