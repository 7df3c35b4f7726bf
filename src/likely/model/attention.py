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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from likely.data.trie import runs
from likely.errors import ModelError
from likely.model.transfer import to_device
from likely.types import IntArray

NAME = "likely_trie"
# Branches are computed together up to so many queries: what is masked away costs less than many small products.
MERGED_QUERIES = 128
# Longer chains are cut: half of the last block's scores are masked away, and all of its scores are in memory.
BLOCK_QUERIES = 256
# oneDNN, which multiplies narrow numbers on a CPU, writes machine code for each new shape, which takes as long as some
# products, and keeps it. So queries and keys of a block come in steps of so many.
ROUND = 16
# Blocks with at most so many keys keep their probabilities for the backward; more would not be linear in the length.
KEPT_KEYS = 512


@dataclass(frozen=True)
class Block:
    """Neighbouring queries and all that some of them may see: the nodes of ``path``, and then the nodes ``own``.
    ``queries`` are rows of the query tensor; ``bias`` (n, b) is 0 where a query may see one of the last b keys and -inf
    where not, and the keys before those are seen by all. The last queries, and the last keys, may be empty rows that
    only round their number up: no query sees such a key, and nobody asks what such a query sees. ``keys`` (m,) are all
    of them; what stands for an empty one is the first node."""

    queries: slice
    own: slice
    path: Tensor
    bias: Tensor
    keys: Tensor
    empty_keys: int = 0

    @property
    def num_queries(self) -> int:
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """Empty ones too."""
        return len(self.keys)


class Kernel(Protocol):
    """Another way to compute what :func:`attend` and :func:`attend_backward` do, for the queries of one layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]: ...

    def attend_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]: ...


Blocks = list[Block] | Kernel


@dataclass
class TriePlan:
    """Who attends to whom in one forward, and how often it was obeyed.

    ``calls`` counts the attention layers that used the plan and ``windowed_calls`` those among them that asked for a
    sliding window: a model that ignores the plan would silently attend across branches, so whoever runs the model
    compares the counts with the layers. ``kernels`` may know a better way than blocks: of (plan, queries, window,
    dtype) it makes what computes the attention, or None.
    """

    position_T: IntArray
    last_T: IntArray
    device: torch.device
    kernels: Callable[[TriePlan, IntArray, int | None, torch.dtype], Kernel | None] | None = None
    calls: int = 0
    windowed_calls: int = 0
    _blocks: dict[tuple[int | None, torch.dtype], Blocks] = field(default_factory=dict)

    def blocks(self, window: int | None, dtype: torch.dtype) -> Blocks:
        """The blocks of a layer with this window, made once for all layers alike; ``dtype`` of the products."""
        if (window, dtype) not in self._blocks:
            self._blocks[window, dtype] = self.blocks_of(np.arange(len(self.position_T)), window, dtype)
        return self._blocks[window, dtype]

    def blocks_of(self, query_S: IntArray, window: int | None, dtype: torch.dtype) -> Blocks:
        """The blocks of a layer whose query tensor holds only the nodes ``query_S``, which ascend."""
        kernel = self.kernels and self.kernels(self, query_S, window, dtype)
        if kernel:
            return kernel
        found, step = [], rounded_up(self.device, dtype)
        for start, end, whole_path in cut(self.position_T):
            first, last = np.searchsorted(query_S, (start, end)).tolist()
            if first == last:
                continue
            query = query_S[first:last]
            own = slice(start, int(query[-1]) + 1)
            path, key = whole_path, np.arange(own.start, own.stop)
            if window is None:  # past some depth the path is not that of the later branches of the block
                for_all = int((self.last_T[path] > query[-1]).sum())
                key = np.concatenate([path[for_all:], key])
            else:  # path[d] is the node at depth d: the first ones are out of every query's sight
                path = path[max(0, int(self.position_T[query].min()) - window + 1) :]
                key = np.concatenate([path, key])
            hidden = hidden_keys(query, key, self.position_T, self.last_T, window)
            empty_queries, empty_keys = -len(query) % step, -(len(path) + own.stop - own.start) % step
            hidden = np.pad(hidden, ((0, empty_queries), (0, 0)))
            hidden = np.pad(hidden, ((0, 0), (0, empty_keys)), constant_values=True)
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -math.inf)
            keys = np.concatenate([path, np.arange(own.start, own.stop), np.zeros(empty_keys, np.int64)])
            on_path, bias, seen = (to_device(x, self.device) for x in (path, bias, keys))
            found.append(Block(slice(first, last), own, on_path, bias, seen, empty_keys))
        return found


def rounded_up(device: torch.device, dtype: torch.dtype) -> int:
    """In steps of how many the rows of products in that dtype should come."""
    return ROUND if device.type == "cpu" and dtype == torch.bfloat16 else 1


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


def num_kept(blocks: Blocks) -> int:
    """Probabilities of one head that are kept for the backward."""
    if not isinstance(blocks, list):
        return 0
    return sum(b.bias.shape[0] * b.num_keys for b in blocks if b.num_keys <= KEPT_KEYS)


def _gather(x_NTC: Tensor, block: Block) -> Tensor:
    """Keys or values of a block, as :meth:`Block.num_keys` counts them."""
    if not len(block.path) and not block.empty_keys:
        return x_NTC[:, block.own]
    return x_NTC.index_select(1, block.keys)


def _queries(x_KGSC: Tensor, block: Block) -> Tensor:
    """Rows (K, G n, C) of a block's queries."""
    rows = x_KGSC[:, :, block.queries]
    empty = block.bias.shape[0] - block.num_queries
    if empty:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, empty))
    return rows.reshape(x_KGSC.shape[0], -1, x_KGSC.shape[-1])


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, in their dtype but summed in float32 at least, and, with a soft cap, the cap's derivative.
    ``query`` (K, G*n, C), ``key`` (K, m, C)."""
    scores = torch.bmm(query, key.transpose(1, 2))
    slope = None
    if softcap is not None:
        squashed = torch.tanh(scores.to(_wide(scores.dtype)) / softcap)
        scores, slope = (squashed * softcap).to(scores.dtype), 1 - squashed.square()
    n, b = bias.shape
    scores.view(scores.shape[0], -1, n, scores.shape[-1])[..., -b:].add_(bias)
    return torch.softmax(scores, dim=-1), slope


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums of gradients are kept in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, softcap: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Attention along the trie's paths: ``q`` (K, G, S, C), already scaled, ``k`` and ``v`` (K, T, C) ->
    (S, K, G, C), and the probabilities of the blocks that have few keys."""
    if not isinstance(blocks, list):
        _refuse_cap(softcap)
        return blocks.attend(q, k, v)
    K, G, S, C = q.shape
    out = q.new_empty(S, K, G, C)
    kept = []
    kv = torch.cat([k, v])
    for block in blocks:
        query, (key, value) = _queries(q, block), _gather(kv, block).chunk(2)
        p, _ = _probabilities(query, key, block.bias, softcap)
        if block.num_keys <= KEPT_KEYS and softcap is None:
            kept.append(p)
        o = torch.bmm(p, value)
        out[block.queries] = o.view(K, G, -1, C)[:, :, : block.num_queries].permute(2, 0, 1, 3)
    return out, kept


