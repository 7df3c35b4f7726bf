"""The estimate of a training's cost: its counts against counts of the model itself, and that it needs no torch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from likely.data.packing import build_packs
from likely.insight.estimate import (
    CHUNK_LOGITS,
    Layer,
    Load,
    Shape,
    estimate,
    load_of,
    measure_rate,
    operations,
    peak_bytes,
    read_shape,
    resolve_dtype,
)
from likely.model import load as models
from likely.model.adapters import add_lora
from likely.model.attention import cut
from likely.training import objective
from likely.training.optim import build_optimizer
from likely.training.step import train_step
from likely.types import Example, Pack, Source

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
    assert full.all == 6 * 600 * 100 + 6 * 40 * 10 * 20
    assert operations(shape, LOAD, "lora", 4).all == 4 * 600 * 100 + 6 * 4 * 50 * 100 + 4 * 40 * 10 * 20


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_are_counted_as_such(dtype: str) -> None:
    """Of a model of 8 billion parameters, whose linear layers take 4 GB instead of 28."""
    shape = Shape(8 * 10**9, 7 * 10**9, 10**6, 128_000, 4096, largest=4096 * 14336)
    few = Load(distinct_tokens=100.0, supervised_contexts=2.0, largest_pack=100)
    peaks = {tune: peak_bytes(shape, few, tune, 8, dtype) / 1e9 for tune in ("lora", "qlora")}
    saved = 7 * (4 - 0.516) + (2 * 7 if dtype == "bfloat16" else 0)
    assert peaks["lora"] - peaks["qlora"] == pytest.approx(saved, abs=1)
    seconds = {
        tune: estimate(shape, few, tune=tune, lora_rank=8, dtype="float32", rate=1e12)["seconds_per_step"]
        for tune in ("lora", "qlora")
    }
    assert operations(shape, few, "qlora", 8) == operations(shape, few, "lora", 8)
    assert 1.02 < seconds["qlora"] / seconds["lora"] < 2  # each layer is unpacked twice, whatever is in the pack


# Of two steps of SmolLM2-135M on the rows of bench/data/gsm8k_200.jsonl: (dtype, batch), trie tokens, GB at most.
MEASURED = [
    ("float32", 3, 622, 2.21),
    ("float32", 8, 1524, 3.04),
    ("bfloat16", 3, 622, 1.97),
    ("bfloat16", 8, 1524, 2.63),
]


@pytest.mark.parametrize(("dtype", "batch", "tokens", "gigabytes"), MEASURED)
def test_four_bits_beside_measured_memory(dtype: str, batch: int, tokens: int, gigabytes: float) -> None:
    shared = {"keys": 2 * 576 * 192, "rest": 2 * 576 * 576 + 3 * 576 * 1536, "first": 576 * 576 + 2 * 576 * 192}
    layer = Layer(**shared, keys_sides=2 * (576 + 192), rest_sides=4 * 576 + 3 * (576 + 1536))
    multiplied, sides = 30 * (layer.keys + layer.rest), 30 * (layer.keys_sides + layer.rest_sides)
    shape = Shape(multiplied + 49152 * 576, multiplied, sides, 49152, 576, 576, (layer,) * 30, 576 * 1536)
    load = Load(float(tokens), 0.4 * tokens, tokens, pairs=tokens * 0.6 * tokens / batch)
    assert peak_bytes(shape, load, "qlora", 16, dtype) / 1e9 == pytest.approx(gigabytes, rel=0.2)


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


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Path:
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**shape, **sizes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_packs(lengths: list[int], shared: int, pack_tokens: int = 2048) -> list[Pack]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 300, shared)
    examples = []
    for line, length in enumerate(lengths):
        ids = np.concatenate([prefix, rng.integers(0, 300, length)]).astype(np.int64)
        weights = np.zeros(len(ids))
        weights[-20:] = 1
        examples.append(Example(ids, weights, np.full(len(ids), 2, np.int8), Source("f", line)))
    return build_packs(examples, pack_tokens)


PACKS = {"a family": ([30, 37, 44, 51, 58], 40), "long rows": ([700, 300, 90, 20], 0), "one": ([60], 10)}


@pytest.mark.parametrize("packs", PACKS.values(), ids=PACKS)
def test_pairs_are_those_of_the_blocks_of_attention(packs: tuple[list[int], int]) -> None:
    for pack in make_packs(*packs):
        expected = sum((end - start) * (len(path) + end - start) for start, end, path in cut(pack.position_T))
        assert load_of([[pack]]).pairs == expected


def addmm(_: Any, left: tuple[int, ...], right: tuple[int, ...], **__: Any) -> int:
    """torch does not count products that are added in place."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("packs", PACKS.values(), ids=PACKS)
def test_operations_are_those_that_torch_counts(
    packs: tuple[list[int], int], tune: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_model(tmp_path, chat_tokenizer)
    step, shape = make_packs(*packs), read_shape(folder)
    assert shape is not None
    tuning = models.Tuning(8 if tune == "lora" else None, None, 0)
    model = models.load_for_training(str(folder), tuning, compute_dtype=torch.float32)
    optimizer = build_optimizer(model.network.parameters(), 0.0)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        train_step(model, step, optimizer, 1.0)
    assert operations(shape, load_of([step]), tune, 8).all == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_chunk_of_logits_is_that_of_the_loss() -> None:
    # The estimate stands without torch, so it says the number once more.
    assert CHUNK_LOGITS == objective.CHUNK_LOGITS
