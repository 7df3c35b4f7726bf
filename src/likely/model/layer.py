"""The two halves of a decoder layer of Llama's kind, forward and backward by hand.

    x + O attention(rotate(Q n), rotate(K n), V n),  n = norm(x)
    x + D (act(G n) * U n),                          n = norm(x)

The modules of transformers hold the parameters; here is only the arithmetic. Written out, a half keeps just what its
backward can't cheaply compute again, casts each tensor once, forms no gradient of a frozen weight, and can take its
queries at some nodes only, which is all that the last layer needs. The residual stream stays in the weights' dtype,
matrix products are in the compute dtype.

Shapes: T nodes, S nodes that are asked for, D hidden size, H query heads, K key-value heads, G = H / K, C head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from likely.model.attention import Blocks, attend, attend_backward, num_kept
from likely.model.elementwise import (
    before_gate,
    before_norm,
    gated,
    normal,
    one_over_root,
    rotate,
    scaled_normal,
    silu,
    wide,
)
from likely.model.linear import Casts, Gradients, Linear, Linears


@dataclass(frozen=True)
class Norm:
    """Root mean square norm (Zhang & Sennrich 2019) of the last axis, as transformers computes it: in float32."""

    weight: Tensor
    eps: float

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def normal(self, x: Tensor, rms: Tensor) -> Tensor:
        """``x`` over its root mean square, in at least float32."""
        return normal(x, rms)

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The result, and one over the root mean square of each row, from which :meth:`again` has it cheaper."""
        return scaled_normal(x, self.weight, self.eps, dtype)

    def again(self, normal: Tensor, dtype: torch.dtype) -> Tensor:
        return (normal * self.weight).to(dtype)

    def backward(self, dy: Tensor, normal: Tensor, rms: Tensor, past: Tensor | None = None) -> tuple[Tensor, Gradients]:
        """Gradients on x, and on the parameters, from that on the result; ``past`` is what else is on x."""
        dx, dweight = before_norm(dy, normal, rms, self.weight, past, self.weight.requires_grad)
        return dx, [None if dweight is None else dweight.to(self.weight.dtype)]


@dataclass(frozen=True)
class Angles:
    """Cosines and sines (T, C) of the nodes' depths."""

    cos: Tensor
    sin: Tensor
    _scaled: dict[float, Angles] = field(default_factory=dict)

    def times(self, scale: float) -> Angles:
        """That scale what they turn, and the way back too."""
        if scale not in self._scaled:
            self._scaled[scale] = Angles(self.cos * scale, self.sin * scale)
        return self._scaled[scale]

    def at(self, rows_S: Tensor | None) -> Angles:
        return self if rows_S is None else Angles(self.cos[rows_S], self.sin[rows_S])

    def turn(self, x_THC: Tensor) -> Tensor:
        return rotate(x_THC, self.cos, self.sin)

    def turn_back(self, dx_THC: Tensor) -> Tensor:
        """The gradient before :meth:`turn` from that after it: a rotation's transpose is the way back."""
        return rotate(dx_THC, self.cos, self.sin, back=True)


@dataclass(frozen=True)
class Sight:
    """What the attention of one forward needs. ``rows_S`` are the nodes whose results are asked for (None: all)."""

    blocks: Blocks
    angles: Angles
    rows_S: Tensor | None
    narrow: Casts

    @property
    def dtype(self) -> torch.dtype:
        return self.narrow.dtype


