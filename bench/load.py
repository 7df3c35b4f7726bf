"""What loading data costs: into the cache, by all processors, and out of it again.

Run as: ``python bench/load.py [--rows 100000] [--repeat 20]``

Rows of about 200 tokens are rendered into an entry of the cache. Then the entry's arrays are written ``--repeat`` times
over to an entry of its own, and a fresh process opens that one, as a training does at its start, and takes the examples
of some steps. Prints one JSON object and appends it to bench/results.jsonl. Peak memory is that of a process and its
workers, without pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from check import write_rows
from processes import memory_mb

HERE = Path(__file__).parent
LOAD = """
import json, sys, time
from likely.data.cache import load_kept
from likely.data.dataset import Request
from likely.data.order import Order
from likely.data.render import Renderer, load_tokenizer
from likely.model.place import find_model
renderer = Renderer(load_tokenizer(find_model(sys.argv[1]).tokenizer))
started = time.perf_counter()
dataset = load_kept(Request(sys.argv[2], renderer, 8192))
loaded = time.perf_counter() - started
print(json.dumps({"seconds": round(loaded, 2), "rows": len(dataset.conversations)}))
"""
OPEN = """
import json, sys, time
from pathlib import Path
from likely.data import cache
from likely.data.order import Order
from likely.data.mixture import Part
started = time.perf_counter()
dataset = cache._open(Path(sys.argv[1]), "d.jsonl", [Part("d.jsonl")])
opened = time.perf_counter() - started
counts = dataset.tokens_per_role(), int(dataset.table.length_N.max())
counted = time.perf_counter() - started
examples, steps = dataset.examples, []
order = Order(len(examples), 8, 0)
for step in range(1, 51):
    before = time.perf_counter()
    chosen = [examples[i] for i in order.of_step(step)]
    steps.append(time.perf_counter() - before)
print(json.dumps({"rows": len(dataset.conversations), "opened_s": round(opened, 2), "counted_s": round(counted, 2),
    "first_step_ms": round(1e3 * steps[0], 2), "step_ms": round(1e3 * sorted(steps)[25], 3)}))
"""


def run(script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints, with its peak memory."""
    peak = 0.0
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, memory_mb(process.pid, "RssAnon"))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        text = process.communicate()[0]
        watcher.join()
    return {**json.loads(text), "peak_mb": round(peak)}


def repeat(entry: Path, times: int) -> Path:
    """An entry with the columns of another, so many times over."""
    import numpy as np

    from likely import manifest
    from likely.data import cache

    folder = entry.with_name("f" * 64)
    folder.mkdir()
    columns = {file.stem: np.lib.format.open_memmap(file, mode="r") for file in entry.glob("*.npy")}
    with cache._Files(folder, 1 << 60) as files:
        for _ in range(times):
            files.add(columns)
    (folder / cache.FACTS).write_bytes((entry / cache.FACTS).read_bytes())
    with manifest.Seal(folder) as seal:
        seal.close({"kind": "data", "key": folder.name})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    from likely.model.place import find_model

    model = find_model(options.model).weights  # kept in the usual cache
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIKELY_CACHE"] = folder
        data = Path(folder) / "rows.jsonl"
        write_rows(data, options.rows)
        first, second = (run(LOAD, str(model), str(data)) for _ in range(2))
        (entry,) = (Path(folder) / "data").iterdir()
        large = repeat(entry, options.repeat)
        result = {
            "bench": "load",
            "data_mb": round(data.stat().st_size / 1e6),
            "entry_mb": round(sum(f.stat().st_size for f in entry.iterdir()) / 1e6),
            "first": first,
            "second": second,
            "repeated": {**run(OPEN, str(large)), "mb": round(sum(f.stat().st_size for f in large.iterdir()) / 1e6)},
            "load": os.getloadavg()[0],
        }
    print(json.dumps(result, indent=2))
    with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
