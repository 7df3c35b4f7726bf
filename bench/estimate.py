"""The estimate of ``likely check`` beside a measured training of the embedded model.

Run as: ``python bench/estimate.py [--steps 4]``, on a machine that does nothing else. Prints and appends to
bench/results.jsonl, for each setting, seconds per step and peak memory, estimated and measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETTINGS = [
    ("lora", "float32", 8),
    ("full", "float32", 8),
    ("lora", "bfloat16", 8),
    ("full", "bfloat16", 8),
    ("lora", "bfloat16", 3),
    ("qlora", "float32", 8),
    ("qlora", "bfloat16", 3),
]


def run(arguments: list[str]) -> tuple[str, float]:
    """Output and peak resident memory (GB) of one run of the program."""
    command = [sys.executable, "-m", "likely", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        text = process.stdout.read() if process.stdout else ""
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return text, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    data = str(HERE / "data" / "gsm8k_200.jsonl")
    for tune, dtype, batch_size in SETTINGS:
        shared = ["--model", options.model, "--tune", tune, "--dtype", dtype, "--batch-size", str(batch_size)]
        shared += ["--steps", str(options.steps)]
        cost: dict[str, Any] = json.loads(run(["check", data, "--json", *shared])[0])["cost"]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            _, peak = run(["train", "--data", data, "--output", str(output), *shared])
            lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [line for line in map(json.loads, lines) if "distinct_tokens" in line]
        seconds = statistics.mean(step["seconds"] for step in steps[1:])  # the first one warms up
        after = json.loads(run(["check", data, "--json", *shared])[0])["cost"]["estimate"]
        guessed = statistics.mean([cost["estimate"]["seconds_per_step"], after["seconds_per_step"]])
        result = {
            "bench": "estimate",
            "setting": [tune, dtype, batch_size],
            "seconds_per_step": {"estimated": round(guessed, 2), "measured": round(seconds, 2)},
            "peak_gb": {"estimated": round(cost["estimate"]["peak_gb"], 2), "measured": round(peak, 2)},
            "time_off": round(guessed / seconds - 1, 2),
            "memory_off": round(cost["estimate"]["peak_gb"] / peak - 1, 2),
            "matrix_gflops": [round(cost["estimate"]["matrix_gflops"]), round(after["matrix_gflops"])],
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "load": os.getloadavg()[0],
        }
        print(json.dumps(result), flush=True)
        with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