@dataclass(frozen=True)
class AttentionHalf:
    """Attention with its norm and residual; ``q_norm`` and ``k_norm`` are over each head, where a model has them."""

    norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    head_size: int
    scale: float
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def parts(self) -> list[Norm | Linear]:
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        return [self.norm, self.q, self.k, self.v, self.o, *norms]

    def __call__(self, x_TD: Tensor, sight: Sight) -> Tensor:
        """Residual stream (T, D) -> (S, D)."""
        out: Tensor = _Attention.apply(x_TD, self, sight, *parameters(self.parts))  # type: ignore[no-untyped-call]
        return out

    def inputs(self, y_TD: Tensor, sight: Sight) -> list[tuple[Linears, Tensor]]:
        """The layers of queries, keys and values, in this order, together where their input is the same."""
        if sight.rows_S is None:
            return [(Linears(self.q, self.k, self.v), y_TD)]
        return [(Linears(self.q), y_TD[sight.rows_S]), (Linears(self.k, self.v), y_TD)]

    def bytes_of_entry(self, num_nodes: int) -> int:
        """Of the residual stream."""
        return num_nodes * self.norm.weight.numel() * self.norm.weight.element_size()

    def bytes_kept(self, num_nodes: int, blocks: Blocks, dtype: torch.dtype) -> int:
        """What the backward finds in memory: the entry, queries, keys, values, the attention's result, and the
        probabilities of blocks with few keys; with norms over the heads, also what was before them."""
        before = self.q.num_out + self.k.num_out + self.v.num_out
        width = before + self.o.num_in + (before if self.q_norm or self.k_norm else 0)
        heads = self.q.num_out // self.head_size
        probabilities = heads * num_kept(blocks)
        return self.bytes_of_entry(num_nodes) + (num_nodes * width + probabilities) * dtype.itemsize

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // self.head_size, self.head_size)

    def placed(self, q_SHC: Tensor, k_THC: Tensor, v_THC: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (K, G, S, C), scaled, and keys and values (K, T, C), as the attention takes them."""
        q = q_SHC if self.q_norm is None else self.q_norm.forward(q_SHC, wide(q_SHC.dtype))[0]
        k = k_THC if self.k_norm is None else self.k_norm.forward(k_THC, wide(k_THC.dtype))[0]
        S, H, C = q.shape
        K = k.shape[1]
        q = sight.angles.times(self.scale).at(sight.rows_S).turn(q).to(sight.dtype)
        k = sight.angles.turn(k).to(sight.dtype).transpose(0, 1).contiguous()
        return q.view(S, K, H // K, C).permute(1, 2, 0, 3), k, v_THC.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class MlpHalf:
    """The gated feed-forward network with its norm and residual; the gate goes through SiLU."""

    norm: Norm
    gate: Linear
    up: Linear
    down: Linear

    @property
    def parts(self) -> list[Norm | Linear]:
        return [self.norm, self.gate, self.up, self.down]

    def bytes_kept(self, num_nodes: int, dtype: torch.dtype) -> int:
        """What the backward finds in memory: the entry, gate and up."""
        entry = num_nodes * self.norm.weight.numel() * self.norm.weight.element_size()
        return entry + num_nodes * (self.gate.num_out + self.up.num_out) * dtype.itemsize

    def __call__(self, x_TD: Tensor, sight: Sight) -> Tensor:
        out: Tensor = _Mlp.apply(x_TD, self, sight, *parameters(self.parts))  # type: ignore[no-untyped-call]
        return out


def parameters(parts: Sequence[Norm | Linear]) -> list[Tensor]:
    return [p for part in parts for p in part.parameters]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, half: AttentionHalf, sight: Sight, *_: Tensor) -> Tensor:
        y, rms = half.norm.forward(x_TD, sight.dtype)
        inputs = half.inputs(y, sight)
        q, k, v = (
            half.heads(part) for linears, seen in inputs for part in linears.split(linears.forward(seen, sight.narrow))
        )
        placed = half.placed(q, k, v, sight)
        o, kept = attend(*placed, sight.blocks)
        o = o.flatten(1)
        before_norms = [x for x, norm in ((q, half.q_norm), (k, half.k_norm)) if norm is not None]
        ctx.save_for_backward(x_TD, rms, o, *placed, *before_norms, *kept)
        ctx.half, ctx.sight = half, sight
        x_S = x_TD if sight.rows_S is None else x_TD[sight.rows_S]
        return Linears(half.o).forward(o, sight.narrow).to(x_TD.dtype).add_(x_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: AttentionHalf = ctx.half
        sight: Sight = ctx.sight
        x_TD, rms, o, q, k, v, *saved = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0]
        do, of_o = Linears(half.o).backward(grads[0].to(sight.dtype), o, sight.narrow)
        num_norms = (half.q_norm is not None) + (half.k_norm is not None)
        before_norms, kept = saved[:num_norms], saved[num_norms:]
        K, G, S, C = q.shape
        dq, dk, dv = attend_backward(do.view(S, K, G, C), q, k, v, sight.blocks, kept)
        dq = sight.angles.times(half.scale).at(sight.rows_S).turn_back(dq.permute(2, 0, 1, 3).view(S, K * G, C))
        dk = sight.angles.turn_back(dk.transpose(0, 1))
        of_norms: Gradients = []
        if half.q_norm is not None:
            dq, of_q_norm = _before_head_norm(half.q_norm, dq, before_norms[0])
            of_norms += of_q_norm
        if half.k_norm is not None:
            dk, of_k_norm = _before_head_norm(half.k_norm, dk, before_norms[-1])
            of_norms += of_k_norm
        wants_dy = wants_dx or half.norm.weight.requires_grad
        normal = half.norm.normal(x_TD, rms)
        of_inputs: Gradients = []
        dys = []
        rest = iter((dq, dk, dv.transpose(0, 1)))
        for linears, seen in half.inputs(half.norm.again(normal, sight.dtype), sight):
            d = seen.new_empty(len(seen), linears.num_out)
            for part in linears.split(d):
                half.heads(part).copy_(next(rest))
            dy, of_linears = linears.backward(d, seen, sight.narrow, wants_dx=wants_dy)
            of_inputs += of_linears
            dys.append(dy)
        dx: Tensor | None = None
        of_norm: Gradients = [None]
        if wants_dy:
            dy = dys[-1].to(wide(sight.dtype))
            if sight.rows_S is None:
                dx, of_norm = half.norm.backward(dy, normal, rms, grads[0])
            else:
                dy.index_add_(0, sight.rows_S, dys[0].to(dy.dtype))
                dx, of_norm = half.norm.backward(dy, normal, rms)
                dx.index_add_(0, sight.rows_S, grads[0].to(dx.dtype))
        return dx if wants_dx else None, None, None, *of_norm, *of_inputs, *of_o, *of_norms


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, half: MlpHalf, sight: Sight, *_: Tensor) -> Tensor:
        y, rms = half.norm.forward(x_TD, sight.dtype)
        gate_up = Linears(half.gate, half.up).forward(y, sight.narrow)
        ctx.save_for_backward(x_TD, rms, gate_up)
        ctx.half, ctx.sight = half, sight
        return Linears(half.down).forward(gated(gate_up), sight.narrow).to(x_TD.dtype).add_(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: MlpHalf = ctx.half
        sight: Sight = ctx.sight
        x_TD, rms, gate_up = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        opened = silu(gate)
        da, of_down = Linears(half.down).backward(grads[0].to(sight.dtype), opened * up, sight.narrow)
        normal = half.norm.normal(x_TD, rms)
        y = half.norm.again(normal, sight.dtype)
        d = before_gate(da, opened, gate_up)
        dy, of_inputs = Linears(half.gate, half.up).backward(d, y, sight.narrow)
        dx, of_norm = half.norm.backward(dy.to(wide(sight.dtype)), normal, rms, grads[0])
        return dx, None, None, *of_norm, *of_inputs, *of_down


def _before_head_norm(norm: Norm, dy_THC: Tensor, x_THC: Tensor) -> tuple[Tensor, Gradients]:
    rms = one_over_root(x_THC, norm.eps)
    return norm.backward(dy_THC, norm.normal(x_THC, rms), rms)
