"""Linear layers side by side, beside the same layers one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from likely.model.linear import Casts, Linear, Linears

SIZES = (6, 3, 5)  # of three layers of one input
KINDS = {
    "plain": ["w", "w", "w"],
    "biases": ["wb", "wb", "wb"],
    "some biases": ["wb", "w", "w"],
    "adapters": ["wAB", "wAB", "wAB"],
    "some adapters": ["w", "wbAB", "wAB"],
}


def random(*shape: int, trained: bool = True) -> Tensor:
    return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64), requires_grad=trained)


def build(kinds: list[str], frozen: str, seed: int = 0) -> list[Linear]:
    """Layers with the parts that their kinds name; ``frozen`` are parts, or "others" for all but the second layer."""
    torch.manual_seed(seed)
    layers = []
    for i, (size, kind) in enumerate(zip(SIZES, kinds, strict=True)):
        never = "wbAB" if frozen == "others" and i != 1 else frozen
        rank = 2 + i
        parts = {
            "weight": random(size, 4, trained="w" not in never),
            "bias": random(size, trained="b" not in never) if "b" in kind else None,
            "lora_a": random(rank, 4, trained="A" not in never) if "A" in kind else None,
            "lora_b": random(size, rank, trained="B" not in never) if "B" in kind else None,
        }
        layers.append(Linear(**parts, scaling=0.5 + i))  # type: ignore[arg-type]
    return layers


def by_autograd(layers: list[Linear], x: Tensor, dout: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The results side by side, and the gradients on x and on what is trained, from the definition."""
    x = x.clone().requires_grad_()
    parts = []
    for layer in layers:
        part = x @ layer.weight.T
        if layer.bias is not None:
            part = part + layer.bias
        if layer.lora_a is not None and layer.lora_b is not None:
            part = part + layer.scaling * (x @ layer.lora_a.T) @ layer.lora_b.T
        parts.append(part)
    out = torch.cat(parts, dim=1)
    held = [x, *itertools.chain.from_iterable(layer.parameters for layer in layers)]
    found = torch.autograd.grad(out, [p for p in held if p.requires_grad], dout)
    rest = iter(found)
    return out.detach(), [next(rest) if p.requires_grad else None for p in held]


@pytest.mark.parametrize("frozen", ["", "w", "wb", "bA", "others"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # without copies of the weights, and with them
def test_side_by_side_is_one_by_one(dtype: torch.dtype, kept: bool, kind: str, frozen: str) -> None:
    layers = build(KINDS[kind], frozen)
    x, dout = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, sum(SIZES), dtype=torch.float64)
    wanted, gradients = by_autograd(layers, x, dout)
    linears, narrow = Linears(*layers), Casts(dtype, kept)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        found = linears.forward(x.to(dtype), narrow)
        dx, others = linears.backward(dout.to(dtype), x.to(dtype), narrow)
    torch.testing.assert_close(found.double(), wanted, **close)
    for mine, theirs in zip([dx, *others], gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine.double(), theirs, **close)


def test_copies_follow_their_parameters() -> None:
    layers, narrow = build(KINDS["biases"], ""), Casts(torch.float32)
    linears, x = Linears(*layers), torch.randn(7, 4)
    with torch.no_grad():
        linears.forward(x, narrow)
        layers[1].weight.mul_(2)  # seen at once
        layers[2].weight.data.mul_(3)  # seen when told
        narrow.forget()
        found = linears.forward(x, narrow)
        wanted = torch.cat([x.double() @ layer.weight.T + layer.bias for layer in layers], dim=1)  # type: ignore[operator]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


class Written(TorchDispatchMode):
    """Counts the bytes of new tensors that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and not any(result is a for a in args):
            self.num_bytes += result.nbytes
        return result


def test_copies_that_are_not_kept_are_written_once() -> None:
    """They are where memory is short."""
    weights, narrow = [layer.weight for layer in build(KINDS["plain"], "")], Casts(torch.float32, kept=False)
    with torch.no_grad(), Written() as written:
        joined = narrow(*weights)
    assert torch.equal(joined, torch.cat(weights).float())
    assert written.num_bytes == joined.nbytes
