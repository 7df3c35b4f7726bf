"""Narrow products on a CPU: a mode of the whole process that is as it was afterwards."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from likely.model.transfer import wide_product

ONEDNN = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
PATIENCE = 60  # seconds


@pytest.fixture(autouse=True, params=["none", "ieee"])
def before(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the user had set."""
    usual = ONEDNN.fp32_precision
    ONEDNN.fp32_precision = request.param
    yield request.param
    ONEDNN.fp32_precision = usual


class Left:
    """A matrix that does something at the time of the product."""

    device = torch.device("cpu")

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def float(self) -> Tensor:
        self.act()
        return torch.ones(2, 2)


def product(act: Callable[[], object]) -> Tensor:
    return wide_product(cast(Any, Left(act)), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16))


def test_the_mode_is_as_it_was_after_a_product(before: str) -> None:
    seen = []
    product(lambda: seen.append(ONEDNN.fp32_precision))
    assert (seen, ONEDNN.fp32_precision) == (["bf16"], before)


def test_the_mode_is_as_it_was_after_an_error(before: str) -> None:
    def fail() -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        product(fail)
    assert ONEDNN.fp32_precision == before


class Interrupted:
    """A factor whose product, in code that sees no signal, is when the user interrupts."""

    __matmul__ = staticmethod(ctypes.CDLL(None)["raise"])
    device = torch.device("cpu")

    def float(self) -> Interrupted:
        return self


class Number:
    def float(self) -> int:
        return signal.SIGUSR1


def test_the_mode_is_as_it_was_after_an_interrupt(before: str) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            wide_product(cast(Any, Interrupted()), cast(Any, Number()), torch.ones(2, 2, dtype=torch.bfloat16))
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert ONEDNN.fp32_precision == before


def test_the_mode_is_as_it_was_after_products_of_two_threads(before: str) -> None:
    """The second one is asked for during the first, and ends after it."""
    inside = threading.Event()
    with ThreadPoolExecutor(2) as threads:

        def during_the_second() -> None:
            inside.set()
            first.result(PATIENCE)

        def during_the_first() -> None:
            seconds.append(threads.submit(product, during_the_second))
            inside.wait(0.2)  # it waits for its turn, or is inside at once

        seconds: list[Future[Tensor]] = []
        first = threads.submit(product, during_the_first)
        first.result(PATIENCE)
        seconds[0].result(PATIENCE)
    assert ONEDNN.fp32_precision == before
