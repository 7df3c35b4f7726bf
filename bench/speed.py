"""likely beside TRL and a plain padded loop: the same model, rows, order, dtype and optimizer, in turn, in one run.

    make bench                                                     # two cases, about 20 minutes on two idle cores
    python bench/speed.py --case shared --dtype bfloat16 --batch 16 --tune full --rounds 3 --steps 6
    python bench/speed.py --data mine.jsonl --model M              # your rows, your model
    python bench/speed.py --all                                    # the whole grid: hours
    python bench/speed.py --table                                  # results.jsonl -> docs/performance.md

Each contender is a process of its own; they take turns, A B C A B C, and the machine's matrix rate is measured before,
between and after. The losses of all of them must agree at every step that they have in common, or nothing is reported
and the exit code is 1. One line for each case goes to bench/results.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES, data_file, micro_batch, steps_in_order, write_rows
from likely.data.packing import build_packs
from likely.model.place import find_model
from likely.types import Example
from limit import Shape, Work, step_flops
from race import Outcome, Training, environment, race
from table import NAMES, RESULTS, told, write_table

HERE = Path(__file__).parent
# Nats per token between any two contenders. In bfloat16 each of them rounds elsewhere; a wrong mask is off by far more.
AGREE = {"float32": 1e-3, "bfloat16": 2e-2}
DEFAULT = [("maths", "full", "float32", 8), ("maths", "full", "bfloat16", 8)]
GRID = list(itertools.product(CASES, ("full", "lora"), ("float32", "bfloat16"), (8, 16)))
COMPARED_STEPS = 8


def main() -> None:
    options = read_options()
    if options.table:
        write_table()
        return
    pythons = {"likely": sys.executable, "peers": options.peers_python}
    if not Path(options.peers_python).exists():
        raise SystemExit(f"error: {options.peers_python} is missing; say: make .venv-trl/.installed")
    chosen = choose_cases(options)
    for case in chosen:
        contenders_of(options, case[3])
    starts = startup_times(pythons)
    for case in chosen:
        started = time.perf_counter()
        result = {**run_case(case, options, pythons), "starts": starts}
        print("\n".join(told(result)), f"({time.perf_counter() - started:.0f} s)\n", sep="\n", flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    if chosen is DEFAULT:
        left_out = ", ".join(" ".join(map(str, case)) for case in GRID if case not in chosen)
        print(f"left out, {len(GRID) - len(chosen)} of {len(GRID)} cases (--all runs them): {left_out}")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="may be repeated")
    parser.add_argument("--data", type=Path, help="your rows instead of a case")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tune", choices=["full", "lora"], default="full")
    parser.add_argument("--dtype", choices=list(AGREE), default="float32")
    parser.add_argument("--order", choices=["examples", "families"], default="examples", help="for all contenders")
    parser.add_argument("--batch", type=int, default=8, help="examples per step")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="measured steps in a turn, after one that warms up")
    parser.add_argument(
        "--compare-steps", type=int, help="steps whose losses are compared [8 in float32, else those of a turn]"
    )
    parser.add_argument("--contenders", default="likely,plain,trl,trl:1", help="NAME:ROWS takes so many rows at once")
    parser.add_argument("--learning-rate", type=float, help="[1e-5 full, 2e-4 lora]")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peer-tokens",
        type=int,
        default=4096,
        help="padded tokens that a peer computes at once; more rows are taken in micro-batches",
    )
    parser.add_argument("--peer-checkpointing", action="store_true", help="TRL with its default, slower and smaller")
    parser.add_argument("--likely-flags", default="", help="more flags of `likely train`, as one word")
    parser.add_argument("--peers-python", default=str(HERE.parent / ".venv-trl" / "bin" / "python"))
    parser.add_argument("--all", action="store_true", help="every case, full and LoRA, both dtypes, batch 8 and 16")
    parser.add_argument("--table", action="store_true", help="only fill the table of docs/performance.md")
    return parser.parse_args()


def choose_cases(options: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    if options.all:
        return GRID
    own = [str(options.data)] if options.data else options.case
    return [(name, options.tune, options.dtype, options.batch) for name in own] if own else DEFAULT


def contenders_of(options: argparse.Namespace, batch_size: int) -> list[str]:
    """The names that were asked for, each one that can run with this batch."""
    named = [contender.strip() for contender in options.contenders.split(",")]
    for contender in named:
        name, _, rows = contender.partition(":")
        whole = not rows or (name != "likely" and rows.isdecimal() and int(rows) and batch_size % int(rows) == 0)
        if name not in NAMES or not whole:
            raise SystemExit(
                f"error: --contenders: {contender} is none of {', '.join(NAMES)}, or doesn't divide the batch"
            )
    return named


def run_case(case: tuple[str, str, str, int], options: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """The line of one case for results.jsonl."""
    name, tune, dtype, batch_size = case
    about = about_run(options.threads)
    compared = options.compare_steps or (COMPARED_STEPS if dtype == "float32" else 0)
    # The first turn is long enough for the comparison; later ones only measure.
    lengths = [max(options.steps + 1, compared), *[options.steps + 1] * (options.rounds - 1)]
    place = find_model(options.model)
    with tempfile.TemporaryDirectory(prefix="likely-bench-") as folder:
        data = options.data or data_file(name, Path(folder))
        families = options.order == "families"
        steps = steps_in_order(data, str(place.tokenizer), max(lengths), batch_size, options.seed, families=families)
        write_rows(steps, Path(folder) / "rows.jsonl")
        training = Training(
            model=str(place.weights),
            tokenizer=str(place.tokenizer),
            name=options.model,
            data=str(data),
            rows=str(Path(folder) / "rows.jsonl"),
            tune=tune,
            dtype=dtype,
            batch_size=batch_size,
            micro_batch=micro_batch(steps, options.peer_tokens),
            learning_rate=options.learning_rate or {"full": 1e-5, "lora": 2e-4}[tune],
            max_grad_norm=options.max_grad_norm,
            weight_decay=options.weight_decay,
            lora_rank=options.lora_rank,
            seed=options.seed,
            checkpointing=options.peer_checkpointing,
            likely_flags=f"--order {options.order} {options.likely_flags}",
        )
        shape, work = Shape.of(read_model_config(str(place.weights))), [work_of(step) for step in steps]
        rows, contexts = (
            round(statistics.mean(v)) for v in zip(*[(w.num_nodes, w.num_contexts) for w in work], strict=True)
        )
        rates = [matrix_rates(shape, min(rows, 2048), min(contexts, 2048), options.threads)]
        turns: dict[str, list[Outcome]] = {contender: [] for contender in contenders_of(options, batch_size)}
        for turn, length in enumerate(lengths, 1):
            for contender, outcomes in turns.items():
                outcomes.append(race(contender, training, length, pythons, options.threads))
                last = outcomes[-1]
                print(
                    f"{' '.join(map(str, case))}, round {turn}: {contender} {statistics.median(last.seconds):.2f} s"
                    f" a step, {last.peak_gb:.1f} GB, losses {' '.join(f'{loss:.4f}' for loss in last.losses)}",
                    flush=True,
                )
            rates.append(matrix_rates(shape, min(rows, 2048), min(contexts, 2048), options.threads))
    apart = largest_disagreement(turns)
    if apart > AGREE[dtype]:
        raise SystemExit(f"error: the losses differ by {apart:.2g} nats (limit {AGREE[dtype]}), so nothing is compared")
    return {
        "bench": "speed",
        "case": name,
        "setting": {"tune": tune, "dtype": dtype, "batch_size": batch_size, "model": options.model},
        "training": {k: v for k, v in asdict(training).items() if k not in {"data", "rows", "model", "tokenizer"}},
        **about,
        "matrix_gflops": median_rates(rates, dtype),
        "losses_apart": round(apart, 6),
        "compared_steps": max(lengths),
        "tokens_per_step": round(statistics.mean(sum(len(e.token_ids_T) for e in step) for step in steps), 1),
        "distinct_tokens_per_step": rows,
        "contenders": {contender: summary(outcomes, steps, work, shape, tune) for contender, outcomes in turns.items()},
    }


def work_of(step: Sequence[Example]) -> Work:
    """Of a step as one pack, however a contender cuts it."""
    return Work.of(build_packs(step, 1 << 30))


def summary(
    outcomes: Sequence[Outcome], steps: Sequence[Sequence[Example]], work: Sequence[Work], shape: Shape, tune: str
) -> dict[str, Any]:
    """Rates of every measured step of every turn. The first step warms up, so the second has ``seconds[0]``."""
    measured = [(i + 1, seconds) for outcome in outcomes for i, seconds in enumerate(outcome.seconds)]
    tokens = [sum(len(e.token_ids_T) for e in steps[i]) for i, _ in measured]
    return {
        "losses": [round(loss, 5) for loss in outcomes[0].losses],
        "seconds_per_step": [[round(s, 3) for s in outcome.seconds] for outcome in outcomes],
        "tokens_per_s": quartiles([n / s for n, (_, s) in zip(tokens, measured, strict=True)]),
        "distinct_tokens_per_s": quartiles([work[i].num_nodes / s for i, s in measured]),
        "needed_gflops": quartiles([step_flops(shape, work[i], tune) / s / 1e9 for i, s in measured]),
        "peak_gb": round(max(outcome.peak_gb for outcome in outcomes), 2),
        "startup_s": round(statistics.median(outcome.startup for outcome in outcomes), 2),
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [round(value, 1) for value in found]


def largest_disagreement(turns: dict[str, list[Outcome]]) -> float:
    """The largest difference between two turns' losses (nats) at the same step, whoever had them; infinite where one
    is not a number."""
    runs = [outcome.losses for outcomes in turns.values() for outcome in outcomes]
    if not all(math.isfinite(loss) for losses in runs for loss in losses):
        return math.inf
    return max(max(abs(a - b) for a, b in zip(x, y, strict=False)) for x in runs for y in runs)


def read_model_config(weights: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(weights).get_text_config()


def matrix_rates(shape: Shape, rows: int, contexts: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "matrix.py"), json.dumps(asdict(shape)), str(rows), str(contexts)]
    done = subprocess.run(command, env=environment(threads, "likely"), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def median_rates(rates: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """GFLOP/s in the dtype of the case, each the median over the run, with every measurement of the two totals."""
    found = [rate[dtype] for rate in rates]
    return {
        "own": statistics.median(rate["own"] for rate in found),
        "square": statistics.median(rate["square"] for rate in found),
        "products": {name: statistics.median(r["products"][name] for r in found) for name in found[0]["products"]},
        "all": [[rate["own"], rate["square"]] for rate in found],
    }


def startup_times(pythons: dict[str, str]) -> dict[str, float]:
    """Median seconds of three: importing the package, asking the program for help, importing TRL's trainer."""
    commands = {
        "import likely": [pythons["likely"], "-c", "import likely"],
        "likely --help": [pythons["likely"], "-m", "likely", "--help"],
        "import SFTTrainer": [pythons["peers"], "-c", "from trl import SFTTrainer"],
    }
    found = {}
    for name, command in commands.items():
        times = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run(command, env=environment(1, name.split()[-1]), check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        found[name] = round(statistics.median(times), 2)
    return found


def about_run(threads: int) -> dict[str, Any]:
    """Commit, versions, machine, and the load that others put on it before anything is measured."""
    import torch

    from likely import provenance

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", ":!/bench/results.jsonl", ":!/docs/performance.md")
    requirements = (HERE / "trl-requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(changed),
        "versions": {**provenance.versions(), **dict(line.split("==") for line in requirements if "trl==" in line)},
        "hardware": {
            "cpu": cpu_name(),
            "isa": str(torch.cpu.get_capabilities().get("cpu_name", "")) or torch.backends.cpu.get_cpu_capability(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
