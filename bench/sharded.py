"""Memory of loading a sharded model: a Llama of 1B parameters with random weights in bfloat16, read by some processes.

python bench/sharded.py [RANKS]    # anonymous memory of each process: what it owns at the end, and its peaks
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from likely.model.load import Tuning
from likely.training.parallel import joined
from likely.training.sharding import load_sharded, local

LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 16, 2048, 8192, 512, 128256  # Llama 3.2 1B; its head is the table
LAYER = HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * INNER + 2)


def write_model(folder: Path) -> None:
    """A file a layer, so that no process holds the model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=KEYS // 64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    places: dict[str, str] = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}-of-{LAYERS + 1:05d}.safetensors"
        save_file({k: 0.02 * torch.randn(s).to(torch.bfloat16) for k, s in shapes.items()}, folder / name)
        places.update(dict.fromkeys(shapes, name))

    write(1, {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for i in range(LAYERS):
        own = f"model.layers.{i}."
        sides = {"q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN)}
        shapes: dict[str, tuple[int, ...]] = {f"{own}self_attn.{k}_proj.weight": s for k, s in sides.items()}
        shapes |= {f"{own}mlp.{k}_proj.weight": (INNER, HIDDEN) for k in ("gate", "up")}
        shapes[f"{own}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{own}{k}_layernorm.weight": (HIDDEN,) for k in ("input", "post_attention")}
        write(i + 2, shapes)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class Peak:
    """The most anonymous memory of this process since :meth:`begin`, in bytes: files that are only mapped don't count,
    since the system may take their pages back."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> int:
        self.bytes = self.now()
        return self.bytes

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.now())
            time.sleep(0.002)


def rank(folder: str) -> None:
    peak = Peak()
    with joined() as ranks:
        before = peak.begin()
        loaded: dict[str, int] = {}

        def forward_begins(*given: Any, **more: Any) -> Any:
            loaded["peak"] = peak.bytes - before
            return connect(*given, **more)

        from likely.training import sharding

        connect, sharding.connect = sharding.connect, forward_begins
        started = time.perf_counter()
        model = load_sharded(folder, Tuning(), ranks, compute_dtype=torch.float32)
        seconds = time.perf_counter() - started
        shard = sum(4 * local(p).numel() for p in model.network.parameters())
        largest = 4 * max(LAYER, VOCABULARY * HIDDEN)
        told = {
            "shard_gb": shard / 1e9,
            "largest_layer_gb": largest / 1e9,
            "peak_of_loading_gb": loaded["peak"] / 1e9,
            "bound_gb": (1.2 * shard + largest) / 1e9,
            "peak_with_a_forward_gb": (peak.bytes - before) / 1e9,
            "seconds": seconds,
        }
        of_all = ranks.gather_json({key: round(value, 3) for key, value in told.items()})
        if ranks.first:
            sys.stdout.write(json.dumps({"bench": "sharded", "ranks": of_all, "load": os.getloadavg()[0]}) + "\n")


def main() -> None:
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        write_model(Path(folder))
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        own = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", folder],
                env={**os.environ, **own, "RANK": str(i), "LOCAL_RANK": str(i)},
            )
            for i in range(num)
        ]
        sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    rank(sys.argv[2]) if sys.argv[1:2] == ["--rank"] else main()
