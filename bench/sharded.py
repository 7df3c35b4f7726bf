"""Memory of a sharded model: a Llama of 1B parameters with random weights in bfloat16, read, trained for one step of
full tuning and saved by some processes.

python bench/sharded.py [RANKS [LAYERS HIDDEN]]    # anonymous memory of each process: what it owns, and its peaks
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
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from likely.data.packing import idle_pack
from likely.model.load import Tuning
from likely.training.optim import build_optimizer
from likely.training.parallel import joined
from likely.training.sharded_files import save_model
from likely.training.sharding import load_sharded, local
from likely.training.step import apply_gradient, compute_gradient

LAYERS, HIDDEN, VOCABULARY = 16, 2048, 128256  # Llama 3.2 1B; its head is the table


def write_model(folder: Path, layers: int, hidden: int) -> None:
    """A file a layer, so that no process holds the model."""
    inner, keys = 4 * hidden, hidden // 4
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=keys // 64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    places: dict[str, str] = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file({k: 0.02 * torch.randn(s).to(torch.bfloat16) for k, s in shapes.items()}, folder / name)
        places.update(dict.fromkeys(shapes, name))

    write(1, {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)})
    for i in range(layers):
        own = f"model.layers.{i}."
        sides = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
        shapes: dict[str, tuple[int, ...]] = {f"{own}self_attn.{k}_proj.weight": s for k, s in sides.items()}
        shapes |= {f"{own}mlp.{k}_proj.weight": (inner, hidden) for k in ("gate", "up")}
        shapes[f"{own}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{own}{k}_layernorm.weight": (hidden,) for k in ("input", "post_attention")}
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
        peaks: dict[str, int] = {}

        def note(name: str) -> None:
            peaks[name] = peak.bytes - before
            peak.begin()

        def forward_begins(*given: Any, **more: Any) -> Any:
            note("peak_of_loading_gb")
            return connect(*given, **more)

        from likely.training import sharding

        connect, sharding.connect = sharding.connect, forward_begins
        started = time.perf_counter()
        model = load_sharded(folder, Tuning(), ranks, compute_dtype=torch.float32)
        note("peak_of_a_forward_gb")
        optimizer = build_optimizer(model.network.parameters(), 0.0)
        compute_gradient(model, [idle_pack()], optimizer, 1.0, ranks=ranks, num_tokens=1.0)
        note("peak_of_a_gradient_gb")
        apply_gradient(optimizer)
        note("peak_of_an_update_gb")
        save_model(model, SimpleNamespace(save_pretrained=lambda _: None), Path(folder) / "saved", ranks)
        note("peak_of_saving_gb")
        shard = sum(4 * local(p).numel() for p in model.network.parameters())
        sizes = model.network.config
        layer = sum(p.numel() for p in model.network.model.layers[0].parameters())
        largest = 4 * max(layer, sizes.vocab_size * sizes.hidden_size)
        told = {"shard_gb": shard, "largest_layer_gb": largest, "bound_gb": 1.2 * shard + largest, **peaks}
        of_all = ranks.gather_json({key: round(value / 1e9, 3) for key, value in told.items()})
        if ranks.first:
            facts = {"ranks": of_all, "seconds": round(time.perf_counter() - started), "load": os.getloadavg()[0]}
            sys.stdout.write(json.dumps({"bench": "sharded", **facts}) + "\n")


def main() -> None:
    num, layers, hidden = [*map(int, sys.argv[1:]), *(2, LAYERS, HIDDEN)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        write_model(Path(folder), layers, hidden)
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
