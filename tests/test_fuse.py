"""Fused kernels: the same numbers as unfused ones, and a fallback that says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from likely.model import fuse
from likely.model.forward import connect
from test_objective import FAMILY, compare, pack_up, tolerance_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiled_as_written(
    twin_of: Any, make_network: Any, make_examples: Any, monkeypatch: pytest.MonkeyPatch, backend: str, name: str
) -> None:
    compiled = []
    torch_compile = torch.compile

    def spy(function: Any, **options: Any) -> Any:
        compiled.append(function.__name__)
        return torch_compile(function, **options)

    monkeypatch.setattr(torch, "compile", spy)
    model = connect(make_network(name).double(), name, compute_dtype=torch.float64)
    packs = pack_up(model, make_examples(FAMILY), 3)
    said: list[str] = []
    with fuse.fusing(CPU, said.append, backend):
        compare(twin_of(name, torch.float64), FAMILY, packs, model=model).check(tolerance_of(name))
    assert said == []
    assert sorted(compiled) == ["before_gate", "before_norm", "gated", "normal", "rotate", "scaled_normal"]


def test_a_compiler_that_fails_is_told_of_once(
    twin_of: Any, make_network: Any, make_examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no working C compiler\nin a long text")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = connect(make_network("llama").double(), "llama", compute_dtype=torch.float64)
    said: list[str] = []
    with fuse.fusing(CPU, said.append, "eager"):
        packs = pack_up(model, make_examples(FAMILY))
        compare(twin_of("llama", torch.float64), FAMILY, packs, model=model).check(tolerance_of("llama"))
    assert said == ["torch.compile failed, so kernels are not fused: no working C compiler"]


def test_want_of_memory_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(torch, "compile", full)
    with fuse.fusing(CPU, pytest.fail, "eager"), pytest.raises(torch.OutOfMemoryError):
        fuse.fusible(torch.sin)(torch.zeros(1))


def test_nothing_is_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", pytest.fail)
    with fuse.fusing(CPU, pytest.fail):
        assert fuse.fusible(torch.sin)(torch.zeros(1)) == 0
