"""The tables of docs/scaling.md: what insight/plan.py says of models and clusters that are not at hand, and of this
machine beside what it does.

python bench/scaling.py                   # 1B, 8B and 70B on 8 to 1,024 H100, full and LoRA
python bench/scaling.py --measure 1,2,4   # steps of so many processes here; on a machine that does nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from likely.data.packing import build_packs
from likely.insight.estimate import Layer, Load, Shape, load_of, measure_rate, operations, read_shape
from likely.insight.plan import UPDATE_BANDWIDTH, Cluster, Work, imbalance, plan
from likely.model.place import find_model

# Layers, hidden size, width of the feed-forward and of all keys, vocabulary, whether the head is the table.
MODELS = {
    "1B": (16, 2048, 8192, 512, 128256, True),
    "8B": (32, 4096, 14336, 1024, 128256, False),
    "70B": (80, 8192, 28672, 1024, 128256, False),
}
# Of the generation before, for what others have published of it.
OLDER = {
    "2-7B": (32, 4096, 11008, 4096, 32000, False),
    "2-13B": (40, 5120, 13824, 5120, 32000, False),
}
ROW, SUPERVISED, ROWS_A_GPU = 1024, 512, 8


def llama(name: str) -> Shape:
    """The sizes of a Llama 3 of that name, or of a Llama 2."""
    layers, hidden, inner, keys, vocabulary, tied = (MODELS | OLDER)[name]
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


class Machine(NamedTuple):
    """What each of some processes reaches while all of them do the same: operations per second of a float32 product,
    bytes per second and direction of a sum over all, and bytes per second of its memory that it reads and writes."""

    rate: float
    link: float
    stream: float


def probe(number: int) -> Machine:
    """Measured by that many processes at once; the mean of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--probe"], stdout=subprocess.PIPE, env=os.environ | place | {"RANK": str(rank)}
        )
        for rank in range(number)
    ]
    told = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    return Machine(**{name: statistics.mean(one[name] for one in told) for name in ("rate", "link", "stream")})


def one_of_a_probe() -> None:
    import torch.distributed as dist
    from torch import ones

    dist.init_process_group("gloo")
    number, bucket = dist.get_world_size(), ones(1 << 24)
    times = {"sum": [0.0] * 5, "stream": [0.0] * 5}
    for i in range(5):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(bucket)
        times["sum"][i] = time.perf_counter() - started
    other = np.ones(1 << 25, np.float32)
    mine = np.ones(1 << 25, np.float32)
    for i in range(5):
        dist.barrier()
        started = time.perf_counter()
        mine += other
        times["stream"][i] = time.perf_counter() - started
    dist.barrier()
    rate = measure_rate(576, 4.0)
    dist.barrier()
    sent = 2 * (number - 1) / number * bucket.nbytes
    link, stream = (b / statistics.median(times[n][1:]) for n, b in (("sum", sent), ("stream", 3 * mine.nbytes)))
    print(json.dumps({"rate": rate, "link": link, "stream": stream}))


def seconds_of_a_step(number: int, num_steps: int, flags: list[str], folder: Path) -> float:
    """Of so many processes; the median of some steps after one that warms up."""
    command = [sys.executable, "-m", "likely", "train", *flags, "--output", str(folder), "--steps", str(num_steps + 1)]
    subprocess.run([*command, "--nproc", str(number)], check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.median([line["seconds"] for line in lines if "grad_norm" in line][1:])


def predict(shape: Shape, load: Load, work: Work, number: int, alone: float, machines: dict[int, Machine]) -> Any:
    """Seconds of a step of ``number`` processes by their parts, from those of one process ``alone`` and the machine.

    The rate of a training is that of one process times what products lose where all cores are busy; more processes
    than cores have a share of a core each, and of what the cores can send and remember.
    """
    cores = max(machines)
    busy = machines[min(number, cores)]
    share = min(1.0, cores / number)
    flops = operations(shape, load, work.tune, work.lora_rank).all

    def parts(processes: int, rate: float, link: float, stream: float) -> dict[str, float]:
        told: dict[str, float] = plan(
            shape, load, work, Cluster(processes, 1e15, per_host=processes, rate=rate, link=link)
        )["seconds"]
        return told | {"update": told["update"] * UPDATE_BANDWIDTH / stream}

    update = parts(1, 1.0, 1.0, machines[1].stream)["update"]
    rate = flops / (alone - update)
    return parts(number, rate * busy.rate / machines[1].rate * share, machines[cores].link * share, busy.stream * share)


def measure(processes: list[int], num_steps: int, tune: str, batch_size: int) -> None:
    from cases import data_file, steps_in_order

    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    place = find_model("smollm2-135m")
    shape = read_shape(place.weights)
    if shape is None:
        raise SystemExit("error: the model's sizes can't be read")
    machines = {number: probe(number) for number in (1, cores)}
    print(f"{cores} cores: {machines}", flush=True)
    with tempfile.TemporaryDirectory(prefix="likely-scaling-") as folder:
        data = data_file("maths", Path(folder))
        steps = steps_in_order(data, str(place.tokenizer), num_steps + 1, batch_size, 0)[1:]
        load = load_of([build_packs(step, 1 << 20) for step in steps])
        flags = ["--model", "smollm2-135m", "--data", str(data), "--tune", tune, "--batch-size", str(batch_size)]
        flags += ["--dtype", "float32", "--seed", "0", "--save-every", "1000", "--lora-rank", "16", "--eval-share", "0"]
        alone = seconds_of_a_step(1, num_steps, flags, Path(folder) / "run-1")
        print(f"1 process: {alone:.2f} s a step of {load.distinct_tokens:.0f} tokens", flush=True)
        for number in processes:
            if number == 1:
                continue
            measured = seconds_of_a_step(number, num_steps, flags, Path(folder) / f"run-{number}")
            slowest = imbalance(shape, steps, number)
            work = Work(tune, 16, batch_size, 1 << 20, slowest)
            parts = predict(shape, load, work, number, alone, machines)
            told = sum(parts.values())
            shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            print(f"{tune}, {number} processes: {measured:.2f} s a step, predicted {told:.2f}", end=" ")
            print(f"({told / measured - 1:+.0%}: {shown}; slowest / mean {slowest:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help="numbers of processes, as 1,2,4")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one that warms up")
    parser.add_argument("--tune", choices=("full", "lora"), default="lora")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        one_of_a_probe()
    elif options.measure:
        measure([int(number) for number in options.measure.split(",")], options.steps, options.tune, options.batch_size)
    else:
        table()


if __name__ == "__main__":
    main()