def _refuse_cap(softcap: float | None) -> None:
    if softcap is not None:
        raise ModelError("a layer asks for capped scores, which the chosen kernel doesn't compute")


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    kept: Sequence[Tensor],
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on ``q``, ``k`` and ``v`` from that on the result of :func:`attend`; the last two in at least float32.
    Probabilities that were not kept are computed anew, block by block."""
    if not isinstance(blocks, list):
        return blocks.attend_backward(grad, q, k, v, kept)
    rest = iter(kept)
    K, G, S, C = q.shape
    dq = q.new_empty(S, K, G, C).permute(1, 2, 0, 3)
    kv = torch.cat([k, v])
    dkv = torch.zeros(kv.shape, dtype=_wide(kv.dtype), device=kv.device)
    for block in blocks:
        key, value = _gather(kv, block).chunk(2)
        query, do = _queries(q, block), _queries(grad.permute(1, 2, 0, 3), block)
        if block.num_keys <= KEPT_KEYS and softcap is None:
            p, slope = next(rest), None
        else:
            p, slope = _probabilities(query, key, block.bias, softcap)
        both = kv.new_empty(2 * K, block.num_keys, C)
        torch.bmm(p.transpose(1, 2), do, out=both[K:])
        dp = torch.bmm(do, value.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        if slope is not None:
            ds = (ds * slope).to(p.dtype)
        dq[:, :, block.queries] = torch.bmm(ds, key).view(K, G, -1, C)[:, :, : block.num_queries]
        torch.bmm(ds.transpose(1, 2), query, out=both[:K])
        depth = len(block.path)
        dkv[:, block.own] += both[:, depth : block.num_keys - block.empty_keys]
        if depth:
            dkv.index_add_(1, block.path, both[:, :depth].to(dkv.dtype))
    return dq, dkv[:K], dkv[K:]


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, softcap: float | None) -> Tensor:
        out, kept = attend(q, k, v, blocks, softcap)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.blocks, ctx.softcap = blocks, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = attend_backward(grads[0].to(v.dtype), q, k, v, ctx.blocks, kept, ctx.softcap)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _widened(x: Tensor, size: int) -> Tensor:
    """With zeros at the end of the last axis. What is wide enough isn't copied, as torch's own padding would."""
    missing = size - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


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
        raise ModelError("the trie attention was called without a trie", way_out="run the model through hidden_at")
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Some models have values of another size than queries and keys; zeros change neither scores nor sums.
    size = max(query.shape[-1], value.shape[-1])
    q, k, v = (_widened(x[0], size).to(dtype) for x in (query * scale, key, value))
    blocks = plan.blocks(window, dtype)
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _TrieAttention.apply(  # type: ignore[no-untyped-call]
            q.reshape(K, H // K, *q.shape[1:]), k, v, blocks, options.get("softcap")
        )
    return out[..., : value.shape[-1]].flatten(1, 2)[None], None
