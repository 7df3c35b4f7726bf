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
from likely.model.elementwise import before_gate, before_norm, gated, normal, rotate, scaled_normal, silu, wide
from likely.model.quantized import is_packed, numbers, shape_of

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class _Cast:
    parameter: Tensor  # held, so that no other tensor takes its identity
    result: Tensor
    trained: bool
    state: tuple[int, int]

    @classmethod
    def of(cls, parameter: Tensor, result: Tensor) -> _Cast:
        return cls(parameter, result, parameter.requires_grad, _state(parameter))


def _state(parameter: Tensor) -> tuple[int, int]:
    """Changes with the parameter, unless a fused optimizer or ``parameter.data`` changes it."""
    return (0 if parameter.is_inference() else parameter._version, parameter.data_ptr())


@dataclass
class Casts:
    """Parameters in the compute dtype, each cast once until :meth:`forget`, or until the parameter visibly changes; the
    memory is used again. Those that are not ``kept`` are cast as often as they are needed."""

    dtype: torch.dtype
    kept: bool = True
    _kept: dict[int, _Cast] = field(default_factory=dict)
    _stale: set[int] = field(default_factory=set)

    def __call__(self, parameter: Tensor) -> Tensor:
        if parameter.dtype == self.dtype:
            return parameter.detach()
        if is_packed(parameter):  # to save memory, so it would be lost on a copy that stays
            return numbers(parameter, self.dtype)
        if not self.kept or not parameter.is_leaf:
            return parameter.detach().to(self.dtype)
        key = id(parameter)
        cast = self._kept.get(key)
        if cast is None or (cast.result.shape, cast.result.device) != (parameter.shape, parameter.device):
            self._kept[key] = _Cast.of(parameter, parameter.detach().to(self.dtype))
        elif cast.state != _state(parameter) or (key in self._stale and (parameter.requires_grad or cast.trained)):
            self._kept[key] = _Cast.of(parameter, cast.result.copy_(parameter.detach()))
        self._stale.discard(key)
        return self._kept[key].result

    def forget(self) -> None:
        """Trainable parameters may have changed. Nothing else tells: a fused optimizer leaves their version number."""
        self._stale = set(self._kept)


