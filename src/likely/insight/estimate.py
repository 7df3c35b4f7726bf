"""What a training will cost on this machine's processors: time from its arithmetic and a measured rate, memory from
what it must hold. Neither torch nor the weights are loaded; shapes are read from the headers of the safetensors files.

:func:`operations` counts what a step computes as :mod:`likely.model.layer` computes it; the counts are compared with
those of torch in tests/test_estimate.py. The constants of time and memory were measured with the embedded model on two
cores (``bench/estimate.py``, docs/log.md); a model of another build can differ more. Nothing here is about graphics
processors.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likely.data.trie import runs
from likely.types import IntArray, Pack

_HEAD_OR_TABLE = re.compile(r"embed|lm_head|wte|wpe|embd")
_LAYER = re.compile(r"layers\.(\d+)\.")
_QUERY, _ASKED = re.compile(r"q_proj"), re.compile(r"[qkv]_proj")
_KEYS = re.compile(r"[kv]_proj")
# As model/attention.py cuts a trie into blocks of queries.
MERGED_QUERIES, BLOCK_QUERIES = 128, 256
# Rate of a whole step by that of a plain float32 product, by the dtype of its products; bfloat16 on processors that
# have instructions for it.
EFFICIENCY = {"float32": 0.74, "bfloat16": 1.22}
# Bytes of activations for each token and each input and output of a linear layer, where transformers runs the layers.
ACTIVATION_BYTES = {
    ("full", "float32"): 4.1,
    ("lora", "float32"): 7.0,
    ("full", "bfloat16"): 2.3,
    ("lora", "bfloat16"): 3.8,
}
# Of the sides of a layer's linear parts that are not as wide as the residual stream, the share that a backward needs.
KEPT_SIDES = 0.75
HEAD_SIZE = 64  # the smaller of the usual ones, since headers don't tell
# Python with torch, transformers and peft, and what else was measured beyond the parts that are counted here.
# With four bits bitsandbytes, too, and the base's files, which are read to be packed.
PROGRAM_BYTES = {"full": 500e6, "lora": 800e6, "qlora": 1200e6}
# Bytes of a number in four bits, with its share of the scales of 64 numbers, which are in eight bits themselves; and
# operations in whose time one is unpacked, which each pack asks for forward and backward.
PACKED_BYTES, UNPACKING = 0.5 + 1 / 64 + 4 / (64 * 256), 50
CHUNK_LOGITS = 3 << 24  # as training/objective.py has at once


@dataclass(frozen=True)
class Layer:
    """Inputs times outputs of a layer's linear parts, and their inputs plus outputs: of those that see every node
    (``keys``), and of the rest, which the last layer computes only where something is predicted. ``first`` are the
    weights whose input is the layer's own."""

    keys: int
    rest: int
    keys_sides: int
    rest_sides: int
    first: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``multiplied`` are the parameters that each token is multiplied with, ``sides`` the summed
    inputs and outputs of those layers; ``vocabulary`` x ``hidden`` is the table of tokens, and the head's matrix.
    ``query`` is the width of all queries of a layer; ``layers`` is empty for a model that the package does not run by
    layers of its own."""

    parameters: int
    multiplied: int
    sides: int
    vocabulary: int
    hidden: int
    query: int = 0
    layers: tuple[Layer, ...] = ()
    largest: int = 0  # parameters of the largest linear layer


@dataclass(frozen=True)
class Load:
    """What the steps hold, on average; ``largest_pack`` is the most trie tokens in one forward. ``pairs`` are those of
    a query and a key that one layer's attention computes, ``last_pairs`` those of the last layer."""

    distinct_tokens: float
    supervised_contexts: float
    largest_pack: int
    pairs: float = 0.0
    last_pairs: float = 0.0


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one step, by what they are spent on."""

    products: float
    adapters: float
    attention: float
    head: float

    @property
    def all(self) -> float:
        return self.products + self.adapters + self.attention + self.head


def read_shape(folder: str | Path) -> Shape | None:
    """The sizes of the model in a folder, from the headers of its safetensors files; None where there are none, or none
    with a table of tokens."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, 100_000_000)))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    tables = [shape for name, shape in shapes.items() if len(shape) == 2 and _HEAD_OR_TABLE.search(name)]
    if not tables:
        return None
    linear = {name: shape for name, shape in shapes.items() if len(shape) == 2 and not _HEAD_OR_TABLE.search(name)}
    vocabulary, hidden = max(tables)
    return Shape(
        parameters=sum(int(np.prod(shape)) for shape in shapes.values()),
        multiplied=sum(a * b for a, b in linear.values()),
        sides=sum(a + b for a, b in linear.values()),
        vocabulary=vocabulary,
        hidden=hidden,
        query=next((shape[0] for name, shape in linear.items() if _QUERY.search(name)), hidden),
        layers=_layers(linear),
        largest=max((a * b for a, b in linear.values()), default=0),
    )


