"""What a training will cost on this machine's processors: time from its arithmetic and a measured rate, memory from
what it must hold. Neither torch nor the weights are loaded; shapes are read from the headers of the safetensors files.

The constants were measured with the embedded model on two cores (``bench/estimate.py``, docs/log.md); a model of
another build can differ more. Nothing here is about graphics processors.
"""

from __future__ import annotations

import json
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_HEAD_OR_TABLE = re.compile(r"embed|lm_head|wte|wpe|embd")
# Share of the rate of a plain float32 product that a whole step reaches, by the dtype of its products.
EFFICIENCY = {"float32": 0.6, "bfloat16": 0.9}
# Bytes of activations for each token and each input and output of a linear layer.
ACTIVATION_BYTES = {
    ("full", "float32"): 4.1,
    ("lora", "float32"): 7.0,
    ("full", "bfloat16"): 2.3,
    ("lora", "bfloat16"): 3.8,
}
PROGRAM_BYTES = 500e6  # Python with torch, transformers and peft
LOGIT_BYTES = 3 * 4 * (1 << 24)  # a chunk of logits, their probabilities and the gradient


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``multiplied`` are the parameters that each token is multiplied with, ``sides`` the summed
    inputs and outputs of those layers; ``vocabulary`` x ``hidden`` is the table of tokens, and the head's matrix."""

    parameters: int
    multiplied: int
    sides: int
    vocabulary: int
    hidden: int


@dataclass(frozen=True)
class Load:
    """What the steps hold, on average; ``largest_pack`` is the most trie tokens in one forward."""

    distinct_tokens: float
    supervised_contexts: float
    largest_pack: int


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
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and not _HEAD_OR_TABLE.search(name)]
    vocabulary, hidden = max(tables)
    return Shape(
        parameters=sum(int(np.prod(shape)) for shape in shapes.values()),
        multiplied=sum(a * b for a, b in linear),
        sides=sum(a + b for a, b in linear),
        vocabulary=vocabulary,
        hidden=hidden,
    )


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


def operations(shape: Shape, load: Load, tune: str, lora_rank: int) -> float:
    """Floating-point operations of one step's products: a forward and the gradient of what flows through take two for
    each weight and token, and so does the gradient of the weights where these are trained. Attention's own are left
    out: for short rows they are few."""
    each = 6 if tune == "full" else 4
    adapters = 6 * lora_rank * shape.sides * load.distinct_tokens if tune == "lora" else 0.0
    head = each * shape.vocabulary * shape.hidden * load.supervised_contexts
    return each * shape.multiplied * load.distinct_tokens + adapters + head


def peak_bytes(shape: Shape, load: Load, tune: str, lora_rank: int, dtype: str) -> float:
    """Most memory that a training has at any time: the program, the weights, for each trained one its gradient and
    AdamW's two averages in float32, the weights once more where products are in bfloat16, activations and logits."""
    trained = shape.parameters if tune == "full" else lora_rank * shape.sides
    held = 4 * shape.parameters + (12 if tune == "full" else 16) * trained
    copies = 2 * shape.multiplied if dtype == "bfloat16" else 0
    activations = ACTIVATION_BYTES[tune, dtype] * shape.sides * load.largest_pack
    return PROGRAM_BYTES + held + copies + activations + LOGIT_BYTES


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
    """``{"seconds_per_step", "peak_gb", "dtype", "matrix_gflops"}`` on this machine's processors, busy as they are."""
    dtype = resolve_dtype(dtype)
    seconds = operations(shape, load, tune, lora_rank) / (rate * EFFICIENCY[dtype])
    return {
        "seconds_per_step": seconds,
        "peak_gb": peak_bytes(shape, load, tune, lora_rank, dtype) / 1e9,
        "dtype": dtype,
        "matrix_gflops": rate / 1e9,
    }
