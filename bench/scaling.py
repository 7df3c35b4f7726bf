"""The table of docs/scaling.md: what insight/plan.py says of models and clusters that are not at hand.

python bench/scaling.py    # 1B, 8B and 70B on 8 to 1,024 H100, full and LoRA
"""

from __future__ import annotations

from likely.insight.estimate import Layer, Load, Shape
from likely.insight.plan import Cluster, Work, plan

# Layers, hidden size, width of the feed-forward and of all keys, vocabulary, whether the head is the table.
MODELS = {
    "1B": (16, 2048, 8192, 512, 128256, True),
    "8B": (32, 4096, 14336, 1024, 128256, False),
    "70B": (80, 8192, 28672, 1024, 128256, False),
}
ROW, SUPERVISED, ROWS_A_GPU = 1024, 512, 8


def llama(name: str) -> Shape:
    """The sizes of a Llama 3 of that name."""
    layers, hidden, inner, keys, vocabulary, tied = MODELS[name]
    layer = Layer(
        keys=2 * hidden * keys,
        rest=2 * hidden * hidden + 3 * hidden * inner,
        keys_sides=2 * (hidden + keys),
        rest_sides=4 * hidden + 3 * (hidden + inner),
        first=hidden * (hidden + 2 * keys),
    )
    multiplied = layers * (layer.keys + layer.rest)
    sides = layers * (layer.keys_sides + layer.rest_sides)
    table = vocabulary * hidden
    parameters = multiplied + (1 if tied else 2) * table
    return Shape(parameters, multiplied, sides, vocabulary, hidden, hidden, (layer,) * layers)


def rows(number: int, tokens: int = ROW, supervised: int = SUPERVISED) -> Load:
    pairs = number * tokens * (tokens + 1) / 2
    return Load(number * tokens, number * supervised, tokens, pairs, pairs * supervised / tokens)


def table() -> None:
    print("| model | tune | GPUs | layout | layers twice | s a step | tokens/s a GPU | exchange", end=" ")
    print("| GB a GPU | checkpoint |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for tune in ("full", "lora"):
            for gpus in (8, 64, 256, 1024):
                work = Work(tune, 16, ROWS_A_GPU * gpus, 16384)
                told = plan(llama(name), rows(ROWS_A_GPU * gpus), work, Cluster(gpus))
                cells = [
                    name,
                    tune,
                    f"{gpus:,}",
                    told["layout"] if told["fits"] else "does not fit",
                    told["checkpointing"],
                    f"{told['seconds_per_step']:.2f}",
                    f"{told['distinct_tokens_per_second'] / gpus:,.0f}",
                    f"{told['seconds']['communication'] / told['seconds_per_step']:.0%}",
                    f"{told['gigabytes_of_a_gpu']:.0f}",
                    f"{told['checkpoint_gigabytes']:,.1f} GB, {told['checkpoint_seconds']:.0f} s",
                ]
                print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    table()
