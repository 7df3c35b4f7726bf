"""Linear layers, with or without adapters, forward and backward by hand, and the copies of their weights that products
in a narrower dtype need.

Shapes: T rows, D numbers of an input, N of all results of it together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from likely.model.elementwise import wide
from likely.model.quantized import is_packed, numbers, shape_of

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class _Seen:
    """A parameter as it was when it was copied. Its state changes with it, unless a fused optimizer or
    ``parameter.data`` changes it."""

    trained: bool
    state: tuple[int, int]

    @classmethod
    def of(cls, parameter: Tensor) -> _Seen:
        version = 0 if parameter.is_inference() else parameter._version
        return cls(parameter.requires_grad, (version, parameter.data_ptr()))


def _shape_of_all(parameters: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Of parameters of the same width, one below the other."""
    first, *rest = map(shape_of, parameters)
    return (first[0] + sum(shape[0] for shape in rest), *first[1:])


def _pieces(whole: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rows of each."""
    return whole.split_with_sizes([shape_of(p)[0] for p in parameters])


@dataclass
class _Copy:
    """Parameters, one below the other. They are held, so that no other tensor takes their identity."""

    parameters: tuple[Tensor, ...]
    result: Tensor
    seen: list[_Seen | None]

    def refresh(self, *, forgotten: bool) -> None:
        pieces = _pieces(self.result, self.parameters)
        for i, (parameter, piece) in enumerate(zip(self.parameters, pieces, strict=True)):
            old, new = self.seen[i], _Seen.of(parameter)
            if old is None or old.state != new.state or (forgotten and (old.trained or new.trained)):
                piece.copy_(parameter.detach())
                self.seen[i] = new


@dataclass
class Casts:
    """Parameters in the compute dtype, each cast once until :meth:`forget`, or until the parameter visibly changes; the
    memory is used again. Those that are not ``kept`` are cast as often as they are needed."""

    dtype: torch.dtype
    kept: bool = True
    _kept: dict[tuple[int, ...], _Copy] = field(default_factory=dict)
    _stale: set[tuple[int, ...]] = field(default_factory=set)

    def __call__(self, *parameters: Tensor) -> Tensor:
        """One parameter, or several of the same width, one below the other."""
        if not self.kept or not all(self._needs_copy(p) and p.is_leaf for p in parameters):
            return self._at_once(*parameters)
        key = tuple(map(id, parameters))
        shape = _shape_of_all(parameters)
        copy = self._kept.get(key)
        if copy is None or (copy.result.shape, copy.result.device) != (shape, parameters[0].device):
            empty = parameters[0].detach().new_empty(shape, dtype=self.dtype)
            copy = self._kept[key] = _Copy(parameters, empty, [None] * len(parameters))
        copy.refresh(forgotten=key in self._stale)
        self._stale.discard(key)
        return copy.result

    def forget(self) -> None:
        """Trainable parameters may have changed. Nothing else tells: a fused optimizer leaves their version number."""
        self._stale = set(self._kept)

    def makes_copies_of(self, parameters: list[Tensor]) -> bool:
        """Whether there is a copy of each in the compute dtype for a while, which may as well be one copy of all."""
        return all(map(self._needs_copy, parameters))

    def _needs_copy(self, parameter: Tensor) -> bool:
        # Those that are packed are so to save memory, which would be lost on a copy that stays.
        return parameter.dtype != self.dtype and not is_packed(parameter)

    def _at_once(self, *parameters: Tensor) -> Tensor:
        if len(parameters) == 1:
            (only,) = parameters
            return numbers(only, self.dtype) if is_packed(only) else only.detach().to(self.dtype)
        # Written in place: where nothing is kept memory is short, and a cast of each would be there once more.
        result = parameters[0].detach().new_empty(_shape_of_all(parameters), dtype=self.dtype)
        for parameter, piece in zip(parameters, _pieces(result, parameters), strict=True):
            piece.copy_(numbers(parameter, self.dtype) if is_packed(parameter) else parameter.detach())
        return result


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


class Adapter(NamedTuple):
    """The factors of a layer's adapter, and which of the layers of one input it is."""

    place: int
    a: Tensor
    b: Tensor
    scaling: float


class Linears:
    """Linear layers of one input; their results (T, N) stand side by side. Where weights are copied for the compute
    dtype anyway, the copies stand one below the other, and one product does for all layers. So do the adapters' A."""

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self._sizes = [layer.num_out for layer in layers]
        self._adapters = [
            Adapter(i, layer.lora_a, layer.lora_b, layer.scaling)
            for i, layer in enumerate(layers)
            if layer.lora_a is not None and layer.lora_b is not None
        ]
        self._ranks = [len(adapter.a) for adapter in self._adapters]

    @property
    def num_out(self) -> int:
        return sum(self._sizes)

    def split(self, x_TN: Tensor) -> tuple[Tensor, ...]:
        """The part of each layer."""
        return x_TN.split_with_sizes(self._sizes, dim=1)

    def forward(self, x: Tensor, narrow: Casts) -> Tensor:
        if self._one_product(narrow):
            biases = [layer.bias for layer in self.layers if layer.bias is not None]
            weight = narrow(*(layer.weight for layer in self.layers))
            out = torch.nn.functional.linear(x, weight, narrow(*biases) if biases else None)
        else:
            out = x.new_empty(len(x), self.num_out)
            for layer, part in zip(self.layers, self.split(out), strict=True):
                torch.mm(x, narrow(layer.weight).T, out=part)
                if layer.bias is not None:
                    part.add_(narrow(layer.bias))
        if self._adapters:
            parts = self.split(out)
            for adapter, z in zip(self._adapters, self._inner(x, narrow), strict=True):
                parts[adapter.place].addmm_(z, narrow(adapter.b).T, alpha=adapter.scaling)
        return out

    def backward(self, dout: Tensor, x: Tensor, narrow: Casts, *, wants_dx: bool = True) -> tuple[Tensor, Gradients]:
        """Gradients on x (empty where nobody wants it; in at least float32 where it is a sum of several products), and
        on the parameters, layer by layer in their order (None where frozen), from that on the results."""
        dx = self._of_input(dout, narrow) if wants_dx else dout.new_empty(0)
        of_adapters = self._of_adapters(dout, x, narrow, dx if wants_dx else None) if self._adapters else {}
        gradients: Gradients = []
        for i, (of_weight, part) in enumerate(zip(self._of_weights(dout, x), self.split(dout), strict=True)):
            gradients.append(of_weight)
            bias = self.layers[i].bias
            if bias is not None:
                gradients.append(part.sum(0, dtype=bias.dtype) if bias.requires_grad else None)
            gradients += of_adapters.get(i, [])
        return dx, gradients

    def _one_product(self, narrow: Casts) -> bool:
        num_biases = sum(layer.bias is not None for layer in self.layers)
        return len(self.layers) == 1 or (
            num_biases in (0, len(self.layers)) and narrow.makes_copies_of([layer.weight for layer in self.layers])
        )

    def _of_input(self, dout: Tensor, narrow: Casts) -> Tensor:
        if self._one_product(narrow):
            return dout @ narrow(*(layer.weight for layer in self.layers))
        (first, d), *rest = zip(self.layers, self.split(dout), strict=True)
        dx = (d @ narrow(first.weight)).to(wide(dout.dtype))
        for layer, d in rest:
            _add_product(dx, d, narrow(layer.weight))
        return dx

    def _of_weights(self, dout: Tensor, x: Tensor) -> Gradients:
        weights = [layer.weight for layer in self.layers]
        if all(weight.requires_grad for weight in weights):
            parts = (dout.T @ x).split_with_sizes(self._sizes)
            return [part.to(weight.dtype) for weight, part in zip(weights, parts, strict=True)]
        pairs = zip(weights, self.split(dout), strict=True)
        return [(d.T @ x).to(weight.dtype) if weight.requires_grad else None for weight, d in pairs]

    def _inner(self, x: Tensor, narrow: Casts) -> tuple[Tensor, ...]:
        """``x A^T`` (T, rank) of each adapter."""
        return (x @ self._down(narrow).T).split_with_sizes(self._ranks, dim=1)

    def _down(self, narrow: Casts) -> Tensor:
        return narrow(*(adapter.a for adapter in self._adapters))

    def _of_adapters(self, dout: Tensor, x: Tensor, narrow: Casts, dx: Tensor | None) -> dict[int, Gradients]:
        """Gradients on the factors of each adapter; adds what comes through the adapters to ``dx``."""
        parts = self.split(dout)
        dzs = [(parts[r.place] @ narrow(r.b)).mul_(r.scaling) for r in self._adapters]
        dz = dzs[0] if len(dzs) == 1 else torch.cat(dzs, dim=1)
        if dx is not None:
            _add_product(dx, dz, self._down(narrow))
        found = {}
        das = (dz.T @ x).split_with_sizes(self._ranks)
        for r, da, z in zip(self._adapters, das, self._inner(x, narrow), strict=True):
            # Transposed, the product is the same and faster: its few rows are the adapter's rank.
            db = (z.T @ parts[r.place]).T.to(r.b.dtype) * r.scaling if r.b.requires_grad else None
            found[r.place] = [da.to(r.a.dtype) if r.a.requires_grad else None, db]
        return found


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
