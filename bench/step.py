"""Whole training steps of likely beside a plain padded loop over the same model, rows, batch, dtype and optimizer.

Run as: ``make bench`` or ``python bench/step.py [--steps 4] [--dtype bfloat16] [--shared-prefix]``

The two take turns, step by step, so that a machine whose speed drifts slows both. The losses must agree. Prints the
machine's matrix rate, tokens/s (the examples' own tokens) as median with spread, and appends to bench/results.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from likely import provenance
from likely.data.dataset import examples_of_step, load_dataset
from likely.data.packing import build_packs
from likely.data.render import Renderer, load_tokenizer
from likely.model.load import Tuning, load_for_training
from likely.model.place import find_model
from likely.training.optim import build_optimizer, set_learning_rate
from likely.training.step import train_step

HERE = Path(__file__).parent
LEARNING_RATE = 1e-5


def matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of one large product, the best of five: the rate no step can beat."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times[1:]) / 1e9


def plain_step(network: Any, examples: list[Any], optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> float:
    """What a careful person writes first: pad to the longest row, all logits, cross-entropy, one mean over tokens."""
    width = max(len(e.token_ids_T) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.token_ids_T)
        ids[row, :length] = torch.from_numpy(example.token_ids_T)
        mask[row, :length] = 1
        supervised = torch.from_numpy(example.weights_T > 0)
        labels[row, :length][supervised] = ids[row, :length][supervised]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def with_prefix(path: Path, num_shots: int, folder: Path) -> Path:
    """The same rows behind one system prompt that shows the first ones as examples."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    shots = "\n\n".join(f"Question: {q['content']}\nAnswer: {a['content']}" for q, a in rows[:num_shots])
    out = folder / "prefixed.jsonl"
    lines = [json.dumps({"messages": [{"role": "system", "content": shots}, *row]}) for row in rows[num_shots:]]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shared-prefix", action="store_true", help="rows behind an 8-example system prompt")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    place = find_model(options.model)
    data = HERE / "data" / "gsm8k_200.jsonl"
    if options.shared_prefix:
        data = with_prefix(data, 8, Path(tempfile.mkdtemp()))
    examples = load_dataset(str(data), Renderer(load_tokenizer(place.tokenizer)), 8192).examples
    model = load_for_training(options.model, Tuning(), compute_dtype=dtype)
    plain = copy.deepcopy(model.network)
    plain.set_attn_implementation("sdpa")
    optimizers = [build_optimizer(network.parameters(), 0.0) for network in (model.network, plain)]
    for optimizer in optimizers:
        set_learning_rate(optimizer, LEARNING_RATE)
    rates: dict[str, list[float]] = {"likely": [], "plain": []}
    for step in range(1, options.steps + 2):  # the first one warms up
        chosen = [examples[i] for i in examples_of_step(step, len(examples), options.batch_size, 0)]
        tokens = sum(len(e.token_ids_T) for e in chosen)
        started = time.perf_counter()
        packs = build_packs(chosen, 2048 if not options.shared_prefix else 4096)
        loss, _ = train_step(model, packs, optimizers[0], 1.0)
        middle = time.perf_counter()
        plain_loss = plain_step(plain, chosen, optimizers[1], dtype)
        seconds = (middle - started, time.perf_counter() - middle)
        distinct = sum(pack.num_nodes for pack in packs)
        print(
            f"step {step}: {tokens} tokens ({distinct} distinct)  likely {loss:.4f} {tokens / seconds[0]:.0f} tokens/s"
            f"  plain {plain_loss:.4f} {tokens / seconds[1]:.0f} tokens/s"
        )
        if abs(loss - plain_loss) > (2e-3 if dtype == torch.float32 else 5e-2):
            raise SystemExit("the losses must agree, or the comparison means nothing")
        if step > 1:
            rates["likely"].append(tokens / seconds[0])
            rates["plain"].append(tokens / seconds[1])
    ratios = [a / b for a, b in zip(rates["likely"], rates["plain"], strict=True)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    result = {
        "commit": commit.stdout.strip(),
        "setting": {**vars(options), "tune": "full"},
        "matrix_gflops": round(matrix_rate(dtype)),
        **{f"{k}_tokens_per_s": [round(f(v)) for f in (min, statistics.median, max)] for k, v in rates.items()},
        "ratio": [round(f(ratios), 2) for f in (min, statistics.median, max)],
        "peak_gb_of_both": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        "versions": provenance.versions(),
        "device": provenance.device_name(model.device),
    }
    print(json.dumps(result, indent=2))
    with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
