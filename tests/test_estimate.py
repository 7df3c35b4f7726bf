"""The estimate of a training's cost: its counts against counts of the model itself, and that it needs no torch."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from likely.insight.estimate import (
    Load,
    Shape,
    estimate,
    measure_rate,
    operations,
    peak_bytes,
    read_shape,
    resolve_dtype,
)
from likely.model.adapters import add_lora

LOAD = Load(distinct_tokens=100.0, supervised_contexts=20.0, largest_pack=60)


def test_the_shape_is_that_of_the_model(tiny_model_dir: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    linear = [m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    shape = read_shape(tiny_model_dir)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    assert shape.multiplied == sum(m.weight.numel() for m in linear)
    assert shape.sides == sum(m.in_features + m.out_features for m in linear)
    assert (shape.vocabulary, shape.hidden) == tuple(network.lm_head.weight.shape)
    # What adapters of rank 3 train is what the memory is counted for.
    tuned = add_lora(network, rank=3, alpha=None, seed=0)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 3 * shape.sides


def test_operations_are_counted_by_hand() -> None:
    shape = Shape(parameters=1000, multiplied=600, sides=50, vocabulary=40, hidden=10)
    full = operations(shape, LOAD, "full", 4)
    assert full == 6 * 600 * 100 + 6 * 40 * 10 * 20
    assert operations(shape, LOAD, "lora", 4) == 4 * 600 * 100 + 6 * 4 * 50 * 100 + 4 * 40 * 10 * 20


def test_memory_grows_with_what_is_held() -> None:
    shape = Shape(parameters=10**9, multiplied=9 * 10**8, sides=10**5, vocabulary=40_000, hidden=2000)
    peaks = {
        (tune, dtype): peak_bytes(shape, LOAD, tune, 8, dtype)
        for tune in ("full", "lora")
        for dtype in ("float32", "bfloat16")
    }
    assert peaks["full", "float32"] - peaks["lora", "float32"] > 10 * 10**9  # gradient and averages
    assert peaks["lora", "bfloat16"] > 4 * 10**9
    more = Load(LOAD.distinct_tokens, LOAD.supervised_contexts, 2 * LOAD.largest_pack)
    assert peak_bytes(shape, more, "lora", 8, "float32") > peaks["lora", "float32"]


def test_time_is_operations_over_the_rate() -> None:
    shape = Shape(parameters=1000, multiplied=600, sides=50, vocabulary=40, hidden=10)
    told = [
        estimate(shape, LOAD, tune="full", lora_rank=4, dtype="float32", rate=rate)["seconds_per_step"]
        for rate in (1e9, 2e9)
    ]
    assert told[0] == pytest.approx(2 * told[1])
    assert 1e6 < measure_rate(64, seconds=0.02) < 1e14
    assert resolve_dtype("float32") == "float32"
    assert resolve_dtype("auto") in {"float32", "bfloat16"}
    assert math.isfinite(told[0])


def test_a_folder_without_weights_has_no_estimate(tmp_path: Path) -> None:
    assert read_shape(tmp_path) is None
    assert read_shape(tmp_path / "a hub id") is None