def _layers(linear: dict[str, list[int]]) -> tuple[Layer, ...]:
    found: dict[int, list[tuple[str, int, int]]] = {}
    for name, (outputs, inputs) in linear.items():
        number = _LAYER.search(name)
        if number is None:
            return ()
        found.setdefault(int(number[1]), []).append((name, inputs, outputs))
    layers = []
    for parts in (found[number] for number in sorted(found)):
        keys = [(a, b) for name, a, b in parts if _KEYS.search(name)]
        rest = [(a, b) for name, a, b in parts if not _KEYS.search(name)]
        first = sum(a * b for name, a, b in parts if _ASKED.search(name))
        if not keys:
            return ()
        products = [sum(a * b for a, b in some) for some in (keys, rest)]
        sides = [sum(a + b for a, b in some) for some in (keys, rest)]
        layers.append(Layer(products[0], products[1], sides[0], sides[1], first))
    return tuple(layers)


def load_of(steps: Sequence[Sequence[Pack]]) -> Load:
    """What steps hold on average, from their packs."""
    contexts = [[np.unique(pack.source_E) for pack in packs] for packs in steps]
    pairs = [
        [_pairs(pack.position_T, source_S) for pack, source_S in zip(packs, sources, strict=True)]
        for packs, sources in zip(steps, contexts, strict=True)
    ]
    return Load(
        distinct_tokens=float(np.mean([sum(pack.num_nodes for pack in packs) for packs in steps])),
        supervised_contexts=float(np.mean([sum(map(len, sources)) for sources in contexts])),
        largest_pack=max(pack.num_nodes for packs in steps for pack in packs),
        pairs=float(np.mean([sum(every for every, _ in of_step) for of_step in pairs])),
        last_pairs=float(np.mean([sum(last for _, last in of_step) for of_step in pairs])),
    )