@dataclass(frozen=True)
class Norm:
    """Root mean square norm (Zhang & Sennrich 2019) of the last axis, as transformers computes it: in float32."""

    weight: Tensor
    eps: float

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` over its root mean square, in at least float32, and one over the root mean square."""
        return normal(x, self.eps)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return scaled_normal(x, self.weight, self.eps, dtype)

    def backward(self, dy: Tensor, normal: Tensor, rms: Tensor) -> tuple[Tensor, Gradients]:
        """Gradients on x, and on the parameters, from that on the result; overwrites nothing."""
        dweight = None
        if self.weight.requires_grad:
            dweight = (dy * normal).flatten(0, -2).sum(0).to(self.weight.dtype)
        return before_norm(dy * self.weight, normal, rms), [dweight]


@dataclass(frozen=True)
class Linear:
    """``x W^T + b``, and with an adapter ``+ scaling (x A^T) B^T`` (LoRA, Hu et al. 2021)."""

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def num_in(self) -> int:
        return shape_of(self.weight)[1]

    @property
    def num_out(self) -> int:
        return shape_of(self.weight)[0]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(p for p in (self.weight, self.bias, self.lora_a, self.lora_b) if p is not None)

    def forward(self, x: Tensor, narrow: Casts) -> Tensor:
        bias = None if self.bias is None else narrow(self.bias)
        out = torch.nn.functional.linear(x, narrow(self.weight), bias)
        if self.lora_a is not None and self.lora_b is not None:
            out.addmm_(x @ narrow(self.lora_a).T, narrow(self.lora_b).T, alpha=self.scaling)
        return out

    def backward(self, dout: Tensor, x: Tensor, narrow: Casts, *, wants_dx: bool = True) -> tuple[Tensor, Gradients]:
        """Gradients on x (empty where nobody wants it), and on the parameters in their order (None where frozen), from
        that on the result."""
        dx = dout @ narrow(self.weight) if wants_dx else dout.new_empty(0)
        gradients: Gradients = [(dout.T @ x).to(self.weight.dtype) if self.weight.requires_grad else None]
        if self.bias is not None:
            gradients.append(dout.sum(0, dtype=self.bias.dtype) if self.bias.requires_grad else None)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = narrow(self.lora_a), narrow(self.lora_b)
            dz = (dout @ b).mul_(self.scaling)
            gradients.append((dz.T @ x).to(self.lora_a.dtype) if self.lora_a.requires_grad else None)
            # Transposed, the product is the same and faster: its few rows are the adapter's rank.
            db = ((x @ a.T).T @ dout).T.to(self.lora_b.dtype) * self.scaling if self.lora_b.requires_grad else None
            gradients.append(db)
            if wants_dx:
                dx.addmm_(dz, a)
        return dx, gradients


@dataclass(frozen=True)
class Angles:
    """Cosines and sines (T, C) of the nodes' depths."""

    cos: Tensor
    sin: Tensor

    def at(self, rows_S: Tensor | None) -> Angles:
        return self if rows_S is None else Angles(self.cos[rows_S], self.sin[rows_S])

    def turn(self, x_THC: Tensor, scale: float = 1.0) -> Tensor:
        return rotate(x_THC, self.cos * scale, self.sin * scale)

    def turn_back(self, dx_THC: Tensor, scale: float = 1.0) -> Tensor:
        """The gradient before :meth:`turn` from that after it: a rotation's transpose is the way back."""
        return rotate(dx_THC, self.cos * scale, self.sin * -scale)


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

    def bytes_of_entry(self, num_nodes: int) -> int:
        """Of the residual stream."""
        return num_nodes * self.norm.weight.numel() * self.norm.weight.element_size()

    def bytes_kept(self, num_nodes: int, blocks: Blocks, dtype: torch.dtype) -> int:
        """What the backward finds in memory: the entry, queries, keys, values, the attention's result, and the
        probabilities of blocks with few keys."""
        width = self.q.num_out + self.k.num_out + self.v.num_out + self.o.num_in
        width += sum(linear.num_out for linear, norm in ((self.q, self.q_norm), (self.k, self.k_norm)) if norm)
        heads = self.q.num_out // self.head_size
        probabilities = heads * num_kept(blocks)
        return self.bytes_of_entry(num_nodes) + (num_nodes * width + probabilities) * dtype.itemsize

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // self.head_size, self.head_size)

    def placed(self, q_SHC: Tensor, k_THC: Tensor, v_THC: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (K, G, S, C), scaled, and keys and values (K, T, C), as the attention takes them."""
        q = q_SHC if self.q_norm is None else self.q_norm.forward(q_SHC, wide(q_SHC.dtype))
        k = k_THC if self.k_norm is None else self.k_norm.forward(k_THC, wide(k_THC.dtype))
        S, H, C = q.shape
        K = k.shape[1]
        q = sight.angles.at(sight.rows_S).turn(q, self.scale).to(sight.dtype)
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
        y = half.norm.forward(x_TD, sight.dtype)
        y_S, x_S = (y, x_TD) if sight.rows_S is None else (y[sight.rows_S], x_TD[sight.rows_S])
        q, k, v = half.q.forward(y_S, sight.narrow), half.k.forward(y, sight.narrow), half.v.forward(y, sight.narrow)
        q, k, v = half.heads(q), half.heads(k), half.heads(v)
        placed = half.placed(q, k, v, sight)
        o, kept = attend(*placed, sight.blocks)
        o = o.flatten(1)
        before_norms = [x for x, norm in ((q, half.q_norm), (k, half.k_norm)) if norm is not None]
        ctx.save_for_backward(x_TD, o, *placed, *before_norms, *kept)
        ctx.half, ctx.sight = half, sight
        return x_S + half.o.forward(o, sight.narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: AttentionHalf = ctx.half
        sight: Sight = ctx.sight
        x_TD, o, q, k, v, *saved = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0]
        do, of_o = half.o.backward(grads[0].to(sight.dtype), o, sight.narrow)
        of_norms: Gradients = []
        norms = [norm for norm in (half.q_norm, half.k_norm) if norm is not None]
        before_norms, kept = saved[: len(norms)], saved[len(norms) :]
        K, G, S, C = q.shape
        dq, dk, dv = attend_backward(do.view(S, K, G, C), q, k, v, sight.blocks, kept)
        dq = sight.angles.at(sight.rows_S).turn_back(dq.permute(2, 0, 1, 3).view(S, K * G, C), half.scale)
        dk = sight.angles.turn_back(dk.transpose(0, 1))
        if half.q_norm is not None:
            dq, of_q_norm = half.q_norm.backward(dq, *half.q_norm.normal(before_norms[0]))
            of_norms += of_q_norm
        if half.k_norm is not None:
            dk, of_k_norm = half.k_norm.backward(dk, *half.k_norm.normal(before_norms[-1]))
            of_norms += of_k_norm
        wants_dy = wants_dx or half.norm.weight.requires_grad
        normal, rms = half.norm.normal(x_TD)
        y = (normal * half.norm.weight).to(sight.dtype)
        y_S = y if sight.rows_S is None else y[sight.rows_S]
        of_inputs: Gradients = []
        parts = []
        for linear, d, seen in ((half.q, dq, y_S), (half.k, dk, y), (half.v, dv.transpose(0, 1), y)):
            part, of_linear = linear.backward(d.flatten(1).to(sight.dtype), seen, sight.narrow, wants_dx=wants_dy)
            of_inputs += of_linear
            parts.append(part)
        dx: Tensor | None = None
        of_norm: Gradients = [None]
        if wants_dy:
            dy = _wide_sum(parts[1:])
            _add_rows(dy, parts[0], sight.rows_S)
            dx, of_norm = half.norm.backward(dy, normal, rms)
            _add_rows(dx, grads[0], sight.rows_S)
        return dx if wants_dx else None, None, None, *of_norm, *of_inputs, *of_o, *of_norms


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, half: MlpHalf, sight: Sight, *_: Tensor) -> Tensor:
        y = half.norm.forward(x_TD, sight.dtype)
        gate, up = half.gate.forward(y, sight.narrow), half.up.forward(y, sight.narrow)
        ctx.save_for_backward(x_TD, gate, up)
        ctx.half, ctx.sight = half, sight
        return x_TD + half.down.forward(gated(gate, up), sight.narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half: MlpHalf = ctx.half
        sight: Sight = ctx.sight
        x_TD, gate, up = ctx.saved_tensors
        opened = silu(gate)
        da, of_down = half.down.backward(grads[0].to(sight.dtype), opened * up, sight.narrow)
        dup, dgate = before_gate(da, opened, gate, up)
        normal, rms = half.norm.normal(x_TD)
        y = (normal * half.norm.weight).to(sight.dtype)
        dy, of_gate = half.gate.backward(dgate, y, sight.narrow)
        more_dy, of_up = half.up.backward(dup, y, sight.narrow)
        dx, of_norm = half.norm.backward(_wide_sum([dy, more_dy]), normal, rms)
        return dx.add_(grads[0]), None, None, *of_norm, *of_gate, *of_up, *of_down


def _wide_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum in at least float32; may overwrite the first part."""
    total = parts[0].to(wide(parts[0].dtype))
    for part in parts[1:]:
        total.add_(part)
    return total


def _add_rows(total: Tensor, part: Tensor, rows_S: Tensor | None) -> None:
    """``total += part``, where ``part`` may belong to some rows only."""
    if rows_S is None:
        total.add_(part)
    else:
        total.index_add_(0, rows_S, part.to(total.dtype))
