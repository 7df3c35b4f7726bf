"""What a checkpoint costs beside its bytes: ``save_checkpoint`` against a plain write and sync of as many bytes.

    python bench/save.py [--model M] [--tune full|lora] [--rounds 5]

Both are timed in turn, on the same disk, and the ratio of their medians is printed; an absolute time says something
about the machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from likely.data.render import load_tokenizer
from likely.model.load import Tuning, load_for_training, save_model
from likely.model.place import find_model
from likely.training.checkpoint import State, save_checkpoint
from likely.training.optim import build_optimizer


def write_plainly(folder: Path, files: list[Path]) -> float:
    """Seconds to write the content of some files elsewhere and sync it; reading them is not counted."""
    contents = [path.read_bytes() for path in files]
    folder.mkdir()
    started = time.perf_counter()
    for i, content in enumerate(contents):
        with (folder / str(i)).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tune", choices=["full", "lora"], default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure [the temporary one]")
    asked = parser.parse_args()
    tuning = Tuning(lora_rank=16 if asked.tune == "lora" else None)
    model = load_for_training(asked.model, tuning, compute_dtype=torch.float32)
    tokenizer = load_tokenizer(find_model(asked.model).tokenizer)
    optimizer = build_optimizer(model.network.parameters(), 0.0)
    for parameter in model.network.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    saving, plain, size = [], [], 0
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        for step in range(asked.rounds + 1):
            started = time.perf_counter()
            saved = save_checkpoint(
                folder, State(step, 0), model.network, optimizer, lambda p: save_model(model, tokenizer, p), {}
            )
            saving.append(time.perf_counter() - started)
            files = [p for p in saved.rglob("*") if p.is_file()]
            size = sum(p.stat().st_size for p in files)
            plain.append(write_plainly(folder / "plain", files))
            shutil.rmtree(saved)
    # The first round warms the disk up.
    ours, theirs = statistics.median(saving[1:]), statistics.median(plain[1:])
    print(
        json.dumps(
            {
                "tune": asked.tune,
                "megabytes": round(size / 1e6),
                "save_seconds": [round(s, 3) for s in sorted(saving[1:])],
                "plain_seconds": [round(s, 3) for s in sorted(plain[1:])],
                "ratio": round(ours / theirs, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
