"""What a training takes on many GPUs: seconds of a step and bytes of each GPU, by arithmetic alone.

    step = compute x slowest rank / mean + max(0, communication - what it hides behind) + update

docs/scaling.md derives the terms and compares them with measured steps. ``N`` is the number of GPUs, ``P`` the model's
parameters and ``P_t`` the trained ones; bytes are those that one GPU sends and receives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from likely.data.dealing import Cost, deal
from likely.data.packing import build_packs
from likely.errors import ConfigError
from likely.insight.estimate import CHUNK_LOGITS, Load, Shape, load_of, operations
from likely.types import Example

# Operations per second of an H100 in a whole training: Llama 3.1 8B on 8 of them, 8,192 tokens a row, fully sharded and
# compiled, 6,667 tokens/s a GPU with half of the layers computed twice (TorchTitan's published table of December 2024).
H100_RATE = 4.0e14
# Share of the communication of sharded weights that computing can hide; the first gathering and the last sum can't be.
HIDDEN = 0.9
UPDATE_BANDWIDTH = 2e12  # bytes of its own memory that a GPU reads and writes in a second
BYTES_AN_UPDATE = 4 * 7  # of a trained number: weight, gradient and two moments read, all but the gradient written
RESERVED = 2e9  # bytes of a GPU that the driver, the libraries and fragments of memory take
USABLE = 0.92  # share of the rest that may be planned with
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
# What a value can be: beyond that a unit was forgotten or mistaken, and the plan would be nonsense in earnest words.
BOUNDS = {
    "gpus": (1, 1 << 20),
    "per_host": (1, 1 << 20),
    "memory": (1e9, 1e13),
    "rate": (1e9, 1e18),
    "link": (1e6, 1e14),
    "network": (1e6, 1e14),
    "disk": (1e6, 1e14),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together. ``memory`` in bytes of one GPU, ``rate`` in operations per second that a GPU reaches in
    the products of a training, ``link`` and ``network`` in bytes per second and direction that one GPU exchanges inside
    its host and with other hosts, ``disk`` in bytes per second that one host writes."""

    gpus: int
    memory: float = 80e9
    per_host: int = 8
    rate: float = H100_RATE
    link: float = 3e11
    network: float = 4e10
    disk: float = 2e9

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.per_host)

    @property
    def bandwidth(self) -> float:
        """Of the slowest part of a ring through all GPUs."""
        return self.link if self.hosts == 1 else min(self.link, self.network)


@dataclass(frozen=True)
class Work:
    """What is trained and how: as in the config. ``imbalance`` is the slowest rank's share of a step over the mean."""

    tune: str
    lora_rank: int
    batch_size: int
    pack_tokens: int
    imbalance: float = 1.0


def read_cluster(text: str) -> Cluster:
    """``gpus=64,memory=80GB,network=50GB/s`` and so on; see :class:`Cluster`.

    Raises:
        ConfigError: an unknown name, or a value that is no number with a unit or out of its bounds.
    """
    known = {field.name for field in fields(Cluster)}
    values: dict[str, float] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([KMGT]?)(?:B|FLOPS)?(?:/s)?", value, re.IGNORECASE)
        if name not in known or name in values or found is None:
            raise ConfigError(
                f"{part!r} is no part of a plan", place="--plan", way_out=f"known once each: {', '.join(sorted(known))}"
            )
        values[name] = float(found[1]) * UNITS[found[2].upper()]
        least, most = BOUNDS[name]
        whole = name in {"gpus", "per_host"}
        if not least <= values[name] <= most or (whole and values[name] % 1):
            what = "no count of GPUs" if whole else f"{values[name]:g} {'operations' if name == 'rate' else 'bytes'}"
            unit = "" if whole else "; write a unit, as in memory=80GB, network=40GB/s, rate=400TFLOPS"
            raise ConfigError(f"{part} is {what}", place="--plan", way_out=f"{least:,.0f} to {most:,.0f} can be{unit}")
    if "gpus" not in values:
        raise ConfigError("a plan needs gpus", place="--plan", way_out="gpus=64,memory=80GB")
    counts = {name: int(values.pop(name)) for name in ("gpus", "per_host") if name in values}
    return Cluster(**counts, **values)  # type: ignore[arg-type]


def plan(shape: Shape, load: Load, work: Work, cluster: Cluster) -> dict[str, Any]:
    """Time and memory of a step, replicated if that fits and sharded if not.

    Returns:
        ``{"layout", "checkpointing", "fits", "seconds_per_step", "distinct_tokens_per_second", "seconds": {...},
        "gigabytes": {...}, "gigabytes_of_a_gpu", "checkpoint_gigabytes", "checkpoint_seconds", "notes"}``; gigabytes
        are of one GPU.
    """
    layouts = ["replicated", "sharded"] if cluster.gpus > 1 else ["replicated"]
    usable = USABLE * (cluster.memory - RESERVED)
    least = _activations(shape, _pack(load, work, cluster), kept=False)
    for layout in layouts:
        memory = _memory(shape, load, work, cluster, layout)
        if sum(memory.values()) - memory["activations"] + least <= usable:
            break
    again = sum(memory.values()) > usable
    if again:  # layers are computed twice rather than their activations kept
        memory["activations"] = least
    seconds = _seconds(shape, load, work, cluster, layout)
    if again:
        seconds["compute"] *= 4 / 3 if work.tune == "full" else 3 / 2
    whole, held = sum(seconds.values()), sum(memory.values())
    stored = 12 * _trained(shape, work)  # weights and moments
    return {
        "layout": layout,
        "checkpointing": "full" if again else "none",
        "fits": held <= usable,
        "seconds_per_step": whole,
        "distinct_tokens_per_second": load.distinct_tokens / whole,
        "seconds": seconds,
        "gigabytes": {name: value / 1e9 for name, value in memory.items()},
        "gigabytes_of_a_gpu": held / 1e9,
        "checkpoint_gigabytes": stored / 1e9,
        "checkpoint_seconds": stored / (cluster.disk * (cluster.hosts if layout == "sharded" else 1)),
        "notes": _notes(work, cluster, seconds, held <= usable),
    }


