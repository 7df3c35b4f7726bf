"""What keeps a GPU busy, as far as a CPU can show it: a step reads nothing back before its end, and the next step's
packs are ready when it is over."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from likely.data.packing import build_packs
from likely.model.forward import connect
from likely.training import memory, objective
from likely.training.ahead import Ahead
from likely.training.optim import build_optimizer
from likely.training.step import apply_gradient, compute_gradient
from test_engine import rows

# Operators that give a Python number, or a shape that depends on values: on a GPU the host waits for what is queued.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave.Tensor",
}


# Ways to read a tensor that no operator stands for.
READING = {"tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Reads(TorchFunctionMode):
    """Notes the calls that read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.read.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes the operators that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name in WAITING or name.split(".")[0] in WAITING:
            self.waited.append(name)
        masks = args[1] if name.split(".")[0] in {"index", "index_put", "index_put_"} else []
        if any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks):
            self.waited.append("a mask as index")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [None, 0])
def test_a_step_reads_loss_and_norm_once(
    make_network: Any, make_examples: Any, name: str, dtype: torch.dtype, room: int | None
) -> None:
    model = connect(make_network(name), name, compute_dtype=dtype)
    model.activation_room = room
    packs = build_packs(make_examples(rows()), 14)
    assert len(packs) > 2
    optimizer = build_optimizer(model.network.parameters(), 0.0)
    with Reads() as reads, Waits() as waits:
        compute_gradient(model, packs, optimizer, 1.0)
        assert reads.read == ["tolist"]
        apply_gradient(optimizer)
    assert reads.read == ["tolist"]
    assert not waits.waited


@pytest.mark.parametrize("how", ["item", "tolist"])
def test_a_step_that_looks_in_between_is_caught(
    make_network: Any, make_examples: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = connect(make_network("llama"), "llama", compute_dtype=torch.float32)
    packs = build_packs(make_examples(rows()), 14)
    loss_and_gradient = objective._loss_and_gradient

    def looking(*arguments: Any) -> Any:
        loss, gradient = loss_and_gradient(*arguments)
        assert (loss.item() if how == "item" else loss.tolist()) >= 0
        return loss, gradient

    monkeypatch.setattr(objective, "_loss_and_gradient", looking)
    with Reads() as reads, Waits() as waits:
        compute_gradient(model, packs, build_optimizer(model.network.parameters(), 0.0), 1.0)
    assert reads.read == [how] * len(packs) + ["tolist"] if how == "tolist" else waits.waited


def test_the_next_result_is_built_by_a_thread_meanwhile() -> None:
    built: list[tuple[int, str]] = []
    ready = threading.Event()

    def build(key: int) -> int:
        built.append((key, threading.current_thread().name))
        if key == 4:
            ready.set()
        return key * key

    with Ahead(build) as ahead:
        assert ahead.take(3, 4) == 9
        assert ready.wait(10)
        assert ahead.take(4, None) == 16
    assert [key for key, _ in built] == [3, 4]
    assert built[0][1] == threading.current_thread().name
    assert built[1][1].startswith("packs")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("packs")]


def test_what_was_prepared_for_nothing_is_thrown_away() -> None:
    with Ahead(lambda key: [key]) as ahead:
        first = ahead.take((1, 64), (2, 64))
        assert first == [(1, 64)]
        assert ahead.take((2, 32), (3, 32)) == [(2, 32)]
        assert ahead.take((3, 32), None) == [(3, 32)]


def test_an_error_of_the_thread_is_raised_where_its_result_is_taken() -> None:
    def build(key: int) -> int:
        if key == 2:
            raise ValueError("the second")
        return key

    with Ahead(build) as ahead:
        assert ahead.take(1, 2) == 1
        with pytest.raises(ValueError, match="the second"):
            ahead.take(2, 3)


def test_logits_of_narrow_factors_are_not_rounded_again(make_network: Any) -> None:
    head = connect(make_network("llama"), "llama", compute_dtype=torch.bfloat16).head
    hidden = torch.randn(5, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    found = head.logits(hidden, head.weight.detach().bfloat16())
    exact = hidden.bfloat16().double() @ head.weight.detach().bfloat16().double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)  # sums of 32 products in float32
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-4  # what rounding the logits would do


@pytest.mark.parametrize(("free", "logits"), [(0, 3 << 24), (16 * 2**30, 71_582_788), (10**12, 1 << 28)])
def test_a_chunk_of_logits_follows_the_free_memory(free: int, logits: int) -> None:
    assert memory.choose_chunk(free) == logits


def test_chunks_of_any_size_give_one_result(make_network: Any, make_examples: Any) -> None:
    model = connect(make_network("llama").double(), "llama", compute_dtype=torch.float64)
    packs = build_packs(make_examples(rows()), 64)
    results = []
    for model.chunk_logits in (None, 1, 3 * 67):
        optimizer = build_optimizer(model.network.parameters(), 0.0)
        results.append(compute_gradient(model, packs, optimizer, 1.0))
        optimizer.zero_grad()
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-7)  # norms are in float32