def _pairs(position_T: IntArray, source_S: IntArray) -> tuple[int, int]:
    """Pairs of a query and a key in the blocks of a pack: of all its nodes, and with queries at some nodes only."""
    blocks: list[tuple[int, int, int]] = []  # first node, one past the last, length of the path to the first
    start, end, depth = 0, 0, 0
    for run_start, run_end, path in runs(position_T):
        if run_end - start <= MERGED_QUERIES:
            start, end, depth = (run_start, run_end, len(path)) if start == end else (start, run_end, depth)
            continue
        if start < end:
            blocks.append((start, end, depth))
        edges = np.linspace(run_start, run_end, -(-(run_end - run_start) // BLOCK_QUERIES) + 1).astype(int).tolist()
        blocks += [(a, b, len(path) + a - run_start) for a, b in itertools.pairwise(edges[:-1])]
        start, end, depth = edges[-2], run_end, len(path) + edges[-2] - run_start
    blocks.append((start, end, depth))
    every = sum((b - a) * (before + b - a) for a, b, before in blocks)
    last = 0
    for a, b, before in blocks:
        asked = source_S[(source_S >= a) & (source_S < b)]
        last += len(asked) * (before + int(asked[-1]) + 1 - a) if len(asked) else 0
    return every, last


def measure_rate(hidden: int, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a float32 product with the model's width, by numpy; the median of many,
    so that it is the rate of a machine as busy as it is."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1024, hidden), np.float32)
    b = rng.standard_normal((hidden, 4 * hidden), np.float32)
    times, started = list[float](), time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - before)
    return float(2 * a.shape[0] * a.shape[1] * b.shape[1] / np.median(times))


def operations(shape: Shape, load: Load, tune: str, lora_rank: int) -> Operations:
    """What one step computes.

    A product takes two operations for each weight and token forward, two for the gradient of what flows through, and
    two for the gradient of the weights where these are trained. The embeddings below the first layer are frozen with
    adapters, so that nothing flows into them. Attention takes four operations for each pair and channel forward, and
    eight backward. The last layer has queries, and everything after them, only where something is predicted.
    """
    nodes, contexts = load.distinct_tokens, load.supervised_contexts
    each = 6 if tune == "full" else 4
    head = each * shape.vocabulary * shape.hidden * contexts
    adapted = 6 * lora_rank if tune != "full" else 0
    attention = 12 * shape.query * ((max(len(shape.layers), 1) - 1) * load.pairs + load.last_pairs)
    if not shape.layers:
        return Operations(
            each * shape.multiplied * nodes, float(adapted * shape.sides * nodes), 12 * shape.query * load.pairs, head
        )
    *inner, last = shape.layers
    products = each * sum((layer.keys + layer.rest) * nodes for layer in inner)
    products += each * (last.keys * nodes + last.rest * contexts)
    if tune != "full":
        only = shape.layers[0]
        products -= 2 * (only.first * nodes if inner else only.keys * nodes + (only.first - only.keys) * contexts)
    adapters = adapted * sum((layer.keys_sides + layer.rest_sides) * nodes for layer in inner)
    adapters += adapted * (last.keys_sides * nodes + last.rest_sides * contexts)
    return Operations(float(products), float(adapters), attention, head)


def peak_bytes(shape: Shape, load: Load, tune: str, lora_rank: int, dtype: str) -> float:
    """Most memory that a training has at any time, if no activation is computed twice: the program, the weights, for
    each trained one its gradient and AdamW's two averages in float32, the weights once more where products are in
    bfloat16, activations, a chunk of logits with its gradient, and the second gradient of a table that is also the
    head."""
    width = 2 if dtype == "bfloat16" else 4
    table = shape.vocabulary * shape.hidden
    trained = shape.parameters if tune == "full" else lora_rank * shape.sides
    # Linear layers in four bits are unpacked one at a time, in float32 and then in the dtype of products.
    packed = shape.multiplied if tune == "qlora" else 0
    held = 4 * (shape.parameters - packed) + PACKED_BYTES * packed + 12 * trained
    copies = 2 * (shape.multiplied - packed + table) if dtype == "bfloat16" else 0
    copies += (4 + width) * shape.largest if packed else 0
    logits = (4 + width) * min(CHUNK_LOGITS, load.supervised_contexts * shape.vocabulary)
    gradient_of_table = (4 + width) * table if tune == "full" else 0
    return PROGRAM_BYTES[tune] + held + copies + _activations(shape, load, tune, dtype) + logits + gradient_of_table


def _activations(shape: Shape, load: Load, tune: str, dtype: str) -> float:
    """Bytes that the layers keep of the largest pack: of our own, two entries of the residual stream in float32, the
    inputs and outputs of attention and feed-forward, and the probabilities."""
    if not shape.layers:
        return ACTIVATION_BYTES["full" if tune == "full" else "lora", dtype] * shape.sides * load.largest_pack
    width = 2 if dtype == "bfloat16" else 4
    inner = sum(layer.keys_sides + layer.rest_sides - 7 * shape.hidden for layer in shape.layers)
    a_node = 8 * shape.hidden * len(shape.layers) + width * KEPT_SIDES * inner
    share = load.largest_pack / max(load.distinct_tokens, 1.0)
    probabilities = width * len(shape.layers) * (shape.query / HEAD_SIZE) * load.pairs * min(1.0, share)
    return a_node * load.largest_pack + probabilities


def resolve_dtype(dtype: str) -> str:
    """What ``auto`` means on this machine's processors, as Linux describes them; float32 where nothing is known."""
    if dtype != "auto":
        return dtype
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else "float32"


def estimate(shape: Shape, load: Load, *, tune: str, lora_rank: int, dtype: str, rate: float) -> dict[str, Any]:
    """``{"seconds_per_step", "peak_gb", "dtype", "gigaflop_per_step", "matrix_gflops"}`` on this machine's processors,
    busy as they are."""
    dtype = resolve_dtype(dtype)
    flops = operations(shape, load, tune, lora_rank).all
    packs = math.ceil(load.distinct_tokens / max(load.largest_pack, 1))
    unpacking = 2 * UNPACKING * shape.multiplied * packs if tune == "qlora" else 0.0
    return {
        "seconds_per_step": flops / (rate * EFFICIENCY[dtype]) + unpacking / rate,
        "peak_gb": peak_bytes(shape, load, tune, lora_rank, dtype) / 1e9,
        "dtype": dtype,
        "gigaflop_per_step": flops / 1e9,
        "matrix_gflops": rate / 1e9,
    }
