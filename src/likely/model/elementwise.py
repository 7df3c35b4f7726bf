"""The arithmetic of a layer that goes number by number, which a GPU may fuse (:mod:`likely.model.fuse`)."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.model.fuse import fusible


def silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


@fusible
def gated(gate_up: Tensor) -> Tensor:
    """What goes into the last product of a gated feed-forward network; gate and up (T, F) stand side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


@fusible
def before_gate(da: Tensor, opened: Tensor, gate_up: Tensor) -> Tensor:
    """Gradients on gate and up, side by side; overwrites ``da`` and ``opened``."""
    gate, up = gate_up.chunk(2, dim=-1)
    before = torch.empty_like(gate_up)
    dgate, dup = before.chunk(2, dim=-1)
    torch.ops.aten.mul.out(opened, da, out=dup)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
    return before


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def one_over_root(x: Tensor, eps: float) -> Tensor:
    """One over the root mean square of each row, in float32."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


@fusible
def normal(x: Tensor, rms: Tensor) -> Tensor:
    """``x`` over its root mean square, in at least float32; ``rms`` is one over that root, of each row."""
    return (x.float() * rms).to(wide(x.dtype))


@fusible
def scaled_normal(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The root mean square norm of the last axis (Zhang & Sennrich 2019), with its gain, and one over the root."""
    rms = one_over_root(x, eps)
    return (x.float() * rms).to(wide(x.dtype)).mul_(weight).to(dtype), rms


@fusible
def before_norm(
    dy: Tensor, normal: Tensor, rms: Tensor, weight: Tensor, past: Tensor | None, wants_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients on what a norm is of, and on its gain, from that on its result; ``past`` is added to the first.
    All are in at least float32."""
    products = dy * normal
    dweight = products.flatten(0, -2).sum(0) if wants_dweight else None
    along = (products @ weight.to(products.dtype))[..., None] / weight.numel()
    dx = torch.mul(dy, weight, out=products).addcmul_(normal, along, value=-1)
    return (dx.mul_(rms) if past is None else torch.addcmul(past, dx, rms)), dweight


@fusible
def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, back: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021) with the halves of a head as its planes, in at least float32;
    ``back`` is the way back, which is the transpose of a rotation."""
    half = x_THC.shape[-1] // 2
    cos, sin = cos_TC[:, None], sin_TC[:, None, :half]
    x = x_THC.to(torch.promote_types(x_THC.dtype, cos.dtype))
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=1 if back else -1)
    out[..., half:].addcmul_(x[..., :half], sin, value=-1 if back else 1)
    return out