def imbalance(shape: Shape, steps: Sequence[Sequence[Example]], num_ranks: int) -> float:
    """What the slowest of so many ranks computes over the mean, on average over some steps, dealt as in a training."""
    cost = Cost(
        pair=2 * len(shape.layers) * shape.query / shape.multiplied,
        context=shape.vocabulary * shape.hidden / shape.multiplied,
    )
    ratios = []
    for examples in steps:
        dealt = [[examples[i] for i in mine] for mine in deal(examples, num_ranks, cost) if mine]
        flops = [operations(shape, load_of([build_packs(mine, 1 << 40)]), "full", 0).all for mine in dealt]
        ratios.append(max(flops) * num_ranks / sum(flops))
    return float(np.mean(ratios))


def _trained(shape: Shape, work: Work) -> int:
    return shape.parameters if work.tune == "full" else work.lora_rank * shape.sides


def _pack(load: Load, work: Work, cluster: Cluster) -> float:
    """Trie tokens of the largest forward on one GPU."""
    mean = load.distinct_tokens / cluster.gpus * work.imbalance
    longest = load.distinct_tokens / work.batch_size  # an example is never cut
    return min(max(mean, longest), float(max(work.pack_tokens, longest)))


def _memory(shape: Shape, load: Load, work: Work, cluster: Cluster, layout: str) -> dict[str, float]:
    """Bytes of one GPU by what they hold, with every activation kept."""
    frozen_width = 0.5 if work.tune == "qlora" else 4
    trained = _trained(shape, work)
    weights = 4.0 * shape.parameters
    if work.tune != "full":
        weights = frozen_width * shape.multiplied + 4 * (shape.parameters - shape.multiplied) + 4 * trained
    table = shape.vocabulary * shape.hidden
    largest = max([layer.keys + layer.rest for layer in shape.layers] or [shape.multiplied])
    pieces = cluster.gpus if layout == "sharded" else 1
    # The bfloat16 copies of all weights stay for a step; where weights are gathered or unpacked, those of two layers.
    few = layout == "sharded" or work.tune == "qlora"
    copies = 2 * (2 * largest + table) if few else 2 * (shape.multiplied + table)
    pack = _pack(load, work, cluster)
    contexts = pack * load.supervised_contexts / max(load.distinct_tokens, 1.0)
    return {
        "weights": weights / pieces,
        "gradients": 4 * trained / pieces + (4 * largest if layout == "sharded" and work.tune == "full" else 0),
        "moments": 8 * trained / pieces,
        "copies": float(copies),
        "activations": _activations(shape, pack, kept=True),
        "logits": 3 * 4 * min(CHUNK_LOGITS, contexts * shape.vocabulary),
    }


def _activations(shape: Shape, nodes: float, *, kept: bool) -> float:
    """Bytes for the nodes of one forward: the residual stream twice a layer in float32, and what a backward needs of
    each layer's linear parts in bfloat16; of one layer only, where the others are computed again."""
    layers = max(len(shape.layers), 1)
    sides = shape.sides / layers
    return nodes * (4 * shape.hidden * layers * (2 if kept else 1) + 2 * sides * (layers if kept else 2))


def _seconds(shape: Shape, load: Load, work: Work, cluster: Cluster, layout: str) -> dict[str, float]:
    flops = operations(shape, load, "full" if work.tune == "full" else "lora", work.lora_rank).all
    compute = flops / (cluster.gpus * cluster.rate) * work.imbalance
    trained, ring = _trained(shape, work), (cluster.gpus - 1) / cluster.gpus
    if layout == "replicated":
        # One sum of float32 gradients after the last backward: each goes round the ring twice.
        exposed = 2 * 4 * trained * ring / cluster.bandwidth
    else:
        packs = math.ceil(load.distinct_tokens / cluster.gpus * work.imbalance / _pack(load, work, cluster))
        gathered = 2 * 2 * shape.parameters * ring * packs  # bfloat16, for the forward and for the backward
        summed = 4 * trained * ring * packs
        talk = (gathered + summed) / cluster.bandwidth
        exposed = max(talk - HIDDEN * compute, (1 - HIDDEN) * talk)
    held = trained / (cluster.gpus if layout == "sharded" else 1)
    return {
        "compute": compute,
        "communication": exposed,
        "update": BYTES_AN_UPDATE * held / UPDATE_BANDWIDTH,
    }


def _notes(work: Work, cluster: Cluster, seconds: dict[str, float], fits: bool) -> list[str]:
    notes = []
    if work.batch_size < cluster.gpus:
        notes.append(
            f"a step of {work.batch_size} examples can't occupy {cluster.gpus} GPUs: raise --batch-size, which is a"
            " choice of statistics, or use fewer GPUs"
        )
    if not fits:
        notes.append("it does not fit: more GPUs, larger ones, --tune lora or qlora, or shorter examples")
    if seconds["communication"] > 0.25 * seconds["compute"]:
        notes.append("a quarter of the step or more is spent on exchange: a larger --batch-size would hide it")
    return notes
